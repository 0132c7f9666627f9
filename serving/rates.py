"""How often somebody may ask: counted in this process, or for several replicas in one actor."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

# Of the actor that counts for all replicas of a cluster.
NAMESPACE, NAME = "liftyard", "rates"

# Who asks, requests a second, and how many at once.
Asking = tuple[str, float, int]


class RatesError(RuntimeError):
    """The actor that counts can't be asked at the moment."""


class Buckets:
    """A bucket of requests for each who asks, filled at their rate."""

    def __init__(self) -> None:
        # Per asker: requests left, and when that was.
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, asking: Sequence[Asking]) -> list[float]:
        """For each the seconds to wait: 0 lets the request in, and counts it."""
        return [self._take(*each) for each in asking]

    def _take(self, who: str, per_s: float, burst: int) -> float:
        now = time.monotonic()
        left, then = self._left.get(who, (float(burst), now))
        left = min(float(burst), left + (now - then) * per_s)
        if left < 1:
            self._left[who] = (left, now)
            return (1 - left) / per_s
        self._left[who] = (left - 1, now)
        return 0.0


class Rates:
    """Counts for one replica by itself, until it shares the count with others."""

    def __init__(self) -> None:
        self._own = Buckets()
        self._actor: Any = None
        self.shared = False
        self._waiting: list[tuple[Asking, asyncio.Future[float]]] = []
        self._work: asyncio.Task[None] | None = None

    async def take(self, who: str, per_s: float, burst: int) -> float:
        """Seconds to wait; 0 lets the request in, and counts it.

        Raises:
            RatesError: The count is shared, and the actor that has it is away.
        """
        if not self.shared:
            return self._own.take([(who, per_s, burst)])[0]
        taken: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.append(((who, per_s, burst), taken))
        if self._work is None:
            self._work = asyncio.create_task(self._ask())
        return await taken

    async def _ask(self) -> None:
        """One call is on its way at a time; those who come meanwhile go in the next."""
        from ray.exceptions import RayError

        while self._waiting:
            together, self._waiting = self._waiting, []
            failed: RayError | None = None
            waits: list[float] = []
            try:
                if self._actor is None:
                    self._actor = await asyncio.to_thread(_actor)
                waits = await self._actor.take.remote([asking for asking, _ in together])
            except RayError as error:
                # By its name another is found, or made.
                self._actor, failed = None, error
            for at, (_, taken) in enumerate(together):
                # A client that went away has cancelled its own.
                if taken.done():
                    continue
                if failed is None:
                    taken.set_result(waits[at])
                else:
                    taken.set_exception(RatesError(f"rates can't be counted: {failed}"))
        self._work = None


def _actor() -> Any:
    """The actor that counts for all; made by whoever asks first."""
    import ray

    return (
        ray.remote(Buckets)
        .options(
            name=NAME,
            namespace=NAMESPACE,
            get_if_exists=True,
            # Not with the replica that made it.
            lifetime="detached",
            max_restarts=-1,
            num_cpus=0,
        )
        .remote()
    )


def end() -> None:
    """Ends the actor on the connected cluster; where there is none, nothing happens."""
    import ray

    try:
        ray.kill(ray.get_actor(NAME, namespace=NAMESPACE))
    except ValueError:
        return
