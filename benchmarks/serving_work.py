"""What is asked for under mixed load, and the numbers that each version gives in process.

Rows are of the model that `benchmarks.serving_servers` trains. Customers are those of a small shop,
whose features are published to a store; with a new event, a customer's features are those that the
training's kernel makes of all events at that moment.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.serving_servers import BATCH_ROWS, make_rows, register, stream
from cluster.device import choose
from jobs import online, pipeline_file
from jobs.features import build
from jobs.ingest import ingest
from models.features import compute, compute_at

# The model of customers, and its versions' trees; those of rows have the same.
REORDER = "reorder_10d"
ROUNDS = {1: 100, 2: 60}

AT = datetime(2024, 5, 3)

PIPELINE = """\
name: shop
seed: 3
tables:
  orders:
    source: {path: orders.parquet}
    entity: customer
    columns: {customer: int64, at: datetime, amount: float64}
features:
  buys:
    table: orders
    entity: customer
    time: at
    name: buys
    measures: {amount: amount}
    windows: [7d, 30d]
    aggregations: [sum, count, mean, max]
    lifetime: [recency]
    cutoffs: {every: 10d, start: 2024-02-01, end: 2024-04-20}
    labels: [{name: reorder_10d, any: 10d}]
targets:
  reorder:
    features: [buys]
    label: {feature: reorder_10d}
    split: {validate_from: 2024-04-01, test_from: 2024-04-10}
"""

# By version, the scores of what is asked for.
Expected = Mapping[int, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the clients ask for, and what they have to get.

    Attributes:
        rows: As JSON has them.
        batch: An Arrow stream of the rows.
        scores: Of the rows.
        customers: Their ids.
        events: A new event of each customer, as JSON has it.
        anew: The customers' scores at `AT`, with their new events.
        latest: The customers' scores by their published features.
    """

    rows: Sequence[Mapping[str, Any]]
    batch: bytes
    scores: Expected
    customers: Sequence[int]
    events: Sequence[Mapping[str, Any]]
    anew: Expected
    latest: Expected


def make(folder: Path, uri: str) -> Work:
    """Registers two versions of both models, promotes the first, and publishes the customers.

    Args:
        folder: Where the shop's tables are put, and the store, in `store`.
        uri: The registry.
    """
    frame = make_rows(BATCH_ROWS, 2)
    scores = {
        version: register(uri, rounds).score(frame).tolist() for version, rounds in ROUNDS.items()
    }
    orders = _orders()
    orders.write_parquet(folder / "orders.parquet")
    (folder / "shop.yaml").write_text(PIPELINE)
    pipeline = pipeline_file.load(folder / "shop.yaml")
    ingest(
        "orders", pipeline.tables["orders"], folder / "tables", base=folder, device=choose("cpu")
    )
    buys = pipeline.features["buys"]
    build("buys", buys, folder / "tables")
    online.publish("reorder", pipeline, folder / "tables", folder / "store")

    features = compute(orders, buys)
    latest = features.filter(pl.col("cutoff") == pl.col("cutoff").max().over("customer"))
    draws = np.random.default_rng(5)
    new = latest.select(
        "customer",
        at=pl.lit(datetime(2024, 5, 2, 10)),
        amount=pl.Series(draws.uniform(1, 50, latest.height)),
    )
    asked = latest.select("customer", cutoff=pl.lit(AT))
    folded = compute_at(pl.concat([orders, new]), buys, asked)
    trained = features.select(folded.columns)
    anew, published = {}, {}
    for version, rounds in ROUNDS.items():
        scorer = register(uri, rounds, name=REORDER, frame=trained, above=150)
        anew[version] = scorer.score(folded).tolist()
        published[version] = scorer.score(latest.select(folded.columns)).tolist()
    return Work(
        rows=frame.to_dicts(),
        batch=stream(frame),
        scores=scores,
        customers=latest["customer"].to_list(),
        events=new.select(pl.col("at").dt.strftime("%Y-%m-%dT%H:%M:%S"), "amount").to_dicts(),
        anew=anew,
        latest=published,
    )


def _orders(customers: int = 300, each: int = 20) -> pl.DataFrame:
    draws = np.random.default_rng(4)
    seconds = draws.integers(0, 122 * 86_400, customers * each)
    moments = np.datetime64("2024-01-01", "us") + seconds.astype("timedelta64[s]")
    return pl.DataFrame(
        {
            "customer": np.repeat(np.arange(customers), each),
            "at": moments,
            "amount": draws.uniform(1, 50, customers * each),
        }
    )
