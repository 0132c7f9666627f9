"""Events into the order the scan walks them: by entity, then by time.

Two counting sorts. The first scatters the columns into buckets of neighbouring entities, small
enough for a core's cache; the second sorts each bucket there. Both are stable and release the
GIL: threads take chunks, then buckets. Knows nothing of features or tables.
"""

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numba import njit

Array = np.ndarray[Any, np.dtype[Any]]

# Sums of squares of measures must stay finite; larger ones are counted, to be refused.
LARGEST = 1e100
# A bucket's columns should fit in a core's second-level cache.
_BUCKET_EVENTS = 12_000
# Up to as many values, the last event of each is looked up; beyond, an entity's are sorted.
_LOOKED_UP = 1 << 20
_MAX_BUCKETS = 8_192


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some events as plain arrays of one length, in the order they came in.

    Attributes:
        entity: int64 or int32; codes in the order of the entities, from the layout's first.
        times: int64, microseconds since 1970.
        measures: float64; NaN where null.
        values: int64 or int32; codes of the columns with distinct counts or category values, from
            the layout's first; a null is one below.
        flags: uint32, a bit a filter; None without filters.
    """

    entity: Array
    times: Array
    measures: Sequence[Array]
    values: Sequence[Array]
    flags: Array | None


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What all batches have in common.

    Attributes:
        first_entity: the code of the first entity.
        entities: how many codes of entities there are.
        first_values: the first code of each column of values.
        measures: how many there are.
        flags: whether there are filters.
    """

    first_entity: int
    entities: int
    first_values: Sequence[int]
    measures: int
    flags: bool

    def shift(self, events: int) -> int:
        """entity >> shift is its bucket."""
        shift, wanted = 0, min(_MAX_BUCKETS, events // _BUCKET_EVENTS + 1)
        while (self.entities - 1) >> shift >= wanted:
            shift += 1
        return shift


@dataclass(frozen=True, kw_only=True)
class Values:
    """What the codes of the columns of values are for.

    Attributes:
        sizes: how many codes each column has.
        distinct: the columns that are counted.
        categories: the columns that have declared values, and for each the slot of each code
            (uint16, codes + 1; the last is for null).
    """

    sizes: Sequence[int]
    distinct: Sequence[int]
    categories: Sequence[tuple[int, Array]]


@dataclass(frozen=True, kw_only=True)
class Sorted:
    """Columns ordered by (entity, time); events of equal time keep the order they came in.

    Attributes:
        bounds: int64 (entities + 1); an entity's events are at bounds[e]:bounds[e + 1].
        times: int64 (n).
        measures: float64 (measures, n); NaN where there is none.
        previous: int32 (distinct, n): place, among the entity's events, of the last one with the
            same value; -1 for none, -2 where the value is null.
        slots: uint16 (categories, n).
        flags: uint32 (n), or of length 0 without filters.
        beyond: finite measures larger than LARGEST, now NaN.
    """

    bounds: Array
    times: Array
    measures: Array
    previous: Array
    slots: Array
    flags: Array
    beyond: int


def threads() -> int:
    """Threads to use: NUMBA_NUM_THREADS, or the CPUs this process may run on."""
    given = os.environ.get("NUMBA_NUM_THREADS")
    return int(given) if given else len(os.sched_getaffinity(0))


def run_all(tasks: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs tasks that release the GIL, on `threads()` threads; results in the tasks' order."""
    workers = min(threads(), len(tasks))
    if workers <= 1:
        return [task() for task in tasks]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda task: task(), tasks))


def room(shape: tuple[int, ...], dtype: type[Any]) -> Array:
    """Memory from Arrow's pool, which keeps what was freed for a while.

    Pages that are new to the process can cost more than the work that fills them.
    """
    import pyarrow as pa

    wanted = np.dtype(dtype)
    buffer = pa.allocate_buffer(math.prod(shape) * wanted.itemsize)
    return np.frombuffer(buffer, wanted).reshape(shape)


class Buckets:
    """The first sort: columns, by bucket of neighbouring entities."""

    def __init__(self, layout: Layout, counts: Array, shift: int) -> None:
        """Makes room.

        Args:
            layout: what the batches have in common.
            counts: int64, events a bucket.
            shift: entity >> shift is its bucket.
        """
        n = int(counts.sum())
        self.layout, self.shift = layout, shift
        self.edges = np.zeros(counts.size + 1, np.int64)
        np.cumsum(counts, out=self.edges[1:])
        self.code = room((n,), np.int32)
        self.times = room((n,), np.int64)
        self.measures = room((layout.measures, n), np.float64)
        self.values = room((len(layout.first_values), n), np.int32)
        self.flags = room((n if layout.flags else 0,), np.uint32)

    def add(self, batch: Batch, cursors: Array) -> int:
        """Scatters a batch; moves the cursors, each bucket's next place.

        Returns:
            How many finite measures were beyond LARGEST; they are NaN now.
        """
        to = np.empty(len(batch.entity), np.int64)
        _place(batch.entity, self.layout.first_entity, self.shift, cursors, to, self.code)
        _move(batch.times, to, self.times)
        for column, first, out in zip(
            batch.values, self.layout.first_values, self.values, strict=True
        ):
            _move_code(column, first, to, out)
        if batch.flags is not None:
            _move(batch.flags, to, self.flags)
        return sum(
            int(_move_measure(column, to, out))
            for column, out in zip(batch.measures, self.measures, strict=True)
        )


def count(entity: Array, layout: Layout, shift: int) -> Array:
    """int64: a batch's events by bucket."""
    counts = np.zeros((max(layout.entities, 1) - 1 >> shift) + 1, np.int64)
    _count(entity, layout.first_entity, shift, counts)
    return counts


def sort_batches(batches: Sequence[Batch], layout: Layout, values: Values) -> Sorted:
    """Sorts batches that are in memory, on all threads."""
    shift = layout.shift(sum(len(batch.entity) for batch in batches))
    counts = np.array(run_all([partial(count, b.entity, layout, shift) for b in batches]))
    buckets = Buckets(layout, counts.sum(axis=0), shift)
    # A batch's events of a bucket go after those of earlier batches, so that it is stable.
    cursors = buckets.edges[:-1] + np.cumsum(counts, axis=0) - counts
    adds = [partial(buckets.add, b, row) for b, row in zip(batches, cursors, strict=True)]
    return finish(buckets, values, sum(run_all(adds)))


def finish(buckets: Buckets, values: Values, beyond: int) -> Sorted:
    """The second sort, within each bucket; finds each event's last one of the same value.

    Args:
        buckets: filled ones; their columns are sorted in place.
        values: what the columns of values are for.
        beyond: how many measures were beyond LARGEST.
    """
    layout, shift, edges, n = buckets.layout, buckets.shift, buckets.edges, len(buckets.times)
    bounds = np.full(layout.entities + 1, n, np.int64)
    previous = room((len(values.distinct), n), np.int32)
    slots = room((len(values.categories), n), np.uint16)
    slot_of = np.zeros((len(slots), max(values.sizes, default=0) + 1), np.uint16)
    for row, (_, lookup) in zip(slot_of, values.categories, strict=True):
        row[: len(lookup)] = lookup
    columns = (
        bounds, buckets.code, buckets.times, buckets.measures, buckets.values, buckets.flags,
        np.array(values.sizes, np.int64), np.array(values.distinct, np.int64), _LOOKED_UP, previous,
        np.array([c for c, _ in values.categories], np.int64), slot_of, slots,
    )  # fmt: skip
    at = np.searchsorted(edges, np.linspace(0, n, 8 * threads() + 1)[1:-1])
    limits = sorted({0, *at.tolist(), edges.size - 1})
    run_all([partial(_sort_buckets, a, b, shift, edges, *columns) for a, b in pairwise(limits)])
    return Sorted(
        bounds=bounds,
        times=buckets.times,
        measures=buckets.measures,
        previous=previous,
        slots=slots,
        flags=buckets.flags,
        beyond=beyond,
    )


@njit(nogil=True, cache=True)
def _count(entity, first, shift, counts):  # type: ignore[no-untyped-def]
    for i in range(entity.size):
        counts[(entity[i] - first) >> shift] += 1


@njit(nogil=True, cache=True)
def _place(entity, first, shift, cursors, to, code):  # type: ignore[no-untyped-def]
    for i in range(entity.size):
        e = entity[i] - first
        place = cursors[e >> shift]
        cursors[e >> shift] = place + 1
        to[i] = place
        code[place] = e


@njit(nogil=True, cache=True)
def _move(column, to, out):  # type: ignore[no-untyped-def]
    for i in range(column.size):
        out[to[i]] = column[i]


@njit(nogil=True, cache=True)
def _move_code(column, first, to, out):  # type: ignore[no-untyped-def]
    for i in range(column.size):
        out[to[i]] = column[i] - first


@njit(nogil=True, cache=True)
def _move_measure(column, to, out):  # type: ignore[no-untyped-def]
    beyond = 0
    for i in range(column.size):
        x = column[i]
        if not abs(x) <= LARGEST:
            beyond += np.isfinite(x)
            x = np.nan
        out[to[i]] = x
    return beyond


@njit(nogil=True, cache=True)
def _sort_buckets(  # type: ignore[no-untyped-def]
    first, last, shift, edges, bounds, code, times, measures, values, flags,
    sizes, distinct, looked_up, previous, category, slot_of, slots,
):  # fmt: skip
    """Sorts the buckets first:last in place; fills bounds, previous and slots."""
    largest = 0
    for b in range(first, last):
        largest = max(largest, edges[b + 1] - edges[b])
    order = np.empty(largest, np.int64)
    longs = np.empty(largest, np.int64)
    doubles = np.empty(largest, np.float64)
    ints = np.empty((values.shape[0], largest), np.int32)
    bits = np.empty(largest, np.uint32)
    width = 1 << shift
    nexts = np.empty(width + 1, np.int64)
    seen_width = 0
    for d in range(distinct.size):
        if sizes[distinct[d]] <= looked_up:
            seen_width = max(seen_width, sizes[distinct[d]])
    # Where each value was last seen, in the sorted order; before an entity's start means never.
    seen = np.full((distinct.size, seen_width), -1, np.int64)
    entities = bounds.size - 1
    for b in range(first, last):
        lo, hi = edges[b], edges[b + 1]
        n = hi - lo
        base = b << shift
        nexts[:] = 0
        for i in range(lo, hi):
            nexts[code[i] - base + 1] += 1
        for e in range(width):
            nexts[e + 1] += nexts[e]
            if base + e < entities:
                bounds[base + e] = lo + nexts[e]
        for i in range(n):
            e = code[lo + i] - base
            order[nexts[e]] = i
            nexts[e] += 1
        start = 0
        for e in range(width):
            end = nexts[e]
            _by_time(order[start:end], times[lo:hi])
            start = end
        for i in range(n):
            longs[i] = times[lo + order[i]]
        times[lo:hi] = longs[:n]
        for j in range(measures.shape[0]):
            for i in range(n):
                doubles[i] = measures[j, lo + order[i]]
            measures[j, lo:hi] = doubles[:n]
        if flags.size:
            for i in range(n):
                bits[i] = flags[lo + order[i]]
            flags[lo:hi] = bits[:n]
        for j in range(values.shape[0]):
            for i in range(n):
                ints[j, i] = values[j, lo + order[i]]
        for k in range(category.size):
            other = slot_of[k, sizes[category[k]]]
            for i in range(n):
                v = ints[category[k], i]
                slots[k, lo + i] = slot_of[k, v] if v >= 0 else other
        for d in range(distinct.size):
            start = 0
            for e in range(width):
                end = nexts[e]
                if sizes[distinct[d]] > looked_up:
                    _link(ints[distinct[d], start:end], previous[d, lo + start : lo + end])
                    start = end
                    continue
                for i in range(start, end):
                    v = ints[distinct[d], i]
                    if v < 0:
                        previous[d, lo + i] = -2
                        continue
                    last_seen = seen[d, v]
                    previous[d, lo + i] = last_seen - lo - start if last_seen >= lo + start else -1
                    seen[d, v] = lo + i
                start = end


@njit(nogil=True, cache=True)
def _by_time(order, times):  # type: ignore[no-untyped-def]
    """Sorts one entity's places by time, stably; most logs are in order already."""
    for i in range(1, order.size):
        if times[order[i]] < times[order[i - 1]]:
            break
    else:
        return
    if order.size <= 32:
        for i in range(1, order.size):
            moved = order[i]
            k = i
            while k > 0 and times[order[k - 1]] > times[moved]:
                order[k] = order[k - 1]
                k -= 1
            order[k] = moved
        return
    own = np.empty(order.size, np.int64)
    for i in range(order.size):
        own[i] = times[order[i]]
    by = np.argsort(own, kind="mergesort")
    for i in range(order.size):
        own[i] = order[by[i]]
    order[:] = own


@njit(nogil=True, cache=True)
def _link(values, previous):  # type: ignore[no-untyped-def]
    """Finds each value's place before, as in `Sorted.previous`, without a table of all values."""
    n = values.size
    if n <= 16:
        for i in range(n):
            k = i - 1
            while k >= 0 and values[k] != values[i]:
                k -= 1
            previous[i] = k if values[i] >= 0 else -2
        return
    # As wide as times, so that one sort is compiled.
    by = np.argsort(values.astype(np.int64), kind="mergesort")
    for i in range(n):
        k = by[i]
        again = i > 0 and values[by[i - 1]] == values[k]
        previous[k] = -2 if values[k] < 0 else (by[i - 1] if again else -1)
