"""Contenders of the feature benchmark, each in a process of its own; their tables compared."""

import multiprocessing
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.features_peers import (
    duckdb_bits,
    duckdb_count,
    pandas_masked,
    polars_form,
    polars_masked,
    polars_sorted,
)
from benchmarks.features_work import NAMES, ours, ours_cuda, ours_in_parts, scan, scan_streaming

CONTENDERS: dict[str, Callable[[Path, list[datetime]], pl.DataFrame]] = {
    f.__name__: f
    for f in (
        ours, ours_in_parts, ours_cuda, scan, scan_streaming, polars_masked, polars_sorted,
        duckdb_count, duckdb_bits, pandas_masked, polars_form,
    )
}  # fmt: skip


def _contend(name: str, path: Path, when: list[datetime], folder: Path, send: Any) -> None:
    """In a process of its own: warm-up, then 2 or 3 runs; the table goes to a file.

    Two where the first takes up to 60 s, a third within 20 s; one beyond.
    """
    run = CONTENDERS[name]
    few = folder / "few.parquet"
    if not few.exists():
        pl.scan_parquet(path).head(2_000).sink_parquet(few)
    run(few, when)
    seconds: list[float] = []
    cpu: list[float] = []
    table = pl.DataFrame()
    while len(seconds) < 3 and sum(seconds) < (0.1, 60, 20)[len(seconds)]:
        # The one before makes room first.
        table = pl.DataFrame()
        began, cpu_began = time.perf_counter(), time.process_time()
        table = run(path, when)
        seconds.append(time.perf_counter() - began)
        cpu.append(time.process_time() - cpu_began)
    # Of this process alone; what getrusage says begins with what its parent had.
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    rows = table.height
    if "scan" not in name:
        table.write_ipc(folder / f"{name}.arrow")
    send.send({"s": seconds, "cpu_s": cpu, "peak_rss_bytes": peak, "rows": rows})


def contend(name: str, path: Path, when: list[datetime], folder: Path) -> dict[str, Any]:
    """Runs one contender; seconds of each run, peak memory, rows."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_contend, args=(name, path, when, folder, send))
    process.start()
    send.close()
    try:
        result: dict[str, Any] = receive.recv()
    except EOFError:
        process.join()
        raise SystemExit(f"{name} died with exit code {process.exitcode}") from None
    process.join()
    print(
        f"{name:16} {min(result['s']):8.2f} s  {result['peak_rss_bytes'] / 2**30:6.2f} GiB",
        flush=True,
    )
    return result


def worst_difference(folder: Path, peer: str, mine: str = "ours") -> float:
    """The largest relative difference between two tables; infinite where rows or nulls differ."""
    left = pl.scan_ipc(folder / f"{mine}.arrow").rename(NAMES, strict=False)
    right = pl.scan_ipc(folder / f"{peer}.arrow").rename(NAMES, strict=False)
    moments = left.select(pl.col("cutoff").unique()).collect()["cutoff"]
    shared = [n for n in NAMES.values() if n in right.collect_schema()]
    worst = 0.0
    for moment in moments:
        a, b = (
            t.filter(pl.col("cutoff") == moment)
            .select("customer_id", *[pl.col(n).cast(pl.Float64).fill_nan(None) for n in shared])
            .collect()
            .sort("customer_id")
            for t in (left, right)
        )
        if not a["customer_id"].equals(b["customer_id"].cast(a["customer_id"].dtype)):
            return float("inf")
        for n in shared:
            if not a[n].is_null().equals(b[n].is_null()):
                return float("inf")
            # Near 0, a thousandth of a unit is 1; sums of cents leave noise there.
            scale = pl.max_horizontal(a[n].abs(), pl.lit(1e-3))
            off = pl.select(((a[n] - b[n]).abs() / scale).max()).item()
            worst = max(worst, off or 0.0)
    return worst
