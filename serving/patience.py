"""A limit on how long many at once are waited for, by one timer."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Patience:
    """Ends what takes longer than `seconds`, as `asyncio.timeout` does with a timer for each.

    Where thousands a second are waited for, of which almost all are there already, that timer is
    most of the wait. The limit is the same for all, so who came first is the first to go.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        # In the order of their coming: until when.
        self._waiting: dict[asyncio.Task[object], float] = {}
        self._ended: set[asyncio.Task[object]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def wait(self, work: Awaitable[T]) -> T:
        """What the work gives.

        Raises:
            TimeoutError: It takes too long; it was cancelled.
        """
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        until = self._waiting[task] = loop.time() + self.seconds
        if self._timer is None:
            self._timer = loop.call_at(until, self._end, loop)
        before = task.cancelling()
        try:
            return await work
        except asyncio.CancelledError:
            # Whoever else cancels the task has precedence.
            if task in self._ended and task.uncancel() <= before:
                raise TimeoutError from None
            raise
        finally:
            self._waiting.pop(task, None)
            self._ended.discard(task)

    def _end(self, loop: asyncio.AbstractEventLoop) -> None:
        """Cancels those whose time is over, and sets the timer for the next."""
        self._timer = None
        for task, until in list(self._waiting.items()):
            if until > loop.time():
                self._timer = loop.call_at(until, self._end, loop)
                return
            del self._waiting[task]
            self._ended.add(task)
            task.cancel()
