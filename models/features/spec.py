"""The declaration of point-in-time features, and the columns it stands for.

Knows nothing of data frames: an engine reads `describe(spec)` and computes what it lists.
"""

import calendar
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Aggregation = Literal[
    "count", "sum", "mean", "min", "max", "std", "distinct", "first", "last", "slope", "median"
]
Lifetime = Literal[Aggregation, "recency", "tenure", "gap_mean", "gap_std", "gap_max", "overdue"]
Scalar = bool | int | float | str

_TIMING = {
    "recency": "days from the last event to the cutoff",
    "tenure": "days from the first event to the cutoff",
    "gap_mean": "mean days between consecutive events",
    "gap_std": "sample standard deviation of the days between consecutive events",
    "gap_max": "most days between consecutive events",
    "overdue": "days from the last event to the cutoff, over the mean days between events",
}


def _utc(moment: datetime) -> datetime:
    """Returns the moment as naive UTC; a naive one is taken as UTC already."""
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


Days = Annotated[str, Field(pattern=r"^[1-9]\d{0,4}d$")]
FixedDuration = Annotated[str, Field(pattern=r"^[1-9]\d{0,4}(h|d|w)$")]
# Hours, days, weeks or calendar months.
Duration = Annotated[str, Field(pattern=r"^[1-9]\d{0,4}(h|d|w|mo)$")]
Moment = Annotated[datetime, AfterValidator(_utc)]


def days(duration: str) -> int:
    """Days in a duration such as "30d"."""
    return int(duration.removesuffix("d"))


class _Declared(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Category(_Declared):
    """Shares of the first measure by the values of a column; other values count in none."""

    column: str
    values: list[Scalar]


class Filter(_Declared):
    """A named subset of the events: those with column < below, or column == equals."""

    name: str
    column: str
    below: float | None = None
    equals: Scalar | None = None

    @model_validator(mode="after")
    def _one_condition(self) -> Self:
        if (self.below is None) == (self.equals is None):
            raise ValueError(f"filter {self.name!r} needs exactly one of below and equals")
        return self


class Rfm(_Declared):
    """Scores from 1 by declared bounds, ascending; the best customers score highest.

    The bounds are declared, and not fifths of the customers at hand, so that a score doesn't
    depend on who else is in the table and is the same online.
    """

    recency: list[float] = Field(min_length=1)
    frequency: list[float] = Field(min_length=1)
    monetary: list[float] = Field(min_length=1)
    window: Duration | None = None

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        for name in ("recency", "frequency", "monetary"):
            bounds = getattr(self, name)
            if bounds != sorted(set(bounds)):
                raise ValueError(f"rfm {name} bounds {bounds} must ascend, each one once")
        return self


class Attributes(_Declared):
    """Columns of another table as they were known just before the cutoff.

    The table has the entity's column, the time from which a row holds, and the columns.
    """

    table: str
    time: str
    columns: list[str] = Field(min_length=1)


class CutoffRange(_Declared):
    """Cutoffs from start to end, both included, some calendar months or days apart."""

    every: Literal["month"] | Annotated[str, Field(pattern=r"^[1-9]\d{0,4}(d|mo)$")]
    start: Moment
    end: Moment


class LabelSpec(_Declared):
    """What happens in [cutoff, cutoff + horizon): exactly one of none, any, count, sum."""

    name: str
    none: Days | None = None
    any: Days | None = None
    count: Days | None = None
    sum: Days | None = None
    measure: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [k for k in ("none", "any", "count", "sum") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(
                f"label {self.name!r} gives {given}; give exactly one of none, any, count, sum"
            )
        if (self.sum is None) != (self.measure is None):
            raise ValueError(f"label {self.name!r}: sum needs a measure, and only sum takes one")
        return self

    @property
    def kind(self) -> str:
        """Which of none, any, count and sum is given."""
        return next(k for k in ("none", "any", "count", "sum") if getattr(self, k) is not None)

    @property
    def horizon_days(self) -> int:
        """How far the label looks ahead of its cutoff."""
        return days(getattr(self, self.kind))


class Declaration(_Declared):
    """Features of one stream of events; see docs/features.md for a whole one."""

    time: str
    measures: dict[str, str] = {}
    categories: dict[str, Category] = {}
    distinct: dict[str, str] = {}
    windows: list[Duration] = []
    aggregations: list[Aggregation] = []
    lifetime: list[Lifetime] = []
    trends: list[tuple[Duration, Duration]] = []
    filters: list[Filter] = Field(default=[], max_length=32)
    decays: list[FixedDuration] = []
    last_events: list[Annotated[int, Field(ge=1, le=1000)]] = []
    rfm: Rfm | None = None

    @model_validator(mode="after")
    def _shares_and_rfm_have_a_measure(self) -> Self:
        for named in ("categories", "rfm"):
            if getattr(self, named) and not self.measures:
                raise ValueError(f"{named} take the first measure; declare one in measures")
        return self


class Stream(Declaration):
    """Events of another table about the same entities, such as campaign exposures."""

    table: str


class FeatureSpec(Declaration):
    """Point-in-time features of one entity's events; see docs/features.md for a whole one."""

    entity: str
    name: str
    attributes: dict[str, Attributes] = {}
    streams: dict[str, Stream] = {}
    cutoffs: list[Moment] | CutoffRange = []
    labels: list[LabelSpec] = []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [f.name for f in describe(self)]
        clash = sorted({n for n in names if names.count(n) > 1 or n in (self.entity, "cutoff")})
        if clash:
            raise ValueError(f"feature names used more than once: {clash}; rename or remove some")
        for item in self.labels:
            if item.measure is not None and item.measure not in self.measures:
                raise ValueError(
                    f"label {item.name!r} sums {item.measure!r}; measures: {list(self.measures)}"
                )
        return self

    @property
    def tables(self) -> list[str]:
        """Names of the tables, beside the events, that attributes and streams are read from."""
        named = [attributes.table for attributes in self.attributes.values()]
        return list(dict.fromkeys([*named, *(stream.table for stream in self.streams.values())]))

    def stream(self, name: str) -> "FeatureSpec":
        """A stream's declaration by itself."""
        own = self.streams[name].model_dump(exclude={"table"})
        return FeatureSpec.model_validate({**own, "entity": self.entity, "name": name})


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


def cutoff_times(spec: FeatureSpec) -> list[datetime]:
    """The declared cutoffs, naive UTC, ascending; a month after the 31st is a shorter one's end."""
    declared = spec.cutoffs
    if isinstance(declared, list):
        return sorted(set(declared))
    out: list[datetime] = []
    step = 0
    while (moment := _step(declared, step)) <= declared.end:
        out.append(moment)
        step += 1
    return out


def _step(declared: CutoffRange, step: int) -> datetime:
    start = declared.start
    if declared.every.endswith("d"):
        return start + timedelta(days=days(declared.every) * step)
    months = 1 if declared.every == "month" else int(declared.every.removesuffix("mo"))
    year, month = divmod(start.year * 12 + start.month - 1 + step * months, 12)
    day = min(start.day, calendar.monthrange(year, month + 1)[1])
    return start.replace(year=year, month=month + 1, day=day)


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
