"""The best models together: a greedy average (Caruana and others 2004), or stacked (Wolpert 1992).

Stacked is a logistic regression over the models' log-odds, with weights of 0 or more. Knows nothing
of how the models were trained: it takes their scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from models.metrics import auc
from models.split import folds_drawn

_EDGE = 1e-6


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


@dataclass(frozen=True, kw_only=True)
class Stack:
    """Models stacked; called like one, and a row scores the same alone.

    Attributes:
        models: Each takes (n, p) float32 and gives (n,) float64.
        weights: Of their log-odds, one each, above 0.
        offset: Added to the weighted log-odds.
    """

    models: tuple[Callable[[np.ndarray], np.ndarray], ...]
    weights: tuple[float, ...]
    offset: float

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Probability of 1 a row, (n,) float64."""
        return stack([model(x) for model in self.models], self.weights, self.offset)


def stack(scores: Sequence[np.ndarray], weights: Sequence[float], offset: float) -> np.ndarray:
    """What `Stack` makes of its models' scores (n,)."""
    z = offset + mean([log_odds(each) for each in scores], weights)
    return np.asarray(0.5 * (1 + np.tanh(0.5 * z)))


def log_odds(p: np.ndarray) -> np.ndarray:
    """(n,) float64 probabilities to (n,) float64, within those of 1e-6 and of 1 less that."""
    p = np.clip(p, _EDGE, 1 - _EDGE)
    return np.asarray(np.log(p) - np.log1p(-p))


def stacked(y: np.ndarray, scores: Sequence[np.ndarray]) -> tuple[list[float], float]:
    """Weights of 0 or more and an offset, by penalised likelihood.

    Half the squared distance of each weight to one over the number of models is added to the
    summed log loss: few rows leave the mean as it is.

    Args:
        y: (n,) 0 or 1, of rows that trained none of them.
        scores: (n,) float64 each.

    Raises:
        EnsembleError: There are no scores.
    """
    from scipy.optimize import minimize

    if not len(scores):
        raise EnsembleError("0 models; give 1 or more")
    z_nm = np.column_stack([log_odds(each) for each in scores])
    even = 1 / len(scores)

    def loss(w: np.ndarray) -> tuple[float, np.ndarray]:
        z = z_nm @ w[:-1] + w[-1]
        off = 0.5 * (1 + np.tanh(0.5 * z)) - y
        away = w[:-1] - even
        value = float((np.logaddexp(0, z) - y * z).sum() + 0.5 * away @ away)
        return value, np.append(z_nm.T @ off + away, off.sum())

    start = np.append(np.full(len(scores), even), 0.0)
    bounds = [(0.0, None)] * len(scores) + [(None, None)]
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return [float(w) for w in found.x[:-1]], float(found.x[-1])


def stacking_helps(
    y: np.ndarray,
    scores: Sequence[np.ndarray],
    *,
    metric: Callable[[np.ndarray, np.ndarray], float] = auc,
    folds: int = 5,
    seed: int = 0,
) -> bool:
    """Whether a stack does better than the greedy average, cross-validated on these rows.

    Args:
        y: (n,) 0 or 1, of rows that trained none of them.
        scores: (n,) float64 each, the best first.
        metric: Higher is better.
        folds: How many, each class spread over them.
        seed: Of the folds.
    """
    if len(scores) < 2 or min(np.sum(y == 0), np.sum(y == 1)) < folds:
        return False
    stack_n, mean_n = np.empty(len(y)), np.empty(len(y))
    for train, held in folds_drawn(y, folds=folds, seed=seed):
        own, theirs = [each[train] for each in scores], [each[held] for each in scores]
        stack_n[held] = stack(theirs, *stacked(y[train], own))
        mean_n[held] = mean(theirs, greedy(y[train], own, metric=metric))
    # A stack of no model isn't one.
    return any(stacked(y, scores)[0]) and metric(y, stack_n) > metric(y, mean_n)


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
