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
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import polars as pl

PEERS_VARIABLE = "LIFTYARD_PEER_ENVIRONMENTS"
PEERS = Path(__file__).parents[2] / "shared" / "peers" / "features"
HORIZON_DAYS = 90
WINDOWS = (7, 30, 90, 365)
CATEGORIES = [f"cat_{i:02d}" for i in range(8)]
CHANNELS = ["web", "store", "app", "phone"]
MONTHS = [datetime(2024, m, 1) for m in range(4, 13)] + [datetime(2025, m, 1) for m in (1, 2, 3)]
SPEC = {
    "entity": "customer_id",
    "time": "ts",
    "name": "buys",
    "measures": {"amount": "amount"},
    "categories": {
        "category": {"column": "category", "values": CATEGORIES},
        "channel": {"column": "channel", "values": CHANNELS},
    },
    "distinct": {"category": "category"},
    "windows": [f"{w}d" for w in WINDOWS],
    "aggregations": ["count", "sum", "mean", "max", "std", "distinct"],
    "lifetime": [
        *("count", "sum", "mean", "max", "std", "distinct", "recency", "tenure"),
        *("gap_mean", "gap_std", "gap_max", "overdue"),
    ],
    "trends": [["30d", "90d"], ["90d", "365d"]],
    "labels": [{"name": "label", "any": f"{HORIZON_DAYS}d"}],
}
# Ours: the peers' name.
NAMES = {
    "buys_count_lifetime": "freq",
    "amount_sum_lifetime": "monetary",
    "amount_mean_lifetime": "amt_mean",
    "amount_max_lifetime": "amt_max",
    "amount_std_lifetime": "amt_std",
    "category_distinct_lifetime": "n_cat",
    "buys_tenure_days": "tenure",
    "buys_recency_days": "recency",
    **{f"buys_gap_{k}_days": f"gap_{k}" for k in ("mean", "std", "max")},
    "buys_overdue_ratio": "rec_ratio",
    "amount_trend_30d_90d": "tr_30_90",
    "buys_trend_90d_365d": "tr_90_365",
    **{f"category_share_{c}": f"share_{c}" for c in CATEGORIES},
    **{f"channel_share_{c}": f"chshare_{c}" for c in CHANNELS},
    **{f"buys_count_{w}d": f"cnt_{w}" for w in WINDOWS},
    **{f"category_distinct_{w}d": f"ncat_{w}" for w in WINDOWS},
    **{f"amount_{k}_{w}d": f"{k}_{w}" for w in WINDOWS for k in ("sum", "mean", "max", "std")},
    "label": "label",
}


def cutoffs(count: int) -> list[datetime]:
    """The last `count` of the peers' months, or, for more of them, even steps over their year."""
    if count <= len(MONTHS):
        return MONTHS[-count:]
    step = (MONTHS[-1] - MONTHS[0]) / (count - 1)
    return [MONTHS[0] + timedelta(seconds=round(i * step.total_seconds())) for i in range(count)]


def generate(events: int, folder: Path) -> Path:
    """A Parquet file of events, made unless it is there."""
    millions = f"{events / 1e6:g}"
    path = folder / f"ev_{millions}m.parquet"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        script = PEERS / "generate_events.py"
        if script.exists():
            subprocess.run([sys.executable, script, millions], cwd=folder, check=True)
        else:
            _own_events(events).write_parquet(path, row_group_size=1_000_000)
    return path


def _own_events(events: int) -> pl.DataFrame:
    rng = np.random.default_rng(7)
    customers = max(1_000, events // 20)
    rate = np.cumsum(rng.gamma(0.6, size=customers) + 0.02)
    who = np.searchsorted(rate, rng.random(events) * rate[-1]).clip(0, customers - 1)
    first = int(datetime(2023, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
    ts = np.sort(rng.integers(0, 911 * 86_400, events)) * 1_000_000 + first
    weight = np.cumsum(1 / np.arange(1, 21) ** 0.9)
    category = np.searchsorted(weight, rng.random(events) * weight[-1])
    channel = np.searchsorted([0.5, 0.8, 0.95], rng.random(events))
    return pl.DataFrame(
        {
            "customer_id": who,
            "ts": pl.Series(ts).cast(pl.Datetime("us")),
            "amount": np.round(rng.lognormal(3.2, 0.9, events), 2),
            "category": pl.Series([f"cat_{i:02d}" for i in range(20)]).gather(category),
            "channel": pl.Series(CHANNELS).gather(channel),
        }
    )


def ours(path: Path, when: list[datetime]) -> pl.DataFrame:
    """The kernel, from Parquet to one table."""
    from models.features import FeatureSpec, compute

    spec = FeatureSpec.model_validate(SPEC)
    return compute(pl.scan_parquet(path), spec, when, labels=True)


def ours_in_parts(path: Path, when: list[datetime]) -> pl.DataFrame:
    """The kernel in bounded memory; leaves only the number of rows and a sum to check."""
    from models.features import FeatureSpec, compute_parts

    spec = FeatureSpec.model_validate(SPEC)
    rows, total = 0, 0.0
    for part in compute_parts(pl.scan_parquet(path), spec, when, labels=True):
        rows += part.height
        total += float(part["amount_sum_365d"].cast(pl.Float64).sum())
    return pl.DataFrame({"rows": [rows], "total": [total]})


def ours_cuda(path: Path, when: list[datetime]) -> pl.DataFrame:
    """The kernel on a GPU, from Parquet to one table that stays there."""
    import cudf

    from models.features import FeatureSpec, cuda

    spec = FeatureSpec.model_validate(SPEC)
    table = cuda.compute(cudf.read_parquet(path), spec, when, labels=True)
    # The table ends where the CPU's does, to be compared; the clock runs on through it.
    return pl.from_arrow(table.to_arrow())  # type: ignore[return-value]


def scan(path: Path, when: list[datetime]) -> pl.DataFrame:
    """Reading the columns, and nothing else."""
    return pl.scan_parquet(path).collect()


def scan_streaming(path: Path, when: list[datetime]) -> pl.DataFrame:
    """The same by the streaming engine, which strings cost less."""
    return pl.scan_parquet(path).collect(engine="streaming")


def polars_masked(path: Path, when: list[datetime]) -> pl.DataFrame:
    """The fastest Polars found by hand, once a cutoff."""
    return _polars(pl.scan_parquet(path).collect(engine="streaming"), when, presorted=False)


def polars_sorted(path: Path, when: list[datetime]) -> pl.DataFrame:
    """The same over events sorted once."""
    events = pl.scan_parquet(path).sort("customer_id", "ts").collect(engine="streaming")
    return _polars(events, when, presorted=True)


def _polars(events: pl.DataFrame, when: list[datetime], *, presorted: bool) -> pl.DataFrame:
    peer, lazy, parts = _peer(), events.lazy(), []
    for moment in when:
        ahead = pl.col("ts").is_between(
            moment, moment + timedelta(days=HORIZON_DAYS), closed="left"
        )
        label = lazy.filter(ahead).select("customer_id").unique().with_columns(label=pl.lit(1))
        features = peer.masked(lazy, moment, presorted=presorted)
        joined = features.join(label, on="customer_id", how="left")
        parts.append(
            joined.with_columns(pl.col("label").fill_null(0), cutoff=pl.lit(moment)).collect()
        )
    return pl.concat(parts)


def duckdb_count(path: Path, when: list[datetime]) -> pl.DataFrame:
    """DuckDB with count(distinct)."""
    return _duckdb(path, when, "count")


def duckdb_bits(path: Path, when: list[datetime]) -> pl.DataFrame:
    """DuckDB with distinct counts by bits, its fastest form."""
    return _duckdb(path, when, "bits")


def _duckdb(path: Path, when: list[datetime], distinct: str) -> pl.DataFrame:
    import duckdb

    peer, parts = _peer(), []
    with duckdb.connect() as base:
        base.execute(f"CREATE TABLE ev AS SELECT * FROM read_parquet('{path}')")
        for moment in when:
            until = moment + timedelta(days=HORIZON_DAYS)
            query = (
                f"SELECT f.*, (l.customer_id IS NOT NULL)::INT AS label, "
                f"TIMESTAMP '{moment}' AS cutoff "
                f"FROM ({peer.duck_sql(moment, 'ev', distinct=distinct)}) f "
                f"LEFT JOIN (SELECT DISTINCT customer_id FROM ev WHERE ts >= TIMESTAMP '{moment}' "
                f"AND ts < TIMESTAMP '{until}') l USING (customer_id)"
            )
            found = pl.from_arrow(base.sql(query).to_arrow_table())
            assert isinstance(found, pl.DataFrame)
            parts.append(found)
    return pl.concat(parts)


def pandas_masked(path: Path, when: list[datetime]) -> pl.DataFrame:
    """pandas over events sorted once: masked columns and one group-by a cutoff."""
    import pandas as pd

    events = pd.read_parquet(path).sort_values(["customer_id", "ts"], kind="stable")
    events["category"] = events["category"].astype("category").cat.codes.astype("float64")
    gap = events["ts"].diff().dt.total_seconds() / 86_400
    events["gap"] = gap.where(events["customer_id"].eq(events["customer_id"].shift()))
    kinds = dict(
        enumerate(sorted(pd.read_parquet(path, columns=["category"])["category"].unique()))
    )
    codes = {name: code for code, name in kinds.items()}
    parts = []
    for moment in when:
        past = events[events["ts"] < moment].copy()
        how: dict[str, tuple[str, str]] = {
            "freq": ("amount", "size"),
            "monetary": ("amount", "sum"),
            "amt_mean": ("amount", "mean"),
            "amt_max": ("amount", "max"),
            "amt_std": ("amount", "std"),
            "n_cat": ("category", "nunique"),
            "first": ("ts", "min"),
            "last": ("ts", "max"),
            **{f"gap_{k}": ("gap", k) for k in ("mean", "std", "max")},
        }
        for w in WINDOWS:
            inside = past["ts"] >= moment - timedelta(days=w)
            past[f"a{w}"] = past["amount"].where(inside)
            past[f"c{w}"] = past["category"].where(inside)
            how |= {f"{k}_{w}": (f"a{w}", k) for k in ("sum", "mean", "max", "std")}
            how |= {f"cnt_{w}": (f"a{w}", "count"), f"ncat_{w}": (f"c{w}", "nunique")}
        for name in CATEGORIES:
            past[f"k{name}"] = past["amount"].where(past["category"] == codes.get(name, -1), 0.0)
            how[f"share_{name}"] = (f"k{name}", "sum")
        for name in CHANNELS:
            past[f"h{name}"] = past["amount"].where(past["channel"] == name, 0.0)
            how[f"chshare_{name}"] = (f"h{name}", "sum")
        out = past.groupby("customer_id", sort=False).agg(**how)
        shares = [f"share_{c}" for c in CATEGORIES] + [f"chshare_{c}" for c in CHANNELS]
        out[shares] = out[shares].div(out["monetary"], axis=0)
        out["tenure"] = (moment - out.pop("first")).dt.total_seconds() / 86_400
        out["recency"] = (moment - out.pop("last")).dt.total_seconds() / 86_400
        out["rec_ratio"] = out["recency"] / out["gap_mean"]
        out["tr_30_90"] = out["sum_30"] / out["sum_90"]
        out["tr_90_365"] = out["cnt_90"] / out["cnt_365"]
        ahead = events["ts"].between(
            moment, moment + timedelta(days=HORIZON_DAYS), inclusive="left"
        )
        out["label"] = out.index.isin(events.loc[ahead, "customer_id"].unique()).astype("int32")
        parts.append(out.reset_index().assign(cutoff=moment))
    return pl.from_pandas(pd.concat(parts, ignore_index=True))


def polars_form(path: Path, when: list[datetime]) -> pl.DataFrame:
    """The project's own Polars form, without the label: the peer where ../shared is absent."""
    from models.features import FeatureSpec, describe, engine
    from models.features.events import micros

    spec = FeatureSpec.model_validate(SPEC)
    known = [f for f in describe(spec) if f.name in NAMES]
    moments = [micros(moment) for moment in when]
    found = engine.at_cutoffs(pl.scan_parquet(path), spec, known, moments)
    return found.rename({k: v for k, v in NAMES.items() if k in found.columns})


FEATURETOOLS = """
import json, sys, time, warnings
from datetime import datetime
warnings.simplefilter("ignore")
import featuretools, pandas as pd
path, out, when, windows = json.loads(sys.argv[1])
events = pd.read_parquet(path).reset_index(names="event")
when = [datetime.fromisoformat(moment) for moment in when]
began = time.perf_counter()
shop = featuretools.EntitySet("shop")
shop.add_dataframe(
    dataframe_name="e", dataframe=events, index="event", time_index="ts",
    logical_types={"category": "Categorical", "channel": "Categorical"},
)
shop.normalize_dataframe(
    base_dataframe_name="e", new_dataframe_name="customers", index="customer_id"
)
shop.add_last_time_indexes()
rows = pd.concat(
    pd.DataFrame(
        {"customer_id": events.loc[events["ts"] < m, "customer_id"].drop_duplicates(), "time": m}
    )
    for m in when
)
tables = {
    window: featuretools.dfs(
        entityset=shop, target_dataframe_name="customers", cutoff_time=rows.copy(),
        agg_primitives=["count", "sum", "mean", "max", "std", "num_unique"], trans_primitives=[],
        training_window=window and f"{window} days", include_cutoff_time=False,
        cutoff_time_in_index=True,
    )[0]
    for window in [None, *windows]
}
seconds = time.perf_counter() - began
names = {"COUNT(e)": "cnt", "SUM(e.amount)": "sum", "MEAN(e.amount)": "mean",
         "MAX(e.amount)": "max", "STD(e.amount)": "std", "NUM_UNIQUE(e.category)": "ncat"}
whole = pd.concat(
    [t[[*names]].astype(float).rename(columns=lambda c: f"{names[c]}_{w or 'lifetime'}")
     for w, t in tables.items()], axis=1,
).reset_index()
whole.to_parquet(out)
print(json.dumps(seconds))
"""


def featuretools_figures(path: Path, when: list[datetime], folder: Path) -> dict[str, Any]:
    """Featuretools' time on a small file, beside ours; the features that both have are equal."""
    root = os.environ.get(PEERS_VARIABLE)
    python = Path(root or "", "featuretools", "bin", "python")
    if root is None or not python.exists():
        reason = f"skipped: {PEERS_VARIABLE} names no folder with featuretools/bin/python"
        return {"featuretools": reason}
    events = pl.read_parquet(path)
    out = folder / "featuretools.parquet"
    asked = json.dumps([str(path), str(out), [m.isoformat() for m in when], WINDOWS])
    told = subprocess.run(
        [str(python), "-c", FEATURETOOLS, asked], check=True, capture_output=True, text=True
    )
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        mine = ours(path, when)
        seconds.append(time.perf_counter() - began)
    theirs = pl.read_parquet(out).rename({"time": "cutoff"})
    theirs = theirs.with_columns(pl.col("cutoff").cast(mine.schema["cutoff"]))
    kinds = {
        "cnt": "buys_count",
        "ncat": "category_distinct",
        **{how: f"amount_{how}" for how in ("sum", "mean", "max", "std")},
    }
    spans = {"lifetime": "lifetime", **{str(w): f"{w}d" for w in WINDOWS}}
    both = mine.join(theirs, on=["customer_id", "cutoff"], how="inner", validate="1:1")
    worst = 0.0
    for span, own in spans.items():
        for how, name in kinds.items():
            a = both[f"{name}_{own}"].cast(pl.Float64)
            # Where a window is empty, what has no value is null in ours and 0 or null in theirs.
            b = both[f"{how}_{span}"].fill_nan(None)
            off = (a - b).abs() / pl.select(pl.max_horizontal(a.abs(), pl.lit(1e-3))).to_series()
            worst = max(worst, off.max() or 0.0)  # type: ignore[arg-type, type-var]
    return {
        "featuretools": "1.31",
        "featuretools_events": events.height,
        "featuretools_features": len(kinds) * len(spans),
        "featuretools_s": json.loads(told.stdout.splitlines()[-1]),
        "ours_at_featuretools_events_s": min(seconds),
        "featuretools_rows_equal": both.height == mine.height == theirs.height,
        "featuretools_worst_difference": worst,
    }


CONTENDERS: dict[str, Callable[[Path, list[datetime]], pl.DataFrame]] = {
    f.__name__: f
    for f in (
        ours, ours_in_parts, ours_cuda, scan, scan_streaming, polars_masked, polars_sorted,
        duckdb_count, duckdb_bits, pandas_masked, polars_form,
    )
}  # fmt: skip


def _peer() -> ModuleType:
    found = importlib.util.spec_from_file_location("peer_plans", PEERS / "peer_plans.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


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
