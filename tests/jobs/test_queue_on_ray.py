"""The queue before a real Ray cluster, with its dispatcher and its head killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import environment, local, supervisor
from jobs import queue as queues
from jobs import submission
from jobs.queue import Queue, Spec
from tests.jobs.postgres import serving

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("queue")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        local.up(folder / "home", cpus=2)
        yield folder / "home"
        local.down(folder / "home")


def _dispatcher(home: Path, url: str | None = None) -> subprocess.Popen[bytes]:
    where = environment.load("local", home=home)
    command = [sys.executable, "-m", "jobs.dispatch", f"--queue={url or where.queue}"]
    return subprocess.Popen([*command, f"--dashboard={where.dashboard_url}"], cwd=ROOT)


def _until(found: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 90
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.timeout(240)
def test_jobs_in_postgresql_arrive_once_though_the_dispatcher_dies(
    home: Path, tmp_path: Path
) -> None:
    ran = tmp_path / "ran"
    with serving() as url:
        queue = Queue(url)
        ids = [
            queue.submit(
                Spec(
                    command=("sh", "-c", f"echo began >> {ran}; sleep 0.5; echo j{n} >> {ran}"),
                    folder=str(tmp_path),
                    cpus=1,
                )
            )
            for n in range(6)
        ]

        def any_is(state: str) -> bool:
            return any(queue.find(id).state == state for id in ids)

        # Decided, and perhaps handed over; begun; ended, with others that are under way.
        for point in (lambda: any_is("RUNNING"), ran.exists, lambda: any_is("SUCCEEDED")):
            with _dispatcher(home, url) as killed:
                _until(point)
                killed.kill()
        with _dispatcher(home, url) as last:
            _until(lambda: all(queue.find(id).over for id in ids))
            last.terminate()
            assert last.wait(20) == 0
        found = [queue.find(id) for id in ids]
    assert [(job.state, job.attempt, job.causes) for job in found] == [("SUCCEEDED", 1, {})] * 6
    lines = ran.read_text(encoding="utf-8").split()
    assert sorted(lines) == ["began"] * 6 + [f"j{n}" for n in range(6)]


@pytest.mark.timeout(240)
def test_jobs_arrive_once_though_queue_and_head_die(home: Path, tmp_path: Path) -> None:
    queue = queues.of(environment.load("local", home=home))
    ran = tmp_path / "ran"

    def submit(name: str, seconds: float = 0) -> str:
        line = (
            f"echo {name} began >> {ran}; sleep {seconds}; echo {name} >> {ran}; echo done {name}"
        )
        return queue.submit(
            Spec(command=("sh", "-c", line), folder=str(tmp_path), backoff_s=0, retries={"lost": 2})
        )

    def lines() -> list[str]:
        return ran.read_text(encoding="utf-8").splitlines() if ran.exists() else []

    ids = [submit(f"j{n}", 1) for n in range(3)]
    with _dispatcher(home) as first:
        _until(lines)
        first.kill()
    with _dispatcher(home) as second:
        _until(lambda: all(queue.find(id).state == "SUCCEEDED" for id in ids))
        assert sorted(line for line in lines() if "began" not in line) == ["j0", "j1", "j2"]
        assert [queue.find(id).attempt for id in ids] == [1, 1, 1]

        # What an attempt wrote is found by its submission.
        text = "".join(submission.logs(queue, ids[0], lambda: environment.load("local", home=home)))
        assert "done j0" in text

        # A head that dies takes its running job with it; the next head gets the job again.
        job = submit("long", 3)
        _until(lambda: "long began" in lines())
        head = supervisor.read(environment.services_of(home), "ray-head")
        assert head is not None
        os.kill(head.pid, signal.SIGKILL)
        second.kill()
    # A process is there for a moment after it was killed, and `up` then has nothing to do.
    _until(lambda: not supervisor.alive(head))
    local.up(home, cpus=2)
    with _dispatcher(home) as third:
        _until(lambda: queue.find(job).state == "SUCCEEDED")
        third.terminate()
        assert third.wait(20) == 0
    assert queue.find(job).causes.get("lost", 0) <= 1
    assert lines().count("long") == 1
