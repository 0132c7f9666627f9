"""Jobs on a real Ray head, as `liftyard up` starts it."""

import dataclasses
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from ray.job_submission import JobSubmissionClient

from cluster import local
from cluster.environment import Environment, load
from jobs import submission
from jobs.submission import JobError

PIPELINE = """\
name: shop
seed: 3
tables:
  orders:
    source: {path: "orders*.csv"}
    entity: customer
    columns: {customer: int64, amount: float64}
"""

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
            yield local.up(home, cpus=1)
        finally:
            local.down(home)


def _start(environment: Environment, shell: str) -> str:
    assert environment.dashboard_url is not None
    return JobSubmissionClient(environment.dashboard_url).submit_job(entrypoint=shell)


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


def test_a_pipeline_runs_as_a_job_in_the_folder_of_its_submitter(
    here: Environment, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "shop.yaml").write_text(PIPELINE)
    (folder / "orders1.csv").write_text("customer,amount\n1,2.5\n2,1\n")
    monkeypatch.chdir(folder)
    id = submission.submit(here, Path("shop.yaml"), arguments=["--runs", "its runs"])
    said = "".join(submission.logs(here, id, follow=True))
    job = submission.find(here, id)
    assert job.status == "SUCCEEDED", said
    assert job.started is not None
    assert job.ended is not None
    assert job.started < job.ended
    assert "jobs.cli run" in job.command
    (summary,) = (folder / "its runs").glob("*/summary.json")
    assert json.loads(summary.read_text())["status"] == "finished"
    assert local.status(here).jobs == {"SUCCEEDED": 1}


def test_a_log_is_followed_over_a_lost_connection(here: Environment, link: _Link) -> None:
    id = _start(here, "for i in 1 2 3 4 5 6; do echo line $i; sleep 0.5; done")
    pieces = submission.logs(link.through, id, follow=True)
    said = ""
    while "line 2" not in said:
        said += next(pieces)
    link.cut()
    time.sleep(1)
    link.mend()
    said += "".join(pieces)
    lines = [line for line in said.splitlines() if line.startswith("line ")]
    assert lines == [f"line {n}" for n in range(1, 7)]
    assert "".join(submission.logs(here, id)) == said


def test_a_connection_that_stays_lost_is_told(here: Environment, link: _Link) -> None:
    id = _start(here, "echo first; sleep 600")
    pieces = submission.logs(link.through, id, follow=True, patience_s=0.5)
    while "first" not in next(pieces):
        pass
    link.cut()
    with pytest.raises(ConnectionError, match=f"lost the log of {id}.*for 0.5 s"):
        list(pieces)
    submission.stop(here, id)


def test_a_job_is_stopped_once(here: Environment) -> None:
    id = _start(here, "sleep 600")
    stopped = submission.stop(here, id)
    assert (stopped.status, stopped.id) == ("STOPPED", id)
    assert stopped.ended is not None
    assert submission.stop(here, id) == stopped
    assert stopped in submission.jobs(here)


def test_an_unknown_job_names_those_there_are(here: Environment) -> None:
    id = _start(here, "true")
    for ask in (submission.find, submission.logs, submission.stop):
        with pytest.raises(JobError, match=rf"no job 'job-9' in environment 'local': .*{id} \("):
            ask(here, "job-9")


def test_what_cannot_be_submitted(here: Environment, folder: Path) -> None:
    with pytest.raises(JobError, match=r"no pipeline none\.yaml"):
        submission.submit(here, Path("none.yaml"))
    with pytest.raises(JobError, match=r"'embedded' takes no jobs: .*liftyard up"):
        submission.jobs(load(None, home=folder))
    gone = dataclasses.replace(here, dashboard_url="http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"'local' doesn't answer at .*:9: `liftyard up`"):
        submission.jobs(gone)
