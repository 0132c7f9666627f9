"""Arrow IPC streams against what a model takes: many rows a request, without a Python object each.

What a client sends is checked before it is read: its columns, its rows, and that its buffers are
uncompressed, since compressed ones may unfold to any size. Knows nothing of HTTP.
"""

import struct
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from models.encoding import Encoder, EncodingError
from serving.schema import Problem, RequestError

MEDIA_TYPE = "application/vnd.apache.arrow.stream"

# What the readers raise on bytes that aren't what they seem.
UNREADABLE = (
    pa.ArrowException,
    pl.exceptions.PolarsError,
    OSError,
    OverflowError,
    UnicodeDecodeError,
    struct.error,
)

# Positions in Arrow's flatbuffers (format/Message.fbs).
_HEADER = 2
_ROWS, _COMPRESSION = 0, 3


def matrix(body: bytes, encoder: Encoder, *, max_rows: int) -> np.ndarray:
    """The stream's rows as the model takes them.

    Args:
        body: An Arrow IPC stream with the encoder's columns in any order and no others; null and
            NaN mean missing.
        encoder: The model's.
        max_rows: More are refused.

    Returns:
        (n, p) float32, n at least 1.

    Raises:
        RequestError: With status 400 the body isn't such a stream; with 422 its columns, rows or
            values aren't what the model takes.
    """
    try:
        with pa.ipc.open_stream(body) as reader:
            _require_columns(reader.schema, encoder)
            _require_plain(body, max_rows)
            table = reader.read_all()
        # Else an offset that points outside its buffer is followed.
        table.validate(full=True)
        frame: Any = pl.from_arrow(table)
    except UNREADABLE as error:
        raise _unreadable(error) from error
    if not frame.height:
        raise RequestError([Problem(reason="the stream has no rows; send at least one")])
    try:
        x_np = encoder.transform(frame)
    except EncodingError as error:
        raise RequestError([Problem(reason=str(error))]) from error
    if np.isinf(x_np).any():
        at, column = np.argwhere(np.isinf(x_np))[0].tolist()
        raise RequestError(
            [
                Problem(
                    row=at,
                    field=encoder.columns[column].name,
                    reason="is infinite, or too large for float32; give a finite number, or null",
                )
            ],
            count=int(np.isinf(x_np).sum()),
        )
    return x_np


def answer(scores_n: np.ndarray, *, model: str, version: int) -> bytes:
    """An Arrow IPC stream of one column, `score`, (n,) float64; model and version as metadata."""
    schema = pa.schema(
        [pa.field("score", pa.float64(), nullable=False)],
        metadata={"model": model, "version": str(version)},
    )
    batch = pa.record_batch([pa.array(scores_n)], schema=schema)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as writer:
        writer.write_batch(batch)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def _require_columns(schema: Any, encoder: Encoder) -> None:
    problems = []
    kinds = {column.name: column.kind for column in encoder.columns}
    for name in sorted({name for name in schema.names if schema.names.count(name) > 1}):
        problems.append(Problem(field=name, reason="there more than once; send it once"))
    for name in kinds.keys() - set(schema.names):
        reason = f"missing; send a column of {kinds[name]}s, of nulls if there are no values"
        problems.append(Problem(field=name, reason=reason))
    for field in schema:
        if field.name not in kinds:
            reason = f"not a field of this model; known are {sorted(kinds)}"
            problems.append(Problem(field=field.name, reason=reason))
        elif _kind(field.type) not in (kinds[field.name], "null"):
            reason = f"has the type {field.type}; send {kinds[field.name]}s, not dictionary-encoded"
            problems.append(Problem(field=field.name, reason=reason))
    if problems:
        problems.sort(key=lambda problem: problem.field or "")
        raise RequestError(problems)


def _kind(dtype: Any) -> str:
    if pa.types.is_boolean(dtype):
        return "boolean"
    if pa.types.is_integer(dtype) or pa.types.is_floating(dtype):
        return "number"
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype):
        return "string"
    if pa.types.is_string_view(dtype):
        return "string"
    return "null" if pa.types.is_null(dtype) else "other"


def _require_plain(body: bytes, max_rows: int) -> None:
    """Looks through the messages' heads, without reading what they hold."""
    rows = 0
    for message in pa.ipc.MessageReader.open_stream(body):
        if message.type != "record batch":
            continue
        head = message.metadata.to_pybytes()
        root = struct.unpack_from("<I", head)[0]
        held = _place(head, root, _HEADER)
        if held is None:
            raise pa.ArrowInvalid("a record batch without its header")
        batch = held + struct.unpack_from("<I", head, held)[0]
        if _place(head, batch, _COMPRESSION) is not None:
            reason = "the stream is compressed; send it uncompressed"
            raise RequestError([Problem(reason=reason)])
        length = _place(head, batch, _ROWS)
        rows += struct.unpack_from("<q", head, length)[0] if length is not None else 0
        if rows > max_rows:
            reason = f"the stream has over {max_rows} rows; send them in several requests"
            raise RequestError([Problem(reason=reason)])


def _place(head: bytes, table: int, field: int) -> int | None:
    """Where a flatbuffer table keeps a field, or None where it doesn't have it."""
    layout = table - struct.unpack_from("<i", head, table)[0]
    size = struct.unpack_from("<H", head, layout)[0]
    at = 4 + 2 * field
    offset = struct.unpack_from("<H", head, layout + at)[0] if at < size else 0
    return table + offset if offset else None


def _unreadable(error: Exception) -> RequestError:
    reason = f"the body is not an Arrow IPC stream: {error}; write one with pyarrow.ipc.new_stream"
    return RequestError([Problem(reason=reason)], status=400)
