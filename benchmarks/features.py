"""Features of purchase events at many cutoffs: the kernel against plans written by hand.

    python -m benchmarks.features --events 10000000 --cutoffs 12 --json FILE

The peers are the plans in ../shared/peers/features, in their fastest settings, with the events read
once and kept in memory; each runs in a process of its own, warmed up on a few events, and its best
time counts. Every contender reads Parquet and leaves one table in memory: 50 features and a label.
Where ../shared is absent, the events are this module's own, and the one peer is the project's
Polars form.

Featuretools runs at 100,000 events, on the lifetime and windowed aggregations that it has. Its
dependencies exclude the project's, so it has an environment of its own:
LIFTYARD_PEER_ENVIRONMENTS names a folder with `featuretools/`, a virtual environment that holds
featuretools, pyarrow and what it needs; else it is skipped, with the reason in the JSON.

More than 30 million events or 24 cutoffs make a table larger than memory: ours then runs in parts
(`compute_parts`), each dropped once it is made, beside the same at 10 million events and 12
cutoffs, and the peers stay out.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.features_contenders import contend, worst_difference
from benchmarks.features_peers import featuretools_figures
from benchmarks.features_work import PEERS, SPEC, cutoffs, generate, ours


def online_figures(path: Path, when: datetime) -> dict[str, Any]:
    """One customer of about 50 events at a time, as serving does; equal to `compute`'s row."""
    from models.features import FeatureSpec, compute, online

    spec = FeatureSpec.model_validate(SPEC)
    events = pl.scan_parquet(path).head(1_000_000).collect()
    counts = events["customer_id"].value_counts(sort=True).filter(pl.col("count") <= 50)
    own = events.filter(pl.col("customer_id") == counts["customer_id"][0])
    rows, one = own.to_dicts(), online(spec)
    seconds = []
    for _ in range(3_000):
        began = time.perf_counter()
        found = one.features(rows, when)
        seconds.append(time.perf_counter() - began)
    trained = compute(own, spec, [when]).drop("customer_id", "cutoff").row(0, named=True)
    return {
        "online_events": own.height,
        "online_median_s": float(np.median(seconds)),
        "online_p99_s": float(np.quantile(seconds, 0.99)),
        "online_equal": found == trained,
    }


def _compile(send: Any) -> None:
    from models.features import FeatureSpec, compile_kernel

    send.send(compile_kernel(FeatureSpec.model_validate(SPEC), labels=True))


def compile_figures(folder: Path) -> dict[str, float]:
    """Compiling everything from nothing, and loading it from disk in the next process."""
    caches = {"LIFTYARD_CACHE": str(folder / "kernels"), "NUMBA_CACHE_DIR": str(folder / "numba")}
    return {
        "compile_s": _with_environment(caches, _compile),
        "load_compiled_s": _with_environment(caches, _compile),
    }


def _with_environment(extra: dict[str, str], run: Callable[..., None], *arguments: Any) -> Any:
    """What `run` sends from a process with more in its environment."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    before = dict(os.environ)
    os.environ.update(extra)
    process = context.Process(target=run, args=(*arguments, send))
    process.start()
    os.environ.clear()
    os.environ.update(before)
    send.close()
    result = receive.recv()
    process.join()
    return result


def _partition(when: list[datetime], path: str) -> tuple[int, int]:
    """Rows of one partition's table, and a checksum of its columns' bytes."""
    table, check = ours(Path(path), when), 0
    for column in table:
        check = zlib.crc32(column.to_physical().fill_null(-1).to_numpy().tobytes(), check)
    return table.height, check


def _alone(when: list[datetime], paths: list[str], send: Any) -> None:
    _partition(when, paths[0])
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        found = [_partition(when, path) for path in paths]
        seconds.append(time.perf_counter() - began)
    send.send((min(seconds), found))


def lease_figures(path: Path, when: list[datetime], folder: Path) -> dict[str, Any]:
    """Partitions by the hash of the customer: one process on one thread, then 2 Dask workers."""
    from cluster import dask_lease, session, storage

    parted = storage.with_partition(pl.scan_parquet(path), "customer_id", 16)
    where = folder / "parts"
    parted.sink_parquet(pl.PartitionBy(where, key=storage.PART, include_key=False), mkdir=True)
    paths = [str(p) for p in sorted(where.rglob("*.parquet"))]
    one_thread = {"POLARS_MAX_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    alone_s, alone = _with_environment(one_thread, _alone, when, paths)
    work = partial(_partition, when)
    with session.connect(cpus=2), dask_lease.lease(workers=2) as lease:
        # Each worker compiles, or loads, before the clock starts.
        list(dask_lease.map_partitions(work, paths, lease))
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            spread = list(dask_lease.map_partitions(work, paths, lease))
            seconds.append(time.perf_counter() - began)
        lease_s = min(seconds)
    return {
        "one_thread_s": alone_s,
        "lease_2_workers_s": lease_s,
        "ratio_lease": alone_s / lease_s,
        "lease_equal": spread == alone,
    }


def machine() -> dict[str, Any]:
    """Hardware and versions."""
    model = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    names = ["polars", "duckdb", "pandas", "numba", "numpy", "pyarrow"]
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def cuda_figures(path: Path, when: list[datetime], folder: Path) -> dict[str, Any]:
    """The kernel on a GPU, copy of the table to the host included; equal to the CPU's table."""
    if importlib.util.find_spec("cudf") is None:
        return {"cuda": "skipped: cudf isn't installed"}
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    card = subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()
    run = contend("ours_cuda", path, when, folder)
    return {
        "cuda": card,
        "cuda_s": min(run["s"]),
        "cuda_worst_difference": worst_difference(folder, "ours_cuda"),
        "runs_cuda_s": run["s"],
    }


def race(path: Path, when: list[datetime], folder: Path) -> dict[str, Any]:
    """Ours against the peers on one file."""
    peers = ["polars_masked", "polars_sorted", "duckdb_count", "duckdb_bits"]
    if not PEERS.exists():
        peers = ["polars_form"]
    runs = {
        name: contend(name, path, when, folder)
        for name in ("scan", "scan_streaming", "ours", *peers)
    }
    best = {name: min(run["s"]) for name, run in runs.items()}
    polars_s = min(s for name, s in best.items() if name.startswith("polars"))
    duckdb_s = min((s for name, s in best.items() if name.startswith("duckdb")), default=None)
    off = {name: worst_difference(folder, name) for name in peers}
    return {
        "ours_s": best["ours"],
        "scan_s": best["scan"],
        "scan_streaming_s": best["scan_streaming"],
        "polars_best_s": polars_s,
        "duckdb_best_s": duckdb_s,
        "ratio_polars": polars_s / best["ours"],
        "ratio_duckdb": duckdb_s / best["ours"] if duckdb_s else None,
        "ratio_scan": best["ours"] / best["scan"],
        "peak_rss_bytes": runs["ours"]["peak_rss_bytes"],
        "rows": runs["ours"]["rows"],
        "worst_difference": off,
        "equal": max(off.values()) < 1e-4,
        "runs_s": {name: run["s"] for name, run in runs.items()},
        # All threads' time: what is left of a comparison where others use the cores.
        "runs_cpu_s": {name: run["cpu_s"] for name, run in runs.items()},
    }


def main() -> None:
    """Runs the race and prints, or writes, its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=10_000_000)
    parser.add_argument("--cutoffs", type=int, default=12)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument(
        "--data", type=Path, default=Path(tempfile.gettempdir()) / "liftyard-benchmarks",
        help="where generated events are kept",
    )  # fmt: skip
    chosen = parser.parse_args()
    path, when = generate(chosen.events, chosen.data), cutoffs(chosen.cutoffs)
    figures: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "events": chosen.events,
        "cutoffs": chosen.cutoffs,
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory(dir=chosen.data) as made:
        folder = Path(made)
        if chosen.events > 30_000_000 or chosen.cutoffs > 24:
            base = generate(min(chosen.events, 10_000_000), chosen.data)
            large = contend("ours_in_parts", path, when, folder)
            small = contend("ours_in_parts", base, cutoffs(12), folder)
            ratio = min(large["s"]) / min(small["s"])
            figures |= {
                "ours_s": min(large["s"]),
                "ours_10m_12_cutoffs_s": min(small["s"]),
                "ratio_to_12_cutoffs": ratio,
                "ratio_per_event": ratio * 10_000_000 / chosen.events,
                "peak_rss_bytes": large["peak_rss_bytes"],
                "runs_s": {"large": large["s"], "small": small["s"]},
                "runs_cpu_s": {"large": large["cpu_s"], "small": small["cpu_s"]},
            }
        else:
            figures |= race(path, when, folder) | compile_figures(folder)
            figures |= cuda_figures(path, when, folder)
            size = min(chosen.events, 1_000_000)
            fewer = generate(size, chosen.data)
            (folder / "pandas").mkdir()
            pandas = contend("pandas_masked", fewer, when, folder / "pandas")
            mine = contend("ours", fewer, when, folder / "pandas")
            off = worst_difference(folder / "pandas", "pandas_masked")
            figures |= {
                "pandas_events": size,
                "pandas_s": min(pandas["s"]),
                "ours_at_pandas_events_s": min(mine["s"]),
                "ratio_pandas": min(pandas["s"]) / min(mine["s"]),
                "equal": figures["equal"] and off < 1e-4,
            }
            tiny = generate(min(chosen.events, 100_000), chosen.data)
            figures |= featuretools_figures(tiny, when, folder)
            figures |= online_figures(path, when[-1])
            figures |= lease_figures(path, when, folder)
    text = json.dumps(figures, indent=2)
    print(text)
    if chosen.json:
        chosen.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
