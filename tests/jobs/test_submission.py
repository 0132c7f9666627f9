"""Logs of jobs on a real Ray head, as `liftyard up` starts it."""

import dataclasses
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from cluster import local
from cluster.environment import Environment
from jobs import dispatch, queue, submission
from jobs.queue import Queue, QueueError, Spec

PROXY = """
import asyncio, sys

async def pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
        await writer.drain()
    writer.close()

async def serve(reader, writer):
    far_reader, far_writer = await asyncio.open_connection("127.0.0.1", int(sys.argv[2]))
    await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def here(folder: Path) -> Iterator[Environment]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        patch.delenv("RAY_AUTH_TOKEN", raising=False)
        home = folder / ".liftyard"
        try:
            where = local.up(home, cpus=1)
            dispatch.up(where, home)
            yield where
        finally:
            dispatch.down(home)
            local.down(home)


@pytest.fixture
def jobs(here: Environment) -> Queue:
    return queue.of(here)


def _submit(jobs: Queue, folder: Path, shell: str, **more: Any) -> str:
    command = ("sh", "-c", shell)
    return jobs.submit(Spec(command=command, folder=str(folder), key=str(time.time()), **more))


class _Link:
    """A connection to the dashboard that can be cut and mended."""

    def __init__(self, environment: Environment) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.far = urlsplit(environment.dashboard_url).port
        self.through = dataclasses.replace(
            environment, dashboard_url=f"http://127.0.0.1:{self.port}"
        )
        self.mend()

    def mend(self) -> None:
        command = [sys.executable, "-c", PROXY, str(self.port), str(self.far)]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)

    def cut(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def link(here: Environment) -> Iterator[_Link]:
    link = _Link(here)
    yield link
    link.cut()


def test_a_log_is_followed_over_a_lost_connection(
    here: Environment, jobs: Queue, folder: Path, link: _Link
) -> None:
    id = _submit(jobs, folder, "for i in 1 2 3 4 5 6; do echo line $i; sleep 0.5; done")
    pieces = submission.logs(jobs, id, lambda: link.through, follow=True)
    said = ""
    while "line 2" not in said:
        said += next(pieces)
    link.cut()
    time.sleep(1)
    link.mend()
    said += "".join(pieces)
    lines = [line for line in said.splitlines() if line.startswith("line ")]
    assert lines == [f"line {n}" for n in range(1, 7)]
    assert "".join(submission.logs(jobs, id, lambda: here)) == said


def test_a_log_is_followed_from_before_the_first_attempt_to_the_last(
    here: Environment, jobs: Queue, folder: Path
) -> None:
    shell = "echo attempt; test -e second || { touch second; exit 3; }; echo well"
    id = _submit(jobs, folder, shell, retries={"failed": 1}, backoff_s=1)
    said = "".join(submission.logs(jobs, id, lambda: here, follow=True))
    # Ray has lines of its own.
    words = [line for line in said.splitlines() if line in ("attempt", "well")]
    assert words == ["attempt", "attempt", "well"]
    assert jobs.find(id).attempt == 2
    # Without following, it is the last attempt's.
    last = "".join(submission.logs(jobs, id, lambda: here))
    assert said.endswith(last) and last.count("attempt\n") == 1


def test_a_connection_that_stays_lost_is_told(jobs: Queue, folder: Path, link: _Link) -> None:
    id = _submit(jobs, folder, "echo first; sleep 600")
    pieces = submission.logs(jobs, id, lambda: link.through, follow=True, patience_s=0.5)
    while "first" not in next(pieces):
        pass
    link.cut()
    with pytest.raises(ConnectionError, match=f"lost the log of {id}.*for 0.5 s"):
        list(pieces)
    jobs.stop(id)
    while jobs.find(id).state != "STOPPED":
        time.sleep(0.05)


def test_an_unknown_job_is_told(here: Environment, jobs: Queue) -> None:
    with pytest.raises(QueueError, match=r"no job 'job-9' in sqlite:.*liftyard jobs"):
        submission.logs(jobs, "job-9", lambda: here)


def test_packages_that_cannot_be_had_fail_the_job(jobs: Queue, folder: Path) -> None:
    absent = _submit(jobs, folder, "true", packages=(str(folder / "absent"),))
    while not jobs.find(absent).over:
        time.sleep(0.05)
    found = jobs.find(absent)
    assert (found.state, found.attempt) == ("FAILED", 1)
    assert "absent" in found.message
