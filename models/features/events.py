"""Events as the engines want them: checked, in UTC microseconds, with the filters' answers.

Knows nothing of features' values.
"""

from datetime import datetime, timedelta

import polars as pl

from models.features.spec import FeatureSpec

EPOCH = datetime(1970, 1, 1)
TIME = pl.Datetime("us")


class FeatureError(ValueError):
    """Events, cutoffs or rows that features can't be computed from."""


def micros(moment: datetime) -> int:
    """Microseconds since 1970; a naive moment is in UTC."""
    if moment.tzinfo is not None:
        moment = moment.replace(tzinfo=None) - (moment.utcoffset() or timedelta())
    return (moment - EPOCH) // timedelta(microseconds=1)


def utc_us(dtype: pl.DataType, column: str) -> pl.Expr:
    """Microseconds since 1970 in UTC, Int64."""
    time = pl.col(column)
    if isinstance(dtype, pl.Datetime):
        # A zone's wall time is stored as UTC: the physical value is what is wanted.
        return time.dt.epoch("us")
    if dtype == pl.Date:
        return time.cast(TIME).dt.epoch("us")
    raise FeatureError(f"time column {column!r} is {dtype}; allowed: Datetime, Date; parse it")


def keys(rows: pl.DataFrame, spec: FeatureSpec) -> pl.DataFrame:
    """The rows' entity and _c, the cutoff in microseconds."""
    missing = [c for c in (spec.entity, "cutoff") if c not in rows.columns]
    if missing:
        raise FeatureError(f"rows lack columns {missing}; they have {rows.columns}")
    if nulls := rows["cutoff"].null_count():
        raise FeatureError(f"{nulls} rows have a null 'cutoff'; fill or drop them first")
    return rows.select(spec.entity, _c=utc_us(rows.schema["cutoff"], "cutoff"))


def checked(
    events: pl.LazyFrame | pl.DataFrame, spec: FeatureSpec
) -> tuple[pl.LazyFrame, pl.Schema]:
    """The events, lazily, and their schema, once all columns that the spec names are there."""
    lazy = events.lazy()
    schema = lazy.collect_schema()
    needed = [spec.entity, spec.time, *spec.measures.values(), *spec.distinct.values()]
    needed += [c.column for c in spec.categories.values()] + [f.column for f in spec.filters]
    missing = sorted({c for c in needed if c not in schema})
    if missing:
        raise FeatureError(f"columns not found: {missing}; the events have {schema.names()}")
    return lazy, schema


def filter_expressions(spec: FeatureSpec) -> list[pl.Expr]:
    """Whether each filter keeps an event; null counts as no."""
    return [
        (
            pl.col(f.column) < f.below if f.below is not None else pl.col(f.column) == f.equals
        ).fill_null(False)
        for f in spec.filters
    ]


def refuse_nulls(nulls: pl.DataFrame, spec: FeatureSpec) -> None:
    """Refuses null entities and times.

    Args:
        nulls: one row: how many are null in the entity's column and in _t.
        spec: the declaration.
    """
    for column, shown in ((spec.entity, spec.entity), ("_t", spec.time)):
        if count := nulls[column].item():
            raise FeatureError(f"{count} events have a null {shown!r}; fill or drop them first")
