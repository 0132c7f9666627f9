"""The columns that a declaration stands for, with what people need to know of each.

Knows nothing of data frames: an engine reads `describe(spec)` and computes what it lists.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from models.features.spec import FeatureSpec, Filter, Rfm, Scalar

_TIMING = {
    "recency": "days from the last event to the cutoff",
    "tenure": "days from the first event to the cutoff",
    "gap_mean": "mean days between consecutive events",
    "gap_std": "sample standard deviation of the days between consecutive events",
    "gap_max": "most days between consecutive events",
    "overdue": "days from the last event to the cutoff, over the mean days between events",
}


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One output column.

    Attributes:
        name: column name.
        description: what it is, for people.
        unit: "events", "values", "days", "ratio", "score", "value", or a measure's column, by
            itself or "per day".
        dtype: "Int32", "Float32", or "as stored" for an attribute.
        columns: the columns it is computed from, of the events or of `table`.
        aggregation: count, sum, ..., gap_max, share, trend, decay, since_last, rfm or attribute.
        subject: name of the measure, distinct, category or attributes; None for the events.
        window: its duration, such as "30d"; None for all events before the cutoff. A decay's
            half-life.
        long: a trend's longer window.
        value: a share's value, which event from the last, which of the RFM scores, or an
            attribute's column.
        filter: name of the filter on the events, if any.
        stream: name of the stream of events, None for the main one.
        table: name of the other table it comes from, if any.
    """

    name: str
    description: str
    unit: str
    dtype: Literal["Int32", "Float32", "as stored"]
    columns: tuple[str, ...]
    aggregation: str
    subject: str | None = None
    window: str | None = None
    long: str | None = None
    value: Scalar | None = None
    filter: str | None = None
    stream: str | None = None
    table: str | None = None


def describe(spec: FeatureSpec) -> list[Feature]:
    """The features a spec declares, in output column order."""
    out: list[Feature] = []
    for window in spec.windows:
        out += [f for how in spec.aggregations for f in _aggregated(spec, how, window)]
        for chosen in spec.filters:
            out += _filtered(spec, chosen, window)
    for kind in spec.lifetime:
        out += _timing(spec, kind) if kind in _TIMING else _aggregated(spec, kind, None)
    for name, category in spec.categories.items():
        measure, column = next(iter(spec.measures.items()))
        out += [
            Feature(
                name=f"{name}_share_{value}",
                description=f"share of {measure} where {category.column} is {value}, lifetime",
                unit="ratio",
                dtype="Float32",
                columns=(spec.time, category.column, column),
                aggregation="share",
                subject=name,
                value=value,
            )
            for value in category.values
        ]
    for short, long in spec.trends:
        for subject, columns in [(None, ()), *((m, (c,)) for m, c in spec.measures.items())]:
            out.append(
                Feature(
                    name=f"{subject or spec.name}_trend_{short}_{long}",
                    description=f"{subject or spec.name} of the last {short} over the last {long}",
                    unit="ratio",
                    dtype="Float32",
                    columns=(spec.time, *columns),
                    aggregation="trend",
                    subject=subject,
                    window=short,
                    long=long,
                )
            )
    out += [f for half_life in spec.decays for f in _decayed(spec, half_life)]
    out += [
        Feature(
            name=f"{spec.name}_since_last_{k}_days",
            description=f"days from the last event but {k - 1} to the cutoff",
            unit="days",
            dtype="Float32",
            columns=(spec.time,),
            aggregation="since_last",
            value=k,
        )
        for k in spec.last_events
    ]
    if spec.rfm is not None:
        out += _rfm(spec, spec.rfm)
    for name in spec.streams:
        table = spec.streams[name].table
        out += [replace(f, stream=name, table=table) for f in describe(spec.stream(name))]
    for name, attributes in spec.attributes.items():
        out += [
            Feature(
                name=f"{name}_{column}",
                description=f"{column} of {attributes.table} as known before the cutoff",
                unit="value",
                dtype="as stored",
                columns=(attributes.time, column),
                aggregation="attribute",
                subject=name,
                value=column,
                table=attributes.table,
            )
            for column in attributes.columns
        ]
    return out


def _decayed(spec: FeatureSpec, half_life: str) -> list[Feature]:
    return [
        Feature(
            name=f"{subject or spec.name}_decayed_{half_life}",
            description=f"sum of {subject or spec.name}, each half after every {half_life}",
            unit=column or "events",
            dtype="Float32",
            columns=(spec.time, *([column] if column else [])),
            aggregation="decay",
            subject=subject,
            window=half_life,
        )
        for subject, column in [(None, None), *spec.measures.items()]
    ]


def _rfm(spec: FeatureSpec, rfm: Rfm) -> list[Feature]:
    measure, column = next(iter(spec.measures.items()))
    when = f"in the {rfm.window} before the cutoff" if rfm.window else "before the cutoff"
    what = {
        "recency": "1, and 1 for each bound that the days since the last event don't pass",
        "frequency": f"1, and 1 for each bound that the number of events {when} reaches",
        "monetary": f"1, and 1 for each bound that the sum of {measure} {when} reaches",
    }
    return [
        Feature(
            name=f"{spec.name}_rfm_{which}",
            description=description,
            unit="score",
            dtype="Int32",
            columns=(spec.time, *([column] if which == "monetary" else [])),
            aggregation="rfm",
            subject=measure if which == "monetary" else None,
            window=None if which == "recency" else rfm.window,
            value=which,
        )
        for which, description in what.items()
    ]


def _aggregated(spec: FeatureSpec, how: str, window: str | None) -> list[Feature]:
    counted = how in ("count", "distinct")
    subjects: dict[str, str | None] = (
        {spec.name: None}
        if how == "count"
        else dict(spec.distinct if how == "distinct" else spec.measures)
    )
    when = f"in the {window} before the cutoff" if window else "before the cutoff"
    said = {"slope": "least-squares slope over time"}.get(how, how)
    return [
        Feature(
            name=f"{name}_{how}_{window or 'lifetime'}",
            description=f"{said} of {name} {when}",
            unit={"count": "events", "distinct": "values", "slope": f"{column} per day"}.get(
                how, column or ""
            ),
            dtype="Int32" if counted else "Float32",
            columns=(spec.time, *([column] if column else [])),
            aggregation=how,
            subject=name if column else None,
            window=window,
        )
        for name, column in subjects.items()
    ]


def _filtered(spec: FeatureSpec, chosen: Filter, window: str) -> list[Feature]:
    wanted: list[tuple[str | None, str, str, str]] = [
        (None, "count", f"{chosen.name}_count_{window}", "events")
    ]
    wanted += [(m, "sum", f"{chosen.name}_{m}_sum_{window}", c) for m, c in spec.measures.items()]
    return [
        Feature(
            name=name,
            description=f"{how} of {subject or spec.name} in {chosen.name}, last {window}",
            unit=unit,
            dtype="Int32" if how == "count" else "Float32",
            columns=(spec.time, chosen.column, *([unit] if subject else [])),
            aggregation=how,
            subject=subject,
            window=window,
            filter=chosen.name,
        )
        for subject, how, name, unit in wanted
    ]


def _timing(spec: FeatureSpec, kind: str) -> list[Feature]:
    return [
        Feature(
            name=f"{spec.name}_overdue_ratio" if kind == "overdue" else f"{spec.name}_{kind}_days",
            description=_TIMING[kind],
            unit="ratio" if kind == "overdue" else "days",
            dtype="Float32",
            columns=(spec.time,),
            aggregation=kind,
        )
    ]
