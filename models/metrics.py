"""How good scores are: ranking, probability and calibration, for a 0/1 target.

Every function takes `y` (n,) of 0 and 1 and `p` (n,) of scores, and gives the same number
whatever the order of the rows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


class MetricError(ValueError):
    """The target or the scores don't allow the metric; the message says why."""


def auc(y: np.ndarray, p: np.ndarray) -> float:
    """Area under the ROC curve; a tie between a 1 and a 0 counts a half.

    Raises:
        MetricError: The target has one class only, or an input is malformed.
    """
    y, p = _checked(y, p)
    positives = int(y.sum())
    negatives = y.size - positives
    if positives == 0 or negatives == 0:
        raise MetricError(
            f"AUC needs both classes, but all {y.size} targets are {int(y[0])}; "
            "take more rows, or split them by class (stratified)"
        )
    # Two sorts of values, not one of places, which takes several times as long.
    p1, p0 = np.sort(p[y == 1]), np.sort(p[y == 0])
    below, up_to = (int(np.searchsorted(p0, p1, side=side).sum()) for side in ("left", "right"))
    return (below + up_to) / 2 / (positives * negatives)


def average_precision(y: np.ndarray, p: np.ndarray) -> float:
    """Mean precision over the steps in recall, tied scores taken as one step.

    Raises:
        MetricError: The target has no 1, or an input is malformed.
    """
    y, p = _checked(y, p)
    _require_positive(y, "average precision")
    hits, counts = _by_score(y, p)
    found = np.cumsum(hits)
    return float((hits / found[-1] * (found / np.cumsum(counts))).sum())


def log_loss(y: np.ndarray, p: np.ndarray) -> float:
    """Mean negative log-likelihood, in nats; p is kept a float64 epsilon off 0 and 1.

    Raises:
        MetricError: p has values outside [0, 1], or an input is malformed.
    """
    y, p = _checked(y, p)
    _require_probability(p, "log loss")
    eps = np.finfo(np.float64).eps
    clipped = np.clip(p, eps, 1 - eps)
    return float(-np.where(y == 1, np.log(clipped), np.log1p(-clipped)).mean())


def brier(y: np.ndarray, p: np.ndarray) -> float:
    """Mean squared difference between probability and target.

    Raises:
        MetricError: p has values outside [0, 1], or an input is malformed.
    """
    y, p = _checked(y, p)
    _require_probability(p, "the Brier score")
    return float(((p - y) ** 2).mean())


def top_decile_lift(y: np.ndarray, p: np.ndarray) -> float:
    """Rate of 1 in the best-scored tenth (rounded up) over the rate in all rows.

    Where a tie straddles the tenth's edge its rows count at their mean rate, so that the
    order of the rows doesn't matter.

    Raises:
        MetricError: The target has no 1, or an input is malformed.
    """
    y, p = _checked(y, p)
    _require_positive(y, "lift")
    size = math.ceil(y.size / 10)
    hits, counts = _by_score(y, p)
    taken = np.clip(size - (np.cumsum(counts) - counts), 0, counts)
    return float((hits / counts * taken).sum() / size / y.mean())


def calibration_curve(
    y: np.ndarray, p: np.ndarray, bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Predicted against observed rates, in bins of equal count by score.

    Args:
        y: (n,) targets.
        p: (n,) probabilities.
        bins: Number of bins; at most n are made.

    Returns:
        Mean probability, rate of 1 (both float64) and row count (int64) of each bin, by rising
        score. Counts differ by at most one. Tied rows are ordered by target, so that the curve
        doesn't depend on the order of the rows.

    Raises:
        MetricError: bins is below 1, p is outside [0, 1], or an input is malformed.
    """
    y, p = _checked(y, p)
    _require_probability(p, "calibration")
    if bins < 1:
        raise MetricError(f"bins is {bins}; give 1 or more")
    parts = np.array_split(np.lexsort((y, p)), min(bins, y.size))
    return (
        np.array([p[part].mean() for part in parts]),
        np.array([y[part].mean() for part in parts]),
        np.array([part.size for part in parts], dtype=np.int64),
    )


def gain_curve(y: np.ndarray, p: np.ndarray, points: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Share of all 1 found in the best-scored share of the rows (cumulative gain).

    Where a tie straddles a share's edge its rows count at their mean rate.

    Args:
        y: (n,) targets.
        p: (n,) scores.
        points: Steps of the curve, evenly apart.

    Returns:
        Shares of the rows, from 0 to 1, and the gain at each; (points + 1,) float64.

    Raises:
        MetricError: The target has no 1, points is below 1, or an input is malformed.
    """
    y, p = _checked(y, p)
    _require_positive(y, "gain")
    if points < 1:
        raise MetricError(f"points is {points}; give 1 or more")
    hits, counts = _by_score(y, p)
    share = np.linspace(0.0, 1.0, points + 1)
    rows = np.concatenate([[0], np.cumsum(counts)]) / y.size
    found = np.concatenate([[0], np.cumsum(hits)]) / hits.sum()
    return share, np.interp(share, rows, found)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One number that says how good scores are.

    Attributes:
        title: For people.
        more: Whether more is better.
        of: Takes y and p.
    """

    title: str
    more: bool
    of: Callable[[np.ndarray, np.ndarray], float]

    def score(self, y: np.ndarray, p: np.ndarray) -> float:
        """The metric, a loss with its sign turned: more is better."""
        return self.of(y, p) if self.more else -self.of(y, p)

    def own(self, score: float) -> float:
        """The metric's own value, of a `score`."""
        return score if self.more else -score

    @property
    def score_title(self) -> str:
        """What `score` is called."""
        return self.title if self.more else f"negative {self.title}"


METRICS = {
    "auc": Metric(title="AUC", more=True, of=auc),
    "average_precision": Metric(title="average precision", more=True, of=average_precision),
    "log_loss": Metric(title="log loss", more=False, of=log_loss),
    "brier": Metric(title="Brier score", more=False, of=brier),
    "top_decile_lift": Metric(title="lift in the top decile", more=True, of=top_decile_lift),
}


def evaluate(y: np.ndarray, p: np.ndarray) -> dict[str, float]:
    """All single-number metrics, by name.

    Raises:
        MetricError: The target has one class only, or an input is malformed.
    """
    return {name: metric.of(y, p) for name, metric in METRICS.items()}


def _checked(y: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    y, p = np.asarray(y), np.asarray(p, dtype=np.float64)
    if y.ndim != 1 or p.shape != y.shape or y.size == 0:
        raise MetricError(
            f"y has shape {y.shape} and p {p.shape}; give two vectors of the same length, 1 or more"
        )
    if not np.isin(y, (0, 1)).all():
        other = y[~np.isin(y, (0, 1))][0]
        raise MetricError(f"y has the value {other!r}; only 0 and 1 are allowed")
    if not np.isfinite(p).all():
        raise MetricError(
            f"p has {int((~np.isfinite(p)).sum())} values that aren't finite; drop those rows, "
            "or see why the model gave no score"
        )
    return y.astype(np.float64), p


def _require_positive(y: np.ndarray, metric: str) -> None:
    if not y.any():
        raise MetricError(f"{metric} needs a target of 1, but all {y.size} are 0; take more rows")


def _require_probability(p: np.ndarray, metric: str) -> None:
    if p.min() < 0 or p.max() > 1:
        raise MetricError(
            f"{metric} needs probabilities in [0, 1], but p spans [{p.min():g}, {p.max():g}]; "
            "pass them through a sigmoid, or calibrate them"
        )


def _by_score(y: np.ndarray, p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number of 1 and of rows at each distinct score, best score first."""
    _, group, counts = np.unique(-p, return_inverse=True, return_counts=True)
    return np.bincount(group, weights=y), counts
