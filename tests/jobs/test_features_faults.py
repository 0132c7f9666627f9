"""A Dask worker killed while features are computed: the same table comes out."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from time import sleep

import polars as pl

from cluster import dask_lease, session, storage
from jobs.config import Features
from jobs.features import build

DECLARED = Features.model_validate(
    {
        "table": "orders",
        "entity": "customer",
        "time": "at",
        "name": "orders",
        "measures": {"amount": "amount"},
        "windows": ["7d", "30d"],
        "aggregations": ["count", "sum", "std"],
        "lifetime": ["recency", "gap_mean"],
        "cutoffs": {"every": "1d", "start": "2024-02-01", "end": "2024-03-10"},
    }
)
PARTS = 64


def test_a_killed_worker_changes_nothing(tmp_path: Path) -> None:
    start = datetime(2024, 1, 1)
    orders = pl.DataFrame(
        {
            "customer": [(i * i) % 997 for i in range(60_000)],
            "amount": [(i % 13) * 0.37 for i in range(60_000)],
            "at": [start + timedelta(minutes=2 * i) for i in range(60_000)],
        }
    )
    for root in (tmp_path / "here", tmp_path / "spread"):
        parted = storage.with_partition(orders.lazy(), "customer", PARTS)
        storage.write(root, "orders", parted, mode="overwrite", onto=None, metadata={})
    build("orders", DECLARED, tmp_path / "here")
    with session.connect(cpus=2), dask_lease.lease(workers=2) as lease:
        pids = list(lease.client.run(os.getpid).values())
        with ThreadPoolExecutor(1) as pool:
            built = pool.submit(build, "orders", DECLARED, tmp_path / "spread", lease=lease)
            while not any(lease.client.processing().values()) and not built.done():
                sleep(0.01)
            assert not built.done()
            os.kill(pids[0], signal.SIGKILL)
            done = built.result()
    assert done.engine.endswith("on 2 Dask workers")
    tables = [
        storage.scan(tmp_path / root, "features/orders").sort("customer", "cutoff").collect()
        for root in ("here", "spread")
    ]
    assert tables[0].equals(tables[1])
