"""The work that all contenders do: events, cutoffs, and what is to come of them; ours, done so."""

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl

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
