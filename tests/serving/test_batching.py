"""The micro-batcher: who meets whom in a call, and what each gets."""

import asyncio
import threading

import numpy as np
import pytest

from serving.batching import Batcher


def test_requests_that_come_while_a_model_is_busy_meet_in_one_call() -> None:
    free = threading.Event()
    calls: list[int] = []

    def predict(x: np.ndarray) -> np.ndarray:
        calls.append(len(x))
        free.wait(30)
        return x[:, 0].astype(np.float64)

    async def ask() -> list[np.ndarray]:
        batcher = Batcher(predict, max_rows=20)
        first = asyncio.create_task(batcher.score(rows(0)))
        while not calls:
            await asyncio.sleep(0.001)
        later = [asyncio.create_task(batcher.score(rows(at))) for at in range(1, 31)]
        await asyncio.sleep(0)
        later[4].cancel()
        free.set()
        answers = await asyncio.gather(first, *later, return_exceptions=True)
        assert isinstance(answers.pop(5), asyncio.CancelledError)
        return [answer for answer in answers if isinstance(answer, np.ndarray)]

    answers = asyncio.run(ask())
    # Nor is a row scored that nobody waits for any more.
    assert calls == [1, 20, 9]
    assert [float(answer[0]) for answer in answers] == [float(at) for at in range(31) if at != 5]


@pytest.mark.parametrize("inline_rows", [0, 64])
def test_each_request_gets_its_own_rows(inline_rows: int) -> None:
    threads: set[int] = set()

    def predict(x: np.ndarray) -> np.ndarray:
        threads.add(threading.get_ident())
        return x.sum(axis=1).astype(np.float64)

    async def ask() -> list[list[float]]:
        batcher = Batcher(predict, inline_rows=inline_rows)
        sizes = ((1, 2), (3,), (4, 5, 6))
        answers = await asyncio.gather(*(batcher.score(rows(*each)) for each in sizes))
        return [answer.tolist() for answer in answers]

    assert asyncio.run(ask()) == [[1, 2], [3], [4, 5, 6]]
    assert (threading.get_ident() in threads) == (inline_rows > 0)


def test_a_call_that_fails_is_told_to_all_in_it_and_the_next_goes_on() -> None:
    def predict(x: np.ndarray) -> np.ndarray:
        if np.isnan(x).any():
            raise ArithmeticError("no")
        return x[:, 0].astype(np.float64)

    async def ask() -> None:
        batcher = Batcher(predict)
        answers = await asyncio.gather(
            batcher.score(rows(np.nan)), batcher.score(rows(1)), return_exceptions=True
        )
        assert [type(answer) for answer in answers] == [ArithmeticError, ArithmeticError]
        assert (await batcher.score(rows(2))).tolist() == [2.0]

    asyncio.run(ask())


def test_a_row_without_a_number_fails_alone() -> None:
    async def ask() -> None:
        batcher = Batcher(lambda x: x[:, 0].astype(np.float64))
        bad, good = await asyncio.gather(
            batcher.score(rows(np.nan)), batcher.score(rows(1)), return_exceptions=True
        )
        assert isinstance(bad, RuntimeError) and good.tolist() == [1.0]

    asyncio.run(ask())


def rows(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None]
