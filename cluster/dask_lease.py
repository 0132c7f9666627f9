"""A Dask cluster leased from Ray: its scheduler and workers are Ray actors.

Ray owns the nodes, so both engines share the same CPUs and GPUs. A worker that dies is replaced
and Dask redoes its work; a scheduler that dies ends the lease.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from cluster.dask_actors import actor_classes, security
from cluster.dask_placement import (
    LeaseError,
    Size,
    place,
    place_singly,
    require_free,
    strategy,
)


@dataclass(kw_only=True)
class _Worker:
    group: Any
    index: int
    actor: Any
    ended: Any  # object ref: done when the worker has ended, however it did


class Lease:
    """A running Dask cluster; made by `lease`.

    Attributes:
        address: The Dask scheduler's address, `tcp://host:port` or `tls://host:port`.
        client: A `distributed.Client` of it (not Dask's default client).
    """

    def __init__(
        self, size: Size, workers: int, placement_timeout_s: float, port: int | None
    ) -> None:
        self._size = size
        self._port = port
        self._timeout_s = placement_timeout_s
        self._lock = threading.RLock()
        self._closing = threading.Event()
        self._workers: list[_Worker] = []
        self._extra: list[Any] = []
        self._scheduler: Any = None
        self._watcher: threading.Thread | None = None
        self._adapter: threading.Thread | None = None
        self.client: Any = None
        self.address = ""
        self._group = place(size, workers, placement_timeout_s)
        self._free = [(self._group, index) for index in range(workers)]

    def _open(self) -> None:
        import ray
        from distributed import Client

        # The scheduler shares the first worker's bundle: it mostly waits, and a CPU of its own
        # would be one that computes nothing.
        scheduler = actor_classes()[0]
        where: dict[str, Any] = (
            {"scheduling_strategy": strategy(self._group, 0)}
            if self._port is None
            # A node's own resource, of which a little pins to it and takes nothing.
            else {"resources": {"node:__internal_head__": 0.001}}
        )
        self._scheduler = scheduler.options(num_cpus=0, **where).remote()
        self.address = ray.get(self._scheduler.start.remote(self._port or 0))
        client: Any = Client
        self.client = client(self.address, set_as_default=False, security=security())
        self._watcher = threading.Thread(target=self._watch, name="dask-lease", daemon=True)
        self._watcher.start()
        self.scale(len(self._free))

    @property
    def workers(self) -> int:
        """How many workers the lease holds or is replacing."""
        return len(self._workers)

    def scale(self, workers: int) -> None:
        """Adds or retires workers, and returns when they are there or gone.

        Idle workers are retired before busy ones, whose tasks are redone elsewhere; both hand
        their results over first. The placement group of the lease's first
        size stays reserved; workers beyond it are placed, and given back, one by one.

        Args:
            workers: How many to have, at least 1.

        Raises:
            LeaseError: `workers` is below 1, or the cluster has no room; nothing changes then.
        """
        if workers < 1:
            raise LeaseError(f"workers={workers}: a lease holds at least 1; leave it to end it")
        with self._lock:
            missing = workers - len(self._workers) - len(self._free)
            if missing > 0:
                require_free(self._size, missing)
            groups = place_singly(self._size, max(0, missing), self._timeout_s)
            self._extra += groups
            self._free += [(group, 0) for group in groups]
            while len(self._workers) < workers:
                self._workers.append(self._start(*self._free.pop(0)))
            if workers < len(self._workers):
                tasks = self.client.processing()
                self._workers.sort(key=lambda worker: not tasks.get(self._address(worker)))
            retired = self._workers[workers:]
            del self._workers[workers:]
            for worker in retired:
                self._retire(worker)
        self._wait_for(workers)

    def adapt(
        self,
        *,
        minimum: int,
        maximum: int,
        backlog_s: float = 1.0,
        idle_s: float = 5.0,
        interval_s: float = 0.5,
    ) -> None:
        """Lets the lease follow its work from now on, until it ends; returns at once.

        It grows while the work at hand would keep its workers busy for longer than `backlog_s`,
        by Dask's own estimate and as far as the cluster has room, and shrinks to the workers
        that have something to do when some have had nothing for `idle_s`. The placement group of
        the lease's first size stays reserved.

        Args:
            minimum: Workers to keep, at least 1.
            maximum: Workers to have at most.
            backlog_s: Work that may wait for each worker.
            idle_s: How long workers may be without work.
            interval_s: Time between two looks.

        Raises:
            LeaseError: The bounds are out of order, a time isn't above 0, or it adapts already.
        """
        if not 1 <= minimum <= maximum or min(backlog_s, idle_s, interval_s) <= 0:
            raise LeaseError(
                f"minimum={minimum}, maximum={maximum}, backlog_s={backlog_s}, idle_s={idle_s}, "
                f"interval_s={interval_s}: minimum is at least 1, maximum at least minimum, and "
                "the times above 0"
            )
        if self._adapter is not None:
            raise LeaseError("this lease adapts already; its bounds hold until it ends")
        self._adapter = threading.Thread(
            target=self._follow,
            args=(minimum, maximum, backlog_s, idle_s, interval_s),
            name="dask-lease-adapt",
            daemon=True,
        )
        self._adapter.start()

    def _follow(
        self, minimum: int, maximum: int, backlog_s: float, idle_s: float, interval_s: float
    ) -> None:
        idle_since: float | None = None
        while not self._closing.wait(interval_s):
            # A scheduler that is slow or gone, and workers that don't come up, are tried again.
            with suppress(OSError):
                asked = self.client.sync(
                    self.client.scheduler.adaptive_target, target_duration=f"{backlog_s}s"
                )
                wanted = min(max(asked, minimum), maximum)
                if wanted >= self.workers:
                    idle_since = None
                    self._grow(wanted)
                elif idle_since is None:
                    idle_since = time.monotonic()
                elif time.monotonic() >= idle_since + idle_s:
                    idle_since = None
                    self.scale(wanted)

    def _grow(self, wanted: int) -> None:
        # Others may have taken the room meanwhile: as many as there is room for.
        for workers in range(wanted, self.workers, -1):
            with suppress(LeaseError):
                self.scale(workers)
                return

    def _address(self, worker: _Worker) -> str | None:
        import ray

        # A worker that is dead or never came up has none.
        with suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            return str(ray.get(worker.actor.address.remote(), timeout=self._timeout_s))
        return None

    def _wait_for(self, workers: int) -> None:
        import ray

        with self._lock:
            current = list(self._workers)
        # A worker that dies while it starts is the watcher's to replace.
        with suppress(ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
            ray.get([worker.actor.address.remote() for worker in current], timeout=self._timeout_s)
        self.client.wait_for_workers(workers, timeout=self._timeout_s)

    def _start(self, group: Any, index: int) -> _Worker:
        threads = str(max(1, int(self._size.cpus)))
        actor = (
            actor_classes()[1]
            .options(
                num_cpus=self._size.cpus,
                num_gpus=self._size.gpus,
                memory=self._size.memory_bytes or None,
                scheduling_strategy=strategy(group, index),
                # One task at a time uses the whole worker; its libraries must not use more.
                runtime_env={
                    "env_vars": {"POLARS_MAX_THREADS": threads, "NUMBA_NUM_THREADS": threads}
                },
            )
            .remote(self.address, self._size.memory_bytes)
        )
        return _Worker(group=group, index=index, actor=actor, ended=actor.run.remote())

    def _retire(self, worker: _Worker) -> None:
        import ray

        # One without an address holds no results to hand over.
        address = self._address(worker)
        if address is not None:
            self.client.retire_workers([address])
        ray.kill(worker.actor)
        if worker.group in self._extra:
            self._extra.remove(worker.group)
            ray.util.remove_placement_group(worker.group)
        else:
            self._free.append((worker.group, worker.index))

    def _watch(self) -> None:
        import ray

        while not self._closing.wait(0.2):
            with self._lock:
                refs = [worker.ended for worker in self._workers]
            if not refs:
                continue
            ended, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
            with self._lock:
                if self._closing.is_set():
                    return
                for place, worker in enumerate(self._workers):
                    if worker.ended in ended:
                        ray.kill(worker.actor)
                        self._workers[place] = self._start(worker.group, worker.index)

    def _close(self) -> None:
        import ray

        self._closing.set()
        for thread in (self._watcher, self._adapter):
            if thread is not None:
                thread.join()
        try:
            if self.client is not None:
                self.client.close()
        finally:
            for actor in [*(worker.actor for worker in self._workers), self._scheduler]:
                if actor is not None:
                    ray.kill(actor)
            for group in [*self._extra, self._group]:
                ray.util.remove_placement_group(group)


@contextmanager
def lease(
    *,
    workers: int,
    cpus: float = 1,
    gpus: float = 0,
    memory_bytes: int = 0,
    placement_timeout_s: float = 30,
    port: int | None = None,
) -> Iterator[Lease]:
    """Leases a Dask cluster from the Ray cluster of this process, and gives it back on exit.

    Args:
        workers: How many Dask workers, at least 1; each runs one task at a time.
        cpus: CPUs of a worker, above 0; also its threads for Polars and numba.
        gpus: GPUs of a worker.
        memory_bytes: Memory reserved for a worker, and where Dask spills; 0 sets no limit.
        placement_timeout_s: How long to wait for resources that others hold.
        port: The scheduler's, on the cluster's head, so that its address lasts; None takes a free
            one, beside the first worker.

    Yields:
        The lease.

    Raises:
        LeaseError: There is no Ray session, or the cluster can't give what was asked.
    """
    import ray

    if not ray.is_initialized():
        raise LeaseError("no Ray session in this process: enter cluster.session.connect() first")
    if workers < 1 or cpus <= 0 or gpus < 0 or memory_bytes < 0:
        raise LeaseError(
            f"workers={workers}, cpus={cpus}, gpus={gpus}, memory_bytes={memory_bytes}: workers "
            "is at least 1, cpus above 0, gpus and memory_bytes at least 0"
        )
    size = Size(cpus=cpus, gpus=gpus, memory_bytes=memory_bytes)
    held = Lease(size, workers, placement_timeout_s, port)
    try:
        held._open()
        yield held
    finally:
        held._close()


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A Dask cluster that was there before and stays, such as an environment's standing lease."""

    client: Any
    workers: int


@contextmanager
def attach(address: str) -> Iterator[Standing]:
    """Connects to a Dask cluster, and on exit ends the connection only.

    Args:
        address: The scheduler's, `tcp://host:port` or `tls://host:port`.

    Raises:
        LeaseError: It has no workers.
        OSError: It doesn't answer.
    """
    from distributed import Client

    connect: Any = Client
    with connect(address, timeout=10, set_as_default=False, security=security()) as client:
        workers = len(client.scheduler_info(n_workers=-1)["workers"])
        if not workers:
            raise LeaseError(f"the Dask cluster at {address} has no workers; add some, or wait")
        yield Standing(client=client, workers=workers)


Workers = Lease | Standing


def map_partitions(
    function: Callable[[Any], Any], parts: Iterable[Any], lease: Workers | None
) -> Iterator[Any]:
    """Runs `function` over each part; results come in the order of the parts.

    Lazy: work starts at the first `next`, and a few parts a worker are in flight, so neither
    parts nor results need fit in memory together. Parts travel inside their tasks, so a lost
    worker's are sent again.

    Args:
        function: Takes a part; picklable, and safe to run twice.
        parts: Picklable parts.
        lease: Where to run; None runs the parts here, in turn.

    Yields:
        `function(part)` for each part. An error in `function` is raised here.
    """
    if lease is None:
        yield from map(function, parts)
        return
    pending: deque[Any] = deque()
    try:
        for part in parts:
            pending.append(lease.client.submit(function, part, pure=False))
            if len(pending) >= 3 * lease.workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
