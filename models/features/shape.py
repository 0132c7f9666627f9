"""What a declaration's kernel reads and writes.

Knows nothing of its text.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from models.features.listing import Feature, describe
from models.features.spec import FeatureSpec, LabelSpec

# Aggregations the kernel has; a feature of any other is left to the Polars form.
KNOWN = frozenset(
    {
        "count", "sum", "mean", "min", "max", "std", "distinct", "share", "trend",
        "recency", "tenure", "gap_mean", "gap_std", "gap_max", "overdue",
        "first", "last", "slope", "decay", "since_last", "rfm",
    }
)  # fmt: skip

# The sums that an aggregation of a measure takes.
_TERMS = {
    "sum": ("x",),
    "mean": ("x",),
    "std": ("x", "xx"),
    "share": ("x",),
    "trend": ("x",),
    "rfm": ("x",),
    "slope": ("x", "t", "tt", "tx"),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a declaration's kernel reads and writes, in the order of its arrays' rows.

    Attributes:
        features: the ones it computes, in output order.
        labels: the ones it computes, after the features.
        windows: durations, in the order of the rows of `starts`.
        horizons: labels' days, in the order of the rows of `ends`.
        measures: names.
        distinct: names.
        categories: names.
        filters: names.
        sums: prefix sums, as (measure, term, filter); terms are x, xx, t, tt and tx, of the values
            and the times from the entity's first event on.
        stacks: (measure, "min" or "max").
        slots: a category's first row in the running sums by slot, and their total number.
    """

    features: Sequence[Feature]
    labels: Sequence[LabelSpec]
    windows: Sequence[str]
    horizons: Sequence[int]
    measures: Sequence[str]
    distinct: Sequence[str]
    categories: Sequence[str]
    filters: Sequence[str]
    sums: Sequence[tuple[str, str, str | None]]
    stacks: Sequence[tuple[str, str]]
    slots: Sequence[int]
    total_slots: int

    @property
    def columns(self) -> list[tuple[str, bool, int]]:
        """Each output's name, whether it is an int, and its row among the ints or floats."""
        out, rows = [], [0, 0]
        named = [(f.name, f.dtype == "Int32") for f in self.features]
        for name, whole in [*named, *((item.name, item.kind != "sum") for item in self.labels)]:
            out.append((name, whole, rows[whole]))
            rows[whole] += 1
        return out

    @property
    def targets(self) -> list[str]:
        """Where the source writes each output."""
        return [f"{'ints_out' if i else 'floats_out'}[{r}, row]" for _, i, r in self.columns]

    @property
    def outputs(self) -> tuple[int, int]:
        """How many floats and ints a row has."""
        ints = sum(whole for _, whole, _ in self.columns)
        return len(self.columns) - ints, ints

    @property
    def doubles(self) -> int:
        """Scratch doubles an event."""
        return 2 * len(self.sums)

    @property
    def ints(self) -> int:
        """Scratch ints an event: counts of each measure, then of each filter."""
        return len(self.measures) + len(self.filters)


def shape(spec: FeatureSpec, *, labels: bool) -> Shape:
    """Lists what the kernel of a declaration needs.

    Args:
        spec: the declaration.
        labels: whether the labels are written too.
    """
    features = [f for f in describe(spec) if f.aggregation in KNOWN and f.table is None]
    windows = {
        w: None for f in features for w in (f.window, f.long) if w and f.aggregation != "decay"
    }
    sums: dict[tuple[str, str, str | None], None] = {}
    stacks: dict[tuple[str, str], None] = {}
    first = next(iter(spec.measures), None)
    for f in features:
        measure = first if f.aggregation == "share" else f.subject
        terms = _TERMS.get(f.aggregation, ()) if measure else ()
        sums |= {(str(measure), term, f.filter): None for term in terms}
        if f.aggregation in ("min", "max"):
            stacks[(str(measure), f.aggregation)] = None
    wanted = spec.labels if labels else []
    for label in wanted:
        if label.measure is not None:
            sums[(label.measure, "x", None)] = None
    slots, total = [], 0
    for category in spec.categories.values():
        slots.append(total)
        total += len(category.values) + 1
    return Shape(
        features=features,
        labels=wanted,
        windows=list(windows),
        horizons=sorted({label.horizon_days for label in wanted}),
        measures=list(spec.measures),
        distinct=list(spec.distinct),
        categories=list(spec.categories),
        filters=[f.name for f in spec.filters],
        sums=list(sums),
        stacks=list(stacks),
        slots=slots,
        total_slots=total,
    )
