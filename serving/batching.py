"""Requests that arrive while a model is busy meet in its next call; a row's number is the same."""

import asyncio
import time
from collections.abc import Callable

import numpy as np

from serving import traces

# Turns of the event loop without a further request that end a wait for more of them.
IDLE_TURNS = 6


class Batcher:
    """The queue in front of a model; a request alone waits for nobody.

    `calls` and `rows` count what was asked of the model.

    Args:
        predict: (n, p) float32 to (n,) float64, a row's number the same alone as among others.
        max_rows: Rows of a call, a single larger request aside.
        inline_rows: Calls of up to so many rows run in the event loop, larger ones in a thread: for
            a quick model, handing a call to a thread and back costs more than the call.
    """

    def __init__(
        self,
        predict: Callable[[np.ndarray], np.ndarray],
        *,
        max_rows: int = 4_096,
        inline_rows: int = 0,
    ) -> None:
        self._predict = predict
        self._max_rows = max_rows
        self._inline_rows = inline_rows
        self._waiting: list[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = []
        self._work: asyncio.Task[None] | None = None
        # Whether the last call was of several requests.
        self._shared = False
        self.calls = 0
        self.rows = 0
        # When the last call began and ended, `time.time_ns`.
        self._called = (0, 0)

    @property
    def waiting(self) -> int:
        """Requests that wait for their call."""
        return len(self._waiting)

    async def score(self, x: np.ndarray) -> np.ndarray:
        """The scores of one request's rows.

        Args:
            x: (n, p) float32, n at least 1.

        Returns:
            (n,) float64.
        """
        future: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        self._waiting.append((x, future))
        if self._work is None:
            self._work = asyncio.create_task(self._drain())
        with traces.step("batch"):
            scores = await future
        # Its own call: those answered wake before the next call is made.
        traces.took("model", *self._called)
        return scores

    async def _gather(self) -> None:
        """Lets in those who are at the door: a turn of the event loop costs less than a call.

        Where the last call was shared, more are on their way: then a few turns in which nobody
        comes end it, else the first.
        """
        there, idle = 0, 0
        while len(self._waiting) < self._max_rows and idle < (IDLE_TURNS if self._shared else 1):
            idle = 0 if len(self._waiting) > there else idle + 1
            there = len(self._waiting)
            await asyncio.sleep(0)

    async def _drain(self) -> None:
        while self._waiting:
            await self._gather()
            # Whose time is over, or whose client went away, isn't worked for.
            self._waiting = [each for each in self._waiting if not each[1].done()]
            if not self._waiting:
                break
            rows = taken = 0
            for x, _ in self._waiting:
                if taken and rows + len(x) > self._max_rows:
                    break
                rows += len(x)
                taken += 1
            batch, self._waiting = self._waiting[:taken], self._waiting[taken:]
            self._shared = taken > 1
            self.calls += 1
            self.rows += rows
            x = batch[0][0] if taken == 1 else np.concatenate([x for x, _ in batch])
            began = time.time_ns()
            try:
                if rows <= self._inline_rows:
                    scores = self._predict(x)
                else:
                    scores = await asyncio.to_thread(self._predict, x)
                if scores.shape != (rows,):
                    raise RuntimeError(f"the model gave shape {scores.shape} for {rows} rows")
            except Exception as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            self._called = (began, time.time_ns())
            good = np.isfinite(scores).all()
            at = 0
            for x, future in batch:
                part = scores[at : at + len(x)]
                at += len(x)
                # A client that went away has cancelled its own.
                if future.done():
                    continue
                if good or np.isfinite(part).all():
                    future.set_result(part)
                else:
                    future.set_exception(RuntimeError(f"the model gave {part}, not numbers"))
            # Those answered go first, and bring the next ones.
            await asyncio.sleep(0)
        self._work = None
