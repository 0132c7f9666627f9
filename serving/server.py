"""What Ray Serve makes a replica of: the models and the gate, behind HTTP and gRPC."""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from serving import answers, device, overview
from serving.answers import Answer
from serving.fleet import Fleet, Report
from serving.gate import Asked, Gate
from serving.replica import Models
from serving.routes import application
from serving.rpc import Rpcs
from serving.settings import Running, Settings

log = logging.getLogger("ray.serve")


class Server(Rpcs):
    """What Ray Serve makes a replica of."""

    def __init__(self, settings: Settings, alone: str | None) -> None:
        """Loads the models.

        Args:
            settings: What is served.
            alone: The model that this replica holds alone; None for those that share.
        """
        import ray
        from ray import serve

        here = serve.get_replica_context().replica_id.unique_id
        self.models = Models(settings, alone=alone, device=device.given())
        self.gate = Gate(settings, Fleet(here, ray.get_runtime_context().get_node_id()))
        loop = asyncio.get_running_loop()
        self._watch = [
            loop.create_task(self.models.keep_fresh()),
            loop.create_task(self.gate.keep_fresh()),
        ]

    async def reconfigure(self, told: dict[str, Any]) -> None:
        """Takes other settings on; where that fails, /healthz says why and the former ones hold.

        Called by Ray Serve, which would end a replica that raises here.
        """
        try:
            running = Running.from_dict(told)
            settings = running.settings
            if settings != self.models.settings:
                ready = await asyncio.to_thread(Gate.opened, settings)
                await asyncio.to_thread(self.models.adapt, settings)
                self.gate.adapt(settings, *ready)
            self.gate.fleet.several = self.gate.rates.shared = running.total > 1
            self.models.not_applied = None
        except (ValueError, OSError) as error:
            log.error(f"the settings stay as they were: {error}")
            self.models.not_applied = f"{type(error).__name__}: {error}"

    async def report(self) -> Report:
        """What another replica, or whoever applies settings, is told of this one."""
        return overview.report(self.models, self.gate)

    async def ask(
        self, question: str, asked: Asked, said: Sequence[Any], how: Mapping[str, Any]
    ) -> Answer:
        """The answer to what another replica let in and puts on record.

        Args:
            question: One of `answers.QUESTIONS`.
            asked: The request.
            said: The question's further arguments.
            how: Those by name.
        """
        try:
            return await answers.QUESTIONS[question](self.models, self.gate, asked, *said, **how)
        except Exception as error:
            return answers.refused(error, asked)

    def __serve_build_asgi_app__(self) -> Any:
        return application(self.models, self.gate)
