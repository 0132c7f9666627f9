"""What Prometheus reads: requests by way in, action, model and status, times, models' calls."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.replica import Models

# Upper bounds in seconds.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)

MEDIA_TYPE = "text/plain; version=1.0.0; charset=utf-8"


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

    def text(self, models: "Models") -> bytes:
        """The exposition, with what is told of the models."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry()
        registry.register(_Families(self._families(models)))
        return generate_latest(registry)

    def _families(self, models: "Models") -> Iterable[Any]:
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        answers = CounterMetricFamily(
            "liftyard_requests", "Answered requests", labels=("way", "action", "model", "status")
        )
        for (*asked, status), count in self._answers.items():
            answers.add_metric((*asked, str(status)), count)
        times = HistogramMetricFamily(
            "liftyard_request_seconds", "Seconds to an answer", labels=("way", "action", "model")
        )
        for key, counts in self._times.items():
            total, buckets = 0, []
            for bound, count in zip((*map(str, BUCKETS), "+Inf"), counts, strict=True):
                total += count
                buckets.append((bound, total))
            times.add_metric(key, buckets, self._seconds[key])
        versions = GaugeMetricFamily("liftyard_model_version", "Version served", labels=("model",))
        waiting = GaugeMetricFamily("liftyard_model_waiting", "Requests queued", labels=("model",))
        calls = CounterMetricFamily(
            "liftyard_model_calls", "Batches scored since the version was loaded", labels=("model",)
        )
        rows = CounterMetricFamily(
            "liftyard_model_rows", "Rows scored since the version was loaded", labels=("model",)
        )
        for model, served in models.served.items():
            versions.add_metric((model,), served.card.version)
            waiting.add_metric((model,), served.batcher.waiting)
            calls.add_metric((model,), served.batcher.calls)
            rows.add_metric((model,), served.batcher.rows)
        challengers = GaugeMetricFamily(
            "liftyard_challenger_version", "Version beside the one served", labels=("model",)
        )
        for model, challenger in models.challengers.items():
            challengers.add_metric((model,), challenger.card.version)
        refused = GaugeMetricFamily(
            "liftyard_model_refused_version",
            "Version that failed on load, so that the one before it goes on answering",
            labels=("model", "role"),
        )
        for role, by_model in (
            ("champion", models.refused),
            ("challenger", models.refused_challengers),
        ):
            for model, (version, _) in by_model.items():
                refused.add_metric((model, role), version)
        shadow = CounterMetricFamily(
            "liftyard_shadow_requests", "Requests in a shadow", labels=("model", "outcome")
        )
        for (model, outcome), count in models.shadow.counts.items():
            shadow.add_metric((model, outcome), count)
        return answers, times, versions, waiting, calls, rows, challengers, refused, shadow


class _Families:
    """What `prometheus_client` calls a collector."""

    def __init__(self, families: Iterable[Any]) -> None:
        self._families = families

    def collect(self) -> Iterable[Any]:
        return self._families
