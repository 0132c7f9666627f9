"""What Prometheus reads: requests by way in, action, model and status, times, models' calls.

Each replica counts for itself, and each series has its label: a sum would fall whenever a replica
goes, which Prometheus takes for a counter that began anew.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.replica import Models

# Upper bounds in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

MEDIA_TYPE = "text/plain; version=1.0.0; charset=utf-8"

Labels = tuple[str, ...]

# Without "liftyard_": whether it only grows, what it is, and its labels beside `replica`.
_FAMILIES: dict[str, tuple[bool, str, Labels]] = {
    "requests": (True, "Answered requests", ("way", "action", "model", "status")),
    "model_version": (False, "Version served", ("model",)),
    "model_waiting": (False, "Requests queued", ("model",)),
    "model_calls": (True, "Batches scored since the version was loaded", ("model",)),
    "model_rows": (True, "Rows scored since the version was loaded", ("model",)),
    "challenger_version": (False, "Version beside the one served", ("model",)),
    "model_refused_version": (
        False,
        "Version that failed on load, so that the one before it goes on answering",
        ("model", "role"),
    ),
    "shadow_requests": (True, "Requests in a shadow", ("model", "outcome")),
}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A replica's figures of one moment.

    Attributes:
        values: By family of `_FAMILIES` and by its labels' values.
        times: By way, action and model: requests by bucket, and their seconds in all.
    """

    values: dict[str, dict[Labels, float]]
    times: dict[Labels, tuple[list[int], float]]


class Metrics:
    """Counts in plain dictionaries, which a request waits less for than for a library's locks."""

    def __init__(self) -> None:
        self._answers: Counter[tuple[str, str, str, int]] = Counter()
        self._times: dict[tuple[str, str, str], list[int]] = {}
        self._seconds: Counter[tuple[str, str, str]] = Counter()

    def seen(self, way: str, action: str, model: str, status: int, seconds: float) -> None:
        """Counts an answered request; `model` is a served one's name, or empty."""
        self._answers[way, action, model, status] += 1
        times = self._times.setdefault((way, action, model), [0] * (len(BUCKETS) + 1))
        times[bisect_left(BUCKETS, seconds)] += 1
        self._seconds[way, action, model] += seconds  # type: ignore[assignment]

    def figures(self, models: "Models") -> Figures:
        """What was counted here, and what is told of the models."""
        served = models.served.items()
        refused: dict[Labels, float] = {}
        for role, by_model in (
            ("champion", models.refused),
            ("challenger", models.refused_challengers),
        ):
            refused.update({(model, role): float(v) for model, (v, _) in by_model.items()})
        shadow: dict[Labels, float] = {key: n for key, n in models.shadow.counts.items()}
        values: dict[str, dict[Labels, float]] = {
            "requests": {(*asked, str(code)): n for (*asked, code), n in self._answers.items()},
            "model_version": {(model,): each.card.version for model, each in served},
            "model_waiting": {(model,): each.batcher.waiting for model, each in served},
            "model_calls": {(model,): each.batcher.calls for model, each in served},
            "model_rows": {(model,): each.batcher.rows for model, each in served},
            "challenger_version": {
                (model,): each.card.version for model, each in models.challengers.items()
            },
            "model_refused_version": refused,
            "shadow_requests": shadow,
        }
        times: dict[Labels, tuple[list[int], float]] = {
            key: (list(counts), float(self._seconds[key])) for key, counts in self._times.items()
        }
        return Figures(values=values, times=times)


def exposition(replicas: Mapping[str, Figures]) -> bytes:
    """The figures of replicas, by their ids, as Prometheus reads them."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(_Families(_families(replicas)))
    return generate_latest(registry)


def _families(replicas: Mapping[str, Figures]) -> Iterable[Any]:
    from prometheus_client.core import (
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
    )

    for name, (grows, about, labels) in _FAMILIES.items():
        kind = CounterMetricFamily if grows else GaugeMetricFamily
        family: Any = kind(f"liftyard_{name}", about, labels=("replica", *labels))
        for replica, figures in replicas.items():
            for values, count in figures.values[name].items():
                family.add_metric((replica, *values), count)
        yield family
    times = HistogramMetricFamily(
        "liftyard_request_seconds",
        "Seconds to an answer",
        labels=("replica", "way", "action", "model"),
    )
    for replica, figures in replicas.items():
        for key, (counts, seconds) in figures.times.items():
            total, buckets = 0, []
            for bound, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
                total += count
                buckets.append((bound, total))
            times.add_metric((replica, *key), buckets, seconds)
    yield times


class _Families:
    """What `prometheus_client` calls a collector."""

    def __init__(self, families: Iterable[Any]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Any]:
        return self._families
