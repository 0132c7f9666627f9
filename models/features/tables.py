"""Tables of events in, tables of features and labels out.

The kernel computes what it knows; the rest is left to the Polars form, and `computed_by` says what.
Knows nothing of where events come from or where the table goes.
"""

import time
from collections.abc import Iterator, Sequence
from datetime import datetime

import numpy as np
import polars as pl

from models.features import engine as polars_form
from models.features.events import FeatureError, keys, micros
from models.features.source import KNOWN
from models.features.spec import Feature, FeatureSpec, LabelSpec, cutoff_times, describe


def computed_by(spec: FeatureSpec) -> str:
    """What computes a declaration: "kernel", and which features are left to Polars."""
    left = [f.name for f in _unknown(spec)]
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


def compute(
    events: pl.LazyFrame | pl.DataFrame,
    spec: FeatureSpec,
    cutoffs: Sequence[datetime] | None = None,
    *,
    labels: bool = False,
) -> pl.DataFrame:
    """Computes every declared feature from the events before each cutoff.

    Args:
        events: one row an event, with the columns that the spec names.
        spec: the declaration.
        cutoffs: moments, naive ones in UTC; None for the spec's own.
        labels: whether to add the spec's labels, as columns after the features.

    Returns:
        One row per (entity, cutoff) with an event before the cutoff, sorted by both: the entity,
        "cutoff" (Datetime us, naive UTC), then the columns of `describe(spec)`.

    Raises:
        FeatureError: no cutoffs, missing columns, a time that isn't one, null entities or times,
            a measure beyond 1e100.
    """
    (frame,) = _parts(events, spec, cutoffs, labels=labels, at_once=None)
    return frame


def compute_parts(
    events: pl.LazyFrame | pl.DataFrame,
    spec: FeatureSpec,
    cutoffs: Sequence[datetime] | None = None,
    *,
    labels: bool = False,
    rows: int = 1_000_000,
) -> Iterator[pl.DataFrame]:
    """Computes what `compute` does, some entities at a time, in bounded memory.

    Events are read twice, in batches, into about 40 bytes an event. What the kernel doesn't know
    is refused, as the Polars form needs all events at once.

    Args:
        events: as for `compute`.
        spec: the declaration.
        cutoffs: as for `compute`.
        labels: as for `compute`.
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
    return _parts(events, spec, cutoffs, labels=labels, at_once=rows)


def _parts(
    events: pl.LazyFrame | pl.DataFrame,
    spec: FeatureSpec,
    cutoffs: Sequence[datetime] | None,
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
    left = _unknown(spec)
    for frame in kernel.features_at_cutoffs(ready, spec, cuts, labels=labels, at_once=at_once):
        if left:
            rest = polars_form.at_cutoffs(events, spec, left, moments)
            frame = frame.hstack(rest.select(f.name for f in left))
        yield frame.select(spec.entity, "cutoff", *names)


def compute_at(
    events: pl.LazyFrame | pl.DataFrame, spec: FeatureSpec, rows: pl.DataFrame
) -> pl.DataFrame:
    """Computes every declared feature at moments that differ from entity to entity.

    Args:
        events: as for `compute`.
        spec: the declaration; its own cutoffs play no part.
        rows: columns entity and "cutoff" (Datetime or Date; naive ones in UTC); others are ignored.

    Returns:
        The columns of `describe(spec)`, one row for each of `rows`, in their order. Where an entity
        has no event before its cutoff, counts, distinct counts and sums are 0, the others null.

    Raises:
        FeatureError: as for `compute`.
    """
    from models.features import kernel, packing

    asked = keys(rows, spec)
    frame = kernel.features_at_rows(packing.ready(events, spec), spec, asked)
    if left := _unknown(spec):
        frame = frame.hstack(polars_form.at_rows(events, spec, left, asked))
    return frame.select(f.name for f in describe(spec))


def label(
    events: pl.LazyFrame | pl.DataFrame,
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
    return [f for f in describe(spec) if f.aggregation not in KNOWN]
