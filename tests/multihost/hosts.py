"""Hosts made of network namespaces on a bridge, each with an address and a link of its own."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from cluster.bootstrap import SETTINGS

ROOT = Path(__file__).resolve().parents[2]


def impossible() -> str | None:
    """Why hosts can't be made here, or None."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and the program ip"
    if shutil.which("openssl") is None:
        return "certificates need the program openssl"
    name = f"ly{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode != 0:
        return f"network namespaces can't be made: {made.stderr.strip()}"
    bridge = subprocess.run(
        ["ip", "link", "add", name, "type", "bridge"], capture_output=True, text=True
    )
    subprocess.run(["ip", "link", "del", name], capture_output=True)
    subprocess.run(["ip", "netns", "del", name], check=True)
    return None if bridge.returncode == 0 else f"no bridge can be made: {bridge.stderr.strip()}"


def sh(*command: str, cwd: Path | None = None) -> str:
    """Runs a program, and gives what it printed."""
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=cwd).stdout


class Authority:
    """A certificate authority, which issues as the machines of `infra/terraform` do."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        sh(
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-subj", "/CN=authority", "-days", "2", "-keyout", "ca.key"),
            *("-out", "ca.pem"),
            cwd=folder,
        )

    def issue(self, folder: Path, address: str) -> dict[str, str]:
        """Writes a node's certificate and key; gives Ray's variables for them."""
        folder.mkdir(parents=True, exist_ok=True)
        sh(
            *("openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"),
            *("-subj", f"/CN={address}", "-keyout", "node.key", "-out", "node.csr"),
            cwd=folder,
        )
        (folder / "extensions").write_text(
            "basicConstraints=critical,CA:FALSE\nkeyUsage=critical,digitalSignature\n"
            "extendedKeyUsage=serverAuth,clientAuth\n"
            f"subjectAltName=IP:{address},IP:127.0.0.1,DNS:localhost\n"
        )
        authority = ("-CA", str(self.folder / "ca.pem"), "-CAkey", str(self.folder / "ca.key"))
        sh(
            *("openssl", "x509", "-req", "-in", "node.csr", *authority, "-days", "2"),
            *("-set_serial", f"0x{secrets.token_hex(16)}", "-extfile", "extensions"),
            *("-out", "node.pem"),
            cwd=folder,
        )
        return {
            "RAY_USE_TLS": "1",
            "RAY_TLS_CA_CERT": str(self.folder / "ca.pem"),
            "RAY_TLS_SERVER_CERT": str(folder / "node.pem"),
            "RAY_TLS_SERVER_KEY": str(folder / "node.key"),
        }


class Host:
    """A namespace with an address; made by `Network.host`."""

    def __init__(self, network: "Network", number: int) -> None:
        self.network = network
        self.name = f"{network.name}-{number}"
        self.address = f"10.77.{network.subnet}.{number}"
        self.link = f"{network.name}v{number}"
        self.folder = network.folder / f"host-{number}"
        self.folder.mkdir()
        # Short: a socket's path may have about 100 characters.
        self.scratch = Path(f"/tmp/{self.name}")
        self.variables: dict[str, str] = {}
        self.node: subprocess.Popen[bytes] | None = None
        sh("ip", "netns", "add", self.name)
        inside = ("netns", self.name)
        sh("ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", *inside)
        sh("ip", "link", "set", self.link, "master", network.name, "up")
        sh("ip", "-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
        sh("ip", "-n", self.name, "link", "set", "eth0", "up")
        sh("ip", "-n", self.name, "link", "set", "lo", "up")

    def popen(self, *command: str, log: Path | None = None) -> subprocess.Popen[bytes]:
        """Starts a program on the host."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "LIFTYARD_"))}
        output = subprocess.PIPE if log is None else log.open("ab")
        try:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                env={**inherited, "PYTHONPATH": str(ROOT), **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                start_new_session=True,
            )
        finally:
            if log is not None:
                output.close()  # type: ignore[union-attr]

    def boot(self, role: str, variables: Mapping[str, str]) -> None:
        """Starts `cluster.bootstrap` on the host."""
        self.variables = {
            "LIFTYARD_NODE_ADDRESS": self.address,
            "LIFTYARD_STATE_DIR": str(self.folder / "state"),
            "LIFTYARD_SCRATCH": str(self.scratch),
            "LIFTYARD_GPUS": "0",
            **variables,
        }
        self.node = self.popen(
            sys.executable, "-m", "cluster.bootstrap", role, log=self.folder / "node.log"
        )

    def health(self) -> dict[str, Any]:
        """What the node said last; empty if nothing yet."""
        try:
            text = (self.folder / "state" / "health.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            return {}
        return dict(json.loads(text))

    def kill(self) -> None:
        """Ends everything on the host at once, as a power failure does."""
        while pids := sh("ip", "netns", "pids", self.name).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        if self.node is not None:
            self.node.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def cut(self) -> None:
        """Takes the host's link down."""
        sh("ip", "link", "set", self.link, "down")

    def heal(self) -> None:
        """Puts the host's link up again."""
        sh("ip", "link", "set", self.link, "up")


class Network:
    """A bridge and the hosts on it; ends all of them on exit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = f"ly{secrets.token_hex(2)}"
        self.subnet = 20 + secrets.randbelow(200)
        self.hosts: list[Host] = []
        sh("ip", "link", "add", self.name, "type", "bridge")
        sh("ip", "link", "set", self.name, "up")

    def host(self) -> Host:
        """Adds a host."""
        made = Host(self, len(self.hosts) + 1)
        self.hosts.append(made)
        return made

    def __enter__(self) -> "Network":
        return self

    def __exit__(self, *raised: object) -> None:
        for host in self.hosts:
            host.kill()
            sh("ip", "netns", "del", host.name)
        sh("ip", "link", "del", self.name)


class Cluster:
    """A head and workers on a network."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self.folder = network, folder
        self.authority = Authority(folder / "authority")
        self.token = folder / "token"
        self.token.write_text("a" * 64)
        self.token.chmod(0o600)
        self.head = network.host()
        self.boot(self.head, "head")

    def variables(self) -> dict[str, str]:
        return {
            "LIFTYARD_HEAD_HOST": self.head.address,
            "LIFTYARD_RAY_PORT": "6379",
            "LIFTYARD_DASHBOARD_PORT": "8265",
            "LIFTYARD_DASK_PORT": "8786",
            "LIFTYARD_DASK_WORKERS": "2",
            "LIFTYARD_CPUS": "2",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            # A driver of ours isn't started by the node, so it doesn't inherit them.
            **SETTINGS,
            # Shorter than Ray's own, so that the test is.
            "RAY_gcs_server_request_timeout_seconds": "15",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "2000",
            "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
            "HEAD": f"{self.head.address}:6379",
            "SCHEDULER": f"tls://{self.head.address}:8786",
        }

    def boot(self, host: Host, role: str) -> None:
        tls = self.authority.issue(host.folder / "tls", host.address)
        host.boot(role, {**self.variables(), **tls})

    def worker(self) -> Host:
        host = self.network.host()
        self.boot(host, "worker")
        return host

    def ready(self, *hosts: Host) -> None:
        for host in hosts:
            until(
                lambda host=host: host.health().get("state") == "ready",
                90,
                lambda host=host: (host.folder / "node.log").read_text(encoding="utf-8"),
            )


def until(found: Callable[[], Any], limit_s: float, what: Callable[[], Any]) -> Any:
    """Waits; where it takes too long, says what there is instead."""
    deadline = time.monotonic() + limit_s
    while not (value := found()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.2)
    return value
