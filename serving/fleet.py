"""All replicas, as one of them sees them: asked for what they tell, or to answer for a model.

A model with replicas of its own is a Ray Serve application under `/v1/models/NAME`, to which
HAProxy hands what comes by that path. What comes another way (gRPC, GraphQL, a customer's page, an
alias) comes to the replicas that share, and is handed on by a deployment handle.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from serving.metrics import Figures
from serving.settings import application

if TYPE_CHECKING:
    from serving.gate import Asked

# What Ray Serve names the class in `serving.server`.
DEPLOYMENT = "Server"

# Seconds that replicas have to tell of themselves.
TELL_S = 5.0

# A replica that goes while it is asked is no reason not to ask another; nothing that is asked here
# changes anything.
TRIES = 3

log = logging.getLogger("ray.serve")


class Busy(RuntimeError):
    """The model's replicas have no room for a further request."""


class Away(RuntimeError):
    """The model's replicas can't be reached."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a replica tells of itself.

    Attributes:
        replica: Its id in Ray Serve.
        alone: The model that it holds alone; None holds those that share.
        node: The id of its node in Ray.
        device: Of its own: "cpu" or "cuda", and why.
        health: As `/healthz` tells it.
        cards: As `/v1/models` tells them.
        figures: For Prometheus.
    """

    replica: str
    alone: str | None
    node: str
    device: str
    health: Mapping[str, Any]
    cards: Mapping[str, Any]
    figures: Figures

    def where(self) -> dict[str, Any]:
        """What runs where, as JSON has it."""
        return {
            "replica": self.replica,
            "alone": self.alone,
            "node": self.node,
            "device": self.device,
            "models": self.health["models"],
        }


class Fleet:
    """Handles to the applications of a cluster, and which replica of it this is.

    `several` says whether there are others; only then is anything here asked of Ray.
    """

    def __init__(self, replica: str = "", node: str = "") -> None:
        self.replica, self.node = replica, node
        self.several = False
        self._handles: dict[str | None, Any] = {}
        self._reporting: asyncio.Task[list[Report]] | None = None

    async def reports(self, alone: Iterable[str]) -> list[Report]:
        """What each replica tells, of those that share and of those of the models named.

        Those that don't answer in time aren't there. Who comes while replicas are asked gets the
        same reports: `/healthz` is open to all, and costs each replica a call.
        """
        if self._reporting is None or self._reporting.done():
            self._reporting = asyncio.create_task(self._report(None, *alone))
        return await asyncio.shield(self._reporting)

    async def _report(self, *models: str | None) -> list[Report]:
        told = await asyncio.gather(*(self._told(model) for model in models))
        return [report for reports in told for report in reports]

    async def _told(self, model: str | None) -> list[Report]:
        try:
            asked = (await self._handle(model)).broadcast("report")
            # One that has just gone has an error in place of its report.
            told = await asked.results_async(timeout_s=TELL_S, return_exceptions=True)
        except Exception as error:
            # Whatever Ray raises, the others' reports are asked for.
            log.warning(f"no reports of {application(model)}: {error!r}")
            return []
        return [each for each in told if isinstance(each, Report)]

    async def ask(
        self,
        question: str,
        asked: "Asked",
        said: Sequence[Any],
        how: Mapping[str, Any],
    ) -> Any:
        """The `answers.Answer` of the replicas of the model that is asked about.

        Args:
            question: The name of a function in `serving.answers`.
            asked: The request, which has been let in.
            said: Further arguments.
            how: Further arguments, by name.

        Raises:
            Busy: They have no room.
            Away: None of them can be reached.
        """
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

        handle = await self._handle(asked.model)
        for left in reversed(range(TRIES)):
            response = handle.ask.remote(question, asked, said, how)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except BackPressureError as error:
                raise Busy(f"too many requests wait for model {asked.model!r}") from error
            except (RayActorError, DeploymentUnavailableError) as error:
                if not left:
                    raise Away(f"no replica of model {asked.model!r} answers") from error
        raise AssertionError("the last try returns or raises")

    async def _handle(self, model: str | None) -> Any:
        if model not in self._handles:
            from ray import serve as engine

            self._handles[model] = engine.get_deployment_handle(
                DEPLOYMENT, app_name=application(model), _check_exists=False
            )
        return self._handles[model]
