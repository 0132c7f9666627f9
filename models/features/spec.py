"""The declaration of point-in-time features, and the columns it stands for.

Knows nothing of data frames: an engine reads `describe(spec)` and computes what it lists.
"""

import calendar
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

Aggregation = Literal["count", "sum", "mean", "min", "max", "std", "distinct"]
Lifetime = Literal[Aggregation, "recency", "tenure", "gap_mean", "gap_std", "gap_max"]
Scalar = bool | int | float | str

_TIMING = {
    "recency": "days from the last event to the cutoff",
    "tenure": "days from the first event to the cutoff",
    "gap_mean": "mean days between consecutive events",
    "gap_std": "sample standard deviation of the days between consecutive events",
    "gap_max": "most days between consecutive events",
}


def _utc(moment: datetime) -> datetime:
    """Returns the moment as naive UTC; a naive one is taken as UTC already."""
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


Days = Annotated[str, Field(pattern=r"^[1-9]\d{0,4}d$")]
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


class CutoffRange(_Declared):
    """Cutoffs from start to end, both included, a calendar month or a number of days apart."""

    every: Literal["month"] | Days
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


class FeatureSpec(_Declared):
    """Point-in-time features of one entity's events; see docs/features.md for a whole one."""

    entity: str
    time: str
    name: str
    measures: dict[str, str] = {}
    categories: dict[str, Category] = {}
    distinct: dict[str, str] = {}
    windows: list[Days] = []
    aggregations: list[Aggregation] = []
    lifetime: list[Lifetime] = []
    trends: list[tuple[Days, Days]] = []
    filters: list[Filter] = []
    cutoffs: list[Moment] | CutoffRange = []
    labels: list[LabelSpec] = []

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.categories and not self.measures:
            raise ValueError("categories are shares of the first measure; declare one in measures")
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


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One output column.

    Attributes:
        name: column name.
        description: what it is, for people.
        unit: "events", "values", "days", "ratio", or a measure's column.
        dtype: "Int32" or "Float32".
        columns: the event columns it is computed from.
        aggregation: count, sum, ..., gap_max, share or trend.
        subject: name of the measure, distinct, category or filter; None for the events.
        window_days: None for all events before the cutoff.
        long_days: a trend's longer window.
        value: a share's value.
        filter: name of the filter on the events, if any.
    """

    name: str
    description: str
    unit: str
    dtype: Literal["Int32", "Float32"]
    columns: tuple[str, ...]
    aggregation: str
    subject: str | None = None
    window_days: int | None = None
    long_days: int | None = None
    value: Scalar | None = None
    filter: str | None = None


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
    if declared.every != "month":
        return start + timedelta(days=days(declared.every) * step)
    year, month = divmod(start.year * 12 + start.month - 1 + step, 12)
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
                    window_days=days(short),
                    long_days=days(long),
                )
            )
    return out


def _aggregated(spec: FeatureSpec, how: str, window: str | None) -> list[Feature]:
    counted = how in ("count", "distinct")
    subjects: dict[str, str | None] = (
        {spec.name: None}
        if how == "count"
        else dict(spec.distinct if how == "distinct" else spec.measures)
    )
    when = f"in the {window} before the cutoff" if window else "before the cutoff"
    return [
        Feature(
            name=f"{name}_{how}_{window or 'lifetime'}",
            description=f"{how} of {name} {when}",
            unit={"count": "events", "distinct": "values"}.get(how, column or ""),
            dtype="Int32" if counted else "Float32",
            columns=(spec.time, *([column] if column else [])),
            aggregation=how,
            subject=name if column else None,
            window_days=days(window) if window else None,
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
            window_days=days(window),
            filter=chosen.name,
        )
        for subject, how, name, unit in wanted
    ]


def _timing(spec: FeatureSpec, kind: str) -> list[Feature]:
    return [
        Feature(
            name=f"{spec.name}_{kind}_days",
            description=_TIMING[kind],
            unit="days",
            dtype="Float32",
            columns=(spec.time,),
            aggregation=kind,
        )
    ]
