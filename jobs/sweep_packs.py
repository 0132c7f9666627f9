"""What an actor makes of a pack of variants: outcomes, whatever the variants do wrong.

Knows nothing of Ray.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol

from cluster import estimators
from cluster.device import choose
from jobs.sweep_board import LATENCY, Outcome
from models import forest
from models.families import FAMILIES, ON_GPU, Fitted, TrainingData, Variant
from models.metrics import METRICS

# Rows that latency is measured on.
LATENCY_ROWS = 1_000


class Train(Protocol):
    """What actors do with a pack; one that can be pickled, and raises for no variant's sake."""

    def __call__(self, pack: Sequence[Variant], data: Any, **how: Any) -> list[Outcome]:
        """One outcome a variant; `how` is device, until, looks and held."""


def fit_pack(
    pack: Sequence[Variant], data: TrainingData, *, device: str = "cpu", **how: Any
) -> list[Fitted]:
    """Trains a pack of one family; `how` is its function's."""
    family = str(pack[0]["family"])
    if family == "forest" and device == "cuda":
        # What is cuML's and what scikit-learn's is decided in one place, which models don't know.
        return forest.fit_pack(pack, data, factory=partial(estimators.forest, choose("cuda")))
    return FAMILIES[family](pack, data, device=device, **how)


def train_pack(
    pack: Sequence[Variant],
    data: TrainingData,
    *,
    metric: str = "auc",
    latency: bool = False,
    device: str = "cpu",
    **how: Any,
) -> list[Outcome]:
    """What an actor makes of a pack; nothing that a variant does wrong is raised.

    A pack that doesn't fit in memory is halved and tried again; one that fails otherwise is tried
    a variant at a time, so that one bad variant doesn't take its pack along.

    Args:
        pack: Variants of one family.
        data: Encoded rows.
        metric: Of `models.metrics.METRICS`, that variants are compared by.
        latency: Whether outcomes have the metric `LATENCY` too.
        device: "cpu" or "cuda".
        how: For boosting: until, looks, held.
    """
    started, cpu = time.perf_counter(), time.process_time()
    try:
        fitted = fit_pack(pack, data, device=device, metric=metric, **how)
        scored = [METRICS[metric].score(data.y_valid, each.valid_scores) for each in fitted]
    except Exception as error:
        if len(pack) > 1:
            size = len(pack) // 2 if out_of_memory(error) else 1
            parts = [pack[at : at + size] for at in range(0, len(pack), size)]
            how |= {"metric": metric, "latency": latency, "device": device}
            return [outcome for part in parts for outcome in train_pack(part, data, **how)]
        return [
            Outcome(
                variant=dict(pack[0]),
                score=None,
                seconds=time.perf_counter() - started,
                error=f"{type(error).__name__}: {error}",
                cpu_s=time.process_time() - cpu,
            )
        ]
    seconds = sum(each.seconds for each in fitted)
    ran_on = device if str(pack[0]["family"]) in ON_GPU else "cpu"
    cpu_share = (time.process_time() - cpu) / seconds
    return [
        Outcome(
            variant=each.variant,
            score=score,
            seconds=each.seconds,
            cpu_s=each.seconds * cpu_share,
            curve=[list(point) for point in each.curve],
            pruned_at=each.pruned_at,
            ran={"device": ran_on, **each.ran},
            metrics={LATENCY: _latency_us(each, data)} if latency else {},
        )
        for each, score in zip(fitted, scored, strict=True)
    ]


def _latency_us(fitted: Fitted, data: TrainingData) -> float:
    """The quickest of three goes, so that what else the machine does counts little."""
    rows = data.x_valid[:LATENCY_ROWS]
    took = []
    for _ in range(3):
        began = time.perf_counter()
        fitted.predict(rows)
        took.append(time.perf_counter() - began)
    return min(took) / len(rows) * 1e6


def cluster_pack(pack: Sequence[Variant], data: Any, **how: Any) -> list[Outcome]:
    """What an actor makes of k-means variants, by way of `run(..., train=cluster_pack)`.

    Args:
        pack: Variants of `models.clustering`, each its own pack or several.
        data: `models.clustering.ClusterData`.
        how: Nothing of it is used.

    Returns:
        Outcomes whose `metrics` are silhouette, davies_bouldin and stability.
    """
    from models import clustering

    outcomes = []
    for variant in pack:
        cpu = time.process_time()
        try:
            (made,) = clustering.fit_pack([variant], data)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            outcomes.append(Outcome(variant=dict(variant), score=None, seconds=0.0, error=said))
            continue
        outcomes.append(
            Outcome(
                variant=made.variant,
                score=None,
                seconds=made.seconds,
                cpu_s=time.process_time() - cpu,
                metrics=made.metrics,
            )
        )
    return outcomes


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device or this machine has no memory left."""
    # By text: torch, XGBoost and cuML each have a class of their own, and may not be installed.
    said = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(
        each in said for each in ("outofmemory", "out of memory", "bad_alloc", "memoryallocation")
    )
