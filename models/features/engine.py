"""Computes declared features and labels with Polars, one group-by a cutoff.

Knows nothing of where events come from or where the table goes.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

import polars as pl

from models.features.spec import Feature, FeatureSpec, LabelSpec, cutoff_times, describe

_DAY_US = 86_400_000_000
_EPOCH = datetime(1970, 1, 1)
_TIME = pl.Datetime("us")


class FeatureError(ValueError):
    """Events, cutoffs or rows that features can't be computed from."""


def compute(
    events: pl.LazyFrame | pl.DataFrame,
    spec: FeatureSpec,
    cutoffs: Sequence[datetime] | None = None,
) -> pl.DataFrame:
    """Computes every declared feature from the events before each cutoff.

    Args:
        events: one row an event, with the columns that the spec names.
        spec: the declaration.
        cutoffs: moments, naive ones in UTC; None for the spec's own.

    Returns:
        One row per (entity, cutoff) with an event before the cutoff, sorted by both: the entity,
        "cutoff" (Datetime us, naive UTC), then the columns of `describe(spec)`.

    Raises:
        FeatureError: no cutoffs, missing columns, a time that isn't one, null entities or times.
    """
    given = list(cutoffs) if cutoffs is not None else list(cutoff_times(spec))
    if not given:
        raise FeatureError("no cutoffs; pass some, or declare them in the spec's cutoffs")
    moments = pl.Series("cutoff", sorted({_micros(c) for c in given}), pl.Int64)
    ready = _with_gaps(_prepare(events, spec), spec)
    features = describe(spec)
    parts = [_at(ready.lazy(), spec, features, moment) for moment in moments]
    return pl.concat(parts).sort(spec.entity, "cutoff")


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
    keys = _keys(rows, spec)
    wanted = keys.unique().sort("_c")
    ready = _with_gaps(_prepare(events, spec), spec)
    features = describe(spec)
    parts = [
        _at(ready.lazy().join(at.lazy(), on=spec.entity, how="semi"), spec, features, moment)
        for (moment,), at in wanted.group_by("_c", maintain_order=True)
    ]
    schema = {f.name: pl.Int32 if f.dtype == "Int32" else pl.Float32 for f in features}
    if not parts:
        return pl.DataFrame(schema=schema)
    found = pl.concat(parts).with_columns(_c=pl.col("cutoff").dt.epoch("us"))
    nothing = [f.name for f in features if f.aggregation in ("count", "distinct", "sum")]
    return (
        keys.join(found, on=[spec.entity, "_c"], how="left", maintain_order="left")
        .select(list(schema))
        .with_columns(pl.col(nothing).fill_null(0))
    )


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
    keys = _keys(rows, spec)
    ready = _prepare(events, spec)
    kind, horizon_us = spec_label.kind, spec_label.horizon_days * _DAY_US
    value = pl.len() if kind != "sum" else pl.col(f"_m_{spec_label.measure}").sum()
    parts = []
    for moment in keys["_c"].unique():
        inside = pl.col("_t").is_between(moment, moment + horizon_us, closed="left")
        found = ready.filter(inside).group_by(spec.entity).agg(_v=value.cast(pl.Float64))
        parts.append(found.with_columns(_c=pl.lit(moment, pl.Int64)))
    if not parts:
        return pl.Series(spec_label.name, [], pl.Float32 if kind == "sum" else pl.Int32)
    joined = keys.join(pl.concat(parts), on=[spec.entity, "_c"], how="left", maintain_order="left")
    got = joined["_v"].fill_null(0.0)
    if kind == "none":
        got = got == 0
    elif kind == "any":
        got = got > 0
    return got.cast(pl.Float32 if kind == "sum" else pl.Int32).rename(spec_label.name)


def _keys(rows: pl.DataFrame, spec: FeatureSpec) -> pl.DataFrame:
    """The rows' entity and _c, the cutoff in microseconds."""
    missing = [c for c in (spec.entity, "cutoff") if c not in rows.columns]
    if missing:
        raise FeatureError(f"rows lack columns {missing}; they have {rows.columns}")
    return rows.select(spec.entity, _c=_utc_us(rows.schema["cutoff"], "cutoff"))


def _with_gaps(ready: pl.DataFrame, spec: FeatureSpec) -> pl.DataFrame:
    """Sorted by entity and time, with _gap, the days since the entity's event before."""
    ready = ready.sort(spec.entity, "_t", maintain_order=True)
    # A gap looks back only, so that it is the same at every cutoff.
    same = pl.col(spec.entity) == pl.col(spec.entity).shift(1)
    return ready.with_columns(
        _gap=pl.when(same).then((pl.col("_t") - pl.col("_t").shift(1)) / _DAY_US)
    )


def _micros(moment: datetime) -> int:
    if moment.tzinfo is not None:
        moment = moment.replace(tzinfo=None) - (moment.utcoffset() or timedelta())
    return (moment - _EPOCH) // timedelta(microseconds=1)


def _utc_us(dtype: pl.DataType, column: str) -> pl.Expr:
    """Microseconds since 1970 in UTC, Int64."""
    time = pl.col(column)
    if isinstance(dtype, pl.Datetime):
        # A zone's wall time is stored as UTC: the physical value is what is wanted.
        return time.dt.epoch("us")
    if dtype == pl.Date:
        return time.cast(_TIME).dt.epoch("us")
    raise FeatureError(f"time column {column!r} is {dtype}; allowed: Datetime, Date; parse it")


def _prepare(events: pl.LazyFrame | pl.DataFrame, spec: FeatureSpec) -> pl.DataFrame:
    """Selects what the spec names: entity, _t (Int64 us), _m_, _d_, _k_ and _f_ columns."""
    lazy = events.lazy()
    schema = lazy.collect_schema()
    needed = [spec.entity, spec.time, *spec.measures.values(), *spec.distinct.values()]
    needed += [c.column for c in spec.categories.values()] + [f.column for f in spec.filters]
    missing = sorted({c for c in needed if c not in schema})
    if missing:
        raise FeatureError(f"columns not found: {missing}; the events have {schema.names()}")
    filters = {
        f"_f_{f.name}": (
            pl.col(f.column) < f.below if f.below is not None else pl.col(f.column) == f.equals
        ).fill_null(False)
        for f in spec.filters
    }
    ready = lazy.select(
        pl.col(spec.entity),
        _utc_us(schema[spec.time], spec.time).alias("_t"),
        *[
            pl.col(c).cast(pl.Float64).fill_nan(None).alias(f"_m_{m}")
            for m, c in spec.measures.items()
        ],
        *[pl.col(c).alias(f"_d_{d}") for d, c in spec.distinct.items()],
        *[pl.col(c.column).alias(f"_k_{k}") for k, c in spec.categories.items()],
        **filters,
    ).collect()
    for column, shown in ((spec.entity, spec.entity), ("_t", spec.time)):
        if nulls := ready[column].null_count():
            raise FeatureError(f"{nulls} events have a null {shown!r}; fill or drop them first")
    return ready


def _at(
    ready: pl.LazyFrame, spec: FeatureSpec, features: list[Feature], moment: int
) -> pl.DataFrame:
    """The features at one cutoff (microseconds)."""
    windows = {w for f in features for w in (f.window_days, f.long_days) if w is not None}
    masks = {w: pl.col("_t") >= moment - w * _DAY_US for w in windows}
    # Plain aggregations of masked columns: a filter inside an aggregation costs several times more.
    masked = [mask.alias(f"_in_{w}") for w, mask in masks.items()]
    names = [f"_m_{m}" for m in spec.measures] + [f"_d_{d}" for d in spec.distinct]
    masked += [
        pl.when(mask).then(pl.col(n)).alias(f"{n}_in_{w}")
        for w, mask in masks.items()
        for n in names
    ]
    return (
        ready.filter(pl.col("_t") < moment)
        .with_columns(masked)
        .group_by(spec.entity)
        .agg(
            pl.lit(moment, pl.Int64).cast(_TIME).first().alias("cutoff"),
            *[
                _expression(f, spec, moment)
                .cast(pl.Int32 if f.dtype == "Int32" else pl.Float32)
                .alias(f.name)
                for f in features
            ],
        )
        .collect()
    )


def _expression(feature: Feature, spec: FeatureSpec, moment: int) -> pl.Expr:
    how, within = feature.aggregation, feature.window_days
    if how == "recency":
        return (moment - pl.col("_t").max()) / _DAY_US
    if how == "tenure":
        return (moment - pl.col("_t").min()) / _DAY_US
    if how.startswith("gap_"):
        return _reduce(pl.col("_gap"), how.removeprefix("gap_"))
    if how == "share":
        amount = pl.col(f"_m_{next(iter(spec.measures))}")
        chosen = pl.col(f"_k_{feature.subject}") == pl.lit(feature.value)
        return _ratio(pl.when(chosen).then(amount).sum(), amount.sum())
    if how == "trend":
        return _ratio(_total(feature.subject, within), _total(feature.subject, feature.long_days))
    if feature.filter is not None:
        chosen = pl.col(f"_f_{feature.filter}")
        if feature.subject is None:
            return (chosen & pl.col(f"_in_{within}")).sum()
        return pl.when(chosen).then(_column("_m_", feature.subject, within)).sum()
    if how == "count":
        return _total(None, within)
    assert feature.subject is not None
    if how == "distinct":
        seen = _column("_d_", feature.subject, within)
        # n_unique counts null as a value.
        return seen.n_unique().cast(pl.Int32) - (seen.null_count() > 0).cast(pl.Int32)
    return _reduce(_column("_m_", feature.subject, within), how)


def _column(prefix: str, subject: str, within: int | None) -> pl.Expr:
    return pl.col(f"{prefix}{subject}" + ("" if within is None else f"_in_{within}"))


def _total(subject: str | None, within: int | None) -> pl.Expr:
    """Sum of a measure, or number of events where there is no subject."""
    if subject is not None:
        return _column("_m_", subject, within).sum()
    return pl.len() if within is None else pl.col(f"_in_{within}").sum()


def _ratio(part: pl.Expr, whole: pl.Expr) -> pl.Expr:
    return pl.when(whole != 0).then(part / whole)


def _reduce(values: pl.Expr, how: str) -> pl.Expr:
    reduced: pl.Expr = getattr(values, how)()
    return reduced
