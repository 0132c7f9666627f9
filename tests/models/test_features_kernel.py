"""What the kernel does with many events: parts, codes, long histories, sums that cancel."""

import itertools
import math
from datetime import datetime, timedelta
from fractions import Fraction

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from models.features import (
    FeatureError,
    FeatureSpec,
    compute,
    compute_parts,
    describe,
    engine,
    sorting,
)
from models.features.events import micros

START = datetime(2024, 1, 1)
CUTOFFS = [START + timedelta(days=d) for d in (40, 41, 90, 200)]
SPEC = FeatureSpec.model_validate(
    {
        "entity": "who",
        "time": "ts",
        "name": "buys",
        "measures": {"amount": "x", "units": "n"},
        "categories": {"kind": {"column": "k", "values": ["k1", "k5"]}},
        "distinct": {"kinds": "k", "items": "item"},
        "windows": ["1d", "30d", "60d"],
        "aggregations": ["count", "sum", "mean", "min", "max", "std", "distinct"],
        "lifetime": ["count", "sum", "min", "std", "distinct", "recency", "gap_std", "gap_max"],
        "trends": [["1d", "30d"]],
        "filters": [
            {"name": "fives", "column": "k", "equals": "k5"},
            {"name": "bulk", "column": "n", "below": 3},
        ],
        "labels": [
            {"name": "lapse", "none": "9d"},
            {"name": "worth", "sum": "30d", "measure": "amount"},
        ],
    }
)


def log(events: int, entities: int, seed: int = 5) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    # Some entities have thousands of events and 200 items, most a few.
    who = (rng.random(events) ** 3 * entities).astype(np.int64)
    return pl.DataFrame(
        {
            "who": who,
            "ts": pl.Series(rng.integers(0, 250 * 86_400, events) * 1_000_000 + micros(START)).cast(
                pl.Datetime("us")
            ),
            "x": np.where(rng.random(events) < 0.1, np.nan, rng.normal(20, 9, events).round(2)),
            "n": rng.integers(1, 9, events),
            "k": pl.Series([f"k{i}" for i in range(9)] + [None]).gather(
                rng.integers(0, 10, events)
            ),
            "item": rng.integers(0, 200, events),
        }
    )


def test_many_events_equal_the_polars_form() -> None:
    events = log(60_000, 300)
    got = compute(events, SPEC, CUTOFFS)
    wanted = engine.at_cutoffs(events, SPEC, describe(SPEC), [micros(c) for c in CUTOFFS])
    assert got.height > 1_000
    # A longest history of several words of bits.
    assert events["who"].value_counts()["count"].max() > 5_000
    assert_frame_equal(got, wanted, rel_tol=2e-6, abs_tol=1e-6)


@pytest.mark.parametrize("kind", ["text", "sparse", "narrow", "date"])
def test_entities_of_any_type_give_the_same_rows(kind: str) -> None:
    events = log(3_000, 40)
    whole = compute(events, SPEC, CUTOFFS)
    days = pl.col("who").cast(pl.Int32).cast(pl.Date)
    as_kind = {
        # The same order as the numbers'.
        "text": pl.format("c{}", pl.col("who").cast(pl.String).str.zfill(4)),
        "sparse": (pl.col("who") - 20) * 10**15,
        "narrow": pl.col("who").cast(pl.UInt8),
        "date": days,
    }[kind]
    changed = compute(events.with_columns(who=as_kind), SPEC, CUTOFFS)
    assert_frame_equal(changed, whole.with_columns(who=as_kind))


def test_values_of_any_type_are_counted_alike() -> None:
    events = log(3_000, 40)
    item = pl.when(pl.col("item") % 7 > 0).then("item")
    names = [f.name for f in describe(SPEC) if f.subject == "items"]
    want = compute(events.with_columns(item=item), SPEC, CUTOFFS)
    for kind in (item * 10**15, item.cast(pl.String), item.cast(pl.Float64), item.cast(pl.Date)):
        got = compute(events.with_columns(item=kind), SPEC, CUTOFFS)
        assert_frame_equal(got.select(names), want.select(names))


def test_values_are_counted_alike_without_a_table_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    events = log(8_000, 60).with_columns(item=pl.when(pl.col("item") % 7 > 0).then("item"))
    want = compute(events, SPEC, CUTOFFS)
    monkeypatch.setattr(sorting, "_LOOKED_UP", 20)
    assert_frame_equal(compute(events, SPEC, CUTOFFS), want)


def test_all_bits_of_the_filters() -> None:
    filters = [{"name": f"f{i}", "column": "n", "below": i / 4} for i in range(32)]
    spec = SPEC.model_copy(update={"aggregations": [], "trends": [], "lifetime": ["count"]})
    spec = FeatureSpec.model_validate(spec.model_dump() | {"filters": filters})
    events = log(500, 9)
    got = compute(events, spec, CUTOFFS)
    wanted = engine.at_cutoffs(events, spec, describe(spec), [micros(c) for c in CUTOFFS])
    assert_frame_equal(got, wanted, rel_tol=2e-6)


def test_parts_make_the_whole_and_stay_small() -> None:
    events = log(30_000, 2_000)
    whole = compute(events, SPEC, CUTOFFS, labels=True)
    text = pl.format("c{}", pl.col("who").cast(pl.String).str.zfill(4))
    for changed in (events, events.with_columns(who=text)):
        parts = list(compute_parts(changed.lazy(), SPEC, CUTOFFS, labels=True, rows=500))
        assert max(part.height for part in parts) <= 500
        assert_frame_equal(pl.concat(parts).drop("who"), whole.drop("who"))


def test_a_window_is_worth_what_is_in_it_whatever_came_before() -> None:
    # Naive running sums would leave the noise of 1e15 in every later window.
    amounts = [1e15, 0.1, -1e15, 0.2, 0.3, 1e15 / 3]
    times = [START + timedelta(days=10 * i) for i in range(6)]
    events = pl.DataFrame(
        {"who": 1, "ts": times, "x": amounts, "n": 1, "k": "k1", "item": range(6)},
    )
    cutoffs = [t + timedelta(hours=1) for t in times]
    got = compute(events, SPEC, cutoffs)
    for column, days in (("30d", 30), ("60d", 60), ("1d", 1)):
        for i, cutoff in enumerate(cutoffs):
            inside = [
                Fraction(a)
                for t, a in zip(times, amounts, strict=True)
                if cutoff - timedelta(days=days) <= t < cutoff
            ]
            total = np.float32(float(sum(inside)))
            assert got[f"amount_sum_{column}"][i] == total
            if len(inside) > 1:
                mean = sum(inside) / len(inside)
                square = sum((a - mean) ** 2 for a in inside) / (len(inside) - 1)
                assert got[f"amount_std_{column}"][i] == np.float32(math.sqrt(square))


@pytest.mark.parametrize("direction", [1, -1])
def test_rising_and_falling_amounts(direction: int) -> None:
    # The stacks of minima and maxima hold everything, or one.
    n = 3_000
    events = pl.DataFrame(
        {
            "who": 1,
            "ts": [START + timedelta(hours=i) for i in range(n)],
            "x": [float(direction * i) for i in range(n)],
            "n": 1,
            "k": "k1",
            "item": range(n),
        }
    )
    cutoffs = [START + timedelta(hours=h) for h in (1, 30, 31, 800, 2_000, 2_999)]
    got = compute(events, SPEC, cutoffs)
    for hours, (most, least, distinct) in zip(
        (1, 30, 31, 800, 2_000, 2_999),
        got.select("amount_max_30d", "amount_min_30d", "items_distinct_30d").iter_rows(),
        strict=True,
    ):
        edge = [direction * max(0, hours - 720), direction * (hours - 1)]
        assert (most, least, distinct) == (max(edge), min(edge), min(hours, 720))


def test_events_in_any_order_of_time_and_in_chunks() -> None:
    events = log(5_000, 30).unique(["who", "ts"], maintain_order=True)
    whole = compute(events.sort("ts"), SPEC, CUTOFFS)
    assert_frame_equal(compute(events.sort("ts", descending=True), SPEC, CUTOFFS), whole)
    pieces = pl.concat([part for part in events.iter_slices(700)], rechunk=False)
    assert_frame_equal(compute(pieces, SPEC, CUTOFFS), whole)


def test_amounts_beyond_what_can_be_squared_are_refused() -> None:
    events = log(10, 2).with_columns(x=pl.lit(1e101))
    with pytest.raises(FeatureError, match=r"10 finite values of .* are beyond 1e\+100"):
        compute(events, SPEC, CUTOFFS)
    infinite = log(10, 2).with_columns(x=pl.lit(math.inf))
    assert compute(infinite, SPEC, CUTOFFS)["amount_sum_lifetime"].sum() == 0


def test_a_category_of_another_type_is_refused() -> None:
    with pytest.raises(FeatureError, match="'k1', and its column is Int64"):
        compute(
            log(10, 2).with_columns(k=pl.lit(1, pl.Int64)).drop("item").with_columns(item=1),
            SPEC.model_copy(update={"filters": []}),
            CUTOFFS,
        )


def test_the_cache_folder_must_be_this_users(tmp_path, monkeypatch) -> None:
    from models.features import compiled

    monkeypatch.setenv("LIFTYARD_CACHE", str(tmp_path))
    assert compiled.folder().parent == tmp_path
    (tmp_path / "features").chmod(0o777)
    with pytest.raises(PermissionError, match="can be written to by others"):
        compiled.folder()


def test_windows_by_months_end_where_the_month_does() -> None:
    from models.features.windows import starts

    moments = [datetime(2024, 3, 31, 6), datetime(2024, 1, 31), datetime(1969, 12, 31, 1)]
    earlier = starts(np.array([micros(m) for m in moments]), "1mo")
    expected = [datetime(2024, 2, 29, 6), datetime(2023, 12, 31), datetime(1969, 11, 30, 1)]
    assert earlier.tolist() == [micros(m) for m in expected]


def test_labels_beside_features_are_what_label_gives() -> None:
    from models.features import label

    events = log(4_000, 60)
    both = compute(events, SPEC, CUTOFFS, labels=True)
    for item in SPEC.labels:
        assert both[item.name].equals(label(events, item, both, SPEC))
    assert len(set(itertools.chain(both.columns))) == len(both.columns)
