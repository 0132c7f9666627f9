"""Many are waited for by one timer; each ends at its own time, and others' cancellations hold."""

import asyncio

import pytest

from serving.patience import Patience

NEVER = 30.0


def test_each_ends_at_its_own_time_and_what_is_quick_gives_its_result() -> None:
    async def waits() -> None:
        patience, loop = Patience(0.2), asyncio.get_running_loop()

        async def ended_after(delay: float) -> float:
            await asyncio.sleep(delay)
            began = loop.time()
            with pytest.raises(TimeoutError):
                await patience.wait(asyncio.sleep(NEVER))
            return loop.time() - began

        delays = (0.0, 0.05, 0.1, 0.3)
        quick, *taken = await asyncio.gather(
            patience.wait(asyncio.sleep(0.01, "result")), *map(ended_after, delays)
        )
        assert quick == "result"
        # Never before its time, and never as late as what it waited for.
        assert all(0.19 <= each < NEVER for each in taken)

    asyncio.run(waits())


def test_who_else_cancels_has_precedence() -> None:
    async def waits() -> None:
        patience = Patience(NEVER)
        task = asyncio.create_task(patience.wait(asyncio.sleep(NEVER)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await patience.wait(asyncio.sleep(NEVER))

    asyncio.run(waits())
