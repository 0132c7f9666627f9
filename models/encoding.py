"""Turns a feature table into the float32 matrix that every model family takes.

Knows nothing of models: it fixes the columns, their order and their codes, so that a row
served alone gets the numbers it had in training.
"""

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from operator import itemgetter
from typing import Any

import numpy as np
import polars as pl


class EncodingError(ValueError):
    """A frame, or a stored encoder, doesn't fit; the message names the column and the remedy."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """How one feature becomes a number.

    Attributes:
        name: The column's name in the frame.
        kind: "number", "boolean" or "string".
        values: For a string column its known values, sorted; a value's code is its position.
    """

    name: str
    kind: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Columns in the order of the matrix; made by `fit` or `from_json`."""

    columns: tuple[Column, ...]

    @cached_property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the matrix's columns, in order."""
        return tuple(column.name for column in self.columns)

    @property
    def categories(self) -> tuple[int, ...]:
        """How many values each column's codes stand for; 0 for numbers and booleans."""
        return tuple(len(column.values) for column in self.columns)

    @classmethod
    def fit(cls, frame: pl.DataFrame, features: Sequence[str]) -> "Encoder":
        """Learns each feature's kind and, for strings, its codes.

        Args:
            frame: Training rows.
            features: Columns to encode, in the order of the matrix.

        Raises:
            EncodingError: A feature is absent, named twice, or of a type with no encoding.
        """
        if not features:
            raise EncodingError("features is empty; name at least one column of the frame")
        repeated = sorted({name for name in features if list(features).count(name) > 1})
        if repeated:
            raise EncodingError(f"features named more than once: {repeated}; name each one once")
        _require_columns(frame, features)
        columns = []
        for name in features:
            kind = _kind(frame.schema[name])
            if kind is None:
                raise EncodingError(
                    f"column {name!r} has type {frame.schema[name]}; allowed are numbers, "
                    "strings and booleans: cast it, or leave it out of the features"
                )
            values: tuple[str, ...] = ()
            if kind == "string":
                # Sorted in Python, so that the order is by code point whatever the dtype.
                values = tuple(sorted(frame[name].cast(pl.String).drop_nulls().unique()))
            columns.append(Column(name=name, kind=kind, values=values))
        return cls(columns=tuple(columns))

    def transform(self, frame: pl.DataFrame) -> np.ndarray:
        """Encodes rows; null, and a string not seen in `fit`, become NaN.

        Integers past 2**24 are rounded to the nearest float32.

        Args:
            frame: Rows with at least the encoder's columns; others are ignored.

        Returns:
            (n, p) float32, C-contiguous.

        Raises:
            EncodingError: A column is absent or of another kind than in `fit`.
        """
        _require_columns(frame, self.feature_names)
        x_np = np.empty((frame.height, len(self.columns)), dtype=np.float32)
        texts = []
        for position, column in enumerate(self.columns):
            series = frame[column.name]
            # A batch whose values are all missing arrives with polars' Null type.
            if series.dtype == pl.Null:
                x_np[:, position] = np.nan
                continue
            if _kind(series.dtype) != column.kind:
                raise EncodingError(
                    f"column {column.name!r} has type {series.dtype}, but was a {column.kind} "
                    f"in training; cast it to a {column.kind}, or fit the encoder again"
                )
            if column.kind == "string":
                texts.append((position, column))
            else:
                # to_numpy makes NaN of null.
                x_np[:, position] = series.cast(pl.Float32).to_numpy()
        if texts:
            # Together, since a plan costs more than a column of few rows.
            codes = frame.select(_codes(column) for _, column in texts)
            for position, column in texts:
                x_np[:, position] = codes[column.name].to_numpy()
        return x_np

    def transform_rows(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """Encodes rows given as mappings, to the bit as `transform` does their frame.

        For a few rows, for which a frame would cost more than the model.

        Args:
            rows: Each has every column: int or float, bool or str by its kind, or None.

        Returns:
            (n, p) float32, C-contiguous.

        Raises:
            EncodingError: A column is absent.
            ValueError, TypeError, OverflowError: A value is of another kind, or too large for
                float64.
        """
        try:
            values = [self._taker(row) for row in rows]
        except KeyError as error:
            raise EncodingError(
                f"a row has no {error.args[0]!r}; give every column: {self.feature_names}"
            ) from error
        with np.errstate(over="ignore"):
            return self.transform_values(values)

    def transform_values(self, rows: Sequence[tuple[Any, ...]]) -> np.ndarray:
        """The same of rows that are tuples of values in the order of the columns.

        Args:
            rows: As for `transform_rows`, but for the names. NumPy warns of a number past float32.

        Returns:
            (n, p) float32, C-contiguous.

        Raises:
            ValueError, TypeError, OverflowError: As `transform_rows`.
        """
        values: Sequence[Sequence[Any]] = rows
        if self._texts:
            values = [list(row) for row in rows]
            for position, codes in self._texts:
                for row in values:
                    row[position] = codes.get(row[position])  # type: ignore[index]
        # By way of float64, as a frame of Float64 columns; None becomes NaN.
        return np.array(values, dtype=np.float32).reshape(len(rows), len(self.columns))

    @cached_property
    def _taker(self) -> Callable[[Mapping[str, Any]], tuple[Any, ...]]:
        """What takes a row's values in order."""
        names = self.feature_names
        return itemgetter(*names) if len(names) > 1 else partial(_only, names[0])

    @cached_property
    def _texts(self) -> list[tuple[int, dict[Any, int]]]:
        """By position, the codes of each string column."""
        return [
            (position, {value: code for code, value in enumerate(column.values)})
            for position, column in enumerate(self.columns)
            if column.kind == "string"
        ]

    def to_json(self) -> str:
        """The encoder as JSON text, the same text for equal encoders."""
        return json.dumps(
            {
                "columns": [
                    {"name": column.name, "kind": column.kind, "values": list(column.values)}
                    for column in self.columns
                ]
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: str) -> "Encoder":
        """The encoder that `to_json` wrote.

        Raises:
            EncodingError: The text isn't what `to_json` writes.
        """
        try:
            stored: dict[str, Any] = json.loads(text)
            return cls(
                columns=tuple(
                    Column(name=column["name"], kind=column["kind"], values=tuple(column["values"]))
                    for column in stored["columns"]
                )
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise EncodingError(
                f"not a stored encoder ({error!r}): {text[:80]!r}; give the text of "
                "Encoder.to_json, or fit a new one"
            ) from error


def _kind(dtype: pl.DataType) -> str | None:
    if dtype == pl.Boolean:
        return "boolean"
    if dtype.is_numeric():
        return "number"
    if dtype in (pl.String, pl.Categorical, pl.Enum):
        return "string"
    return None


def _only(name: str, row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row[name],)


def _codes(column: Column) -> pl.Expr:
    codes = list(range(len(column.values)))
    return (
        pl.col(column.name)
        .cast(pl.String)
        .replace_strict(list(column.values), codes, default=None, return_dtype=pl.Float32)
    )


def _require_columns(frame: pl.DataFrame, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in frame.columns]
    if not missing:
        return
    close = {name: difflib.get_close_matches(name, frame.columns, n=1) for name in missing}
    hints = [f"{name!r}: did you mean {found[0]!r}?" for name, found in close.items() if found]
    raise EncodingError(
        f"columns not found: {missing}; the frame has {frame.columns}; "
        + ("; ".join(hints) if hints else "add them, or leave them out of the features")
    )
