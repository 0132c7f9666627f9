"""Features and labels by the kernel: sorts events once, then scans entities on all threads."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import polars as pl
from numba import njit

from models.features.codes import frozen
from models.features.compiled import kernel
from models.features.packing import Ready
from models.features.shape import Shape, shape
from models.features.sorting import (
    Array,
    Batch,
    Layout,
    Sorted,
    Values,
    room,
    run_all,
    sort_batches,
    threads,
)
from models.features.spec import FeatureSpec
from models.features.windows import DAY_US, starts


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Features and labels, by `Shape.columns`.

    Attributes:
        who: int32 (rows), codes of entities.
        floats: float32 (float columns, rows).
        ints: int32 (int columns, rows).
    """

    who: Array
    floats: Array
    ints: Array


def warm(spec: FeatureSpec, *, labels: bool = False) -> None:
    """Compiles all that computes a declaration, or loads it from disk."""
    columns = len({*spec.distinct.values(), *(c.column for c in spec.categories.values())})
    layout = Layout(
        first_entity=0,
        entities=1,
        first_values=[0] * columns,
        measures=len(spec.measures),
        flags=bool(spec.filters),
    )
    # A column of integers is its own codes, of 8 bytes; any other has codes of 4.
    for kind in (np.int64, np.int32):
        code, number = frozen(np.zeros(1, kind)), frozen(np.zeros(1))
        batch = Batch(
            entity=code,
            times=frozen(np.zeros(1, np.int64)),
            measures=[number] * len(spec.measures),
            values=[code] * columns,
            flags=frozen(np.zeros(1, np.uint32)) if spec.filters else None,
        )
        slots = np.zeros(2, np.uint16)
        values = Values(
            sizes=[1] * columns,
            distinct=[0] * len(spec.distinct),
            categories=[(0, slots)] * len(spec.categories),
        )
        events = sort_batches([batch], layout, values)
    cuts = np.ones(1, np.int64)
    for rows in at_cutoffs(events, spec, cuts, labels=labels):
        _last_cuts(rows.who, cuts, np.empty(1, np.int64))
        to_frame(rows, shape(spec, labels=labels))


def at_cutoffs(
    events: Sorted, spec: FeatureSpec, cuts: Array, *, labels: bool, at_once: int | None = None
) -> Iterator[Rows]:
    """Every entity at every one of the same cutoffs (int64 us, ascending) after its first event.

    Args:
        events: sorted ones.
        spec: the declaration.
        cuts: cutoffs.
        labels: whether labels are wanted.
        at_once: about how many rows to yield at a time; None for all.
    """
    parts = _parts(events.bounds, None if at_once is None else at_once // max(cuts.size, 1))
    counts = run_all(
        [partial(_count_rows, a, b, events.bounds, events.times, cuts) for a, b in parts]
    )
    done = 0
    while done < len(parts):
        some = done + 1
        while some < len(parts) and (at_once is None or sum(counts[done : some + 1]) <= at_once):
            some += 1
        first = np.concatenate([[0], np.cumsum(counts[done:some], dtype=np.int64)])
        yield _run(events, spec, cuts, parts[done:some], first, labels=labels, cut_at=None)
        done = some


def at_rows(
    events: Sorted, spec: FeatureSpec, codes: Array, cuts: Array, *, labels: bool = False
) -> Rows:
    """Each row's own entity and cutoff; rows sorted by both, codes up to one past the last."""
    entities = events.bounds.size - 1
    cut_at = np.searchsorted(codes, np.arange(entities + 2)).astype(np.int64)
    # One more, without events, for those that have none.
    parts = [*_parts(events.bounds, None), (entities, entities + 1)]
    first = np.array([*(cut_at[a] for a, _ in parts), cut_at[-1]], np.int64)
    return _run(events, spec, cuts, parts, first, labels=labels, cut_at=cut_at)


def _parts(bounds: Array, largest: int | None) -> list[tuple[int, int]]:
    """Entities cut into parts of about equal numbers of events, of no more than `largest` each."""
    entities, n = bounds.size - 1, int(bounds[-1])
    pieces = 8 * threads()
    if largest is not None:
        pieces = max(pieces, 2 * threads() * entities // max(largest, 1))
    at = np.searchsorted(bounds, np.linspace(0, n, pieces + 1)[1:-1])
    return list(pairwise(sorted({0, *at.tolist(), entities}))) or [(0, 0)]


def _run(
    events: Sorted,
    spec: FeatureSpec,
    cuts: Array,
    parts: list[tuple[int, int]],
    first: Array,
    *,
    labels: bool,
    cut_at: Array | None,
) -> Rows:
    made = shape(spec, labels=labels)
    rows = int(first[-1])
    floats, ints = (
        room((count, rows), dtype)
        for count, dtype in zip(made.outputs, (np.float32, np.int32), strict=True)
    )
    who = room((rows,), np.int32)
    bounds = events.bounds
    if cut_at is not None:
        bounds = np.append(bounds, bounds[-1])
    before, after = edges(made, cuts)
    run = kernel(spec, made)
    arguments = (
        0 if cut_at is None else 1,
        bounds,
        cut_at if cut_at is not None else np.zeros(1, np.int64),
        int(np.diff(bounds).max(initial=0)),
        cuts,
        before,
        after,
        events.times,
        events.measures,
        events.previous,
        events.slots,
        events.flags,
        who,
        floats,
        ints,
    )
    run(0, 0, 0, *arguments)  # Compiles, once and not on every thread.
    run_all(
        [
            partial(run, a, b, int(row), *arguments)
            for (a, b), row in zip(parts, first, strict=False)
            if a < b
        ]
    )
    return Rows(who=who, floats=floats, ints=ints)


def edges(made: Shape, cuts: Array) -> tuple[Array, Array]:
    """The windows' first moments (windows, cuts) and the horizons' ends (horizons, cuts)."""
    before = np.empty((len(made.windows), cuts.size), np.int64)
    for row, window in zip(before, made.windows, strict=True):
        row[:] = starts(cuts, window)
    after = np.array([cuts + days * DAY_US for days in made.horizons], np.int64)
    return before, after.reshape(len(made.horizons), cuts.size)


def to_frame(rows: Rows, made: Shape) -> pl.DataFrame:
    """Columns over the kernel's memory, without a copy; NaN is null."""
    import pyarrow as pa

    n = rows.who.size

    def column(whole: bool, row: int) -> Any:
        if whole:
            return pa.Array.from_buffers(pa.int32(), n, [None, pa.py_buffer(rows.ints[row])])
        values, bits = rows.floats[row], np.empty((n + 7) // 8, np.uint8)
        nulls = int(_valid(values, bits))
        validity = pa.py_buffer(bits) if nulls else None
        return pa.Array.from_buffers(pa.float32(), n, [validity, pa.py_buffer(values)], nulls)

    arrays = run_all([partial(column, whole, row) for _, whole, row in made.columns])
    frame = pl.from_arrow(pa.table(arrays, names=[c[0] for c in made.columns]), rechunk=False)
    assert isinstance(frame, pl.DataFrame)
    return frame


def features_at_cutoffs(
    ready: Ready, spec: FeatureSpec, cuts: Array, *, labels: bool, at_once: int | None = None
) -> Iterator[pl.DataFrame]:
    """entity, cutoff, features, labels; sorted by entity and cutoff, about `at_once` at a time."""
    made = shape(spec, labels=labels)
    for rows in at_cutoffs(ready.events, spec, cuts, labels=labels, at_once=at_once):
        when = np.empty(rows.who.size, np.int64)
        _last_cuts(rows.who, cuts, when)
        yield to_frame(rows, made).select(
            ready.entities.decode(rows.who, spec.entity),
            pl.Series("cutoff", when, pl.Int64).cast(pl.Datetime("us")),
            pl.all(),
        )


def features_at_rows(
    ready: Ready, spec: FeatureSpec, keys: pl.DataFrame, *, labels: bool = False
) -> pl.DataFrame:
    """Features and labels of each of `keys` (entity and _c), in their order."""
    codes = ready.entities.encode(keys[spec.entity], missing=ready.entities.count)
    cuts = keys["_c"].to_numpy()
    order = np.lexsort((cuts, codes))
    rows = at_rows(ready.events, spec, codes[order], cuts[order], labels=labels)
    frame = to_frame(rows, shape(spec, labels=labels))
    back = np.empty(order.size, np.int64)
    back[order] = np.arange(order.size)
    return frame.select(pl.all().gather(back))


@njit(nogil=True, cache=True)
def _count_rows(first, last, bounds, times, cuts):  # type: ignore[no-untyped-def]
    rows = 0
    for e in range(first, last):
        if bounds[e] < bounds[e + 1]:
            c = cuts.size
            while c > 0 and cuts[c - 1] > times[bounds[e]]:
                c -= 1
            rows += cuts.size - c
    return rows


@njit(nogil=True, cache=True)
def _last_cuts(who, cuts, when):  # type: ignore[no-untyped-def]
    """An entity's rows are at the last cutoffs, as many as it has rows."""
    i = 0
    while i < who.size:
        j = i
        while j < who.size and who[j] == who[i]:
            j += 1
        for k in range(i, j):
            when[k] = cuts[cuts.size - (j - k)]
        i = j


@njit(nogil=True, cache=True)
def _valid(values, bits):  # type: ignore[no-untyped-def]
    """Sets a bit for each value that isn't NaN, lowest first; returns how many are."""
    n = values.size
    good = 0
    for i in range(n):
        good += values[i] == values[i]
    if good == n:
        return 0
    for byte in range(n // 8):
        i = byte * 8
        # Written out, as the compiler makes vectors of this and not of a loop.
        word = np.uint8(values[i] == values[i])
        word |= np.uint8(values[i + 1] == values[i + 1]) << 1
        word |= np.uint8(values[i + 2] == values[i + 2]) << 2
        word |= np.uint8(values[i + 3] == values[i + 3]) << 3
        word |= np.uint8(values[i + 4] == values[i + 4]) << 4
        word |= np.uint8(values[i + 5] == values[i + 5]) << 5
        word |= np.uint8(values[i + 6] == values[i + 6]) << 6
        word |= np.uint8(values[i + 7] == values[i + 7]) << 7
        bits[byte] = word
    if n % 8:
        word = np.uint8(0)
        for k in range(n % 8):
            at = n - n % 8 + k
            word |= np.uint8(values[at] == values[at]) << k
        bits[bits.size - 1] = word
    return n - good
