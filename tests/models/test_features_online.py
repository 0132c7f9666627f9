"""Serving computes what training did, to the last bit."""

from datetime import datetime, timedelta

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.features import FeatureError, FeatureSpec, compute, compute_at, describe, online

CUTOFFS = [datetime(2024, 4, 1), datetime(2024, 5, 1)]
SCHEMA = {"who": pl.Int64, "ts": pl.Datetime("us"), "x": pl.Float64, "k": pl.String}
DECLARED = {
    "entity": "who",
    "time": "ts",
    "name": "buys",
    "measures": {"amount": "x"},
    "categories": {"kind": {"column": "k", "values": ["a", "b"]}},
    "distinct": {"kinds": "k", "amounts": "x"},
    "windows": ["7d", "1mo"],
    "aggregations": [
        *("count", "sum", "mean", "min", "max", "std", "distinct", "first", "last", "slope")
    ],
    "lifetime": ["sum", "std", "recency", "tenure", "gap_mean", "gap_std", "gap_max", "overdue"],
    "trends": [["7d", "1mo"]],
    "filters": [
        {"name": "returns", "column": "x", "below": 0},
        {"name": "as", "column": "k", "equals": "a"},
    ],
    "decays": ["5d"],
    "last_events": [2],
    "rfm": {"recency": [2, 20], "frequency": [2, 5], "monetary": [0, 100.5], "window": "1mo"},
    "streams": {
        "sent": {"table": "sent", "time": "at", "windows": ["7d"], "aggregations": ["count"]}
    },
    "attributes": {"tier": {"table": "levels", "time": "at", "columns": ["level"]}},
}
SPEC = FeatureSpec.model_validate(DECLARED)

moments = st.integers(0, 24 * 100).map(lambda h: datetime(2024, 2, 1) + timedelta(hours=h))
events = st.tuples(
    st.integers(0, 3),
    moments,
    st.none() | st.floats(-1e6, 1e6),
    st.sampled_from(["a", "b", "unseen", None]),
)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(events, min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 3), moments), max_size=9),
)
def test_online_equals_training_exactly(rows, other):
    log = pl.DataFrame(rows, schema=SCHEMA, orient="row")
    at = pl.DataFrame(other, schema={"who": pl.Int64, "at": pl.Datetime("us")}, orient="row")
    tables = {"sent": at, "levels": at.with_row_index("level")}
    trained = compute(log, SPEC, CUTOFFS, tables=tables)
    served = online(SPEC)
    for row in trained.iter_rows(named=True):
        who = row.pop("who")
        own = {n: t.filter(pl.col("who") == who).to_dicts() for n, t in tables.items()}
        mine = log.filter(pl.col("who") == who).to_dicts()
        # Not "close": the same floats, and ints where there are ints.
        assert served.features(mine, row.pop("cutoff"), own) == row


def test_an_entity_without_events_gets_what_compute_at_gives():
    nothing = {"sent": [], "levels": []}
    empty = pl.DataFrame(schema=SCHEMA)
    at = pl.DataFrame(schema={"who": pl.Int64, "at": pl.Datetime("us"), "level": pl.String})
    rows = pl.DataFrame({"who": [1], "cutoff": [CUTOFFS[0]]})
    trained = compute_at(empty, SPEC, rows, tables={"sent": at, "levels": at})
    found = online(SPEC).features([], CUTOFFS[0], nothing)
    assert found == trained.row(0, named=True)
    assert list(found) == [f.name for f in describe(SPEC)]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"ts": CUTOFFS[0], "x": 1.0}, "lacks the column 'k'"),
        ({"x": 1.0, "k": "a"}, "'ts' is None"),
        ({"ts": CUTOFFS[0], "x": 1e200, "k": "a"}, "beyond 1e"),
    ],
)
def test_unusable_events_are_refused(event, message):
    with pytest.raises(FeatureError, match=message):
        online(SPEC).features([event], CUTOFFS[1], {"sent": [], "levels": []})


def test_what_is_left_to_polars_is_refused():
    spec = FeatureSpec.model_validate(DECLARED | {"aggregations": ["median"]})
    with pytest.raises(FeatureError, match=r"amount_median_7d.*left to Polars"):
        online(spec)
