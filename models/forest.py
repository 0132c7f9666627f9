"""Random forests: variants that differ only in trees are one forest.

A forest draws each tree's seed in turn from its own, so the forest of 50 trees is the first 50
of one of 500. Missing values take the training median, on any device: scikit-learn's forests
take NaN, cuML's don't, and both should get the same rows.
"""

import copy
import time
from collections.abc import Callable, Sequence
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
    require_at_least,
)

DEFAULTS: dict[str, Any] = {
    "trees": 100,
    "depth": 12,
    "min_leaf": 1,
    "feature_share": 0.5,
    "seed": 0,
}


def sklearn_forest(
    *, trees: int, depth: int, min_leaf: int, feature_share: float, seed: int
) -> Any:
    """An untrained scikit-learn forest; what `fit_pack` makes if given no factory."""
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(
        n_estimators=trees,
        max_depth=depth,
        min_samples_leaf=min_leaf,
        max_features=feature_share,
        random_state=seed,
        n_jobs=1,
    )


def fit_pack(
    variants: Sequence[Variant],
    data: TrainingData,
    *,
    factory: Callable[..., Any] = sklearn_forest,
) -> list[Fitted]:
    """Trains each variant, equal to training it alone.

    Args:
        variants: Settings out of `DEFAULTS`.
        data: Rows to train on and to score.
        factory: Takes the settings by keyword and returns an object with scikit-learn's `fit`
            and `predict_proba`. Prefixes are taken where the trained object shows its trees as
            `estimators_`; where it doesn't, each size is trained alone.

    Returns:
        One `Fitted` a variant, in their order.

    Raises:
        VariantError: A setting isn't known or out of range.
    """
    settings = [completed("forest", variant, DEFAULTS) for variant in variants]
    for each in settings:
        require_at_least("forest", each, ("trees", "depth", "min_leaf"), 1)
    if not settings:
        return []
    medians_p = _medians(data.x_train)
    x_train = _imputed(data.x_train, medians_p)

    fitted: dict[int, Fitted] = {}
    for places in alike(settings, FREE["forest"]):
        started = time.perf_counter()
        sizes = sorted({settings[place]["trees"] for place in places})
        longest = factory(**{**settings[places[0]], "trees": sizes[-1]})
        longest.fit(x_train, data.y_train)
        forests = {sizes[-1]: longest}
        for size in sizes[:-1]:
            if hasattr(longest, "estimators_"):
                forests[size] = _prefix(longest, size)
            else:
                forests[size] = factory(**{**settings[places[0]], "trees": size})
                forests[size].fit(x_train, data.y_train)
        training_s = time.perf_counter() - started
        for place in places:
            started = time.perf_counter()
            predict = partial(_predict, forests[settings[place]["trees"]], medians_p)
            scores = predict(data.x_valid)
            fitted[place] = Fitted(
                variant=dict(variants[place]),
                valid_scores=scores,
                seconds=training_s / len(places) + time.perf_counter() - started,
                predict=predict,
            )
    return [fitted[place] for place in range(len(settings))]


def _prefix(forest: Any, trees: int) -> Any:
    """The forest's first trees; shared with it, not copied."""
    shorter = copy.copy(forest)
    shorter.estimators_ = forest.estimators_[:trees]
    shorter.n_estimators = trees
    return shorter


def _medians(x: np.ndarray) -> np.ndarray:
    """(p,) float32 medians of what is present; 0 for a column with nothing."""
    present = [column[~np.isnan(column)] for column in x.T]
    return np.array([np.median(c) if c.size else 0.0 for c in present], dtype=np.float32)


def _imputed(x: np.ndarray, medians_p: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(x), medians_p, x)


def _predict(forest: Any, medians_p: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.asarray(forest.predict_proba(_imputed(x, medians_p)), dtype=np.float64)[:, 1]
