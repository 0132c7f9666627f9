"""The Dask lease on a real embedded Ray of 3 CPUs."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from cluster.dask_lease import Lease, lease, map_partitions
from cluster.dask_placement import LeaseError
from cluster.session import connect


@pytest.fixture(scope="module", autouse=True)
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path_factory.mktemp("ray") / "token"))
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        with connect(cpus=3):
            yield


# The first two come before `held` takes two of the CPUs.


def _until(held: Lease, workers: int) -> None:
    deadline = time.monotonic() + 20
    while held.workers != workers or len(_pids(held)) != workers:
        assert time.monotonic() < deadline, f"{held.workers} workers, not {workers}"
        time.sleep(0.1)


def test_adapts_to_the_work_and_the_room() -> None:
    def slowly(part: int) -> int:
        time.sleep(0.2)
        return part + 1

    with lease(workers=1) as adapting:
        with pytest.raises(LeaseError, match="minimum=3, maximum=2"):
            adapting.adapt(minimum=3, maximum=2)
        adapting.adapt(minimum=1, maximum=5, backlog_s=0.3, idle_s=0.3, interval_s=0.1)
        with pytest.raises(LeaseError, match="adapts already"):
            adapting.adapt(minimum=1, maximum=2)
        results = map_partitions(slowly, range(40), adapting)
        got = [next(results)]
        # Five are allowed, and the cluster has room for three.
        while adapting.workers < 3:
            got.append(next(results))
        got += results
        assert got == [part + 1 for part in range(40)]
        _until(adapting, 1)
        assert list(map_partitions(slowly, range(3), adapting)) == [1, 2, 3]


def test_retires_idle_workers_before_busy_ones() -> None:
    def pid_later() -> int:
        time.sleep(0.5)
        return os.getpid()

    with lease(workers=2) as shrinking:
        pids = shrinking.client.run(os.getpid)
        for _ in range(2):
            # The newest, which would be the first to go if all were idle.
            (busy, pid) = list(pids.items())[-1]
            future = shrinking.client.submit(
                pid_later, workers=[busy], allow_other_workers=True, pure=False
            )
            while not any(shrinking.client.processing().values()):
                time.sleep(0.01)
            shrinking.scale(1)
            assert set(shrinking.client.run(os.getpid)) == {busy}
            assert future.result() == pid
            shrinking.scale(2)
            now = shrinking.client.run(os.getpid)
            pids = {busy: pid} | {address: now[address] for address in now if address != busy}


@pytest.fixture(scope="module")
def held(session: None) -> Iterator[Lease]:
    with lease(workers=2) as held:
        yield held


def _pids(held: Lease) -> set[int]:
    return set(held.client.run(os.getpid).values())


def test_dask_listens_on_the_loopback_only(held: Lease) -> None:
    assert held.address.startswith("tcp://127.0.0.")
    workers = held.client.scheduler_info()["workers"]
    assert [address[:12] for address in workers] == ["tcp://127.0."] * 2


def test_results_come_whole_and_in_order(held: Lease) -> None:
    def slow_first(part: int) -> int:
        time.sleep(0.2 if part == 0 else 0)
        return part * part

    assert list(map_partitions(slow_first, range(12), held)) == [n * n for n in range(12)]


def test_an_error_in_the_function_reaches_the_caller(held: Lease) -> None:
    with pytest.raises(ZeroDivisionError):
        list(map_partitions(lambda part: 1 // part, [1, 0], held))


def test_workers_bound_the_threads_of_their_libraries(held: Lease) -> None:
    def threads() -> tuple[str | None, str | None]:
        return os.environ.get("POLARS_MAX_THREADS"), os.environ.get("NUMBA_NUM_THREADS")

    assert set(held.client.run(threads).values()) == {("1", "1")}


def test_scales_up_and_down(held: Lease) -> None:
    held.scale(3)
    assert len(_pids(held)) == 3
    with pytest.raises(LeaseError, match="1 workers of CPU 1"):
        held.scale(4)
    assert held.workers == 3
    held.scale(1)
    assert len(_pids(held)) == 1
    held.scale(2)
    assert len(_pids(held)) == 2
    with pytest.raises(LeaseError, match="workers=0"):
        held.scale(0)


def test_a_killed_worker_loses_no_result(held: Lease, tmp_path: Path) -> None:
    def work(part: int) -> int:
        (tmp_path / f"{part}-{os.getpid()}").touch()
        time.sleep(0.2)
        return part + 100

    before = _pids(held)
    victim = min(before)
    results = map_partitions(work, range(20), held)
    got = [next(results)]
    os.kill(victim, signal.SIGKILL)
    got += results
    assert got == [part + 100 for part in range(20)]
    deadline = time.monotonic() + 15
    while (now := _pids(held)) == before or len(now) < 2:
        assert time.monotonic() < deadline, f"no worker replaced {victim}; there are {now}"
        time.sleep(0.1)
    assert victim not in now


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"workers": 4}, "4 workers of CPU 1, .* has CPU 3"),
        ({"workers": 1, "gpus": 1}, "GPU 1, .* GPU 0"),
        ({"workers": 0}, "workers=0"),
    ],
)
def test_refuses_what_the_cluster_lacks(asked: dict[str, int], named: str) -> None:
    with pytest.raises(LeaseError, match=named), lease(**asked):
        pass


def test_gives_everything_back(held: Lease) -> None:
    free = ray.available_resources()["CPU"]
    with lease(workers=1) as other:
        client = other.client
        assert list(map_partitions(abs, [-1, -2], other)) == [1, 2]
        assert ray.available_resources().get("CPU", 0) < free
    assert client.status == "closed"
    deadline = time.monotonic() + 10
    while ray.available_resources().get("CPU", 0) != free:
        assert time.monotonic() < deadline, "the lease's CPU did not come back"
        time.sleep(0.1)
