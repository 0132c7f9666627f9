"""The Polars form of features: one group-by a cutoff.

For what the kernel doesn't know, and to hold the kernel against. It costs events x cutoffs.
Knows nothing of where events come from or where the table goes.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl

from models.features.events import TIME, checked, filter_expressions, refuse_nulls, utc_us
from models.features.listing import Feature
from models.features.spec import FeatureSpec
from models.features.windows import DAY_US, starts


def at_cutoffs(
    events: pl.LazyFrame | pl.DataFrame,
    spec: FeatureSpec,
    features: Sequence[Feature],
    moments: Sequence[int],
) -> pl.DataFrame:
    """The entity, "cutoff" and features, one row per entity and cutoff with an event before it.

    Args:
        events: one row an event.
        spec: the declaration.
        features: which of `describe(spec)`.
        moments: cutoffs in microseconds since 1970.

    Returns:
        A table sorted by entity and cutoff.
    """
    ready = _with_gaps(_prepare(events, spec), spec)
    parts = [_at(ready.lazy(), spec, features, moment) for moment in moments]
    return pl.concat(parts).sort(spec.entity, "cutoff")


def at_rows(
    events: pl.LazyFrame | pl.DataFrame,
    spec: FeatureSpec,
    features: Sequence[Feature],
    asked: pl.DataFrame,
) -> pl.DataFrame:
    """The features at each row's own entity and cutoff (_c, microseconds), in the rows' order."""
    ready = _with_gaps(_prepare(events, spec), spec)
    parts = [
        _at(ready.lazy().join(at.lazy(), on=spec.entity, how="semi"), spec, features, moment)
        for (moment,), at in asked.unique().sort("_c").group_by("_c", maintain_order=True)
    ]
    schema = {f.name: pl.Int32 if f.dtype == "Int32" else pl.Float32 for f in features}
    if not parts:
        return pl.DataFrame(schema=schema)
    found = pl.concat(parts).with_columns(_c=pl.col("cutoff").dt.epoch("us"))
    nothing = [f.name for f in features if f.aggregation in ("count", "distinct", "sum")]
    return (
        asked.join(found, on=[spec.entity, "_c"], how="left", maintain_order="left")
        .select(list(schema))
        .with_columns(pl.col(nothing).fill_null(0))
    )


def _with_gaps(ready: pl.DataFrame, spec: FeatureSpec) -> pl.DataFrame:
    """Sorted by entity and time, with _gap, the days since the entity's event before."""
    ready = ready.sort(spec.entity, "_t", maintain_order=True)
    # A gap looks back only, so that it is the same at every cutoff.
    same = pl.col(spec.entity) == pl.col(spec.entity).shift(1)
    return ready.with_columns(
        _gap=pl.when(same).then((pl.col("_t") - pl.col("_t").shift(1)) / DAY_US)
    )


def _prepare(events: pl.LazyFrame | pl.DataFrame, spec: FeatureSpec) -> pl.DataFrame:
    """Selects what the spec names: entity, _t (Int64 us), _m_, _d_, _k_ and _f_ columns."""
    lazy, schema = checked(events, spec)
    filters = {
        f"_f_{f.name}": keeps
        for f, keeps in zip(spec.filters, filter_expressions(spec), strict=True)
    }
    ready = lazy.select(
        pl.col(spec.entity),
        utc_us(schema[spec.time], spec.time).alias("_t"),
        *[
            pl.when(pl.col(c).cast(pl.Float64).is_finite())
            .then(pl.col(c).cast(pl.Float64))
            .alias(f"_m_{m}")
            for m, c in spec.measures.items()
        ],
        *[pl.col(c).alias(f"_d_{d}") for d, c in spec.distinct.items()],
        *[pl.col(c.column).alias(f"_k_{k}") for k, c in spec.categories.items()],
        **filters,
    ).collect()
    refuse_nulls(ready.select(spec.entity, "_t").null_count(), spec)
    return ready


def _at(
    ready: pl.LazyFrame, spec: FeatureSpec, features: Sequence[Feature], moment: int
) -> pl.DataFrame:
    """The features at one cutoff (microseconds)."""
    windows = {w for f in features for w in (f.window, f.long) if w is not None}
    masks = {w: pl.col("_t") >= _start(moment, w) for w in windows}
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
            pl.lit(moment, pl.Int64).cast(TIME).first().alias("cutoff"),
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
    how, within = feature.aggregation, feature.window
    if how == "recency":
        return (moment - pl.col("_t").max()) / DAY_US
    if how == "tenure":
        return (moment - pl.col("_t").min()) / DAY_US
    if how == "overdue":
        return _ratio((moment - pl.col("_t").max()) / DAY_US, pl.col("_gap").mean())
    if how.startswith("gap_"):
        return _reduce(pl.col("_gap"), how.removeprefix("gap_"))
    if how == "share":
        amount = pl.col(f"_m_{next(iter(spec.measures))}")
        chosen = pl.col(f"_k_{feature.subject}") == pl.lit(feature.value)
        return _ratio(pl.when(chosen).then(amount).sum(), amount.sum())
    if how == "trend":
        return _ratio(_total(feature.subject, within), _total(feature.subject, feature.long))
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


def _start(moment: int, window: str) -> int:
    return int(starts(np.array([moment]), window)[0])


def _column(prefix: str, subject: str, within: str | None) -> pl.Expr:
    return pl.col(f"{prefix}{subject}" + ("" if within is None else f"_in_{within}"))


def _total(subject: str | None, within: str | None) -> pl.Expr:
    """Sum of a measure, or number of events where there is no subject."""
    if subject is not None:
        return _column("_m_", subject, within).sum()
    return pl.len() if within is None else pl.col(f"_in_{within}").sum()


def _ratio(part: pl.Expr, whole: pl.Expr) -> pl.Expr:
    return pl.when(whole != 0).then(part / whole)


def _reduce(values: pl.Expr, how: str) -> pl.Expr:
    reduced: pl.Expr = getattr(values, how)()
    return reduced
