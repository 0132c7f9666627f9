"""The built-in environment `local`: a Ray head on this machine, and a Dask lease if asked for.

`up` starts them as supervised processes and writes the environment's file; `down` ends exactly
those and leaves tables, models and runs. Ports are chosen free, so that several checkouts can
each have theirs. Run as a module it is the process that holds the Dask lease.
"""

import argparse
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster import dask_actors, dask_lease, ports, session, supervisor
from cluster.environment import HOME, Environment, embedded, file_of, services_of
from cluster.files import replace_text
from cluster.supervisor import Http, LogLine, Service, State

ROOT = Path(__file__).resolve().parents[1]
HEAD = "ray-head"
LEASE = "dask-lease"


class LocalError(ValueError):
    """The environment can't be changed as asked; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node of a Ray cluster.

    Attributes:
        address: Its IP address.
        head: Whether it is the head.
        cpus: CPUs that Ray gives out.
        gpus: GPUs that Ray gives out.
        memory_bytes: Memory that Ray gives out, the object store not counted.
    """

    address: str
    head: bool
    cpus: float
    gpus: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Status:
    """What an environment has and does.

    Attributes:
        nodes: The living ones, the head first, then by address.
        actors: Living Ray actors.
        dask_workers: Workers of the standing lease; None if there is no lease.
    """

    nodes: tuple[Node, ...]
    actors: int
    dask_workers: int | None

    @property
    def cpus(self) -> float:
        """CPUs of all nodes."""
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        """GPUs of all nodes."""
        return sum(node.gpus for node in self.nodes)


def up(
    home: Path = HOME, *, cpus: int | None = None, dask_workers: int | None = None
) -> Environment:
    """Starts what of `local` isn't running; a second call changes nothing.

    Args:
        home: Liftyard's folder; states, logs and the environment's file go below it.
        cpus: CPUs that Ray gives out; None takes all of the machine's, or what runs already.
        dask_workers: One-CPU workers of the standing Dask lease, which hold their CPUs as long as
            it is up; None has none, or what runs already. A lease of another size is replaced.

    Returns:
        The environment, usable.

    Raises:
        LocalError: `cpus` or `dask_workers` is out of range, or it runs with other CPUs.
        ServiceError: A process didn't start; if it was the lease, the rest is up and usable.
    """
    if (cpus is not None and cpus < 1) or (dask_workers is not None and dask_workers < 0):
        raise LocalError(
            f"cpus={cpus}, dask_workers={dask_workers}: cpus is at least 1, dask_workers at least 0"
        )
    home = home.resolve()
    states = services_of(home)
    states.mkdir(parents=True, exist_ok=True)
    session.authenticate(make=True)
    with supervisor.locked(states / "up.lock"):
        head, fresh = _start_head(states, cpus)
        ray_address = f"{_option(head, 'node-ip-address')}:{_option(head, 'port')}"
        here = embedded(home)
        file = file_of("local", home)
        without_dask = Environment(
            name="local",
            ray_address=ray_address,
            dask_address=None,
            dashboard_url=_dashboard(head),
            tracking_uri=here.tracking_uri,
            storage_root=here.storage_root,
            serve_url=_serve_url(file),
            queue=f"sqlite:///{home / 'queues' / 'local.sqlite'}",
        )
        try:
            lease = _start_lease(states, ray_address, dask_workers, fresh)
        except BaseException:
            # The head can be used all the same, and a lease from before is gone.
            _write(without_dask, file)
            raise
        dask_address = None if lease is None else _lease_address(lease)
        environment = replace(without_dask, dask_address=dask_address)
        _write(environment, file)
    return environment


def down(home: Path = HOME) -> list[str]:
    """Ends what `up` started, whether or not it still runs whole, and nothing else.

    Args:
        home: As given to `up`.

    Returns:
        Names of the services that were ended; empty if there were none.
    """
    states = services_of(home.resolve())
    if not states.exists():
        return []
    with supervisor.locked(states / "up.lock"):
        file_of("local", home.resolve()).unlink(missing_ok=True)
        # The lease first: it then gives its workers back rather than loses them.
        return [name for name in (LEASE, HEAD) if _stop(states, name)]


def status(environment: Environment) -> Status:
    """Asks an environment what it has and does.

    Raises:
        LocalError: It is `embedded`, or has no dashboard to ask.
        ConnectionError: It doesn't answer.
    """
    url = environment.dashboard_url
    if url is None:
        raise LocalError(
            f"environment {environment.name!r} has no dashboard to ask: `embedded` runs only "
            "within a command; `liftyard up` starts one that stays, for --env local"
        )
    found = nodes(url)
    from ray.util.state import list_actors
    from ray.util.state.exception import RayStateApiException

    living: Any = [("state", "=", "ALIVE")]
    try:
        actors = list_actors(address=url, filters=living, limit=10_000)
    except (RayStateApiException, OSError) as error:
        raise ConnectionError(f"{environment.name!r} doesn't answer at {url}: {error}") from error
    return Status(nodes=found, actors=len(actors), dask_workers=_count_dask_workers(environment))


def nodes(dashboard_url: str) -> tuple[Node, ...]:
    """Asks a cluster's dashboard for its living nodes: the head first, then by address.

    Raises:
        ConnectionError: It doesn't answer.
    """
    session.authenticate(make=False)
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        # All of them: Ray takes a filter that leaves out a dead node for an answer cut short.
        listed: list[Any] = list_nodes(address=dashboard_url, limit=10_000, detail=True)
    except (RayStateApiException, OSError, RuntimeError) as error:
        raise ConnectionError(f"the cluster of {dashboard_url} doesn't answer: {error}") from error
    return tuple(
        Node(
            address=node.node_ip,
            head=node.is_head_node,
            cpus=node.resources_total.get("CPU", 0.0),
            gpus=node.resources_total.get("GPU", 0.0),
            memory_bytes=int(node.resources_total.get("memory", 0)),
        )
        for node in sorted(listed, key=lambda node: (not node.is_head_node, node.node_ip))
        if node.state == "ALIVE"
    )


def _count_dask_workers(environment: Environment) -> int | None:
    if environment.dask_address is None:
        return None
    from distributed import Client

    client: Any = Client
    try:
        with client(
            environment.dask_address,
            timeout=5,
            set_as_default=False,
            security=dask_actors.security(),
        ) as connected:
            return len(connected.scheduler_info(n_workers=-1)["workers"])
    except OSError as error:
        raise ConnectionError(
            f"the Dask lease of {environment.name!r} doesn't answer at "
            f"{environment.dask_address}: {error}"
        ) from error


def _start_head(states: Path, cpus: int | None) -> tuple[State, bool]:
    """The head, and whether it was started just now."""
    running = supervisor.read(states, HEAD)
    if running is not None and supervisor.alive(running):
        has = _option(running, "num-cpus")
        if cpus is not None and has != str(cpus):
            raise LocalError(
                f"asked for {cpus} CPUs, but 'local' runs with {has or 'all'}: run `liftyard "
                "down` first (tables, models and runs stay)"
            )
        command: Sequence[str] = running.command
    else:
        # Of a dead head: its folder, and processes that outlived it, which wait for it in vain.
        _stop(states, HEAD, grace_s=1)
        command = _head_command(cpus)
    dashboard = f"http://{_value(command, 'dashboard-host')}:{_value(command, 'dashboard-port')}"
    service = Service(
        name=HEAD,
        command=command,
        # The dashboard answers before the node is there.
        ready=(LogLine(pattern="Ray runtime started"), Http(url=f"{dashboard}/api/version")),
        environment=_variables(),
        folder=ROOT,
        limit_s=90,
    )
    try:
        return supervisor.start(service, states), running is None or command != running.command
    except BaseException:
        shutil.rmtree(str(_value(command, "temp-dir")), ignore_errors=True)
        raise


def _head_command(cpus: int | None) -> list[str]:
    # The path of a Ray socket may have about 100 characters, which a folder below home can exceed.
    scratch = tempfile.mkdtemp(prefix="liftyard-", dir="/tmp")
    gcs, dashboard, client = ports.free(3)
    return [
        str(Path(sys.executable).with_name("ray")),
        "start",
        "--head",
        "--block",
        f"--node-ip-address={session.loopback()}",
        f"--port={gcs}",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        # Ray's own default for these two is a fixed port each.
        f"--ray-client-server-port={client}",
        "--dashboard-agent-listen-port=0",
        f"--temp-dir={scratch}",
        "--disable-usage-stats",
        "--log-color=false",
        *([] if cpus is None else [f"--num-cpus={cpus}"]),
    ]


def _start_lease(
    states: Path, ray_address: str, workers: int | None, fresh_head: bool
) -> State | None:
    running = supervisor.read(states, LEASE)
    if workers is None:
        workers = 0 if running is None else int(_option(running, "workers") or 0)
    command = [
        sys.executable,
        "-m",
        "cluster.local",
        f"--address={ray_address}",
        f"--workers={workers}",
    ]
    if fresh_head or running is None or list(running.command) != command:
        # Without its head a lease has nothing to give back, and waits for it in vain.
        _stop(states, LEASE, grace_s=1 if fresh_head else 10)
    if workers == 0:
        return None
    service = Service(
        name=LEASE,
        command=command,
        ready=(LogLine(pattern=_LEASED),),
        environment=_variables(),
        folder=ROOT,
        limit_s=90,
    )
    return supervisor.start(service, states)


def _stop(states: Path, name: str, *, grace_s: float = 10) -> bool:
    state = supervisor.read(states, name)
    if state is None:
        return False
    supervisor.stop(state, grace_s=grace_s)
    scratch = _option(state, "temp-dir")
    if scratch is not None:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _variables() -> dict[str, str | None]:
    """What the services' processes, and with them every Ray worker and job, find in theirs."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        # Ray installs the wheels of packages by the `pip` that it finds.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        # Ray's zero-GPU tasks then keep CUDA_VISIBLE_DEVICES, and it doesn't warn of the change.
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Another cluster's, which would win over ours.
        "RAY_ADDRESS": None,
    }


def _dashboard(head: State) -> str:
    return f"http://{_option(head, 'dashboard-host')}:{_option(head, 'dashboard-port')}"


def _option(state: State, name: str) -> str | None:
    return _value(state.command, name)


def _value(command: Sequence[str], name: str) -> str | None:
    prefix = f"--{name}="
    return next((part.removeprefix(prefix) for part in command if part.startswith(prefix)), None)


def _serve_url(file: Path) -> str:
    """Where a run's serve step serves: the address from before, else one on a free port."""
    if file.exists():
        kept = json.loads(file.read_text(encoding="utf-8")).get("serve_url")
        if kept is not None:
            return str(kept)
    return f"http://127.0.0.1:{ports.free(1)[0]}"


def _write(environment: Environment, file: Path) -> None:
    kept = asdict(environment)
    # Prices are settings, and looked up by who reads the file.
    del kept["name"], kept["prices"]
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_text(file, json.dumps(kept, indent=2) + "\n")


_LEASED = r"leased (\S+) with"


def _lease_address(lease: State) -> str:
    found = re.search(_LEASED, lease.log.read_text(encoding="utf-8"))
    assert found is not None, "a lease is ready by this line"
    return found[1]


def _hold(address: str, workers: int, most: int, port: int | None) -> None:
    """Holds a Dask lease until this process is told to end, or the scheduler is gone."""
    ended = threading.Event()
    with (
        session.connect(address=address),
        dask_lease.lease(workers=workers, port=port) as lease,
    ):
        # Not before: Ray sets a handler of its own, which ends the process at once.
        signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
        if most > workers:
            lease.adapt(minimum=workers, maximum=most)
        print(f"leased {lease.address} with {workers} workers", flush=True)
        while not ended.wait(1):
            if lease.client.status != "running":
                sys.exit(f"the Dask scheduler {lease.address} is gone")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Hold a Dask lease of a Ray cluster.")
    parser.add_argument("--address", required=True, help="the Ray head, host:port")
    parser.add_argument("--workers", required=True, type=int, help="one-CPU Dask workers")
    parser.add_argument(
        "--most", type=int, default=0, help="what it may grow to while there is work"
    )
    parser.add_argument("--port", type=int, help="of the scheduler, then on the cluster's head")
    given = parser.parse_args()
    _hold(given.address, given.workers, given.most, given.port)
