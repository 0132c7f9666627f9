"""A cluster over hosts of their own, with TLS and a token, through deaths, cuts and restarts."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.multihost.hosts import ROOT, Authority, Cluster, Host, Network, impossible, until

WORK = ROOT / "tests" / "multihost" / "work.py"
REASON = impossible()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def start(host: Host, *arguments: str) -> subprocess.Popen[bytes]:
    return host.popen(sys.executable, str(WORK), *arguments)


def end(work: subprocess.Popen[bytes], limit_s: float = 90) -> dict[str, Any]:
    try:
        said = work.communicate(timeout=limit_s)[0].decode()
    except subprocess.TimeoutExpired as late:
        work.kill()
        raise AssertionError(f"after {limit_s:g} s: {(late.output or b'').decode()}") from None
    assert work.returncode == 0, said
    return dict(json.loads(said.splitlines()[-1]))


def work(host: Host, *arguments: str) -> dict[str, Any]:
    return end(start(host, *arguments))


def nodes(cluster: Cluster) -> list[str]:
    return list(work(cluster.head, "tasks", "1")["nodes"])


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    with Network(tmp_path) as made:
        yield made


@pytest.mark.timeout(420)
def test_a_cluster_over_hosts(network: Network, tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    cluster = Cluster(network, tmp_path)
    first, second = cluster.worker(), cluster.worker()
    alone = embedded(tmp_path)
    # Before the head is up workers wait, and say for what.
    cluster.ready(cluster.head, first, second)

    # The same features and scores as in one process.
    found = work(cluster.head, "compute", str(tables), str(tmp_path / "journal"))
    assert found["engine"] == "kernel on 2 Dask workers"
    assert (found["new"], found["trained"]) == (True, 4)
    for key in ("rows", "digest", "scores"):
        assert found[key] == alone[key], key

    # A host of another authority, or with another token, gets nothing.
    refuse_strangers(cluster)

    # A host that dies loses no task of Dask's.
    mapping = start(cluster.head, "dask", "24")
    time.sleep(3)
    second.kill()
    assert end(mapping)["doubled"] == [2 * n for n in range(24)]

    # Nor does a link that is cut; healed, its host is there again. And a host is added.
    third = cluster.worker()
    cluster.ready(third)
    tasks = start(cluster.head, "tasks", "40")
    until(lambda: (cluster.head.folder / "began").exists(), 60, lambda: "no tasks began")
    time.sleep(1)
    first.cut()
    assert end(tasks)["done"] == 40
    first.heal()
    everyone = sorted(host.address for host in (cluster.head, first, third))
    until(lambda: nodes(cluster) == everyone, 60, lambda: (first.health(), nodes(cluster)))

    # A head that dies and boots again: workers join it, and the data is where it was.
    cluster.head.kill()
    cluster.boot(cluster.head, "head")
    until(
        lambda: (
            cluster.head.health().get("process") != 0
            and cluster.head.health().get("state") == "ready"
        ),
        90,
        cluster.head.health,
    )
    until(lambda: nodes(cluster) == everyone, 120, lambda: (first.health(), nodes(cluster)))
    log = cluster.head.folder / "node.log"
    until(lambda: log.read_text(encoding="utf-8").count("leased tls://") == 2, 60, log.read_text)
    again = work(cluster.head, "compute", str(tables), str(tmp_path / "journal"))
    assert (again["new"], again["trained"]) == (False, 0)
    assert (again["digest"], again["scores"]) == (found["digest"], found["scores"])


def embedded(folder: Path) -> dict[str, Any]:
    """The same work in one process, on tables of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "LIFTYARD_"))}
    environment |= {"PYTHONPATH": str(ROOT), "RAY_AUTH_TOKEN_PATH": str(folder / "other-token")}

    def alone(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, str(WORK), *arguments],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    for name in ("tables", "other"):
        alone("tables", str(folder / name))
    said = alone("embedded", str(folder / "other"), str(folder / "other-journal"))
    return dict(json.loads(said.splitlines()[-1]))


def refuse_strangers(cluster: Cluster) -> None:
    stranger = cluster.network.host()
    foreign = Authority(stranger.folder / "foreign")
    stranger.boot("worker", {**cluster.variables(), **foreign.issue(stranger.folder, "10.0.0.1")})
    until(
        lambda: "of the same authority" in stranger.health().get("detail", ""),
        30,
        stranger.health,
    )
    assert stranger.health()["state"] == "waiting"
    stranger.kill()
    asked = [start(stranger, verb, "1") for verb in ("tasks", "dask")]

    wrong = stranger.folder / "token"
    wrong.write_text("b" * 64)
    wrong.chmod(0o600)
    tls = cluster.authority.issue(stranger.folder / "tls", stranger.address)
    stranger.variables |= {**tls, "RAY_AUTH_TOKEN_PATH": str(wrong)}
    asked.append(start(stranger, "tasks", "1"))
    for each in asked:
        said = each.communicate(timeout=90)[0].decode()
        assert each.returncode != 0, said
        assert '"done"' not in said and '"doubled"' not in said
