"""Permutation importance: the AUC lost when one feature's values are shuffled among the rows.

L. Breiman, Random Forests, Machine Learning 45 (2001), section 10; it needs nothing of the model
but its scores, so that families compare.
"""

from collections.abc import Callable

import numpy as np

from models.metrics import auc


def permutation(
    predict: Callable[[np.ndarray], np.ndarray],
    x: np.ndarray,
    y: np.ndarray,
    *,
    seed: int,
    rows: int = 2_000,
) -> np.ndarray:
    """The AUC lost, by feature.

    Args:
        predict: (n, p) float32 to (n,) scores.
        x: (n, p) float32, rows that weren't trained on.
        y: (n,) 0 or 1, both present.
        seed: Of the rows and the shuffles.
        rows: At most so many rows are used.

    Returns:
        (p,) float64; negative where the shuffled feature scored better.

    Raises:
        MetricError: The rows used have one class only.
    """
    random = np.random.default_rng(seed)
    chosen = np.sort(random.permutation(y.size)[:rows])
    x, y = x[chosen], y[chosen]
    whole = auc(y, predict(x))
    lost_p = np.empty(x.shape[1])
    for feature in range(x.shape[1]):
        shuffled = x.copy()
        shuffled[:, feature] = x[random.permutation(y.size), feature]
        lost_p[feature] = whole - auc(y, predict(shuffled))
    return lost_p
