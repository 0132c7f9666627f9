"""The environment `local`: a real Ray head and Dask lease, up and down."""

import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from distributed import Client

from cluster import environment, local, supervisor


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    home = tmp_path / "home"
    yield home
    local.down(home)


def _marked(*markers: str) -> list[psutil.Process]:
    """Every process, of any name, that carries one of the markers."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(supervisor.MARKER) in markers:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def _state(home: Path, name: str) -> supervisor.State:
    state = supervisor.read(environment.services_of(home), name)
    assert state is not None
    return state


def _scratch(head: supervisor.State) -> Path:
    (folder,) = [part for part in head.command if part.startswith("--temp-dir=")]
    return Path(folder.removeprefix("--temp-dir="))


def test_up_again_after_a_death_and_down(home: Path) -> None:
    up = local.up(home, cpus=2, dask_workers=1)
    head, lease = _state(home, "ray-head"), _state(home, "dask-lease")

    # What it says of itself, and who may ask.
    assert environment.load("local", home=home) == up
    assert up.tracking_uri == f"sqlite:///{home}/mlflow.db"
    assert urlsplit(up.dashboard_url).hostname == "127.0.0.1"
    with pytest.raises(urllib.error.HTTPError, match="401") as refused:
        urllib.request.urlopen(f"{up.dashboard_url}/api/version")
    refused.value.close()
    assert stat.S_IMODE((home.parent / "token").stat().st_mode) == 0o600
    status = local.status(up)
    (node,) = status.nodes
    assert (node.head, node.cpus, node.gpus) == (True, 2, 0)
    assert node.memory_bytes > 2**20
    assert status.dask_workers == 1
    assert status.actors == 2

    # A second call changes nothing, and other CPUs are refused.
    assert local.up(home) == up
    assert (_state(home, "ray-head"), _state(home, "dask-lease")) == (head, lease)
    with pytest.raises(local.LocalError, match=r"asked for 1 CPUs.*runs with 2.*liftyard down"):
        local.up(home, cpus=1)

    # Both engines compute, and Ray's workers can import the packages from anywhere.
    with Client(up.dask_address, set_as_default=False) as client:
        assert client.submit(sum, [1, 2]).result() == 3
    script = (
        "import ray, sys; from cluster.session import connect\n"
        f"with connect(address={up.ray_address!r}):\n"
        "    import jobs\n"
        "    where = ray.remote(lambda: __import__('models').__file__)\n"
        "    print(ray.get(where.options(num_cpus=1).remote()))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script],
        cwd=home.parent,
        env={**os.environ, "PYTHONPATH": str(local.ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.strip() == str(local.ROOT / "models" / "__init__.py")

    # A lease whose scheduler dies ends, and the next call starts it again.
    (scheduler,) = [each for each in _marked(head.marker) if "DaskScheduler" in each.name()]
    scheduler.kill()
    while supervisor.alive(lease):
        time.sleep(0.01)
    renewed = local.up(home)
    assert renewed.dask_address not in (None, up.dask_address)
    assert replace(renewed, dask_address=up.dask_address) == up
    lease = _state(home, "dask-lease")

    # A head that dies is replaced, with its lease; what was written stays.
    kept = home / "tables" / "kept"
    kept.parent.mkdir()
    kept.touch()
    os.kill(head.pid, signal.SIGKILL)
    while supervisor.alive(head):
        time.sleep(0.01)
    with pytest.raises(environment.EnvironmentFileError, match=r"has died.*liftyard up"):
        environment.load("local", home=home)
    again = local.up(home, cpus=2)
    assert _marked(head.marker, lease.marker) == []
    assert not _scratch(head).exists()
    assert again.dask_address not in (None, renewed.dask_address)
    assert [(node.head, node.cpus) for node in local.status(again).nodes] == [(True, 2)]

    # A lease that is too large says so, and leaves nothing of it.
    with pytest.raises(supervisor.ServiceError, match="asked for 3 workers of CPU 1"):
        local.up(home, dask_workers=3)
    assert supervisor.read(environment.services_of(home), "dask-lease") is None
    assert environment.load("local", home=home).dask_address is None

    without = local.up(home, dask_workers=0)
    assert without.dask_address is None
    assert without.ray_address == again.ray_address
    assert local.status(without).dask_workers is None

    # Down ends all of it and nothing but it.
    head = _state(home, "ray-head")
    assert local.down(home) == ["ray-head"]
    assert _marked(head.marker) == []
    assert not _scratch(head).exists()
    assert kept.exists()
    assert local.down(home) == []
    with pytest.raises(environment.EnvironmentFileError, match="isn't up"):
        environment.load("local", home=home)
    with pytest.raises(ConnectionError, match="doesn't answer"):
        local.status(without)
    with socket.socket() as port:
        assert port.connect_ex(("127.0.0.1", urlsplit(up.dashboard_url).port)) != 0


@pytest.mark.parametrize("asked", [{"cpus": 0}, {"dask_workers": -1}])
def test_refuses_sizes_out_of_range(asked: dict[str, int], home: Path) -> None:
    with pytest.raises(local.LocalError, match="cpus is at least 1, dask_workers at least 0"):
        local.up(home, **asked)


def test_embedded_has_no_status(home: Path) -> None:
    with pytest.raises(local.LocalError, match=r"no dashboard to ask.*liftyard up"):
        local.status(environment.load(None, home=home))
