"""Logistic regression with an L2 penalty: variants that differ only in it are one path.

A path is walked from the strongest penalty down, each solution the start of the next (Friedman,
Hastie, Tibshirani 2010), by Newton's method. Its steps are fixed and every variant leaves it at
the last step above its own penalty, so that what a variant gets doesn't depend on the others.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from models.families import (
    FREE,
    Fitted,
    TrainingData,
    Variant,
    alike,
    completed,
    require_above_zero,
)
from models.network import predict_layers
from models.network_inputs import scaled, scaling_of

DEFAULTS: dict[str, Any] = {"l2": 1.0, "positive_weight": 1.0, "seed": 0}

# Penalties of the path's steps, strongest first.
PATH = tuple(10.0 ** (power / 2) for power in range(10, -9, -1))
_MOST_STEPS = 50
_TOLERANCE = 1e-10


def fit_pack(variants: Sequence[Variant], data: TrainingData) -> list[Fitted]:
    """Trains each variant, identical to the bit to training it alone.

    Args:
        variants: Settings out of `DEFAULTS`. `l2` times half the squared weights is added to the
            summed loss, on standardised features; the intercept bears none. `seed` draws nothing.
        data: Rows to train on and to score; missing is at the mean, with an indicator.

    Returns:
        One `Fitted` a variant, in their order.

    Raises:
        VariantError: A setting isn't known or out of range.
    """
    settings = [completed("logistic", variant, DEFAULTS) for variant in variants]
    for each in settings:
        require_above_zero("logistic", each, ("l2", "positive_weight"))
    if not settings:
        return []
    scaling = scaling_of(data.x_train)
    x = scaled(scaling, data.x_train).astype(np.float64)
    x = np.hstack([x, np.ones((len(x), 1))])

    fitted: dict[int, Fitted] = {}
    for places in alike(settings, FREE["logistic"]):
        started = time.perf_counter()
        sample_n = np.where(data.y_train, settings[places[0]]["positive_weight"], 1.0)
        on_path: dict[int, np.ndarray] = {-1: np.zeros(x.shape[1])}
        for at in range(max(_before(settings[place]["l2"]) for place in places) + 1):
            on_path[at] = _newton(x, data.y_train, sample_n, PATH[at], on_path[at - 1])
        path_s = (time.perf_counter() - started) / len(places)
        for place in places:
            started = time.perf_counter()
            l2 = settings[place]["l2"]
            w = _newton(x, data.y_train, sample_n, l2, on_path[_before(l2)])
            layer = (w[:-1, None].astype(np.float32), w[-1:, None].astype(np.float32))
            predict = partial(predict_layers, scaling, [layer])
            fitted[place] = Fitted(
                variant=dict(variants[place]),
                valid_scores=predict(data.x_valid),
                seconds=path_s + time.perf_counter() - started,
                predict=predict,
            )
    return [fitted[place] for place in range(len(settings))]


def _before(l2: float) -> int:
    """The last step of the path whose penalty is at least this; -1 for none."""
    return len([step for step in PATH if step >= l2]) - 1


def _newton(
    x: np.ndarray, y: np.ndarray, sample_n: np.ndarray, l2: float, start: np.ndarray
) -> np.ndarray:
    """Weights (p + 1,), the intercept last, by Newton's method with halved steps."""
    penalty = np.full(x.shape[1], l2)
    penalty[-1] = 0.0
    # A column of one value or two equal ones make the curvature singular at a small penalty.
    ridge = np.diag(penalty + 1e-9 * len(x))
    w, z = start, x @ start
    loss = _loss(z, y, sample_n, w, penalty)
    for _ in range(_MOST_STEPS):
        p = 0.5 * (1 + np.tanh(0.5 * z))
        gradient = x.T @ (sample_n * (p - y)) + penalty * w
        curvature = (x * (sample_n * p * (1 - p))[:, None]).T @ x + ridge
        step = np.linalg.solve(curvature, gradient)
        if gradient @ step < _TOLERANCE * len(x):
            break
        share = 1.0
        while share > 1e-4:
            new = w - share * step
            z = x @ new
            new_loss = _loss(z, y, sample_n, new, penalty)
            if new_loss <= loss:
                break
            share /= 2
        else:
            break
        w, loss = new, new_loss
    return w


def _loss(
    z: np.ndarray, y: np.ndarray, sample_n: np.ndarray, w: np.ndarray, penalty: np.ndarray
) -> float:
    return float(sample_n @ (np.logaddexp(0, z) - y * z) + 0.5 * penalty @ (w * w))
