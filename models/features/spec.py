"""The declaration of point-in-time features.

Knows nothing of data frames, nor of how features are computed.
"""

import calendar
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from models.features.listing import describe

Aggregation = Literal[
    "count", "sum", "mean", "min", "max", "std", "distinct", "first", "last", "slope", "median"
]
Lifetime = Literal[Aggregation, "recency", "tenure", "gap_mean", "gap_std", "gap_max", "overdue"]
Scalar = bool | int | float | str


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
