"""A small shop for tests: customers, orders and mailings, as files and as a pipeline."""

from pathlib import Path

import numpy as np
import polars as pl

PIPELINE = """\
name: shop
seed: 3
tables:
  orders:
    source: {path: orders.parquet}
    entity: customer
    columns: {customer: int64, at: datetime, amount: float64}
  mailings:
    source: {path: mailings.parquet}
    entity: customer
    columns: {customer: int64, mailing: int64, sent: datetime, ends: datetime}
  answers:
    source: {path: answers.parquet}
    entity: customer
    columns: {customer: int64, mailing: int64, at: datetime}
  people:
    source: {path: people.parquet}
    entity: customer
    columns: {customer: int64, region: string}
features:
  buys:
    table: orders
    entity: customer
    time: at
    name: buys
    measures: {amount: amount}
    windows: [7d, 30d]
    aggregations: [count, sum]
    lifetime: [recency]
    cutoffs: {every: 10d, start: 2024-02-01, end: 2024-05-01}
    labels: [{name: lapse_10d, none: 10d}]
targets:
  lapse:
    features: [buys]
    attributes: [{table: people, key: customer, columns: [region]}]
    label: {feature: lapse_10d}
    split: {validate_from: 2024-04-01, test_from: 2024-04-15}
    baseline: [buys_recency_days, buys_count_30d]
  answers:
    rows: {table: mailings, cutoff: sent}
    features: [buys]
    label: {event: answers, keys: [customer, mailing], time: at, until: ends}
    split: {validate_from: 2024-03-10, test_from: 2024-04-10}
sweep:
  refit: 2
  families:
    boosting: {packs: 2, pack_size: 2, settings: {rounds: [5, 10], l2: {min: 0.5, max: 5.0}}}
    forest: {packs: 1, pack_size: 2, settings: {trees: [5, 10], depth: 3}}
    network: {packs: 1, pack_size: 2, settings: {width: 8, epochs: 1, learning_rate: [0.01, 0.003]}}
"""


def make(folder: Path) -> Path:
    """Writes the shop's files to `folder`; returns the pipeline file."""
    random = np.random.default_rng(11)
    start = np.datetime64("2024-01-01", "us")
    customers = 120
    often = random.uniform(2, 30, customers)
    orders, mailings, answers = [], [], []
    for customer in range(customers):
        days = np.cumsum(random.exponential(often[customer], 90))
        orders += [(customer, day, random.uniform(1, 50)) for day in days[days < 140]]
        for mailing, day in enumerate((40, 60, 80, 100, 120)):
            mailings.append((customer, mailing, day, day + 10))
            if random.uniform() < 2 / often[customer]:
                answers.append((customer, mailing, day + random.uniform(0, 9.9)))

    def moments(days: list[float]) -> pl.Series:
        micros = np.round(np.array(days) * 86_400_000_000).astype("timedelta64[us]")
        return pl.Series(start + micros)

    customer, at, amount = zip(*orders, strict=True)
    frame = pl.DataFrame({"customer": customer, "at": moments(at), "amount": amount})
    frame.write_parquet(folder / "orders.parquet")
    customer, mailing, sent, ends = zip(*mailings, strict=True)
    pl.DataFrame(
        {"customer": customer, "mailing": mailing, "sent": moments(sent), "ends": moments(ends)}
    ).write_parquet(folder / "mailings.parquet")
    customer, mailing, at = zip(*answers, strict=True)
    pl.DataFrame({"customer": customer, "mailing": mailing, "at": moments(at)}).write_parquet(
        folder / "answers.parquet"
    )
    pl.DataFrame(
        {"customer": range(customers), "region": ["north", "south"] * (customers // 2)}
    ).write_parquet(folder / "people.parquet")
    (folder / "shop.yaml").write_text(PIPELINE)
    return folder / "shop.yaml"
