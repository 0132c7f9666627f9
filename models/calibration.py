"""Scores to probabilities: Platt's sigmoid or isotonic regression, or neither where that is best.

Both rise with the score. Isotonic regression joins the middles of its steps by lines (Oron and
Flournoy 2017), so that rows which differ in score don't tie but outside the scores that it saw.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from models.ensemble import log_odds
from models.metrics import log_loss
from models.split import folds_drawn

_EDGE = 1e-6


class CalibrationError(ValueError):
    """The rows can't calibrate; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Raw:
    """Scores as they are."""

    def __call__(self, p: np.ndarray) -> np.ndarray:
        """(n,) to (n,)."""
        return p


@dataclass(frozen=True, kw_only=True)
class Platt:
    """A sigmoid of slope x log-odds + offset (Platt 1999)."""

    slope: float
    offset: float

    def __call__(self, p: np.ndarray) -> np.ndarray:
        """(n,) float64 probabilities to (n,) float64."""
        z = self.slope * log_odds(p) + self.offset
        return np.asarray(0.5 * (1 + np.tanh(0.5 * z)))


@dataclass(frozen=True, kw_only=True)
class Isotonic:
    """Lines between points; flat outside them."""

    scores: tuple[float, ...]
    rates: tuple[float, ...]

    def __call__(self, p: np.ndarray) -> np.ndarray:
        """(n,) float64 probabilities to (n,) float64."""
        return np.asarray(np.interp(p, self.scores, self.rates))


Calibration = Raw | Platt | Isotonic


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A model whose scores are calibrated; called like one."""

    model: Callable[[np.ndarray], np.ndarray]
    calibration: Calibration

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(n, p) float32 to (n,) float64, probability of 1."""
        return self.calibration(self.model(x))


def fit(method: str, y: np.ndarray, p: np.ndarray) -> Calibration:
    """Calibrates on rows that didn't train the model.

    Args:
        method: "raw", "platt" or "isotonic".
        y: (n,) 0 or 1, both present.
        p: (n,) float64 scores in [0, 1].

    Raises:
        CalibrationError: The method isn't known, or there is one class only.
    """
    if method not in METHODS:
        raise CalibrationError(f"method {method!r}; allowed: {', '.join(METHODS)}")
    if y.min() == y.max():
        raise CalibrationError(f"all {y.size} targets are {y[0]}; give rows of both classes")
    return METHODS[method](y.astype(np.float64), p)


def choose(y: np.ndarray, p: np.ndarray, *, folds: int = 5, seed: int = 0) -> str:
    """The method of least log loss, cross-validated on these rows.

    Args:
        y: (n,) 0 or 1, at least `folds` of each.
        p: (n,) float64 scores in [0, 1].
        folds: How many, each class spread over them.
        seed: Of the folds.

    Raises:
        CalibrationError: A class has fewer rows than there are folds.
    """
    if min(np.sum(y == 0), np.sum(y == 1)) < folds:
        raise CalibrationError(
            f"{int(np.sum(y == 0))} rows of 0 and {int(np.sum(y == 1))} of 1; "
            f"{folds} folds need as many of each"
        )
    losses = {}
    for method in METHODS:
        out = np.empty(y.size)
        for train, held in folds_drawn(y, folds=folds, seed=seed):
            out[held] = fit(method, y[train], p[train])(p[held])
        losses[method] = log_loss(y, out)
    # The first of equals: raw before the others.
    return min(losses, key=lambda method: losses[method])


def _raw(y: np.ndarray, p: np.ndarray) -> Calibration:
    return Raw()


def _platt(y: np.ndarray, p: np.ndarray) -> Calibration:
    ones = y.sum()
    # Platt's own targets, which keep the sigmoid off 0 and 1 on few rows.
    target = np.where(y == 1, (ones + 1) / (ones + 2), 1 / (y.size - ones + 2))
    x = np.column_stack([log_odds(p), np.ones(y.size)])
    w = np.array([1.0, 0.0])
    for _ in range(100):
        q = 0.5 * (1 + np.tanh(0.5 * (x @ w)))
        curvature = (x * (q * (1 - q))[:, None]).T @ x + 1e-9 * np.eye(2)
        step = np.linalg.solve(curvature, x.T @ (q - target))
        # Newton from afar can overshoot; no sigmoid needs a larger step.
        step *= min(1.0, 2.0 / max(np.abs(step).max(), 1e-12))
        w = w - step
        if np.abs(step).max() < 1e-9:
            break
    # A falling sigmoid would turn the ranking round.
    return Platt(slope=max(float(w[0]), _EDGE), offset=float(w[1]))


def _isotonic(y: np.ndarray, p: np.ndarray) -> Calibration:
    from sklearn.isotonic import isotonic_regression

    scores, group, counts = np.unique(p, return_inverse=True, return_counts=True)
    rate = np.bincount(group, weights=y) / counts
    fitted = isotonic_regression(rate, sample_weight=counts.astype(np.float64))
    _, step = np.unique(fitted, return_inverse=True)
    weight = np.bincount(step, weights=counts)
    middles = np.bincount(step, weights=scores * counts) / weight
    rates = np.bincount(step, weights=fitted * counts) / weight
    # A row of a rate never seen isn't impossible.
    return Isotonic(
        scores=tuple(middles.tolist()),
        rates=tuple(np.clip(rates, 0.5 / y.size, 1 - 0.5 / y.size).tolist()),
    )


METHODS: dict[str, Callable[[np.ndarray, np.ndarray], Calibration]] = {
    "raw": _raw,
    "platt": _platt,
    "isotonic": _isotonic,
}
