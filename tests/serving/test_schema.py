"""Bodies of rows: the quick way to a matrix and the one that finds what is wrong agree."""

import json
from typing import Any

import numpy as np
import polars as pl
from hypothesis import example, given
from hypothesis import strategies as st

from models.encoding import Encoder
from serving.schema import RequestError, RowReader, parse

FRAME = pl.DataFrame({"a spend": [1.5, None], "gold": [True, False], "kind": ["x", "ż"]})
ENCODER = Encoder.fit(FRAME, FRAME.columns)
READER = RowReader(ENCODER)

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.sampled_from(["x", "ż", "never seen", "\ud800"]),
    st.lists(st.integers(), max_size=1),
)
FITTING = st.fixed_dictionaries(
    {
        "a spend": st.one_of(st.none(), st.integers(-(2**60), 2**60), st.floats(width=32)),
        "gold": st.one_of(st.none(), st.booleans()),
        "kind": st.one_of(st.none(), st.text(max_size=3)),
    }
)
ROWS = st.one_of(
    FITTING, st.dictionaries(st.sampled_from(["a spend", "gold", "kind", "other"]), VALUES), VALUES
)


def outcome(body: bytes, quick: bool) -> Any:
    try:
        if quick:
            return READER.decoded(body, max_rows=3).tolist()
        return READER.matrix(parse(body, max_rows=3)).tolist()
    except RequestError as error:
        return error.status, error.body()


@given(st.lists(ROWS, max_size=4))
@example([{"a spend": 10**400, "gold": None, "kind": None}])
@example([{"a spend": 3.5e38, "gold": None, "kind": None}])
@example([{"a spend": True, "gold": 1, "kind": None}])
def test_both_ways_give_the_same(rows: list[Any]) -> None:
    body = json.dumps({"rows": rows}).encode()
    np.testing.assert_equal(outcome(body, quick=True), outcome(body, quick=False))


@given(st.binary(max_size=40).map(lambda noise: b'{"rows": [{"gold": ' + noise))
def test_noise_is_refused_the_same_way(body: bytes) -> None:
    assert outcome(body, quick=True) == outcome(body, quick=False)
