"""What a node runs at boot: it joins Ray as head or worker, and goes on doing so.

    python -m cluster.bootstrap head | worker | health

Configured by environment variables (infra/README.md, «What a node is told»). A node waits for what
it needs, joins, joins again when Ray ends (a head that restarted, a network that was cut), says how
it is in `LIFTYARD_STATE_DIR/health.json` (`health` prints it, and exits 0 where it is ready), and
on a notice that its machine goes drains itself and stays away. A head also holds the standing Dask
lease. Token and TLS are Ray's own variables, which Dask's processes follow.
"""

import json
import os
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import ports
from cluster.files import replace_text
from cluster.node import BootstrapError, Node, read, secrets_asked, tls_on
from cluster.notice import drain, notice

LONGEST_PAUSE_S = 30.0
SETTLED_S = 60.0
# By Ray's own settings a call into a host whose link was cut waits for minutes. Jobs inherit these.
SETTINGS = {
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
}
DRAINED = "it has left Ray after a notice"


@dataclass(frozen=True, kw_only=True)
class Health:
    """How a node is.

    Attributes:
        state: `waiting` (for what `detail` says), `joining`, `ready`, `failed` (it tries again),
            `draining`, `drained` or `ended`.
        detail: In words.
        since: When it became so, ISO 8601 UTC.
        process: Id of the process that says so.
    """

    state: str
    detail: str
    since: str
    process: int


def command(node: Node, *, client_port: int = 10001) -> list[str]:
    """The command that keeps the node in Ray, in the foreground.

    Args:
        node: What it is told.
        client_port: Port of Ray's client server, at a head; nothing of ours uses it.
    """
    options = [
        *([] if node.cpus is None else [f"--num-cpus={node.cpus}"]),
        *([] if node.gpus is None else [f"--num-gpus={node.gpus}"]),
        *([] if node.scratch is None else [f"--temp-dir={node.scratch}"]),
        f"--node-ip-address={node.address}",
        "--dashboard-agent-listen-port=0",
        "--disable-usage-stats",
        "--log-color=false",
        "--block",
    ]
    start = [str(Path(sys.executable).with_name("ray")), "start"]
    if node.role == "worker":
        return [*start, f"--address={node.head}", *options]
    return [
        *(*start, "--head", f"--port={node.ray_port}"),
        f"--dashboard-host={node.dashboard_host}",
        f"--dashboard-port={node.dashboard_port}",
        f"--ray-client-server-port={client_port}",
        *options,
    ]


def lacking(node: Node, variables: Mapping[str, str]) -> str | None:
    """What the node still has to wait for, in words; None where it can join.

    Secrets must be readable, the machine not on its way out, and, for a worker, the head must
    answer; where TLS is on, with a certificate of the authority this node knows.
    """
    for name in secrets_asked(variables):
        if not os.access(variables[name], os.R_OK):
            return f"{variables[name]} ({name}), which isn't there or can't be read"
    if (why := notice(node.metadata)) is not None:
        return f"the machine to end: {why}"
    if node.role == "head":
        return None
    try:
        with socket.create_connection((node.head_host, node.ray_port), timeout=5) as plain:
            if tls_on(variables):
                trust = ssl.create_default_context(cafile=variables["RAY_TLS_CA_CERT"])
                trust.load_cert_chain(
                    variables["RAY_TLS_SERVER_CERT"], variables["RAY_TLS_SERVER_KEY"]
                )
                trust.set_alpn_protocols(["h2"])
                with trust.wrap_socket(plain, server_hostname=node.head_host):
                    pass
    except ssl.SSLError as error:
        return f"a head at {node.head} of the same authority: {error.reason or error}"
    except OSError as error:
        return f"the head at {node.head}: {error}"
    return None


def run(node: Node, variables: Mapping[str, str]) -> None:
    """Keeps the node in the cluster until TERM.

    Args:
        node: What it is told.
        variables: The process's environment.
    """
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: ended.set())
    pause_s = 1.0
    while not ended.is_set():
        missing = lacking(node, variables)
        if missing is not None:
            report(node, "waiting", f"waits for {missing}")
            ended.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            continue
        began = time.monotonic()
        why = _join(node, ended)
        if time.monotonic() - began > SETTLED_S:
            pause_s = 1.0
        if not ended.is_set():
            state = "drained" if why == DRAINED else "failed"
            report(node, state, f"{why}; tries again in {pause_s:g} s")
            ended.wait(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
    report(node, "ended", "told to end")


def _join(node: Node, ended: threading.Event) -> str:
    """Keeps Ray running until it ends, the node has drained or it is told to; says which."""
    report(node, "joining", "head starts" if node.role == "head" else f"joins {node.head}")
    with tempfile.TemporaryFile() as output:
        # A file and not a pipe, which Ray's processes would hold and fill.
        ray = subprocess.Popen(
            command(node, client_port=ports.free(1)[0]),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**SETTINGS, **os.environ, "PATH": _path()},
        )
        lease: subprocess.Popen[bytes] | None = None
        ready, look_at, lease_at = False, 0.0, 0.0
        leave_at: float | None = None
        try:
            while ray.poll() is None:
                if ended.wait(0.2):
                    return "told to end"
                if not ready:
                    output.seek(0)
                    ready = b"Ray runtime started" in output.read()
                    if ready:
                        report(node, "ready", _registered(node))
                    continue
                idle = node.role == "head" and (lease is None or lease.poll() is not None)
                if idle and node.dask_workers and time.monotonic() > lease_at:
                    # One that ended was refused for want of CPUs, or has lost its scheduler.
                    lease = _hold_lease(node)
                    lease_at = time.monotonic() + 5
                if leave_at is not None:
                    if time.monotonic() > leave_at:
                        return DRAINED
                elif time.monotonic() > look_at:
                    look_at = time.monotonic() + 5
                    if (why := notice(node.metadata)) is not None:
                        leave_at = time.monotonic() + node.drain_s
                        report(node, "draining", why)
                        drain(node.head, node.address, within_s=node.drain_s, why=why)
            if leave_at is not None:
                return DRAINED
            output.seek(0)
            said = output.read().decode(errors="replace").strip().splitlines()[-15:]
            return f"Ray ended with {ray.returncode}: " + "\n  ".join(["", *said])
        finally:
            for process in (lease, ray):
                if process is not None:
                    _end(process)


def report(node: Node, state: str, detail: str) -> None:
    """Says how the node is, on the output and in `health.json`."""
    health = Health(
        state=state,
        detail=detail,
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        process=os.getpid(),
    )
    print(f"{health.since} {node.role} {node.address}: {state}: {detail}", flush=True)
    node.state.mkdir(parents=True, exist_ok=True)
    replace_text(node.state / "health.json", json.dumps(asdict(health), indent=2) + "\n")


def health(state: Path) -> Health:
    """What a node last said; `ended` where the process that said it is gone.

    Raises:
        FileNotFoundError: None has said anything there.
    """
    kept = Health(**json.loads((state / "health.json").read_text(encoding="utf-8")))
    if Path("/proc/self").exists() and not Path(f"/proc/{kept.process}").exists():
        return Health(**{**asdict(kept), "state": "ended", "detail": f"died while {kept.state}"})
    return kept


def _registered(node: Node) -> str:
    """The node as Ray has it, and what of its accelerators Ray hasn't."""
    from ray import _raylet

    native: Any = _raylet
    for info in native.GcsClient(address=node.head).get_all_node_info().values():
        if info.node_manager_address == node.address and info.state == 0:
            has = info.resources_total
            gpus = has.get("GPU", 0.0)
            kinds = [name.partition(":")[2] for name in has if name.startswith("accelerator_type:")]
            said = (
                f"{has.get('CPU', 0.0):g} CPUs, {gpus:g} GPUs{' of ' + kinds[0] if kinds else ''}"
            )
            devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
            if node.gpus is None and devices > gpus:
                said += f"; the machine has {devices} GPUs: is its driver well?"
            return said
    return "not yet in the head's list of nodes"


def _path() -> str:
    # Ray installs the wheels of packages by the `pip` that it finds.
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _hold_lease(node: Node) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "cluster.local", f"--address={node.address}:{node.ray_port}"),
            *(f"--workers={node.dask_workers}", f"--most={node.dask_most}"),
            f"--port={node.dask_port}",
        ],
        stdin=subprocess.DEVNULL,
        env={**SETTINGS, **os.environ},
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(arguments: Sequence[str]) -> None:
    """The command line; see the module's docstring."""
    role = arguments[0] if len(arguments) == 1 else ""
    try:
        if role == "health":
            found = health(Path(os.environ["LIFTYARD_STATE_DIR"]))
            print(json.dumps(asdict(found)))
            sys.exit(0 if found.state == "ready" else 1)
        if role not in ("head", "worker"):
            raise BootstrapError(
                f"arguments {shlex.join(arguments)!r}: allowed is one of head, worker and health"
            )
        run(read("head" if role == "head" else "worker", os.environ), os.environ)
    except (BootstrapError, OSError, KeyError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
