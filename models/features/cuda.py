"""The kernel on a GPU: the scan's own source, a thread an entity.

Columns come from a cuDF frame by `__cuda_array_interface__`, are coded and sorted on the GPU, and
the features stay there, in a frame of the same kind: for XGBoost or cuML. Nulls come out as NaN.
cuDF and pandas say what is used here alike, and so do CuPy and NumPy: on numba's simulator
(NUMBA_ENABLE_CUDASIM=1) the same code runs over pandas and NumPy.

Knows nothing of where the frame comes from.
"""

from collections.abc import Sequence
from datetime import datetime
from types import ModuleType
from typing import Any

import numpy as np

from models.features.compiled import kernel
from models.features.events import FeatureError, micros
from models.features.kernel import edges
from models.features.listing import describe
from models.features.shape import KNOWN, shape
from models.features.sorting import LARGEST
from models.features.spec import FeatureSpec, cutoff_times

_THREADS = 128


def compute(
    frame: Any,
    spec: FeatureSpec,
    cutoffs: Sequence[datetime] | None = None,
    *,
    labels: bool = False,
    xp: ModuleType | None = None,
) -> Any:
    """Computes every declared feature from the events before each cutoff, on the GPU.

    Args:
        frame: a `cudf.DataFrame`, one row an event; times without a zone are in UTC.
        spec: the declaration.
        cutoffs: moments, naive ones in UTC; None for the spec's own.
        labels: whether to add the spec's labels, as columns after the features.
        xp: the arrays' module; None for CuPy.

    Returns:
        A frame of the same kind as the one given, with the rows and columns of
        `models.features.compute`; NaN where that has null.

    Raises:
        FeatureError: a feature that the kernel doesn't know, streams or attributes, no cutoffs,
            missing columns, null entities or times, a measure beyond 1e100.
    """
    if xp is None:
        import cupy

        xp = cupy
    if left := [f.name for f in describe(spec) if f.table or f.aggregation not in KNOWN]:
        raise FeatureError(f"{left} aren't computed on the GPU; leave them out, or use `compute`")
    given = sorted({micros(c) for c in (cutoffs if cutoffs is not None else cutoff_times(spec))})
    if not given:
        raise FeatureError("no cutoffs; pass some, or declare them in the spec's cutoffs")
    made = shape(spec, labels=labels)
    cuts = np.array(given, np.int64)
    codes, names, sorted_columns = _sorted(frame, spec, xp)
    bounds = xp.searchsorted(codes, xp.arange(len(names) + 1)).astype(np.int64)
    device_cuts = xp.asarray(cuts)
    rows = xp.zeros(len(names) + 1, np.int64)
    if len(codes):
        # A category may have no events.
        first = sorted_columns["t"][xp.minimum(bounds[:-1], len(codes) - 1)]
        later = cuts.size - xp.searchsorted(device_cuts, first, side="right")
        rows[1:] = xp.cumsum(xp.where(bounds[1:] > bounds[:-1], later, 0))
    total = int(rows[-1])
    floats = xp.empty((made.outputs[0], total), np.float32)
    ints = xp.empty((made.outputs[1], total), np.int32)
    before, after = (xp.asarray(moments) for moments in edges(made, cuts))
    room = len(codes) + len(names)
    run: Any = kernel(spec, made, "cuda")
    # The simulator swaps a module's globals a thread, and its threads race for them.
    threads = 1 if xp is np else _THREADS
    run[len(names) // threads + 1, threads](
        rows, 0, bounds, xp.zeros(1, np.int64), device_cuts, before, after,
        *(sorted_columns[name] for name in ("t", "m", "previous", "slots", "flags")),
        xp.empty((room, max(made.doubles, 1)), np.float64),
        xp.empty((room, max(made.ints, 1)), np.int32),
        xp.empty((room, max(len(made.stacks), 1)), np.int32),
        xp.empty((max(len(made.distinct), 1), (len(codes) >> 6) + len(names) + 1), np.uint64),
        floats, ints,
    )  # fmt: skip
    who = xp.searchsorted(rows, xp.arange(total), side="right") - 1
    when = device_cuts[cuts.size - (rows[who + 1] - xp.arange(total))]
    columns = {spec.entity: names.take(who), "cutoff": when}
    for name, whole, row in made.columns:
        columns[name] = ints[row] if whole else floats[row]
    made_frame = type(frame)(columns)
    made_frame["cutoff"] = made_frame["cutoff"].astype("datetime64[us]")
    return made_frame


def _sorted(frame: Any, spec: FeatureSpec, xp: ModuleType) -> tuple[Any, Any, dict[str, Any]]:
    """Sorted codes of entities, the entities, and the columns as `sorting.Sorted` has them."""
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
    times = _array(frame[spec.time].astype("datetime64[us]").astype("int64"), np.int64, 0)
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
    return entity, names, columns


def _array(series: Any, dtype: Any, null: Any) -> Any:
    """The series as an array on its device, with a value for null."""
    convert = getattr(series, "to_cupy", series.to_numpy)
    return convert(dtype=dtype, na_value=null)
