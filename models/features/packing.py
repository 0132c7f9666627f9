"""Events from a table into sorted arrays, without a copy where the table has them already."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from models.features.codes import Codes, frozen
from models.features.events import FeatureError, checked, filter_expressions, refuse_nulls, utc_us
from models.features.sorting import (
    LARGEST,
    Array,
    Batch,
    Buckets,
    Layout,
    Sorted,
    Values,
    count,
    finish,
    sort_batches,
)
from models.features.spec import FeatureSpec, Scalar

# Events in a batch: enough for a thread to be busy with, few enough to take little memory.
_BATCH_EVENTS = 250_000


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Sorted events, and what their entities' codes stand for."""

    events: Sorted
    entities: Codes


def ready(
    events: pl.LazyFrame | pl.DataFrame, spec: FeatureSpec, *, in_batches: bool = False
) -> Ready:
    """Reads, packs and sorts events.

    Args:
        events: one row an event.
        spec: the declaration.
        in_batches: reads the events a batch at a time, once for each thing to know of them,
            instead of once and all: half the memory, and slower.

    Raises:
        FeatureError: missing columns, null entities or times, measures beyond 1e100.
    """
    lazy, schema = checked(events, spec)
    names = list(
        dict.fromkeys([*spec.distinct.values(), *(c.column for c in spec.categories.values())])
    )
    entity = Codes(spec.entity, schema[spec.entity], ordered=True)
    columns = [Codes(name, schema[name], ordered=False) for name in names]
    coded = [entity.read().alias("_e"), *(c.read().alias(f"_v{j}") for j, c in enumerate(columns))]
    selected = [
        *coded,
        utc_us(schema[spec.time], spec.time).alias("_t"),
        *[
            pl.col(c).cast(pl.Float64).fill_null(float("nan")).alias(f"_m{j}")
            for j, c in enumerate(spec.measures.values())
        ],
    ]
    if spec.filters:
        bits = [
            keeps.cast(pl.UInt32) * (1 << i) for i, keeps in enumerate(filter_expressions(spec))
        ]
        selected.append(pl.sum_horizontal(bits).cast(pl.UInt32).alias("_f"))
    plan = lazy.select(selected)
    frame = None if in_batches else plan.collect(engine="streaming")
    source = plan if frame is None else frame.lazy()
    shown = source.select(pl.col("_e").alias(spec.entity), "_t")
    refuse_nulls(shown.null_count().collect(engine="streaming"), spec)
    for codes, column in zip([entity, *columns], coded, strict=True):
        codes.learn(source.select(pl.col(column.meta.output_name()).alias("v")))
    layout = Layout(
        first_entity=entity.first,
        entities=entity.count,
        first_values=[c.first for c in columns],
        measures=len(spec.measures),
        flags=bool(spec.filters),
    )

    def batch(part: pl.DataFrame) -> Batch:
        return Batch(
            entity=entity.arrays(part["_e"]),
            times=frozen(part["_t"].to_numpy()),
            measures=[frozen(part[f"_m{j}"].to_numpy()) for j in range(len(spec.measures))],
            values=[c.arrays(part[f"_v{j}"]) for j, c in enumerate(columns)],
            flags=frozen(part["_f"].to_numpy()) if spec.filters else None,
        )

    def values() -> Values:
        return Values(
            sizes=[c.count for c in columns],
            distinct=[names.index(c) for c in spec.distinct.values()],
            categories=[
                (names.index(c.column), _slots(name, c.values, columns[names.index(c.column)]))
                for name, c in spec.categories.items()
            ],
        )

    if frame is not None:
        parts = [batch(part) for part in _slices(frame)]
        done = sort_batches(parts, layout, values())
    else:
        done = _sort_as_read(plan, batch, entity, layout, values)
    if done.beyond:
        raise FeatureError(
            f"{done.beyond} finite values of {list(spec.measures.values())} are beyond "
            f"{LARGEST:g}; allowed: -{LARGEST:g} to {LARGEST:g}; correct or drop them first"
        )
    return Ready(events=done, entities=entity)


def _sort_as_read(
    plan: pl.LazyFrame,
    batch: Callable[[pl.DataFrame], Batch],
    entity: Codes,
    layout: Layout,
    values: Callable[[], Values],
) -> Sorted:
    """Sorts events that are read a batch at a time: once to count, once to place."""

    def read(*columns: str) -> Iterator[pl.DataFrame]:
        chosen = plan.select(columns) if columns else plan
        return iter(chosen.collect_batches(chunk_size=_BATCH_EVENTS, engine="streaming"))

    events = int(plan.select(pl.len()).collect(engine="streaming").item())
    shift = layout.shift(events)
    counts = count(np.zeros(0, np.int64), layout, shift)
    for part in read("_e"):
        counts += count(entity.arrays(part["_e"]), layout, shift)
    buckets = Buckets(layout, counts, shift)
    cursors = buckets.edges[:-1].copy()
    beyond = sum(buckets.add(batch(part), cursors) for part in read())
    return finish(buckets, values(), beyond)


def _slices(frame: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """The frame's own chunks, or parts of them, so that threads share the work."""
    if frame.is_empty():
        yield frame
    offset = 0
    for chunk in frame["_t"].get_chunks():
        for inside in range(0, len(chunk), _BATCH_EVENTS):
            yield frame.slice(offset + inside, min(_BATCH_EVENTS, len(chunk) - inside))
        offset += len(chunk)


def _slots(name: str, values: Sequence[Scalar], codes: Codes) -> Array:
    """uint16: each code's place in the declared values, their number for any other and for null."""
    slots = np.full(codes.count + 1, len(values), np.uint16)
    for slot, value in enumerate(values):
        try:
            code = codes.find(value)
        except TypeError:
            raise FeatureError(
                f"category {name!r} has the value {value!r}, and its column is {codes.dtype}; "
                "declare values of the column's type"
            ) from None
        if code is not None:
            slots[code] = slot
    return slots
