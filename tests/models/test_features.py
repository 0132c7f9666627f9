"""Features against a slow reference: plain Python, one entity and one cutoff at a time."""

import importlib.util
import itertools
import math
import statistics
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from pathlib import Path
from zoneinfo import ZoneInfo

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from pydantic import ValidationError

from models.features import (
    FeatureError,
    FeatureSpec,
    compute,
    compute_at,
    cutoff_times,
    describe,
    label,
)

PEER = Path(__file__).parents[3] / "shared/peers/features/peer_plans.py"
CUTOFFS = [datetime(2024, 4, 1), datetime(2024, 5, 1)]
SCHEMA = {"who": pl.Int64, "ts": pl.Datetime("us"), "x": pl.Float64, "k": pl.String}
DECLARED = {
    "entity": "who",
    "time": "ts",
    "name": "buys",
    "measures": {"amount": "x"},
    "categories": {"kind": {"column": "k", "values": ["a", "b"]}},
    "distinct": {"kinds": "k"},
    "windows": ["7d", "30d", "36h", "1mo"],
    "aggregations": [
        *("count", "sum", "mean", "min", "max", "std", "distinct"),
        *("first", "last", "slope", "median"),
    ],
    "lifetime": [
        *("count", "sum", "mean", "min", "max", "std", "distinct"),
        *("first", "last", "slope", "median"),
        *("recency", "tenure", "gap_mean", "gap_std", "gap_max", "overdue"),
    ],
    "trends": [["7d", "30d"]],
    "decays": ["5d", "12h"],
    "last_events": [1, 3],
    "rfm": {"recency": [2, 20], "frequency": [2, 5], "monetary": [0, 100.5], "window": "30d"},
    "filters": [
        {"name": "returns", "column": "x", "below": 0},
        {"name": "as", "column": "k", "equals": "a"},
    ],
    "labels": [
        {"name": "lapse", "none": "30d"},
        {"name": "back", "any": "30d"},
        {"name": "n", "count": "30d"},
        {"name": "worth", "sum": "30d", "measure": "amount"},
    ],
}
SPEC = FeatureSpec.model_validate(DECLARED)


def frame(rows):
    return pl.DataFrame(rows, schema=SCHEMA, orient="row")


def reduced(values, how):
    if how == "sum":
        return sum(values)
    if not values or (how == "std" and len(values) < 2):
        return None
    functions = {
        "mean": statistics.mean,
        "min": min,
        "max": max,
        "std": statistics.stdev,
        "median": statistics.median,
        "first": lambda v: v[0],
        "last": lambda v: v[-1],
    }
    return functions[how](values)


def fitted_slope(rows):
    """The exact least-squares slope a day, in fractions."""
    known = [(Fraction((t - CUTOFFS[0]) / timedelta(hours=1)) / 24, Fraction(x)) for t, x in rows]
    if len({t for t, _ in known}) < 2:
        return None
    t_mean, x_mean = (sum(v) / len(known) for v in zip(*known, strict=True))
    spread = sum((t - t_mean) ** 2 for t, _ in known)
    return float(sum((t - t_mean) * (x - x_mean) for t, x in known) / spread)


def reference(rows, who, cutoff):
    """Returns {feature name: value} from the events of one entity, or None without events."""
    past = sorted((r for r in rows if r[0] == who and r[1] < cutoff), key=lambda r: r[1])
    if not past:
        return None
    day = timedelta(days=1)
    out = {}
    starts = {
        "7d": cutoff - 7 * day,
        "30d": cutoff - 30 * day,
        "36h": cutoff - 1.5 * day,
        # All the cutoffs here are in months after one that has their day.
        "1mo": cutoff.replace(month=cutoff.month - 1),
        "lifetime": past[0][1],
    }
    for key, start in starts.items():
        chosen = [r for r in past if r[1] >= start]
        amounts = [r[2] for r in chosen if r[2] is not None]
        out[f"buys_count_{key}"] = len(chosen)
        out[f"kinds_distinct_{key}"] = len({r[3] for r in chosen} - {None})
        for how in ("sum", "mean", "min", "max", "std", "median", "first", "last"):
            out[f"amount_{how}_{key}"] = reduced(amounts, how)
        out[f"amount_slope_{key}"] = fitted_slope([r[1:3] for r in chosen if r[2] is not None])
        returns, as_ = [a for a in amounts if a < 0], [r for r in chosen if r[3] == "a"]
        out[f"returns_count_{key}"], out[f"returns_amount_sum_{key}"] = len(returns), sum(returns)
        out[f"as_count_{key}"] = len(as_)
        out[f"as_amount_sum_{key}"] = sum(r[2] or 0 for r in as_)
    total = out["amount_sum_lifetime"]
    for value in ("a", "b"):
        part = sum(r[2] or 0 for r in past if r[3] == value)
        out[f"kind_share_{value}"] = part / total if total else None
    for subject, how in (("amount", "sum"), ("buys", "count")):
        long = out[f"{subject}_{how}_30d"]
        out[f"{subject}_trend_7d_30d"] = out[f"{subject}_{how}_7d"] / long if long else None
    gaps = [(b[1] - a[1]) / day for a, b in itertools.pairwise(past)]
    for how in ("mean", "std", "max"):
        out[f"buys_gap_{how}_days"] = reduced(gaps, how)
    out["buys_recency_days"] = recency = (cutoff - past[-1][1]) / day
    mean_gap = out["buys_gap_mean_days"]
    out["buys_overdue_ratio"] = recency / mean_gap if mean_gap else None
    for name, half_life in (("5d", 5), ("12h", 0.5)):
        weights = [0.5 ** ((cutoff - r[1]) / day / half_life) for r in past]
        out[f"buys_decayed_{name}"] = math.fsum(weights)
        out[f"amount_decayed_{name}"] = math.fsum(
            w * (r[2] or 0) for w, r in zip(weights, past, strict=True)
        )
    for k in (1, 3):
        ago = (cutoff - past[-k][1]) / day if len(past) >= k else None
        out[f"buys_since_last_{k}_days"] = ago
    out["buys_rfm_recency"] = 1 + sum(recency <= bound for bound in (2, 20))
    out["buys_rfm_frequency"] = 1 + sum(out["buys_count_30d"] >= bound for bound in (2, 5))
    out["buys_rfm_monetary"] = 1 + sum(out["amount_sum_30d"] >= bound for bound in (0, 100.5))
    out["buys_tenure_days"] = (cutoff - past[0][1]) / day
    return out


# Hours make ties, events at a cutoff and at a window's edge; quarters make sums exact.
moments = st.one_of(
    st.integers(0, 24 * 100).map(lambda h: datetime(2024, 2, 1) + timedelta(hours=h)),
    st.sampled_from([c - timedelta(days=w) for c in CUTOFFS for w in (-30, 0, 7, 30)]),
)
events = st.tuples(
    st.integers(0, 4),
    moments,
    st.none() | st.integers(-400, 4000).map(lambda q: q / 4),
    st.sampled_from(["a", "b", "unseen", None]),
)
logs = st.lists(events, max_size=40).flatmap(
    lambda rows: st.just(rows) if not rows else st.just(rows + rows[:2])
)
quick = settings(deadline=None, max_examples=40)


@quick
@given(logs)
def test_equals_the_reference(rows):
    got = compute(frame(rows), SPEC, CUTOFFS)
    features = describe(SPEC)
    assert got.columns == ["who", "cutoff", *(f.name for f in features)]
    assert [str(t) for t in got.dtypes[2:]] == [f.dtype for f in features]
    expected = [(w, c, reference(rows, w, c)) for w in range(5) for c in CUTOFFS]
    expected = [e for e in expected if e[2] is not None]
    assert got.select("who", "cutoff").rows() == [e[:2] for e in expected]
    for row, (_, _, values) in zip(got.iter_rows(named=True), expected, strict=True):
        wanted = {f.name: values[f.name] for f in features}
        blank = {n for n, v in wanted.items() if v is None}
        assert {n for n in wanted if row[n] is None} == blank
        numbers = {n: v for n, v in wanted.items() if n not in blank}
        assert {n: row[n] for n in numbers} == pytest.approx(numbers, rel=1e-5, abs=1e-5)


@quick
@given(logs)
def test_labels_equal_the_reference(rows):
    keys = pl.DataFrame(
        [(w, c) for c in CUTOFFS for w in (3, 0, 1, 9)],
        schema={"who": pl.Int64, "cutoff": pl.Datetime("us")},
        orient="row",
    )
    got = {item.name: label(frame(rows), item, keys, SPEC).to_list() for item in SPEC.labels}
    for i, (who, cutoff) in enumerate(keys.rows()):
        end = cutoff + timedelta(days=30)
        after = [r for r in rows if r[0] == who and cutoff <= r[1] < end]
        assert got["lapse"][i] == (not after)
        assert got["back"][i] == bool(after)
        assert got["n"][i] == len(after)
        assert got["worth"][i] == sum(r[2] or 0 for r in after)


@quick
@given(logs, st.integers(0, 4), st.integers(0, 10**6))
def test_a_planted_future_event_moves_nothing(rows, who, late_s):
    planted = [*rows, (who, CUTOFFS[-1] + timedelta(seconds=late_s), 1e6, "a")]
    assert_frame_equal(compute(frame(rows), SPEC, CUTOFFS), compute(frame(planted), SPEC, CUTOFFS))


@quick
@given(logs)
def test_partitions_of_entities_give_the_whole(rows):
    parts = [compute(frame([r for r in rows if r[0] % 2 == i]), SPEC, CUTOFFS) for i in (0, 1)]
    whole = compute(frame(rows).lazy(), SPEC, CUTOFFS)
    assert_frame_equal(pl.concat(parts).sort("who", "cutoff"), whole)


def test_zones_are_converted_over_a_change_of_clocks():
    zone = ZoneInfo("America/New_York")  # Clocks went forward on 2024-03-10.
    rows = [(1, datetime(2024, 3, 2, 5) + timedelta(days=d), 1.0, "a") for d in range(20)]
    zoned = frame(rows).with_columns(
        pl.col("ts").dt.replace_time_zone("UTC").dt.convert_time_zone(str(zone))
    )
    cutoff = datetime(2024, 3, 15, 1, tzinfo=zone)
    got = compute(zoned, SPEC, [cutoff])
    assert got["cutoff"].to_list() == [cutoff.astimezone(UTC).replace(tzinfo=None)]
    # 05:00 UTC is the cutoff itself: excluded; a week of 168 hours before it is included.
    assert got["buys_count_7d"].to_list() == [7]
    assert got["buys_gap_max_days"].to_list() == [1.0]
    assert_frame_equal(got, compute(frame(rows), SPEC, [datetime(2024, 3, 15, 5)]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (frame([(None, CUTOFFS[0], 1.0, "a")]), "1 events have a null 'who'"),
        (frame([(1, None, 1.0, "a"), (2, None, 1.0, "a")]), "2 events have a null 'ts'"),
        (frame([]).drop("x"), r"not found: \['x'\]"),
        (frame([]).cast({"ts": pl.String}), "is String"),
    ],
)
def test_unusable_events_are_refused(table, message):
    with pytest.raises(FeatureError, match=message):
        compute(table, SPEC, CUTOFFS)


@pytest.mark.parametrize(
    "change",
    [
        {"window": ["7d"]},
        {"windows": ["7 days"]},
        {"windows": ["7d", "7d"]},
        {"measures": {}},
        {"labels": [{"name": "l", "any": "7d", "none": "7d"}]},
        {"filters": [{"name": "f", "column": "x"}]},
    ],
)
def test_unusable_declarations_are_refused(change):
    with pytest.raises(ValidationError):
        FeatureSpec.model_validate(DECLARED | change)


def test_cutoffs_by_month_and_by_days():
    def declared(every):
        cutoffs = {"every": every, "start": datetime(2024, 1, 31), "end": datetime(2024, 3, 31)}
        return cutoff_times(FeatureSpec.model_validate(DECLARED | {"cutoffs": cutoffs}))

    assert [c.day for c in declared("month")] == [31, 29, 31]
    assert declared("30d") == [datetime(2024, 1, 31) + timedelta(days=30 * i) for i in range(3)]


@pytest.mark.skipif(not PEER.exists(), reason="../shared is absent: no hand-written plan")
def test_equals_a_hand_written_plan():
    import numpy as np

    found = importlib.util.spec_from_file_location("peer_plans", PEER)
    peer = importlib.util.module_from_spec(found)
    found.loader.exec_module(peer)
    rng, n, cutoff = np.random.default_rng(3), 20_000, datetime(2025, 3, 1)
    offsets = pl.Series(rng.integers(0, 86400 * 800, n)).cast(pl.Int64) * 1_000_000
    log = pl.DataFrame(
        {
            "customer_id": rng.integers(0, 500, n),
            "ts": (offsets + 1_672_531_200_000_000).cast(pl.Datetime("us")),
            "amount": rng.integers(1, 9999, n) / 4,
            "category": [f"cat_{i:02d}" for i in rng.integers(0, 20, n)],
            "channel": [peer.CHS[i] for i in rng.integers(0, 4, n)],
        }
    )
    spec = FeatureSpec.model_validate(
        {
            "entity": "customer_id",
            "time": "ts",
            "name": "buys",
            "measures": {"amount": "amount"},
            "categories": {"category": {"column": "category", "values": peer.CATS}},
            "distinct": {"category": "category"},
            "windows": [f"{w}d" for w in peer.WINS],
            "aggregations": ["count", "sum", "mean", "max", "std", "distinct"],
            "lifetime": ["recency", "tenure", "gap_mean", "gap_std", "gap_max"],
        }
    )
    names = {f"buys_{k}_days": k for k in spec.lifetime}
    names |= {f"category_share_{c}": f"share_{c}" for c in peer.CATS}
    for w in peer.WINS:
        names |= {f"amount_{k}_{w}d": f"{k}_{w}" for k in ("sum", "mean", "max", "std")}
        names |= {f"buys_count_{w}d": f"cnt_{w}", f"category_distinct_{w}d": f"ncat_{w}"}
    wanted = peer.naive(log.lazy(), cutoff).collect().sort("customer_id")
    got = compute(log, spec, [cutoff]).select(list(names))
    assert_frame_equal(
        got.cast(pl.Float64),
        wanted.select(pl.col(p).cast(pl.Float64).alias(n) for n, p in names.items()),
        rel_tol=1e-5,
    )


def test_rows_with_their_own_cutoffs_get_the_same_features_as_at_that_cutoff():
    events = frame(
        [
            (who, datetime(2024, 3, day), day * 0.5, "ab"[day % 2])
            for who in (1, 2)
            for day in (3, 9)
        ]
    )
    rows = pl.DataFrame(
        {"who": [2, 1, 9, 2], "cutoff": [CUTOFFS[1], CUTOFFS[0], CUTOFFS[0], CUTOFFS[0]]}
    )
    got = compute_at(events, SPEC, rows)
    every = compute(events, SPEC, CUTOFFS)
    for place in (0, 1, 3):
        who, cutoff = rows.row(place)
        same = every.filter(pl.col("who") == who, pl.col("cutoff") == cutoff)
        assert_frame_equal(got[place], same.drop("who", "cutoff"))
    stranger = got.row(2, named=True)
    assert (stranger["buys_count_30d"], stranger["amount_sum_7d"]) == (0, 0.0)
    assert stranger["amount_mean_7d"] is None and stranger["buys_recency_days"] is None


def test_streams_and_attributes_are_as_known_before_the_cutoff():
    spec = FeatureSpec.model_validate(
        {
            **{k: DECLARED[k] for k in ("entity", "time", "name", "windows", "lifetime")},
            "measures": {"amount": "x"},
            "distinct": {"kinds": "k"},
            "streams": {
                "sent": {
                    "table": "exposures",
                    "time": "sent_at",
                    "measures": {"cost": "eur"},
                    "windows": ["7d"],
                    "aggregations": ["count", "sum", "median"],
                    "lifetime": ["recency"],
                }
            },
            "attributes": {
                "tier": {"table": "levels", "time": "since", "columns": ["level", "points"]}
            },
        }
    )
    cutoff = CUTOFFS[0]
    log = frame([(w, cutoff - timedelta(days=9), 1.0, "a") for w in (1, 2, 3)])
    tables = {
        "exposures": pl.DataFrame(
            {
                "who": [1, 1, 1, 2, 7],
                "sent_at": [cutoff - timedelta(days=d) for d in (0, 2, 7, 30, 1)],
                "eur": [9.0, 1.0, 2.5, 4.0, 4.0],
            }
        ),
        "levels": pl.DataFrame(
            {
                "who": [1, 1, 1, 2],
                "since": [cutoff - timedelta(days=d) for d in (5, 60, 0, -1)],
                "level": ["gold", "new", "past it", "later"],
                "points": [3, 1, 9, 8],
            }
        ),
    }
    got = compute(log, spec, [cutoff], tables=tables)
    assert got.columns[2:] == [f.name for f in describe(spec)]
    names = ["sent_count_7d", "cost_sum_7d", "cost_median_7d", "sent_recency_days"]
    names += ["tier_level", "tier_points"]
    assert got.select(names).rows() == [
        (2, 3.5, 1.75, 2.0, "gold", 3),
        (0, 0.0, None, 30.0, None, None),
        (0, 0.0, None, None, None, None),
    ]
    at = compute_at(log, spec, got.select("who", "cutoff")[::-1], tables=tables)
    assert_frame_equal(at[::-1], got.drop("who", "cutoff"))
    with pytest.raises(FeatureError, match=r"tables \['levels'\].*not given: \['exposures'\]"):
        compute(log, spec, [cutoff], tables={"exposures": tables["exposures"]})


def test_rows_without_an_entity_or_a_cutoff():
    log = frame([(1, CUTOFFS[0], 1.0, "a")])
    nobody = pl.DataFrame(
        {"who": [None, 1], "cutoff": [CUTOFFS[1]] * 2}, schema_overrides={"who": pl.Int64}
    )
    assert compute_at(log, SPEC, nobody)["buys_count_lifetime"].to_list() == [0, 1]
    never = nobody.with_columns(cutoff=pl.lit(None, pl.Datetime("us")))
    with pytest.raises(FeatureError, match="2 rows have a null 'cutoff'"):
        compute_at(log, SPEC, never)
