"""What a pipeline's steps share: the run, the cluster and what is lent of it, the registry."""

import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from cluster import dask_lease, session
from cluster.device import Device
from cluster.environment import Environment
from jobs import sweep
from jobs.config import Pipeline
from jobs.runs import Run, Step
from models.registry import Registry

# From so many events on, features are spread over Dask workers unasked: one process would hold
# tens of gigabytes.
DASK_EVENTS = 100_000_000

LentT = TypeVar("LentT", bound=dask_lease.Workers)


@dataclass(kw_only=True)
class Work:
    """One attempt at a run; what it needs of the cluster is had when first asked for.

    Attributes:
        run: With the steps that are done.
        stack: Closed when the attempt ends.
    """

    pipeline: Pipeline
    run: Run
    environment: Environment
    base: Path
    console: Console
    device: Device
    dask_workers: int | None
    stack: ExitStack
    _leased: ExitStack = field(default_factory=ExitStack)
    _warm: ExitStack = field(default_factory=ExitStack)

    @property
    def tables(self) -> str:
        return self.environment.storage_root

    @cached_property
    def cluster(self) -> session.Session:
        """The Ray cluster, connected to until the run's end."""
        with self.console.status("connecting to Ray"):
            return self.stack.enter_context(session.connect(address=self.environment.ray_address))

    @cached_property
    def lease(self) -> dask_lease.Workers | None:
        """Dask workers for the features, if any are wanted; the sweep ends them."""
        standing = self.environment.dask_address
        workers = self.dask_workers
        if standing is not None and workers is None:
            return self._until_sweep(dask_lease.attach(standing))
        if workers is None:
            validated = self.run.step("validate").detail
            read = {each.table for each in self.pipeline.features.values()}
            events = sum(told["rows"] for table, told in validated.items() if table in read)
            workers = int(self.cluster.cpus) if events >= DASK_EVENTS else 0
        if not workers or not self.pipeline.features:
            return None
        # The cluster before the lease, so that it ends after it.
        _ = self.cluster
        return self._until_sweep(dask_lease.lease(workers=workers))

    def _until_sweep(self, lent: AbstractContextManager[LentT]) -> LentT:
        self.stack.callback(self._leased.close)
        return self._leased.enter_context(lent)

    @cached_property
    def warm(self) -> sweep.Pool:
        """Actors that train, one a GPU or CPU; the sweep starts them and `cool` ends them."""
        # A lease's workers hold CPUs that the actors would wait for.
        self._leased.close()
        cuda = self.device.kind == "cuda"
        gpus = self.pipeline.sweep.gpus if cuda and self.cluster.gpus else 0
        workers = int(self.cluster.gpus / gpus) if gpus else int(self.cluster.cpus)
        self.stack.callback(self._warm.close)
        with self.console.status("waiting for room on the cluster"):
            pool = self._warm.enter_context(sweep.pool(max(1, workers), gpus=gpus))
        if gpus:
            where = ", ".join(f"{at.node} GPU {' '.join(at.gpus)}" for at in pool.places())
            self.console.print(f"models train on {where}")
        elif cuda:
            self.console.print("models train on CPUs: Ray has no GPU to give out on this cluster")
        return pool

    def cool(self) -> None:
        """Ends the actors, for what needs their CPUs."""
        self._warm.close()

    @cached_property
    def registry(self) -> Registry:
        return Registry(self.environment.tracking_uri)


def step(
    name: str,
    start: float,
    rows_in: int,
    rows_out: int,
    detail: dict[str, Any],
    engine: str = "polars-streaming",
    device: str = "cpu",
) -> Step:
    """What a step did, timed from `start`."""
    return Step(
        name=name,
        seconds=round(time.perf_counter() - start, 3),
        rows_in=rows_in,
        rows_out=rows_out,
        engine=engine,
        device=device,
        detail=detail,
    )
