"""Values of a column as small integers from 0."""

import numpy as np
import polars as pl
from numba import njit

from models.features.sorting import Array
from models.features.spec import Scalar

# An integer column whose range is no wider than this times the events is its own code.
_SPARSE = 4


class Codes:
    """What the codes of a column stand for; made by reading it once.

    Strings are coded by Polars while they are read; integers of moderate range are their own
    codes, from `first` on; other values are looked up among the sorted distinct ones.

    Attributes:
        dtype: the column's.
        first: the first code in `arrays`; a null is one below.
        count: how many codes there are.
    """

    def __init__(self, column: str, dtype: pl.DataType, *, ordered: bool) -> None:
        """Of a column of some type; ordered: codes in the order of the values."""
        self.dtype, self.first, self.count = dtype, 0, 0
        self._column, self._ordered = column, ordered
        # The values by code, unless they are integers from `first` on.
        self._values: pl.Series | None = None
        # Of what the column is read as, the code in order.
        self._rank: Array | None = None
        self._places: Array | None = None
        text = isinstance(dtype, pl.String | pl.Categorical | pl.Enum)
        # Its own categories, so that codes start at 0 and go when the table does.
        self._categories = pl.Categories.random() if text else None
        self._whole = dtype.is_integer() and dtype not in (pl.UInt64, pl.Int128, pl.UInt128)

    def read(self) -> pl.Expr:
        """What to read the column as."""
        if self._categories is not None:
            return pl.col(self._column).cast(pl.String).cast(pl.Categorical(self._categories))
        return pl.col(self._column).cast(pl.Int64) if self._whole else pl.col(self._column)

    def learn(self, source: pl.LazyFrame) -> None:
        """Finds the codes of the read column, called "v" in the source."""
        v = pl.col("v")
        if self._categories is not None:
            # Where the source is a plan, this reads it, and the categories fill.
            source.select(v.to_physical().max()).collect(engine="streaming")
            values = self._categories.to_series().cast(pl.String)
            if self._ordered:
                order = values.arg_sort().to_numpy()
                self._rank = np.empty(len(order), np.int32)
                self._rank[order] = np.arange(len(order), dtype=np.int32)
                values = values.gather(order)
            self._values = values
        elif self._whole:
            low, high, events = (
                source.select(v.min().alias("low"), v.max().alias("high"), pl.len())
                .collect(engine="streaming")
                .row(0)
            )
            low, high = (0, -1) if low is None else (low, high)
            if high - low < _SPARSE * events + 65_536:
                self.first, self.count = low, high - low + 1
                return
            self._values = self._distinct(source)
            self._places = np.empty(1 << (2 * len(self._values)).bit_length(), np.int32)
            _index(self._values.to_numpy(), self._places)
        else:
            self._values = self._distinct(source)
        self.count = len(self._values)

    def _distinct(self, source: pl.LazyFrame) -> pl.Series:
        found = source.select(pl.col("v").drop_nulls().unique())
        return found.collect(engine="streaming")["v"].sort()

    def arrays(self, series: pl.Series) -> Array:
        """Codes of a part of the read column, from `first` on: int32, or int64 for integers."""
        if self._categories is not None:
            codes = frozen(series.to_physical().cast(pl.Int32).fill_null(-1).to_numpy())
            return codes if self._rank is None else frozen(self._rank[codes])
        if self._values is None:
            return frozen(series.fill_null(self.first - 1).to_numpy())
        if self._places is None:
            return frozen(self.encode(series, missing=-1).astype(np.int32))
        if not series.null_count():
            return frozen(
                _look_up(frozen(series.to_numpy()), self._values.to_numpy(), self._places)
            )
        there = series.fill_null(self._values[0])
        codes = _look_up(frozen(there.to_numpy()), self._values.to_numpy(), self._places)
        codes[series.is_null().to_numpy()] = -1
        return frozen(codes)

    def decode(self, codes: Array, name: str) -> pl.Series:
        """The values of codes from 0."""
        if self._values is not None:
            return self._values.gather(codes).cast(self.dtype).alias(name)
        return pl.Series(name, codes + self.first, pl.Int64).cast(self.dtype)

    def encode(self, values: pl.Series, *, missing: int) -> Array:
        """int64 codes from 0 of values; `missing` for one that is not among them."""
        if self._values is None:
            codes = values.cast(pl.Int64).fill_null(self.first - 1).to_numpy() - self.first
            return np.where((codes < 0) | (codes >= self.count), missing, codes)
        known = pl.DataFrame({"v": self._values, "c": np.arange(self.count)})
        asked = pl.DataFrame({"v": values.cast(self._values.dtype)})
        found = asked.join(known, on="v", how="left", maintain_order="left")["c"]
        return found.fill_null(missing).to_numpy()

    def find(self, value: Scalar) -> int | None:
        """The code from 0 of a value, None if it has none.

        Raises:
            TypeError: the value can't be compared with the column's.
        """
        if self._values is None:
            if isinstance(value, str):
                raise TypeError
            code = int(value) - self.first
            return code if int(value) == value and 0 <= code < self.count else None
        try:
            return self._values.index_of(value)
        except pl.exceptions.PolarsError as error:
            raise TypeError from error


def frozen(array: Array) -> Array:
    """One type for numba, whether Polars gave its own memory or a copy."""
    array.flags.writeable = False
    return array


@njit(nogil=True, cache=True)
def _index(values, places):  # type: ignore[no-untyped-def]
    """Fills an open hash table of the places of distinct values; its size is a power of 2."""
    mask = places.size - 1
    places[:] = -1
    for i in range(values.size):
        h = (values[i] * np.int64(-7046029254386353131) >> 32) & mask
        while places[h] >= 0:
            h = (h + 1) & mask
        places[h] = i


@njit(nogil=True, cache=True)
def _look_up(column, values, places):  # type: ignore[no-untyped-def]
    """The place of each of a column's values, which are all there."""
    mask = places.size - 1
    out = np.empty(column.size, np.int32)
    for i in range(column.size):
        h = (column[i] * np.int64(-7046029254386353131) >> 32) & mask
        while values[places[h]] != column[i]:
            h = (h + 1) & mask
        out[i] = places[h]
    return out
