"""JSON rows against what a model takes: a matrix to score, or every problem by row and field.

Knows nothing of HTTP: `parse` takes a body's bytes, `RowReader` takes rows.
"""

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import Annotated, Any

import msgspec
import numpy as np

from models.encoding import Column, Encoder

# A body's problems are listed up to here, and counted beyond.
PROBLEMS_SHOWN = 100

_MISSING = object()

# What the encoder's float32 holds; beyond it a number would become an infinity in silence.
LARGEST = float(np.finfo(np.float32).max)

TYPES: dict[str, frozenset[type]] = {
    "number": frozenset((int, float, type(None))),
    "boolean": frozenset((bool, type(None))),
    "string": frozenset((str, type(None))),
}

# The body as the OpenAPI page shows it.
REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["rows"],
                "additionalProperties": False,
                "properties": {
                    "rows": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "type": "object",
                            "additionalProperties": {
                                "type": ["number", "string", "boolean", "null"]
                            },
                        },
                    }
                },
            }
        }
    },
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a request.

    Attributes:
        row: Position in `rows`, from 0; None where it isn't about one row.
        field: The field's name; None where it isn't about one field.
        reason: What was received, what is allowed and what to do.
    """

    row: int | None = None
    field: str | None = None
    reason: str


class RequestError(ValueError):
    """A request that can't be scored; `status` is the HTTP status that says so."""

    def __init__(self, problems: Sequence[Problem], *, count: int | None = None, status: int = 422):
        super().__init__("; ".join(problem.reason for problem in problems))
        self.problems = tuple(problems)
        self.count = len(problems) if count is None else count
        self.status = status

    def body(self) -> dict[str, Any]:
        """`detail`: the problems, the first 100 of them; `problems`: how many there are."""
        return {"detail": [asdict(problem) for problem in self.problems], "problems": self.count}


def parse(body: bytes, *, max_rows: int) -> list[Any]:
    """The rows of a request's body, not yet looked into.

    Args:
        body: JSON, `{"rows": [...]}`.
        max_rows: More are refused.

    Raises:
        RequestError: With status 400 the body isn't JSON; with 422 it isn't of this form.
    """
    try:
        # Decoded first, since json would look for other encodings than the one that JSON has.
        request = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        reason = f'the body is not JSON: {error}; send {{"rows": [{{"field": value, ...}}, ...]}}'
        raise RequestError([Problem(reason=reason)], status=400) from error
    if not isinstance(request, dict):
        reason = f'the body is {_said(request)}; send an object, {{"rows": [...]}}'
        raise RequestError([Problem(reason=reason)])
    if unknown := sorted(set(request) - {"rows"}):
        reason = "not known here; the body holds only 'rows'"
        raise RequestError([Problem(field=name, reason=reason) for name in unknown])
    return require_rows(request.get("rows", _MISSING), max_rows=max_rows)


def require_rows(rows: Any, *, max_rows: int) -> list[Any]:
    """The rows, not yet looked into, where they are a list of as many as may be.

    Raises:
        RequestError: They aren't.
    """
    if not isinstance(rows, list) or not rows:
        said = "missing" if rows is _MISSING else _said(rows)
        raise RequestError(
            [Problem(field="rows", reason=f"is {said}; give a list of at least one row")]
        )
    if len(rows) > max_rows:
        reason = f"has {len(rows)} rows; at most {max_rows} a request: send them in parts"
        raise RequestError([Problem(field="rows", reason=reason)])
    return rows


class RowReader:
    """Makes a model's matrix of JSON rows; one a model, so that a request finds all prepared."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._names = frozenset(encoder.feature_names)
        kinds = [column.kind for column in encoder.columns]
        self._numbers = np.array([kind == "number" for kind in kinds])
        self._kinds = [
            (TYPES[kind], _taker([each.name for each in encoder.columns if each.kind == kind]))
            for kind in sorted(set(kinds))
        ]
        self._decoder = _decoder(encoder)

    def decoded(self, body: bytes, *, max_rows: int) -> np.ndarray:
        """The rows of a request's body as the model takes them, (n, p) float32.

        Most bodies are good: those are read straight into the model's fields, which takes a
        fraction of the time. What isn't taken so is read as any JSON, to say what is wrong with it.

        Args:
            body: JSON, `{"rows": [...]}`.
            max_rows: More are refused.

        Raises:
            RequestError: As `parse` and `matrix`.
        """
        try:
            rows = self._decoder.decode(body).rows
        except (msgspec.MsgspecError, RecursionError):
            rows = []
        if 0 < len(rows) <= max_rows:
            return self._encoder.transform_values([msgspec.structs.astuple(row) for row in rows])
        return self.matrix(parse(body, max_rows=max_rows))

    def matrix(self, rows: Sequence[Any]) -> np.ndarray:
        """The rows as the model takes them, (n, p) float32; null means missing.

        Raises:
            RequestError: A field is unknown, missing, of the wrong type or not finite.
        """
        # As a whole, since most requests are good: one by one only to say why not.
        x_np = self._whole(rows)
        if x_np is not None:
            return x_np
        problems = []
        count = 0
        for problem in _problems(rows, self._encoder):
            count += 1
            if count <= PROBLEMS_SHOWN:
                problems.append(problem)
        assert problems, "the check of the whole refused what the check by rows finds good"
        raise RequestError(problems, count=count)

    def _whole(self, rows: Sequence[Any]) -> np.ndarray | None:
        """The matrix, or None where something isn't as it should be."""
        nulls = 0
        for row in rows:
            if type(row) is not dict or row.keys() != self._names:
                return None
            for allowed, taken in self._kinds:
                values = taken(row)
                if not allowed.issuperset(map(type, values)):
                    return None
                if allowed is TYPES["number"]:
                    nulls += values.count(None)
        try:
            x_np = self._encoder.transform_rows(rows)
        except OverflowError:
            return None
        # A number that isn't finite, besides the nulls, was given so or is past float32.
        finite = np.isfinite(x_np[:, self._numbers])
        return x_np if finite.size - np.count_nonzero(finite) == nulls else None


def _decoder(encoder: Encoder) -> Any:
    """Reads a body into objects with the model's fields, in the order of its columns."""
    number = Annotated[float, msgspec.Meta(ge=-LARGEST, le=LARGEST)]
    types = {"number": number | None, "boolean": bool | None, "string": str | None}
    # Names of features may be no names of Python.
    names = {f"f{at}": column.name for at, column in enumerate(encoder.columns)}
    row: Any = msgspec.defstruct(
        "Row",
        [(field, types[column.kind]) for field, column in zip(names, encoder.columns, strict=True)],
        rename=names,
        forbid_unknown_fields=True,
        gc=False,
    )
    request: Any = msgspec.defstruct("Request", [("rows", list[row])], forbid_unknown_fields=True)
    return msgspec.json.Decoder(request)


def _taker(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:
    """What takes these fields out of a row, always as a tuple."""
    if len(names) > 1:
        return itemgetter(*names)
    return lambda row: (row[names[0]],)


def smoke_rows(encoder: Encoder) -> list[dict[str, Any]]:
    """A row of nulls and a row of plain values, such as any model must score."""
    plain = {"number": 0.0, "boolean": False}
    return [
        {column.name: None for column in encoder.columns},
        {
            column.name: plain.get(column.kind, (*column.values, "")[0])
            for column in encoder.columns
        },
    ]


def _fits(column: Column, values: list[Any]) -> bool:
    if not TYPES[column.kind].issuperset(map(type, values)):
        return False
    return column.kind != "number" or all(
        value is None or -LARGEST <= value <= LARGEST for value in values
    )


def _problems(rows: Sequence[Any], encoder: Encoder) -> Iterator[Problem]:
    by_name: Mapping[str, Column] = {column.name: column for column in encoder.columns}
    for at, row in enumerate(rows):
        if not isinstance(row, dict):
            yield Problem(row=at, reason=f"is {_said(row)}; a row is an object of field and value")
            continue
        for name in row.keys() - by_name.keys():
            close = difflib.get_close_matches(name, by_name, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {sorted(by_name)}"
            yield Problem(row=at, field=name, reason=f"not a field of this model; {hint}")
        for name, column in by_name.items():
            if name not in row:
                reason = f"missing; give a {column.kind}, or null if there is no value"
                yield Problem(row=at, field=name, reason=reason)
            elif not _fits(column, [row[name]]):
                yield Problem(row=at, field=name, reason=_misfit(column, row[name]))


def _misfit(column: Column, value: Any) -> str:
    if column.kind == "number" and type(value) in (int, float):
        if isinstance(value, float) and not math.isfinite(value):
            return f"{value} is not finite; give a finite number, or null if there is no value"
        return f"is out of range; a number lies between -{LARGEST:.7g} and {LARGEST:.7g}"
    return f"is {_said(value)}; give a {column.kind}, or null if there is no value"


def _said(value: Any) -> str:
    """The value in few words, by JSON's names."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    kinds = {bool: "boolean", int: "number", float: "number", str: "string"}
    text = str(value) if isinstance(value, bool) else repr(value)
    return f"the {kinds[type(value)]} {text if len(text) <= 40 else text[:40] + '...'}"
