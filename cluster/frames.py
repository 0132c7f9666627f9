"""Runs a Polars plan on the CPU or on GPUs, and says which ran it and why.

No engine falls back in silence. cudf_polars has two ways to do so, and both are shut: a plan that
it can't translate raises (`raise_on_fail`), and so does an operation that it can't partition
(`fallback_mode`). A caller may ask for the CPU then (`or_cpu`), and the result says why.
The GPU calls follow cudf_polars 26.10.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from cluster.device import Device

Spread = Literal["one", "dask", "ray"]


@dataclass(frozen=True, kw_only=True)
class Ran:
    """What ran a plan.

    Attributes:
        engine: `polars-streaming`, `cudf-polars`, `cudf-polars-dask` or `cudf-polars-ray`.
        device: `cpu` or `cuda`.
        reason: Why this engine and device.
        seconds: Wall time.
    """

    engine: str
    device: str
    reason: str
    seconds: float


def collect(
    plan: pl.LazyFrame,
    device: Device,
    *,
    spread: Spread = "one",
    dask_client: Any = None,
    or_cpu: bool = False,
) -> tuple[pl.DataFrame, Ran]:
    """Run a plan.

    Args:
        plan: The plan.
        device: From `cluster.device.choose`.
        spread: On CUDA, `one` GPU, all GPUs of a `dask` cluster, or all GPUs of the `ray` cluster
            that this process is connected to. On the CPU only `one` is allowed: work is spread
            there partition by partition (`cluster.dask_lease.map_partitions`).
        dask_client: The `distributed.Client` for `dask`.
        or_cpu: Run on the CPU what the GPU engine doesn't know; the reason then says so.

    Returns:
        The result in host memory, and what ran it.

    Raises:
        ValueError: `spread` doesn't fit the device, or `dask` came without a client.
        polars.exceptions.ComputeError: On CUDA, the plan has an operation that the GPU engine
            doesn't know, and `or_cpu` is false.
    """
    start = time.perf_counter()
    if device.kind == "cuda" and or_cpu:
        try:
            return collect(plan, device, spread=spread, dask_client=dask_client)
        except (pl.exceptions.ComputeError, NotImplementedError) as error:
            reason = f"the GPU engine doesn't know this plan ({error})"
            return collect(plan, Device(kind="cpu", reason=reason))
    if device.kind == "cpu":
        if spread != "one":
            raise ValueError(
                f"spread {spread!r} needs CUDA, and the device is cpu ({device.reason}): "
                "use spread='one', or map partitions over a Dask lease"
            )
        frame, engine = plan.collect(engine="streaming"), "polars-streaming"
    else:
        with _gpu_engine(spread, dask_client) as (gpu, engine):
            frame = plan.collect(engine=gpu)
    return frame, Ran(
        engine=engine,
        device=device.kind,
        reason=device.reason,
        seconds=time.perf_counter() - start,
    )


@contextmanager
def _gpu_engine(spread: Spread, dask_client: Any) -> Iterator[tuple[Any, str]]:
    raising = {"fallback_mode": "raise"}
    if spread == "one":
        # In memory nothing is partitioned, so there is no fallback_mode to set.
        yield pl.GPUEngine(executor="in-memory", raise_on_fail=True), "cudf-polars"
    elif spread == "dask":
        if dask_client is None:
            raise ValueError("spread 'dask' needs dask_client, the client of a cluster of GPUs")
        from cudf_polars.engine.dask import DaskEngine

        with DaskEngine(
            dask_client=dask_client,
            executor_options=raising,
            engine_options={"raise_on_fail": True},
        ) as engine:
            yield engine, "cudf-polars-dask"
    elif spread == "ray":
        from cudf_polars.engine.ray import RayEngine

        with RayEngine(executor_options=raising, engine_options={"raise_on_fail": True}) as engine:
            yield engine, "cudf-polars-ray"
    else:
        raise ValueError(f"spread {spread!r}: allowed are 'one', 'dask' and 'ray'")
