"""Features from a stored table: the same here and over Dask workers, made anew only when needed."""

import datetime as dt
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest

from cluster import dask_lease, session, storage
from jobs.config import Features
from jobs.features import HorizonError, build

DECLARED = Features.model_validate(
    {
        "table": "orders",
        "lookups": [{"table": "products", "key": "product", "columns": ["kind"]}],
        "entity": "customer",
        "time": "at",
        "name": "orders",
        "measures": {"amount": "amount"},
        "categories": {"kind": {"column": "kind", "values": ["tea"]}},
        "windows": ["7d", "30d"],
        "aggregations": ["count", "sum", "std"],
        "lifetime": ["recency", "gap_mean"],
        "cutoffs": {"every": "10d", "start": "2024-02-01", "end": "2024-03-10"},
        "labels": [{"name": "lapse_10d", "none": "10d"}],
    }
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    rows = 4_000
    at = pl.datetime_range(
        pl.datetime(2024, 1, 1), pl.datetime(2024, 3, 31), interval="31m", eager=True
    )[:rows]
    orders = pl.DataFrame(
        {
            # Every other ten days only a few customers buy, so that others lapse.
            "customer": [(i * i) % (97 if i // 480 % 2 == 0 else 5) for i in range(rows)],
            "product": [i % 5 for i in range(rows)],
            "amount": [(i % 13) * 0.37 for i in range(rows)],
            "at": at,
        }
    )
    products = pl.DataFrame({"product": range(4), "kind": ["tea", "salt", "tea", "oil"]})
    for name, frame, entity in (("orders", orders, "customer"), ("products", products, None)):
        parted = storage.with_partition(frame.lazy(), entity, 4)
        storage.write(tmp_path, name, parted, mode="overwrite", onto=None, metadata={})
    return tmp_path


def table(root: Path, version: int) -> pl.DataFrame:
    return storage.scan(root, "features/orders", version).collect().sort("customer", "cutoff")


@pytest.fixture(scope="module")
def lease() -> Iterator[dask_lease.Lease]:
    with session.connect(cpus=2), dask_lease.lease(workers=2) as leased:
        yield leased


def test_the_same_here_and_over_dask_workers(root: Path, lease: dask_lease.Lease) -> None:
    here = build("orders", DECLARED, root)
    alone = table(root, here.version)
    # Another declaration in between, so that the first is not just found again.
    build("orders", DECLARED.model_copy(update={"windows": ["7d"]}), root)
    spread = build("orders", DECLARED, root, lease=lease)
    assert (spread.new, spread.engine) == (True, "kernel on 2 Dask workers")
    assert table(root, spread.version).equals(alone)
    assert alone.height == here.rows > 150
    assert set(alone["lapse_10d"].unique()) == {0, 1}


def test_same_events_and_declaration_make_no_version(root: Path) -> None:
    first = build("orders", DECLARED, root)
    again = build("orders", DECLARED, root)
    assert (first.new, again.new) == (True, False)
    assert again.version == first.version


def test_a_lookup_without_a_row_counts_in_no_share(root: Path) -> None:
    built = table(root, build("orders", DECLARED, root).version)
    orders = storage.scan(root, "orders").collect()
    cutoff = built["cutoff"].max()
    past = orders.filter((pl.col("at") < cutoff) & (pl.col("customer") == 1))
    tea = past.filter(pl.col("product").is_in([0, 2]))["amount"].sum()
    share = built.filter((pl.col("customer") == 1) & (pl.col("cutoff") == cutoff))["kind_share_tea"]
    assert share.item() == pytest.approx(tea / past["amount"].sum(), rel=1e-6)


def test_a_label_past_the_last_event_is_refused(root: Path) -> None:
    late = DECLARED.model_validate(
        {**DECLARED.model_dump(exclude_none=True), "cutoffs": ["2024-03-25T00:00:00"]}
    )
    with pytest.raises(HorizonError, match=r"'lapse_10d' looks 10 days ahead.*end the cutoffs at"):
        build("orders", late, root)
    assert not storage.exists(root, "features/orders")


def test_a_new_cutoff_adds_its_rows_only_while_the_past_stands(root: Path) -> None:
    def declared(end: str) -> Features:
        cutoffs = {"every": "10d", "start": "2024-02-01", "end": end}
        return DECLARED.model_validate(
            DECLARED.model_dump(exclude_none=True) | {"cutoffs": cutoffs}
        )

    first = build("orders", declared("2024-02-25"), root)
    assert first.computed == first.rows
    onto = storage.version(root, "orders")
    late = storage.scan(root, "orders").collect().head(20).with_columns(at=pl.datetime(2024, 3, 31))
    storage.write(root, "orders", late, mode="append", onto=onto, metadata={})
    more = build("orders", declared("2024-03-10"), root)
    assert 0 < more.computed < more.rows
    added = table(root, more.version)

    # Later events alone change no row.
    same = build("orders", declared("2024-03-10"), root)
    assert not same.new
    storage.write(root, "orders", late, mode="append", onto=onto + 1, metadata={})
    onto += 1
    same = build("orders", declared("2024-03-10"), root)
    assert (same.new, same.computed) == (True, 0)
    assert table(root, same.version).equals(added)

    # An early one makes anew the rows that look at it, and no others.
    early = late.with_columns(at=pl.datetime(2024, 2, 20))
    storage.write(root, "orders", early, mode="append", onto=onto + 1, metadata={})
    anew = build("orders", declared("2024-03-11"), root)
    assert 0 < anew.computed < anew.rows
    after = table(root, anew.version)
    seen = pl.col("cutoff") >= dt.datetime(2024, 2, 11)
    assert not after.filter(seen).equals(added.filter(seen))
    assert after.filter(~seen).equals(added.filter(~seen))

    # And what was added is what is made in one go.
    other = build("others", declared("2024-02-25"), root)
    storage.write(root, "orders", late, mode="append", onto=onto + 2, metadata={})
    other = build("others", declared("2024-03-11"), root)
    whole = build("whole", declared("2024-03-11"), root)
    assert other.computed < other.rows and whole.computed == whole.rows
    orders = build("orders", declared("2024-03-11"), root)
    for name, built in (("others", other), ("orders", orders)):
        pieced = storage.scan(root, f"features/{name}", built.version).collect()
        in_one_go = storage.scan(root, "features/whole", whole.version).collect()
        assert pieced.sort("customer", "cutoff").equals(in_one_go.sort("customer", "cutoff"))
