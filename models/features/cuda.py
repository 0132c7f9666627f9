"""The kernel on a GPU: the scan's own source, a thread an entity.

Columns come from a cuDF frame by `__cuda_array_interface__`, are coded and sorted on the GPU, and
the features stay there, in a frame of the same kind: for XGBoost or cuML. Nulls come out as NaN.
cuDF and pandas say what is used here alike, and so do CuPy and NumPy: on numba's simulator
(NUMBA_ENABLE_CUDASIM=1) the same code runs over pandas and NumPy.

Knows nothing of where the frame comes from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import ModuleType
from typing import Any

import numpy as np

from models.features.compiled import kernel
from models.features.events import FeatureError, micros
from models.features.kernel import edges
from models.features.listing import describe
from models.features.shape import KNOWN, Shape, shape
from models.features.sorting import LARGEST
from models.features.spec import Attributes, FeatureSpec, cutoff_times

_THREADS = 128


@dataclass(frozen=True, kw_only=True)
class _Events:
    """Sorted events on the GPU.

    Attributes:
        names: entities, in order; their places are their codes.
        bounds: int64 (entities + 1); an entity's events are at bounds[e]:bounds[e + 1].
        columns: as `sorting.Sorted` has them.
    """

    names: Any
    bounds: Any
    columns: dict[str, Any]


def compute(
    frame: Any,
    spec: FeatureSpec,
    cutoffs: Sequence[datetime] | None = None,
    *,
    labels: bool = False,
    tables: Mapping[str, Any] | None = None,
    xp: ModuleType | None = None,
) -> Any:
    """Computes every declared feature from the events before each cutoff, on the GPU.

    Args:
        frame: a `cudf.DataFrame`, one row an event; times without a zone are in UTC.
        spec: the declaration.
        cutoffs: moments, naive ones in UTC; None for the spec's own.
        labels: whether to add the spec's labels, as columns after the features.
        tables: frames of the spec's attributes and streams, by name.
        xp: the arrays' module; None for CuPy.

    Returns:
        A frame of the same kind as the one given, with the rows and columns of
        `models.features.compute`; NaN where that has null.

    Raises:
        FeatureError: a feature that the kernel doesn't know, no cutoffs, missing tables or columns,
            null entities or times, a measure beyond 1e100.
    """
    if xp is None:
        import cupy

        xp = cupy
    streams = {name: spec.stream(name) for name in spec.streams}
    if left := [
        f.name
        for own in (spec, *streams.values())
        for f in describe(own)
        if f.table is None and f.aggregation not in KNOWN
    ]:
        raise FeatureError(f"{left} aren't computed on the GPU; leave them out, or use `compute`")
    if missing := [name for name in spec.tables if name not in (tables or {})]:
        raise FeatureError(f"tables {missing} of attributes or streams not given")
    given = sorted({micros(c) for c in (cutoffs if cutoffs is not None else cutoff_times(spec))})
    if not given:
        raise FeatureError("no cutoffs; pass some, or declare them in the spec's cutoffs")
    made = shape(spec, labels=labels)
    cuts = np.array(given, np.int64)
    events = _sorted(frame, spec, xp)
    names, bounds = events.names, events.bounds
    device_cuts = xp.asarray(cuts)
    rows = xp.zeros(len(names) + 1, np.int64)
    if times := len(events.columns["t"]):
        # A category may have no events.
        first = events.columns["t"][xp.minimum(bounds[:-1], times - 1)]
        later = cuts.size - xp.searchsorted(device_cuts, first, side="right")
        rows[1:] = xp.cumsum(xp.where(bounds[1:] > bounds[:-1], later, 0))
    total = int(rows[-1])
    computed = _run(events, spec, made, cuts, rows, own=False, xp=xp)
    who = xp.searchsorted(rows, xp.arange(total), side="right") - 1
    when = device_cuts[cuts.size - (rows[who + 1] - xp.arange(total))]
    columns = {spec.entity: names.take(who), "cutoff": when, **computed}
    for name, own in streams.items():
        others = _sorted((tables or {})[spec.streams[name].table], own, xp)
        columns |= _at_rows(others, own, xp.asarray(others.names.get_indexer(names))[who], when, xp)
    for name, attributes in spec.attributes.items():
        other = (tables or {})[attributes.table]
        columns |= _as_of(name, attributes, other, spec.entity, names, who, when, xp)
    made_frame = type(frame)(columns)
    made_frame["cutoff"] = made_frame["cutoff"].astype("datetime64[us]")
    said = [f.name for f in describe(spec)] + [label.name for label in made.labels]
    return made_frame[[spec.entity, "cutoff", *said]]


def _run(
    events: _Events,
    spec: FeatureSpec,
    made: Shape,
    cuts: np.ndarray[Any, Any],
    rows: Any,
    *,
    own: bool,
    xp: ModuleType,
) -> dict[str, Any]:
    """Columns of features and labels.

    Args:
        events: sorted ones.
        spec: the declaration.
        made: its shape.
        cuts: cutoffs, of all entities or of one after the other.
        rows: entity e's rows are rows[e]:rows[e + 1].
        own: whether entity e's cutoffs are those at its rows; else all entities have the last
            ones, as many as they have rows.
        xp: the arrays' module.
    """
    total, entities = int(rows[-1]), len(events.names)
    floats = xp.empty((made.outputs[0], total), np.float32)
    ints = xp.empty((made.outputs[1], total), np.int32)
    before, after = (xp.asarray(moments) for moments in edges(made, cuts))
    count = len(events.columns["t"])
    room = count + entities
    run: Any = kernel(spec, made, "cuda")
    # The simulator swaps a module's globals a thread, and its threads race for them.
    threads = 1 if xp is np else _THREADS
    run[entities // threads + 1, threads](
        rows, int(own), events.bounds, rows, xp.asarray(cuts), before, after,
        *(events.columns[name] for name in ("t", "m", "previous", "slots", "flags")),
        xp.empty((room, max(made.doubles, 1)), np.float64),
        xp.empty((room, max(made.ints, 1)), np.int32),
        xp.empty((room, max(len(made.stacks), 1)), np.int32),
        xp.empty((max(len(made.distinct), 1), (count >> 6) + entities + 1), np.uint64),
        floats, ints,
    )  # fmt: skip
    return {name: ints[row] if whole else floats[row] for name, whole, row in made.columns}


def _at_rows(
    events: _Events, spec: FeatureSpec, codes: Any, when: Any, xp: ModuleType
) -> dict[str, Any]:
    """Features at each row's own entity (-1 for one without events) and cutoff, in their order."""
    entities = len(events.names)
    # One more entity, without events.
    codes = xp.where(codes < 0, entities, codes)
    order = xp.lexsort(xp.stack([when, codes]))
    rows = xp.searchsorted(codes[order], xp.arange(entities + 2)).astype(np.int64)
    padded = _Events(
        names=xp.arange(entities + 1),
        bounds=xp.concatenate([events.bounds, events.bounds[-1:]]),
        columns=events.columns,
    )
    # The windows' edges are found on the CPU, where calendar months are known.
    cuts = when[order]
    cuts = cuts if xp is np else cuts.get()
    found = _run(padded, spec, shape(spec, labels=False), cuts, rows, own=True, xp=xp)
    back = xp.empty(len(order), np.int64)
    back[order] = xp.arange(len(order))
    return {name: column[back] for name, column in found.items()}


def _as_of(
    name: str,
    attributes: Attributes,
    table: Any,
    entity: str,
    names: Any,
    who: Any,
    when: Any,
    xp: ModuleType,
) -> dict[str, Any]:
    """The last row before each cutoff; of rows at the same time, the table's last."""
    needed = [entity, attributes.time, *attributes.columns]
    if missing := [c for c in needed if c not in table.columns]:
        raise FeatureError(
            f"columns not found: {missing}; table {attributes.table!r} has {[*table.columns]}"
        )
    if nulls := int(table[attributes.time].isna().sum()):
        raise FeatureError(
            f"{nulls} rows of table {attributes.table!r} have a null {attributes.time!r}; "
            "fill or drop them first"
        )
    codes = xp.asarray(names.get_indexer(table[entity]))
    times = _microseconds(table[attributes.time])
    rows = len(codes)
    # One sort of both: a row of the table before those that ask later than it.
    both = xp.stack(
        [
            xp.concatenate([xp.ones(rows, np.int64), xp.zeros(len(who), np.int64)]),
            xp.concatenate([times, when]),
            xp.concatenate([codes, who]).astype(np.int64),
        ]
    )
    order = xp.lexsort(both)
    seen = xp.cumsum(order < rows)
    history = order[order < rows]
    asks = order >= rows
    last = xp.empty(len(who), np.int64)
    last[order[asks] - rows] = seen[asks] - 1
    if not rows:
        raise FeatureError(f"table {attributes.table!r} has no rows; leave its attributes out")
    found = history[xp.maximum(last, 0)]
    there = (last >= 0) & (codes[found] == who)
    return {
        f"{name}_{column}": table[column].take(found).reset_index(drop=True).where(there)
        for column in attributes.columns
    }


def _microseconds(series: Any) -> Any:
    return _array(series.astype("datetime64[us]").astype("int64"), np.int64, 0)


def _sorted(frame: Any, spec: FeatureSpec, xp: ModuleType) -> _Events:
    valued = [*spec.distinct.values(), *(c.column for c in spec.categories.values())]
    needed = [spec.entity, spec.time, *spec.measures.values(), *valued]
    needed += [f.column for f in spec.filters]
    if missing := sorted({c for c in needed if c not in frame.columns}):
        raise FeatureError(f"columns not found: {missing}; the events have {[*frame.columns]}")
    for column in (spec.entity, spec.time):
        if nulls := int(frame[column].isna().sum()):
            raise FeatureError(f"{nulls} events have a null {column!r}; fill or drop them first")

    def coded(column: str) -> tuple[Any, Any]:
        """int64 codes, -1 for null, in the order of the values, and the values."""
        category = frame[column].astype("category")
        return _array(category.cat.codes, np.int64, -1), category.cat.categories

    entity, names = coded(spec.entity)
    times = _microseconds(frame[spec.time])
    order = xp.lexsort(xp.stack([times, entity]))
    entity = entity[order]
    n = len(order)
    measures = xp.empty((len(spec.measures), n), np.float64)
    for row, column in zip(measures, spec.measures.values(), strict=True):
        values = _array(frame[column], np.float64, np.nan)[order]
        inside = xp.abs(values) <= LARGEST
        if beyond := int((xp.isfinite(values) & ~inside).sum()):
            raise FeatureError(
                f"{beyond} finite values of {column!r} are beyond {LARGEST:g}; "
                "correct or drop them first"
            )
        row[:] = xp.where(inside, values, np.nan)
    previous = xp.empty((len(spec.distinct), n), np.int32)
    starts = xp.searchsorted(entity, entity)
    for row, column in zip(previous, spec.distinct.values(), strict=True):
        values = coded(column)[0][order]
        by = xp.lexsort(xp.stack([values, entity]))
        same = (values[by][1:] == values[by][:-1]) & (entity[by][1:] == entity[by][:-1])
        row[:] = -1
        row[by[1:]] = xp.where(same, by[:-1] - starts[by[:-1]], -1)
        row[values < 0] = -2
    slots = xp.empty((len(spec.categories), n), np.uint16)
    for row, category in zip(slots, spec.categories.values(), strict=True):
        values, known = coded(category.column)
        place = {v: i for i, v in enumerate(known.to_pandas() if xp is not np else known)}
        slot_of = np.full(len(place) + 1, len(category.values), np.uint16)
        for slot, value in enumerate(category.values):
            if value in place:
                slot_of[place[value]] = slot
        # The last place is null's, whose code is -1.
        row[:] = xp.asarray(slot_of)[values[order]]
    flags = xp.zeros(n if spec.filters else 0, np.uint32)
    for i, chosen in enumerate(spec.filters):
        column = frame[chosen.column]
        kept = column < chosen.below if chosen.below is not None else column == chosen.equals
        flags |= _array(kept, np.bool_, False)[order].astype(np.uint32) << i
    columns = {
        "t": times[order], "m": measures, "previous": previous, "slots": slots, "flags": flags
    }  # fmt: skip
    bounds = xp.searchsorted(entity, xp.arange(len(names) + 1)).astype(np.int64)
    return _Events(names=names, bounds=bounds, columns=columns)


def _array(series: Any, dtype: Any, null: Any) -> Any:
    """The series as an array on its device, with a value for null."""
    convert = getattr(series, "to_cupy", series.to_numpy)
    return convert(dtype=dtype, na_value=null)
