"""What Ray Serve makes a replica of: the models and the gate, behind HTTP and gRPC."""

import asyncio
import logging
from typing import Any

from serving.gate import Gate
from serving.replica import Models
from serving.routes import application
from serving.rpc import Rpcs
from serving.settings import Settings

log = logging.getLogger("ray.serve")


class Server(Rpcs):
    """What Ray Serve makes a replica of."""

    def __init__(self, settings: Settings) -> None:
        self.models = Models(settings)
        self.gate = Gate(settings)
        loop = asyncio.get_running_loop()
        self._watch = [
            loop.create_task(self.models.keep_fresh()),
            loop.create_task(self.gate.keep_fresh()),
        ]

    async def reconfigure(self, running: dict[str, Any]) -> None:
        """Takes other settings on; where that fails, /healthz says why and the former ones hold.

        Called by Ray Serve, which would end a replica that raises here.
        """
        try:
            settings = Settings.from_dict(running["settings"])
            if settings != self.models.settings:
                ready = await asyncio.to_thread(Gate.opened, settings)
                await asyncio.to_thread(self.models.adapt, settings)
                self.gate.adapt(settings, *ready)
            self.models.not_applied = None
        except (ValueError, OSError) as error:
            log.error(f"the settings stay as they were: {error}")
            self.models.not_applied = f"{type(error).__name__}: {error}"

    def __serve_build_asgi_app__(self) -> Any:
        return application(self.models, self.gate)
