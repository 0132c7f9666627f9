"""Rows as mappings and rows as a frame are one matrix."""

import pickle

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.encoding import Encoder, EncodingError

FRAME = pl.DataFrame(
    {"spend": [1.5, None], "visits": [1, 2], "channel": ["web", "app"], "member": [True, None]}
)
ROW = st.fixed_dictionaries(
    {
        "spend": st.none() | st.floats(-1e38, 1e38) | st.integers(-(2**70), 2**70),
        "visits": st.none() | st.integers(-(2**40), 2**40),
        "channel": st.none() | st.sampled_from(["web", "app", "post", "Web"]),
        "member": st.none() | st.booleans(),
    }
)
TYPES = {"spend": pl.Float64, "visits": pl.Float64, "channel": pl.String, "member": pl.Boolean}


@given(st.lists(ROW, min_size=1, max_size=5), st.permutations(FRAME.columns))
def test_rows_encode_as_their_frame_does(rows: list[dict[str, object]], order: list[str]) -> None:
    encoder = Encoder.fit(FRAME, order)
    x = encoder.transform_rows(rows)
    frame = pl.DataFrame(
        [
            pl.Series(name, [row[name] for row in rows], dtype, strict=False)
            for name, dtype in TYPES.items()
        ]
    )
    assert (x.dtype, x.flags.c_contiguous) == (np.float32, True)
    np.testing.assert_array_equal(x, encoder.transform(frame))
    assert encoder.categories == tuple(2 if name == "channel" else 0 for name in order)


@pytest.mark.parametrize("name", FRAME.columns)
def test_one_column_encodes_and_is_stored_after_use(name: str) -> None:
    encoder = Encoder.fit(FRAME, [name])
    x = encoder.transform_rows(FRAME.to_dicts())
    np.testing.assert_array_equal(x, encoder.transform(FRAME))
    again: Encoder = pickle.loads(pickle.dumps(encoder))
    np.testing.assert_array_equal(again.transform_rows(FRAME.to_dicts()), x)


def test_a_row_without_a_column_is_told() -> None:
    with pytest.raises(EncodingError, match="a row has no 'member'"):
        Encoder.fit(FRAME, FRAME.columns).transform_rows([{"spend": 1, "visits": 2, "channel": ""}])
