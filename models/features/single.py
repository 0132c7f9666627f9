"""One entity's features from a list of its events, for serving.

The kernel is the one that training runs, so that the numbers are the same to the last bit.
"""

import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from typing import Any

import numpy as np

from models.features.compiled import kernel
from models.features.events import FeatureError, micros
from models.features.kernel import edges
from models.features.listing import describe
from models.features.shape import KNOWN, shape
from models.features.sorting import LARGEST
from models.features.spec import FeatureSpec

Event = Mapping[str, Any]


class Online:
    """A declaration ready to compute one entity at a time; safe to share between threads."""

    def __init__(self, spec: FeatureSpec) -> None:
        """Compiles the declaration's kernel, or loads it from disk.

        Raises:
            FeatureError: it has a feature that the kernel doesn't know.
        """
        left = [f.name for f in describe(spec) if f.table is None and f.aggregation not in KNOWN]
        if left:
            raise FeatureError(
                f"{left} are left to Polars and can't be computed online; leave them out"
            )
        self.spec = spec
        self._made = shape(spec, labels=False)
        self._columns, self._outputs = self._made.columns, self._made.outputs
        self._run = kernel(spec, self._made)
        self._slots = [
            {value: slot for slot, value in enumerate(category.values)}
            for category in spec.categories.values()
        ]
        self._streams = {name: Online(spec.stream(name)) for name in spec.streams}
        self._own([], datetime(2000, 1, 1))

    def features(
        self,
        events: Sequence[Event],
        cutoff: datetime,
        tables: Mapping[str, Sequence[Event]] | None = None,
    ) -> dict[str, Any]:
        """Computes the declared features of one entity.

        Args:
            events: all of the entity's events, in any order, as the columns' values by name; those
                from the cutoff on play no part. Events of the same time count in the order given.
            cutoff: the moment; a naive one is in UTC.
            tables: the entity's rows of the tables of attributes and streams, by table.

        Returns:
            Values by name, in the order of `describe(spec)`: what `compute_at` gives in a row, as
            ints, floats of float32's precision, None for null, and attributes as they are stored.

        Raises:
            FeatureError: an event lacks a column or a time, or has a measure beyond 1e100.
        """
        found = self._own(events, cutoff)
        given = tables or {}
        if missing := [name for name in self.spec.tables if name not in given]:
            raise FeatureError(f"tables {missing} of attributes or streams not given: {[*given]}")
        for name, online in self._streams.items():
            found |= online.features(given[self.spec.streams[name].table], cutoff)
        for name, attributes in self.spec.attributes.items():
            last, latest = None, -math.inf
            for row in given[attributes.table]:
                if latest <= (moment := _moment(row, attributes.time)) < micros(cutoff):
                    last, latest = row, moment
            for column in attributes.columns:
                found[f"{name}_{column}"] = None if last is None else last[column]
        return found

    def _own(self, events: Sequence[Event], cutoff: datetime) -> dict[str, Any]:
        spec, n = self.spec, len(events)
        moments = [_moment(event, spec.time) for event in events]
        order = sorted(range(n), key=moments.__getitem__)
        try:
            ordered = [events[i] for i in order]
            measures = np.array(
                [[_number(e[c]) for e in ordered] for c in spec.measures.values()], np.float64
            )
            previous = np.array(
                [_previous([e[c] for e in ordered]) for c in spec.distinct.values()], np.int32
            )
            slots = np.array(
                [
                    [slot_of.get(e[c.column], len(slot_of)) for e in ordered]
                    for c, slot_of in zip(spec.categories.values(), self._slots, strict=True)
                ],
                np.uint16,
            )
            flags = [
                sum(
                    1 << i
                    for i, f in enumerate(spec.filters)
                    if (value := e[f.column]) is not None
                    and (value == f.equals if f.below is None else value < f.below)
                )
                for e in ordered
                if spec.filters
            ]
        except KeyError as error:
            raise FeatureError(f"an event lacks the column {error}") from None
        cuts = np.array([micros(cutoff)], np.int64)
        before, after = edges(self._made, cuts)
        floats, ints = np.empty(self._outputs[0], "f4"), np.empty(self._outputs[1], "i4")
        self._run(
            0, 1, 0, 1, np.array([0, n]), np.array([0, 1]), n, cuts, before, after,
            np.array([moments[i] for i in order], np.int64),
            measures.reshape(len(spec.measures), n),
            previous.reshape(len(spec.distinct), n),
            slots.reshape(len(spec.categories), n),
            np.array(flags, np.uint32),
            np.empty(1, np.int32), floats.reshape(-1, 1), ints.reshape(-1, 1),
        )  # fmt: skip
        values = [[x if x == x else None for x in floats.tolist()], ints.tolist()]
        return {name: values[whole][row] for name, whole, row in self._columns}


def _moment(event: Event, column: str) -> int:
    moment = event.get(column)
    if isinstance(moment, datetime):
        return micros(moment)
    if isinstance(moment, date):
        return micros(datetime(moment.year, moment.month, moment.day))
    raise FeatureError(f"an event's {column!r} is {moment!r}; allowed: a datetime or a date")


def _number(value: float | None) -> float:
    if value is None or not math.isfinite(value):
        return math.nan
    if abs(value) > LARGEST:
        raise FeatureError(f"{value!r} is beyond {LARGEST:g}; correct or drop it first")
    return value


def _previous(values: Sequence[Any]) -> list[int]:
    """Place of the last equal value before each; -1 for none, -2 where it is None itself."""
    seen: dict[Any, int] = {}
    out = []
    for i, value in enumerate(values):
        key = "NaN" if value != value else value
        out.append(-2 if value is None else seen.get(key, -1))
        seen[key] = i
    return out
