"""Tables of events in, tables of features and labels out.

The kernel computes what it knows; the rest is left to the Polars form, and `computed_by` says what.
Knows nothing of where events come from or where the table goes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from models.features import engine as polars_form
from models.features.events import TIME, FeatureError, keys, micros, utc_us
from models.features.listing import Feature, describe
from models.features.shape import KNOWN
from models.features.spec import (
    Attributes,
    FeatureSpec,
    LabelSpec,
    cutoff_times,
)

if TYPE_CHECKING:
    from models.features.single import Online

Table = pl.LazyFrame | pl.DataFrame


def computed_by(spec: FeatureSpec) -> str:
    """What computes a declaration: "kernel", and which features are left to Polars."""
    own = [spec, *(spec.stream(name) for name in spec.streams)]
    left = [f.name for each in own for f in _unknown(each)]
    return f"kernel; polars for {', '.join(left)}" if left else "kernel"


def compile_kernel(spec: FeatureSpec, *, labels: bool = False) -> float:
    """Compiles a declaration's kernel, or loads it from disk (see `models.features.compiled`).

    Args:
        spec: the declaration.
        labels: whether for `compute` with labels.

    Returns:
        Seconds it took; none to speak of where this process has it already.
    """
    from models.features import kernel

    began = time.perf_counter()
    kernel.warm(spec, labels=labels)
    return time.perf_counter() - began


def online(spec: FeatureSpec) -> "Online":
    """The declaration, ready to compute one entity's features from a list of its events.

    Raises:
        FeatureError: it has a feature that the kernel doesn't know.
    """
    from models.features.single import Online

    return Online(spec)


def compute(
    events: Table,
    spec: FeatureSpec,
    cutoffs: Sequence[datetime] | None = None,
    *,
    labels: bool = False,
    tables: Mapping[str, Table] | None = None,
) -> pl.DataFrame:
    """Computes every declared feature from the events before each cutoff.

    Args:
        events: one row an event, with the columns that the spec names.
        spec: the declaration.
        cutoffs: moments, naive ones in UTC; None for the spec's own.
        labels: whether to add the spec's labels, as columns after the features.
        tables: the tables of the spec's attributes and streams, by name.

    Returns:
        One row per (entity, cutoff) with an event before the cutoff, sorted by both: the entity,
        "cutoff" (Datetime us, naive UTC), then the columns of `describe(spec)`.

    Raises:
        FeatureError: no cutoffs, missing tables or columns, a time that isn't one, null entities or
            times, a measure beyond 1e100.
    """
    others = _others(spec, tables)
    (frame,) = _parts(events, spec, cutoffs, others, labels=labels, at_once=None)
    return frame


def compute_parts(
    events: Table,
    spec: FeatureSpec,
    cutoffs: Sequence[datetime] | None = None,
    *,
    labels: bool = False,
    tables: Mapping[str, Table] | None = None,
    rows: int = 1_000_000,
) -> Iterator[pl.DataFrame]:
    """Computes what `compute` does, some entities at a time, in bounded memory.

    Events are read in batches, into about 40 bytes an event. What the kernel doesn't know is
    refused, as the Polars form needs all events at once.

    Args:
        events: as for `compute`.
        spec: the declaration.
        cutoffs: as for `compute`.
        labels: as for `compute`.
        tables: as for `compute`.
        rows: about how many to yield at a time.

    Yields:
        Parts that make `compute`'s table, in order.

    Raises:
        FeatureError: as for `compute`, or a feature that the kernel doesn't know.
    """
    if left := _unknown(spec):
        raise FeatureError(
            f"{[f.name for f in left]} need all events at once; "
            "compute them apart, by `compute`, or leave them out"
        )
    return _parts(events, spec, cutoffs, _others(spec, tables), labels=labels, at_once=rows)


def _parts(
    events: Table,
    spec: FeatureSpec,
    cutoffs: Sequence[datetime] | None,
    others: Mapping[str, Table],
    *,
    labels: bool,
    at_once: int | None,
) -> Iterator[pl.DataFrame]:
    from models.features import kernel, packing

    given = list(cutoffs) if cutoffs is not None else list(cutoff_times(spec))
    if not given:
        raise FeatureError("no cutoffs; pass some, or declare them in the spec's cutoffs")
    moments = sorted({micros(c) for c in given})
    ready = packing.ready(events, spec, in_batches=at_once is not None)
    cuts = np.array(moments, np.int64)
    names = [f.name for f in describe(spec)]
    names += [item.name for item in spec.labels] if labels else []
    add = _adder(spec, others)
    for frame in kernel.features_at_cutoffs(ready, spec, cuts, labels=labels, at_once=at_once):
        if left := _unknown(spec):
            rest = polars_form.at_cutoffs(events, spec, left, moments)
            frame = frame.hstack(rest.select(f.name for f in left))
        yield add(frame).select(spec.entity, "cutoff", *names)


def compute_at(
    events: Table,
    spec: FeatureSpec,
    rows: pl.DataFrame,
    *,
    tables: Mapping[str, Table] | None = None,
) -> pl.DataFrame:
    """Computes every declared feature at moments that differ from entity to entity.

    Args:
        events: as for `compute`.
        spec: the declaration; its own cutoffs play no part.
        rows: columns entity and "cutoff" (Datetime or Date; naive ones in UTC); others are ignored.
        tables: as for `compute`.

    Returns:
        The columns of `describe(spec)`, one row for each of `rows`, in their order. Where an entity
        has no event before its cutoff, counts, distinct counts, sums and decayed sums are 0, RFM
        scores 1, the others null.

    Raises:
        FeatureError: as for `compute`.
    """
    from models.features import kernel, packing

    asked = keys(rows, spec)
    frame = kernel.features_at_rows(packing.ready(events, spec), spec, asked)
    if left := _unknown(spec):
        frame = frame.hstack(polars_form.at_rows(events, spec, left, asked))
    if spec.tables:
        frame = frame.with_columns(rows[spec.entity], asked["_c"].cast(TIME).alias("cutoff"))
        frame = _adder(spec, _others(spec, tables))(frame)
    return frame.select(f.name for f in describe(spec))


def _others(spec: FeatureSpec, tables: Mapping[str, Table] | None) -> Mapping[str, Table]:
    given = tables or {}
    if missing := [name for name in spec.tables if name not in given]:
        raise FeatureError(f"tables {missing} of attributes or streams not given: {list(given)}")
    return given


def _adder(
    spec: FeatureSpec, others: Mapping[str, Table]
) -> Callable[[pl.DataFrame], pl.DataFrame]:
    """Adds the features of streams and attributes to a table with the entity and "cutoff"."""
    from models.features import kernel, packing

    streams = []
    for name, stream in spec.streams.items():
        own = spec.stream(name)
        streams.append((own, others[stream.table], packing.ready(others[stream.table], own)))

    def add(frame: pl.DataFrame) -> pl.DataFrame:
        for own, events, ready in streams:
            asked = keys(frame, own)
            frame = frame.hstack(kernel.features_at_rows(ready, own, asked))
            if left := _unknown(own):
                frame = frame.hstack(polars_form.at_rows(events, own, left, asked))
        for name, attributes in spec.attributes.items():
            frame = _as_of(frame, spec.entity, name, attributes, others[attributes.table])
        return frame

    return add


def _as_of(
    frame: pl.DataFrame, entity: str, name: str, attributes: Attributes, table: Table
) -> pl.DataFrame:
    """The last row before each cutoff; of rows at the same time, the table's last."""
    lazy = table.lazy()
    schema = lazy.collect_schema()
    needed = [entity, attributes.time, *attributes.columns]
    if missing := [c for c in needed if c not in schema]:
        raise FeatureError(
            f"columns not found: {missing}; table {attributes.table!r} has {schema.names()}"
        )
    history = lazy.select(
        pl.col(entity).cast(frame.schema[entity]),
        utc_us(schema[attributes.time], attributes.time).alias("_t"),
        *[pl.col(c).alias(f"{name}_{c}") for c in attributes.columns],
    ).collect()
    if nulls := history["_t"].null_count():
        raise FeatureError(
            f"{nulls} rows of table {attributes.table!r} have a null {attributes.time!r}; "
            "fill or drop them first"
        )
    asked = frame.select(entity, pl.col("cutoff").dt.epoch("us").alias("_t")).with_row_index("_i")
    found = (
        asked.sort("_t")
        .join_asof(
            history.sort("_t", maintain_order=True),
            on="_t",
            by=entity,
            strategy="backward",
            allow_exact_matches=False,
            check_sortedness=False,
        )
        .sort("_i")
    )
    return frame.hstack(found.select(f"{name}_{c}" for c in attributes.columns))


def label(
    events: Table,
    spec_label: LabelSpec,
    rows: pl.DataFrame,
    spec: FeatureSpec,
) -> pl.Series:
    """Computes what happened in [cutoff, cutoff + horizon).

    Args:
        events: as for `compute`.
        spec_label: the label.
        rows: columns entity and "cutoff"; others are ignored.
        spec: the declaration the label belongs to.

    Returns:
        One value a row, in the rows' order, named as the label: Int32 (none and any: 0 or 1) or,
        for sum, Float32.

    Raises:
        FeatureError: as for `compute`.
    """
    from models.features import kernel, packing

    measures = {spec_label.measure: spec.measures[spec_label.measure]} if spec_label.measure else {}
    alone = FeatureSpec(
        entity=spec.entity,
        time=spec.time,
        name=spec.name,
        measures=measures,
        labels=[spec_label],
    )
    ready = packing.ready(events, alone)
    return kernel.features_at_rows(ready, alone, keys(rows, spec), labels=True)[spec_label.name]


def _unknown(spec: FeatureSpec) -> list[Feature]:
    """Features of the main events that are left to the Polars form."""
    return [f for f in describe(spec) if f.table is None and f.aggregation not in KNOWN]
