"""What the tests run on a host: python work.py VERB [ARGUMENT …]; prints one line of JSON last."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import ray

from cluster import dask_lease, session, storage
from jobs import features, sweep
from jobs.config import Features
from models.families import TrainingData

DECLARED = Features.model_validate(
    {
        "table": "orders",
        "entity": "customer",
        "time": "at",
        "name": "orders",
        "measures": {"amount": "amount"},
        "windows": ["7d", "30d"],
        "aggregations": ["count", "sum", "std"],
        "lifetime": ["recency"],
        "cutoffs": {"every": "10d", "start": "2024-02-01", "end": "2024-03-10"},
        "labels": [{"name": "lapse_10d", "none": "10d"}],
    }
)
VARIANTS = [{"family": "boosting", "rounds": r, "depth": d} for d in (2, 3) for r in (5, 20)]


def tables(root: Path) -> None:
    """Writes the events."""
    at = pl.datetime_range(
        pl.datetime(2024, 1, 1), pl.datetime(2024, 3, 31), interval="31m", eager=True
    )[:4_000]
    orders = pl.DataFrame(
        {
            "customer": [(i * i) % (97 if i // 480 % 2 == 0 else 5) for i in range(4_000)],
            "amount": [(i % 13) * 0.37 for i in range(4_000)],
            "at": at,
        }
    )
    parted = storage.with_partition(orders.lazy(), "customer", 4)
    storage.write(root, "orders", parted, mode="overwrite", onto=None, metadata={})


def compute(root: Path, journal: Path, lease: Any) -> dict[str, Any]:
    """Features, and a sweep, on the session and lease there are."""
    built = features.build("orders", DECLARED, root, lease=lease)
    table = storage.scan(root, "features/orders", built.version).collect()
    random = np.random.default_rng(5)
    x = random.normal(size=(1_500, 6)).astype(np.float32)
    y = (x[:, 0] + 0.5 * x[:, 1] ** 2 + random.normal(size=1_500) > 0.5).astype(np.int8)
    data = TrainingData(x_train=x[:1000], y_train=y[:1000], x_valid=x[1000:], y_valid=y[1000:])
    before = journal.read_text(encoding="utf-8") if journal.exists() else ""
    outcomes = sweep.run(VARIANTS, data, journal=journal, workers=2)
    written = journal.read_text(encoding="utf-8").removeprefix(before)
    return {
        "new": built.new,
        "engine": built.engine,
        "rows": table.height,
        "digest": int(table.sort("customer", "cutoff").hash_rows(seed=1).sum() & 0xFFFFFFFF),
        "scores": [outcome.score for outcome in outcomes],
        "trained": len(written.splitlines()),
    }


def run(verb: str, arguments: list[str]) -> dict[str, Any]:
    """Does what is asked."""
    if verb == "tables":
        tables(Path(arguments[0]))
        return {}
    if verb == "embedded":
        with session.connect(cpus=2):
            return compute(Path(arguments[0]), Path(arguments[1]), None)
    head, scheduler = os.environ["HEAD"], os.environ["SCHEDULER"]
    if verb == "dask":
        with dask_lease.attach(scheduler) as standing:
            doubled = dask_lease.map_partitions(_slowly, range(int(arguments[0])), standing)
            return {"doubled": list(doubled)}
    with session.connect(address=head):
        if verb == "compute":
            with dask_lease.attach(scheduler) as standing:
                return compute(Path(arguments[0]), Path(arguments[1]), standing)
        task = ray.remote(num_cpus=1, max_retries=-1)(_where)
        nodes = [n["NodeManagerAddress"] for n in ray.nodes() if n["Alive"]]
        Path("began").touch()
        refs = [task.remote(0.3) for _ in range(int(arguments[0]))]
        return {"done": len(ray.get(refs)), "nodes": sorted(nodes)}


def _slowly(number: int) -> int:
    time.sleep(0.3)
    return 2 * number


def _where(seconds: float) -> str:
    time.sleep(seconds)
    return str(ray.util.get_node_ip_address())


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2:])), flush=True)
