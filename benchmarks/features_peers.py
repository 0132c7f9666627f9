"""The peers of the feature benchmark: Polars, DuckDB, pandas and Featuretools."""

import importlib.util
import json
import os
import subprocess
import time
from datetime import datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import polars as pl

from benchmarks.features_work import (
    CATEGORIES,
    CHANNELS,
    HORIZON_DAYS,
    NAMES,
    PEERS,
    SPEC,
    WINDOWS,
    ours,
)

PEERS_VARIABLE = "LIFTYARD_PEER_ENVIRONMENTS"


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


def _peer() -> ModuleType:
    found = importlib.util.spec_from_file_location("peer_plans", PEERS / "peer_plans.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
