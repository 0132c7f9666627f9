"""What a node runs at boot: what it is told, what it waits for, a real head, a notice."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cluster import bootstrap, local, ports, session
from cluster.node import BootstrapError, read
from cluster.notice import notice

ROOT = Path(__file__).resolve().parents[2]
TOLD = {
    "LIFTYARD_NODE_ADDRESS": "127.0.0.9",
    "LIFTYARD_HEAD_HOST": "head.internal",
    "LIFTYARD_RAY_PORT": "6379",
    "LIFTYARD_DASHBOARD_PORT": "8265",
    "LIFTYARD_DASK_PORT": "8786",
    "LIFTYARD_STATE_DIR": "/var/lib/liftyard",
}


class Metadata(BaseHTTPRequestHandler):
    """The cloud's metadata service (IMDSv2): a session token first."""

    answers: dict[str, str] = {}  # noqa: RUF012

    def do_PUT(self) -> None:
        self._say(200, "secret" if self.headers["X-aws-ec2-metadata-token-ttl-seconds"] else "")

    def do_GET(self) -> None:
        if self.headers["X-aws-ec2-metadata-token"] != "secret":
            return self._say(401, "")
        path = self.path.removeprefix("/latest/meta-data/")
        self._say(200 if path in self.answers else 404, self.answers.get(path, ""))

    def _say(self, code: int, text: str) -> None:
        self.send_response(code)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[str]:
    Metadata.answers = {"autoscaling/target-lifecycle-state": "InService"}
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_names_every_variable_that_is_missing() -> None:
    with pytest.raises(
        BootstrapError,
        match=r"head needs LIFTYARD_RAY_PORT, LIFTYARD_DASK_PORT, RAY_AUTH_TOKEN_PATH, "
        r"RAY_TLS_CA_CERT, RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY: see infra/README",
    ):
        told = {**TOLD, "RAY_AUTH_MODE": "token", "RAY_USE_TLS": "1", "LIFTYARD_RAY_PORT": ""}
        del told["LIFTYARD_DASK_PORT"]
        read("head", told)
    with pytest.raises(BootstrapError, match="LIFTYARD_CPUS='two': a number"):
        read("worker", {**TOLD, "LIFTYARD_CPUS": "two"})


def test_commands_of_head_and_worker() -> None:
    head = bootstrap.command(read("head", TOLD))
    assert {"--head", "--port=6379", "--dashboard-port=8265", "--block"} <= set(head)
    worker = bootstrap.command(read("worker", {**TOLD, "LIFTYARD_GPUS": "2"}))
    assert {"--address=head.internal:6379", "--num-gpus=2", "--block"} <= set(worker)
    assert not any(part.startswith(("--num-cpus", "--head")) for part in worker)


def test_waits_for_secrets_then_for_the_head(tmp_path: Path) -> None:
    token = tmp_path / "token"
    told = {
        **TOLD,
        "LIFTYARD_HEAD_HOST": "127.0.0.1",
        "LIFTYARD_RAY_PORT": str(ports.free(1)[0]),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }
    node = read("worker", told)
    assert "RAY_AUTH_TOKEN_PATH" in str(bootstrap.lacking(node, told))
    token.write_text("a" * 64)
    assert "the head at 127.0.0.1" in str(bootstrap.lacking(node, told))
    with socket.create_server(("127.0.0.1", node.ray_port)):
        assert bootstrap.lacking(node, told) is None


def test_a_notice_is_seen(metadata: str) -> None:
    node = read("head", {**TOLD, "LIFTYARD_METADATA_URL": metadata})
    assert notice(metadata) is None
    Metadata.answers["autoscaling/target-lifecycle-state"] = "Terminated"
    assert notice(metadata) == "its group's target is Terminated"
    Metadata.answers["spot/instance-action"] = '{"action": "terminate"}'
    assert notice(metadata) == 'spot notice {"action": "terminate"}'
    assert "the machine to end: spot notice" in str(bootstrap.lacking(node, {}))
    # No metadata service is no notice.
    assert notice("http://127.0.0.1:1") is None
    assert notice(None) is None


def _until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 90
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return value


@pytest.mark.timeout(240)
@pytest.mark.skipif(sys.platform != "linux", reason="nodes need loopback addresses")
def test_nodes_join_say_how_they_are_and_leave_on_a_notice(
    tmp_path: Path, metadata: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    session.authenticate(make=True)
    port = str(ports.free(1)[0])
    dashboard = str(ports.free(1)[0])

    def boot(role: str, address: str, **more: str) -> subprocess.Popen[bytes]:
        told = {
            "LIFTYARD_NODE_ADDRESS": address,
            "LIFTYARD_HEAD_HOST": "127.0.0.2",
            "LIFTYARD_RAY_PORT": port,
            "LIFTYARD_DASHBOARD_HOST": "127.0.0.1",
            "LIFTYARD_DASHBOARD_PORT": dashboard,
            "LIFTYARD_DASK_PORT": "1",
            "LIFTYARD_DASK_WORKERS": "0",
            "LIFTYARD_STATE_DIR": str(tmp_path / role),
            "LIFTYARD_SCRATCH": f"/tmp/ly-{os.getpid()}-{role}",
            "LIFTYARD_CPUS": "1",
            "LIFTYARD_GPUS": "0",
            **more,
        }
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.bootstrap", role],
            env={**os.environ, **told, "PYTHONPATH": str(ROOT)},
            cwd=tmp_path,
        )

    def says(role: str) -> str:
        file = tmp_path / role / "health.json"
        return bootstrap.health(tmp_path / role).state if file.exists() else ""

    head = boot("head", "127.0.0.2")
    worker = boot("worker", "127.0.0.3", LIFTYARD_METADATA_URL=metadata, LIFTYARD_DRAIN_S="2")
    try:
        _until(lambda: says("head") == "ready" and says("worker") == "ready")
        assert bootstrap.health(tmp_path / "worker").detail == "1 CPUs, 0 GPUs"
        asked = subprocess.run(
            [sys.executable, "-m", "cluster.bootstrap", "health"],
            env={**os.environ, "LIFTYARD_STATE_DIR": str(tmp_path / "worker")},
            cwd=ROOT,
            capture_output=True,
        )
        assert asked.returncode == 0
        assert json.loads(asked.stdout)["state"] == "ready"

        # On a notice the node leaves Ray, and stays away.
        Metadata.answers["spot/instance-action"] = '{"action": "terminate"}'
        _until(lambda: says("worker") == "waiting")
        assert "spot notice" in bootstrap.health(tmp_path / "worker").detail
        where = local.Environment(
            name="it",
            ray_address=f"127.0.0.2:{port}",
            dask_address=None,
            dashboard_url=f"http://127.0.0.1:{dashboard}",
            tracking_uri="sqlite:////none",
            storage_root="/none",
            serve_url=None,
        )
        assert [node.address for node in local.status(where).nodes] == ["127.0.0.2"]
    finally:
        for node in (worker, head):
            node.send_signal(signal.SIGTERM)
        for node in (worker, head):
            assert node.wait(60) == 0
        for role in ("head", "worker"):
            shutil.rmtree(f"/tmp/ly-{os.getpid()}-{role}", ignore_errors=True)
    assert says("head") == "ended"
