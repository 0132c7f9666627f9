"""Averages of the best models, chosen greedily (Caruana and others 2004).

Knows nothing of how the models were trained: it takes their scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models.metrics import auc


class EnsembleError(ValueError):
    """The scores can't be averaged; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Average:
    """A weighted mean of models; called like one, and a row scores the same alone.

    Attributes:
        models: Each takes (n, p) float32 and gives (n,) float64.
        weights: One each, above 0; they add up to 1.
    """

    models: tuple[Callable[[np.ndarray], np.ndarray], ...]
    weights: tuple[float, ...]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Probability of 1 a row, (n,) float64."""
        return mean([model(x) for model in self.models], self.weights)


def mean(scores: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """The weighted mean of scores (n,), summed in their order."""
    total = np.zeros_like(scores[0])
    for each, weight in zip(scores, weights, strict=True):
        total = total + weight * each
    return total


def greedy(
    y: np.ndarray,
    scores: Sequence[np.ndarray],
    *,
    picks: int = 20,
    metric: Callable[[np.ndarray, np.ndarray], float] = auc,
) -> list[float]:
    """Weights of models: each pick adds the one that helps the mean most, also once more.

    Args:
        y: (n,) 0 or 1, of rows that trained none of them.
        scores: (n,) float64 each, the best first: of equals the first is picked.
        picks: How many; the best of the means on the way counts.
        metric: Higher is better.

    Returns:
        A weight a model, 0 for those not picked; they add up to 1.

    Raises:
        EnsembleError: There are no scores, or picks is below 1.
    """
    if not len(scores) or picks < 1:
        raise EnsembleError(f"{len(scores)} models and {picks} picks; give 1 or more of each")
    total = np.zeros(len(y))
    counts = np.zeros(len(scores), dtype=np.int64)
    best, best_counts = -np.inf, counts
    for pick in range(1, picks + 1):
        found = [metric(y, (total + each) / pick) for each in scores]
        chosen = int(np.argmax(found))
        total = total + scores[chosen]
        counts[chosen] += 1
        if found[chosen] > best:
            best, best_counts = found[chosen], counts.copy()
    return [float(count / best_counts.sum()) for count in best_counts]
