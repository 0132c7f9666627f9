"""Arrow bodies that a client may send, good and hostile, without a server."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.encoding import Encoder
from serving import arrow
from serving.schema import RequestError

FRAME = pl.DataFrame({"spend": [1.5, None, -3.0], "visits": [1, 2, 3], "segment": ["a", None, "b"]})
ENCODER = Encoder.fit(FRAME, FRAME.columns)


def stream(table: pa.Table, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=2)
    return sink.getvalue().to_pybytes()


GOOD = stream(FRAME.to_arrow())


def test_batches_of_a_stream_are_one_matrix() -> None:
    x = arrow.matrix(GOOD, ENCODER, max_rows=3)
    np.testing.assert_array_equal(x, ENCODER.transform(FRAME))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (stream(FRAME.to_arrow(), options=pa.ipc.IpcWriteOptions(compression="zstd")), "compress"),
        (GOOD[:-100], "not an Arrow IPC stream"),
        (b"", "not an Arrow IPC stream"),
        (stream(FRAME.cast({"segment": pl.Categorical}).to_arrow()), "not dictionary-encoded"),
        (stream(pa.table({"spend": [[1.0]], "visits": [1], "segment": ["a"]})), "send numbers"),
        (stream(FRAME.with_columns(visit=1).to_arrow()), "not a field"),
    ],
)
def test_what_cannot_be_scored_is_refused_with_the_reason(body: bytes, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        arrow.matrix(body, ENCODER, max_rows=3)


@given(st.data())
def test_a_damaged_stream_is_read_or_refused(data: st.DataObject) -> None:
    body = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    try:
        x = arrow.matrix(bytes(body), ENCODER, max_rows=3)
    except RequestError as error:
        assert error.status in (400, 422)
        assert error.problems
    else:
        assert x.shape[1] == 3
        assert 1 <= len(x) <= 3
