"""`environments/local`, applied for real: a Ray cluster, Dask, MLflow and Serve as processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from distributed import Client

from cluster import environment, local, ports, supervisor
from jobs import queue
from jobs.queue import Spec

FILES = Path(__file__).resolve().parents[2] / "infra" / "terraform" / "environments" / "local"

pytestmark = [
    pytest.mark.skipif(shutil.which("terraform") is None, reason="terraform isn't on PATH"),
    pytest.mark.skipif(sys.platform != "linux", reason="nodes need loopback addresses"),
]


class Terraform:
    """The environment's files with a state and variables of the test's own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        names = ("ray", "dashboard", "dask", "mlflow", "serve")
        self.variables = {
            "python": sys.executable,
            "home": str(self.home),
            "token_path": str(folder / "token"),
            "ports": json.dumps(dict(zip(names, ports.free(5), strict=True))),
            "workers": "1",
        }

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            ["terraform", f"-chdir={FILES}", *arguments],
            env={**os.environ, "TF_DATA_DIR": str(self.folder / "data"), "TF_IN_AUTOMATION": "1"},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def do(self, verb: str, **changed: str) -> str:
        self.variables |= changed
        given = [f"-var={name}={value}" for name, value in self.variables.items()]
        state = f"-state={self.folder / 'terraform.tfstate'}"
        return self.run(verb, "-auto-approve", "-no-color", "-input=false", state, *given)

    def environment(self) -> environment.Environment:
        state = f"-state={self.folder / 'terraform.tfstate'}"
        file = self.home / "environments" / "here.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(self.run("output", "-json", state, "environment"), encoding="utf-8")
        return environment.load("here", home=self.home)

    def state(self, name: str) -> supervisor.State:
        found = supervisor.read(environment.services_of(self.home), name)
        assert found is not None
        return found


@pytest.fixture
def terraform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Terraform]:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    made = Terraform(tmp_path)
    made.run("init", "-input=false", "-no-color")
    yield made
    made.do("destroy")


def _until(found: Callable[[], Any], limit_s: float = 60) -> Any:
    deadline = time.monotonic() + limit_s
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return value


def _addresses(where: environment.Environment) -> list[str]:
    try:
        return sorted(node.address for node in local.status(where).nodes)
    except ConnectionError:
        return []


def _answers(where: environment.Environment) -> bool:
    try:
        with Client(
            where.dask_address, timeout=2, set_as_default=False, heartbeat_interval=1000
        ) as client:
            client.wait_for_workers(1, timeout=5)
            return bool(client.submit(sum, [1, 2]).result(timeout=5) == 3)
    except OSError:
        return False


def test_files_are_formatted_and_valid(tmp_path: Path) -> None:
    bare = Terraform(tmp_path)
    bare.run("fmt", "-check", "-recursive")
    bare.run("init", "-input=false", "-no-color")
    bare.run("validate")


@pytest.mark.timeout(600)
def test_apply_change_recover_and_destroy(terraform: Terraform) -> None:
    first = terraform.do("apply")
    assert "7 added, 0 changed, 0 destroyed" in first
    where = terraform.environment()

    # All of it is there, from the file that the output gives.
    status = local.status(where)
    assert [node.address for node in status.nodes] == ["127.0.0.2", "127.0.0.3"]
    assert [node.cpus for node in status.nodes] == [1, 1]
    assert status.dask_workers == 1
    assert _answers(where)
    with urllib.request.urlopen(f"{where.tracking_uri}/health") as answer:
        assert answer.read() == b"OK"
    waits = environment.services_of(terraform.home) / "serve.log"
    assert "serve: waits for a champion" in waits.read_text(encoding="utf-8")

    # What is queued is run.
    jobs = queue.of(where)
    job = jobs.submit(Spec(command=("echo", "one"), folder=str(terraform.folder)))
    _until(lambda: jobs.find(job).state == "SUCCEEDED")

    # A second apply changes nothing.
    names = ("tracking", "head", "worker-0", "serve", "dispatcher")
    before = {name: terraform.state(name) for name in names}
    assert "0 added, 0 changed, 0 destroyed" in terraform.do("apply")
    assert {name: terraform.state(name) for name in names} == before

    # A changed count adds workers, or removes them, and touches nothing else.
    assert "1 added, 0 changed, 0 destroyed" in terraform.do("apply", workers="2")
    assert _until(lambda: len(_addresses(where)) == 3)
    second = terraform.state("worker-1")
    assert "0 added, 0 changed, 1 destroyed" in terraform.do("apply", workers="1")
    assert supervisor.processes(second) == []
    assert _until(lambda: _addresses(where) == ["127.0.0.2", "127.0.0.3"])
    assert {name: terraform.state(name) for name in names} == before

    # What dies is started again: the worker's Ray, and MLflow's server.
    (raylet,) = [p for p in supervisor.processes(before["worker-0"]) if p.name() == "raylet"]
    raylet.kill()
    server = next(p for p in supervisor.processes(before["tracking"]) if "mlflow" in _line(p))
    server.kill()
    _until(lambda: any(p.name() == "raylet" for p in supervisor.processes(before["worker-0"])))
    _until(lambda: _addresses(where) == ["127.0.0.2", "127.0.0.3"])
    _until(lambda: supervisor.Http(url=f"{where.tracking_uri}/health").check(""))

    # The head too, at the same addresses: the worker joins it, and Dask is leased anew.
    (head,) = [p for p in supervisor.processes(before["head"]) if p.name() == "gcs_server"]
    head.send_signal(signal.SIGKILL)
    head.wait()
    _until(lambda: _addresses(where) == ["127.0.0.2", "127.0.0.3"], 120)
    _until(lambda: _answers(where), 90)
    job = jobs.submit(Spec(command=("echo", "two"), folder=str(terraform.folder)))
    _until(lambda: jobs.find(job).state == "SUCCEEDED")
    assert {name: terraform.state(name) for name in names} == before
    scratch = psutil.Process(before["head"].pid).environ()["LIFTYARD_SCRATCH"]
    assert Path(scratch).exists()

    # Destroy ends exactly these, and leaves the data.
    kept = Path(where.storage_root) / "kept"
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.touch()
    with subprocess.Popen(["sleep", "600"]) as bystander:
        terraform.do("destroy")
        assert bystander.poll() is None
        bystander.kill()
    assert [p for state in before.values() for p in supervisor.processes(state)] == []
    assert not Path(scratch).parent.exists()
    assert kept.exists()
    assert (terraform.home / "mlflow.db").exists()
    assert not supervisor.Tcp(host="127.0.0.2", port=_port(where)).check("")


def _line(process: psutil.Process) -> str:
    line = " ".join(process.cmdline())
    return "" if "cluster.keeper" in line else line


def _port(where: environment.Environment) -> int:
    assert where.ray_address is not None
    return int(where.ray_address.rpartition(":")[2])
