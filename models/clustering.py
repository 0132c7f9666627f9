"""K-means over numbers of clusters and seeds, each scored three ways on the same rows.

Silhouette (Rousseeuw 1987) and Davies-Bouldin (1979) say how apart clusters are; stability says
whether resampled rows give the same clusters (Ben-Hur and others 2002, by the adjusted Rand
index). Knows nothing of what the rows are.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.families import Variant, VariantError, completed, require_at_least

DEFAULTS: dict[str, Any] = {"clusters": 8, "seed": 0}


class ClusterDataError(ValueError):
    """The rows can't be clustered; the message says why."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterData:
    """Rows to cluster, and how they are scored.

    Attributes:
        x: (n, p) float32, without NaN, on scales that may be compared.
        sample: Rows that silhouette is computed on, the same for every variant.
        resamples: How often half of the rows are clustered anew for the stability; 0 for none.
        seed: Of the sample and the resamples.

    Raises:
        ClusterDataError: The shape or a value doesn't fit.
    """

    x: np.ndarray
    sample: int = 2_000
    resamples: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or len(self.x) < 4 or self.x.dtype != np.float32:
            raise ClusterDataError(
                f"x has shape {self.x.shape} and is {self.x.dtype}; give 4 or more rows of float32"
            )
        if not np.isfinite(self.x).all():
            raise ClusterDataError("x has values that aren't finite; fill or cap them")


@dataclass(frozen=True, kw_only=True)
class Clustering:
    """One k-means, fitted and scored.

    Attributes:
        variant: The settings as they were given.
        centers: (k, p) float64.
        silhouette: -1 to 1, higher is better.
        davies_bouldin: 0 or more, lower is better.
        stability: Mean adjusted Rand index against the resamples, at most 1; NaN without them.
        seconds: Wall seconds.
    """

    variant: dict[str, Any]
    centers: np.ndarray
    silhouette: float
    davies_bouldin: float
    stability: float
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """The scores by name, those that were computed."""
        found = {
            "silhouette": self.silhouette,
            "davies_bouldin": self.davies_bouldin,
            "stability": self.stability,
        }
        return {name: value for name, value in found.items() if not np.isnan(value)}


def fit_pack(variants: Sequence[Variant], data: ClusterData) -> list[Clustering]:
    """Clusters the rows once a variant; a variant's scores don't depend on the others.

    One at a time: as batched products they take seven times as long.

    Args:
        variants: Settings out of `DEFAULTS`.
        data: Rows.

    Raises:
        VariantError: A setting isn't known, or there are as many clusters as rows in the sample.
    """
    from sklearn.metrics import adjusted_rand_score, davies_bouldin_score, silhouette_score

    found = []
    draws = np.random.default_rng(data.seed)
    chosen = np.sort(draws.permutation(len(data.x))[: data.sample])
    halves = [
        np.sort(draws.permutation(len(data.x))[: len(data.x) // 2]) for _ in range(data.resamples)
    ]
    for variant in variants:
        settings = completed("kmeans", variant, DEFAULTS)
        require_at_least("kmeans", settings, ("clusters",), 2)
        smallest = min(len(chosen), len(data.x) // 2)
        if settings["clusters"] >= smallest:
            raise VariantError(
                f"setting 'clusters' of 'kmeans' is {settings['clusters']}; "
                f"give fewer than the {smallest} rows that score it"
            )
        started = time.perf_counter()
        model = _kmeans(settings, data.x)
        labels = model.labels_[chosen]
        several = np.unique(labels).size > 1
        others = [_kmeans(settings, data.x[half]).predict(data.x[chosen]) for half in halves]
        found.append(
            Clustering(
                variant=dict(variant),
                centers=model.cluster_centers_.astype(np.float64),
                silhouette=float(silhouette_score(data.x[chosen], labels)) if several else -1.0,
                davies_bouldin=float(davies_bouldin_score(data.x, model.labels_)),
                stability=float(np.mean([adjusted_rand_score(labels, other) for other in others]))
                if others
                else float("nan"),
                seconds=time.perf_counter() - started,
            )
        )
    return found


def _kmeans(settings: dict[str, Any], x: np.ndarray) -> Any:
    from sklearn.cluster import KMeans

    return KMeans(n_clusters=settings["clusters"], random_state=settings["seed"], n_init=1).fit(x)
