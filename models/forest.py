"""Random forests: variants that differ only in trees are one forest.

A forest draws each tree's seed in turn from its own, so the forest of 50 trees is the first 50
of one of 500. Missing values take the training median, on any device: scikit-learn's forests
take NaN, cuML's don't, and both should get the same rows. Trees are grown on the codes of at most
`BINS` bins a feature: a sort of few distinct values takes a third of the time.
"""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from models.families import (
    FREE,
    Fitted,
    TrainingData,
    Variant,
    alike,
    completed,
    require_above_zero,
    require_at_least,
)

DEFAULTS: dict[str, Any] = {
    "trees": 100,
    "depth": 12,
    "min_leaf": 1,
    "feature_share": 0.5,
    "positive_weight": 1.0,
    "seed": 0,
}

BINS = 64


@dataclass(frozen=True, kw_only=True)
class Bins:
    """How rows become codes.

    Attributes:
        medians_p: (p,) float32, for what is missing.
        edges: A feature's upper bounds of its bins but the last, ascending float32.
    """

    medians_p: np.ndarray
    edges: tuple[np.ndarray, ...]

    def codes(self, x: np.ndarray) -> np.ndarray:
        """(n, p) float32, NaN where missing, to (n, p) float32 of whole numbers from 0."""
        filled = np.where(np.isnan(x), self.medians_p, x)
        codes = np.empty_like(filled)
        for at, edges in enumerate(self.edges):
            codes[:, at] = np.searchsorted(edges, filled[:, at])
        return codes


# Bins and the training rows' codes once a process, by the data itself.
_BINNED: "WeakKeyDictionary[TrainingData, tuple[Bins, np.ndarray, np.ndarray]]" = (
    WeakKeyDictionary()
)


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
        require_above_zero("forest", each, ("positive_weight",))
    if not settings:
        return []
    bins, x_train, x_valid = binned(data)

    fitted: dict[int, Fitted] = {}
    for places in alike(settings, FREE["forest"]):
        started = time.perf_counter()
        shared = {name: v for name, v in settings[places[0]].items() if name != "positive_weight"}
        weight = settings[places[0]]["positive_weight"]
        # A forest of its own signature may take no weights; none are needed where all are 1.
        weights = {} if weight == 1 else {"sample_weight": np.where(data.y_train, weight, 1.0)}
        sizes = sorted({settings[place]["trees"] for place in places})
        longest = factory(**{**shared, "trees": sizes[-1]})
        longest.fit(x_train, data.y_train, **weights)
        forests = {sizes[-1]: longest}
        for size in sizes[:-1]:
            if hasattr(longest, "estimators_"):
                forests[size] = _prefix(longest, size)
            else:
                forests[size] = factory(**{**shared, "trees": size})
                forests[size].fit(x_train, data.y_train, **weights)
        scores = _scores(forests, x_valid)
        each_s = (time.perf_counter() - started) / len(places)
        for place in places:
            trees = settings[place]["trees"]
            fitted[place] = Fitted(
                variant=dict(variants[place]),
                valid_scores=scores[trees],
                seconds=each_s,
                predict=partial(_predict_binned, forests[trees], bins),
            )
    return [fitted[place] for place in range(len(settings))]


def _prefix(forest: Any, trees: int) -> Any:
    """The forest's first trees; shared with it, not copied."""
    shorter = copy.copy(forest)
    shorter.estimators_ = forest.estimators_[:trees]
    shorter.n_estimators = trees
    return shorter


def _scores(forests: dict[int, Any], x: np.ndarray) -> dict[int, np.ndarray]:
    """Each size's scores of coded rows; with trees to show, each tree is asked once."""
    longest = forests[max(forests)]
    if not hasattr(longest, "estimators_"):
        return {size: _probability(forest, x) for size, forest in forests.items()}
    scores, total_n2 = {}, np.zeros((len(x), 2))
    for count, tree in enumerate(longest.estimators_, start=1):
        # The sum that the forest itself makes, in its order.
        total_n2 += tree.predict_proba(x, check_input=False)
        if count in forests:
            scores[count] = (total_n2 / count)[:, 1]
    return scores


def binned(data: TrainingData) -> tuple[Bins, np.ndarray, np.ndarray]:
    """The bins of the training rows, and the codes of training and validation rows."""
    if data not in _BINNED:
        present = [column[~np.isnan(column)] for column in data.x_train.T]
        medians = [np.median(c) if c.size else 0.0 for c in present]
        bins = Bins(
            medians_p=np.array(medians, dtype=np.float32),
            edges=tuple(_edges(c) for c in present),
        )
        _BINNED[data] = bins, bins.codes(data.x_train), bins.codes(data.x_valid)
    return _BINNED[data]


def _edges(column: np.ndarray) -> np.ndarray:
    """Between distinct values where they are few, else at quantiles."""
    distinct = np.unique(column)
    if distinct.size <= BINS:
        edges: np.ndarray = (distinct[1:] + distinct[:-1]) / 2
        return edges
    return np.unique(np.quantile(column, np.linspace(0, 1, BINS + 1)[1:-1], method="lower"))


def _probability(forest: Any, x: np.ndarray) -> np.ndarray:
    return np.asarray(forest.predict_proba(x), dtype=np.float64)[:, 1]


def _predict_binned(forest: Any, bins: Bins, x: np.ndarray) -> np.ndarray:
    return _probability(forest, bins.codes(x))


def _predict(forest: Any, medians_p: np.ndarray, x: np.ndarray) -> np.ndarray:
    # Forests that were registered before features were binned are pickled with it.
    return _probability(forest, np.where(np.isnan(x), medians_p, x))
