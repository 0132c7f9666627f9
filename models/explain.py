"""Why a row has its score: what each feature adds to it, summing to the score.

    boosting    Shapley values by TreeSHAP (Lundberg and others 2020, Nature Machine
                Intelligence 2), exact, from xgboost's `pred_contribs`; log-odds
    forest      the same of the same trees, handed to xgboost; probability
    network,    integrated gradients (Sundararajan and others 2017) from the row of training means,
    logistic    the integral of their piecewise linear path taken exactly; where a column has a
                vector, the path is that of the vectors, and a column has what its vector adds;
                log-odds
    ensemble,   those of the models inside, each rescaled so that they sum to the model's share of
    calibrated  the score (the multiplier of DeepLIFT, Shrikumar and others 2017); probability, or
                log-odds where models are stacked or a calibration is a line in them

Contributions tell what the model does, not what would happen if a feature were changed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from models import boosting, calibration, ensemble, forest, network, network_inputs

LOG_ODDS, PROBABILITY = "log-odds", "probability"


class ExplainError(ValueError):
    """The model is of a kind that has no explanation here."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Contributions of n rows; `base_n + contributions_np.sum(axis=1)` is the score on `scale`.

    Attributes:
        base_n: (n,) float64, the score that the contributions start from.
        contributions_np: (n, p) float64, in the order of the encoder's columns.
        scale: "log-odds" (a sigmoid gives the score) or "probability".
    """

    base_n: np.ndarray
    contributions_np: np.ndarray
    scale: str

    def total_n(self) -> np.ndarray:
        """What they sum to, (n,) float64."""
        total: np.ndarray = self.base_n + self.contributions_np.sum(axis=1)
        return total

    def rescaled(self, by: Callable[[np.ndarray], np.ndarray], scale: str) -> "Explanation":
        """On another scale: each row's contributions times one number, so that they sum there."""
        base_n, total_n = self.base_n, self.total_n()
        gap_n = total_n - base_n
        # Where contributions cancel out, the slope there.
        near_n = np.abs(gap_n) < 1e-6
        left_n = np.where(near_n, base_n - 1e-6, base_n)
        right_n = np.where(near_n, base_n + 1e-6, total_n)
        slope_n = (by(right_n) - by(left_n)) / (right_n - left_n)
        return Explanation(
            base_n=by(base_n),
            contributions_np=self.contributions_np * slope_n[:, None],
            scale=scale,
        )

    def as_probability(self) -> "Explanation":
        """The same on the scale of the score itself."""
        return self if self.scale == PROBABILITY else self.rescaled(_sigmoid, PROBABILITY)


def explain(predict: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> Explanation:
    """What each feature adds to each row's score.

    Args:
        predict: `Scorer.predict`, of any family.
        x: (n, p) float32, NaN where missing, as `predict` takes it.

    Raises:
        ExplainError: The model is of another kind.
    """
    match predict:
        case calibration.Calibrated():
            return _calibrated(explain(predict.model, x), predict.calibration)
        case ensemble.Average():
            parts = [explain(model, x).as_probability() for model in predict.models]
            weighted = list(zip(parts, predict.weights, strict=True))
            return Explanation(
                base_n=np.sum([weight * part.base_n for part, weight in weighted], axis=0),
                contributions_np=np.sum(
                    [w * part.contributions_np for part, w in weighted], axis=0
                ),
                scale=PROBABILITY,
            )
        case ensemble.Stack():
            parts = [_as_log_odds(explain(model, x)) for model in predict.models]
            weighted = list(zip(parts, predict.weights, strict=True))
            return Explanation(
                base_n=predict.offset + np.sum([w * part.base_n for part, w in weighted], axis=0),
                contributions_np=np.sum(
                    [w * part.contributions_np for part, w in weighted], axis=0
                ),
                scale=LOG_ODDS,
            )
        case partial(func=boosting._predict | boosting._predict_on_device, args=(booster, rounds)):
            return _shap(booster, rounds, x, LOG_ODDS)
        case partial(func=forest._predict_binned, args=(trees, bins)):
            return _forest(trees, bins.codes(x), predict)
        case partial(func=forest._predict, args=(trees, medians_p)):
            return _forest(trees, np.where(np.isnan(x), medians_p, x), predict)
        case partial(func=network.predict_layers, args=(scaling, layers)):
            inputs_ni = network_inputs.scaled(scaling, x)
            # Being missing is its feature's doing.
            owners_i = np.concatenate([np.arange(x.shape[1]), scaling[2]])
            return _integrated(layers, inputs_ni, np.zeros(owners_i.size), owners_i, x.shape[1])
        case partial(func=network.predict_vectors, args=(vectors, layers)):
            owners_i = vectors.columns.owners_i()
            return _integrated(layers, vectors(x), vectors.base_i, owners_i, x.shape[1])
    raise _unexplained(predict)


def _unexplained(predict: Any) -> ExplainError:
    called = getattr(predict, "func", predict)
    what = getattr(called, "__name__", type(called).__name__)
    return ExplainError(
        f"no explanation for a model of {what}; explained are boosting, forest, "
        "network, logistic, ensembles and calibrated models of them"
    )


def reasons(
    contributions_p: np.ndarray,
    values: Mapping[str, Any],
    features: Sequence[Mapping[str, str]],
    *,
    count: int = 3,
) -> list[dict[str, Any]]:
    """The features that moved one row's score most, in words.

    Args:
        contributions_p: (p,) of the row.
        values: The row as it was sent, null where missing.
        features: "name", "description" and "unit" of each, in the order of the contributions.
        count: At most so many; features that moved nothing are left out.
    """
    found = []
    for at in np.argsort(-np.abs(contributions_p), kind="stable")[:count]:
        moved = float(contributions_p[at])
        if moved == 0:
            continue
        feature = features[at]
        value, unit = values[feature["name"]], feature["unit"]
        what = feature["description"] or feature["name"]
        said = "missing" if value is None else f"{_plain(value)} {unit}".strip()
        found.append(
            {
                "feature": feature["name"],
                "description": feature["description"],
                "unit": unit,
                "value": value,
                "contribution": moved,
                "text": f"{what}: {said}, which {'raises' if moved > 0 else 'lowers'} the score",
            }
        )
    return found


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _sigmoid(z: np.ndarray) -> np.ndarray:
    # tanh, because exp overflows on a far negative z.
    return np.asarray(0.5 * (1 + np.tanh(0.5 * z)))


def _as_log_odds(part: Explanation) -> Explanation:
    """On the scale of `ensemble.log_odds`, which has bounds."""
    if part.scale == PROBABILITY:
        return part.rescaled(ensemble.log_odds, LOG_ODDS)
    return part.rescaled(lambda z: ensemble.log_odds(_sigmoid(z)), LOG_ODDS)


def _calibrated(inner: Explanation, by: calibration.Calibration) -> Explanation:
    if isinstance(by, calibration.Raw):
        return inner
    if isinstance(by, calibration.Platt) and inner.scale == LOG_ODDS:
        return Explanation(
            base_n=by.slope * inner.base_n + by.offset,
            contributions_np=by.slope * inner.contributions_np,
            scale=LOG_ODDS,
        )
    if inner.scale == LOG_ODDS:
        return inner.rescaled(lambda z: by(_sigmoid(z)), PROBABILITY)
    return inner.rescaled(by, PROBABILITY)


def _shap(booster: Any, rounds: int, x: np.ndarray, scale: str) -> Explanation:
    import xgboost

    both = booster.predict(
        xgboost.DMatrix(x, nthread=1),
        pred_contribs=True,
        iteration_range=(0, rounds),
        # Else it may give a row one more axis.
        strict_shape=True,
    ).astype(np.float64)[:, 0, :]
    return Explanation(base_n=both[:, -1], contributions_np=both[:, :-1], scale=scale)


def _forest(trees: Any, inputs: np.ndarray, predict: Any) -> Explanation:
    if not hasattr(trees, "estimators_"):
        raise _unexplained(predict)
    rounds = len(trees.estimators_)
    return _shap(_as_booster(trees), rounds, inputs.astype(np.float32), PROBABILITY)


def _as_booster(trees: Any) -> Any:
    """scikit-learn's trees as a booster that sums to their mean probability, in float32."""
    import xgboost

    features = int(trees.n_features_in_)
    made = [
        _as_tree(tree.tree_, at, len(trees.estimators_))
        for at, tree in enumerate(trees.estimators_)
    ]
    model = {
        "learner": {
            "attributes": {},
            "feature_names": [],
            "feature_types": [],
            "gradient_booster": {
                "model": {
                    "cats": {"enc": [], "feature_segments": [], "sorted_idx": []},
                    "gbtree_model_param": {
                        "num_parallel_tree": "1",
                        "num_trees": str(len(made)),
                    },
                    "iteration_indptr": list(range(len(made) + 1)),
                    "tree_info": [0] * len(made),
                    "trees": [{**tree, "tree_param": _shape(tree, features)} for tree in made],
                },
                "name": "gbtree",
            },
            "learner_model_param": {
                "base_score": "[0E0]",
                "boost_from_average": "0",
                "num_class": "0",
                "num_feature": str(features),
                "num_target": "1",
            },
            "objective": {
                "name": "reg:squarederror",
                "reg_loss_param": {"scale_pos_weight": "1"},
            },
        },
        "version": [3, 2, 0],
    }
    booster = xgboost.Booster({"nthread": 1})
    booster.load_model(bytearray(json.dumps(model).encode()))
    return booster


def _shape(tree: Mapping[str, Any], features: int) -> dict[str, str]:
    return {
        "num_deleted": "0",
        "num_feature": str(features),
        "num_nodes": str(len(tree["left_children"])),
        "size_leaf_vector": "1",
    }


def _as_tree(tree: Any, place: int, trees: int) -> dict[str, Any]:
    # xgboost takes a right child to be the node after its left one.
    order, at = [0], 0
    while at < len(order):
        node = order[at]
        if tree.children_left[node] >= 0:
            order += [tree.children_left[node], tree.children_right[node]]
        at += 1
    nodes = len(order)
    inner = tree.children_left[order] >= 0
    left = np.full(nodes, -1)
    left[inner] = 1 + 2 * np.arange(inner.sum())
    parents = np.full(nodes, 2**31 - 1)
    parents[1:] = np.repeat(np.flatnonzero(inner), 2)
    # scikit-learn stores shares or weights of the classes, by version.
    classes_n2 = tree.value[order, 0, :]
    leaf = classes_n2[:, 1] / classes_n2.sum(axis=1) / trees
    # Left is "at most" there and "below" here: the least float32 past the threshold.
    threshold = tree.threshold[order]
    near = threshold.astype(np.float32)
    below = np.where(near > threshold, near, np.nextafter(near, np.float32(np.inf)))
    return {
        "base_weights": [0.0] * nodes,
        "categories": [],
        "categories_nodes": [],
        "categories_segments": [],
        "categories_sizes": [],
        "default_left": [0] * nodes,
        "id": place,
        "left_children": left.tolist(),
        "right_children": np.where(inner, left + 1, -1).tolist(),
        "loss_changes": [0.0] * nodes,
        "parents": parents.tolist(),
        "split_conditions": np.where(inner, below, leaf).tolist(),
        "split_indices": np.where(inner, tree.feature[order], 0).tolist(),
        "split_type": [0] * nodes,
        "sum_hessian": tree.weighted_n_node_samples[order].tolist(),
    }


def _integrated(
    layers: Sequence[tuple[np.ndarray, np.ndarray]],
    inputs_ni: np.ndarray,
    base_i: np.ndarray,
    owners_i: np.ndarray,
    features: int,
) -> Explanation:
    """Integrated gradients of the margin from the base; a feature has those of its inputs."""
    wide = [(w_io.astype(np.float64), b_1o.astype(np.float64)) for w_io, b_1o in layers]
    w_io, b_1o = wide[0]
    wide[0] = w_io, b_1o + base_i.astype(np.float64) @ w_io
    moved_ni = inputs_ni.astype(np.float64) - base_i
    base = float(_margin(wide, np.zeros((1, base_i.size)))[0])
    added_ni = np.stack([_along(wide, moved_i) for moved_i in moved_ni])
    contributions_np = np.zeros((len(inputs_ni), features))
    np.add.at(contributions_np.T, owners_i, added_ni.T)
    return Explanation(
        base_n=np.full(len(inputs_ni), base), contributions_np=contributions_np, scale=LOG_ODDS
    )


def _margin(layers: Sequence[tuple[np.ndarray, np.ndarray]], h: np.ndarray) -> np.ndarray:
    for at, (w_io, b_1o) in enumerate(layers):
        h = (h if at == 0 else np.maximum(h, 0)) @ w_io + b_1o
    margin: np.ndarray = h[:, 0]
    return margin


def _along(layers: Sequence[tuple[np.ndarray, np.ndarray]], input_i: np.ndarray) -> np.ndarray:
    """Each input's part of the margin's change on the straight way from 0 to the input, (I,)."""
    # Between kinks, where a unit turns on or off, the margin is linear: one gradient is exact.
    kinks_k = np.array([0.0, 1.0])
    for depth in range(1, len(layers)):
        h_ko = kinks_k[:, None] * input_i
        for at, (w_io, b_1o) in enumerate(layers[:depth]):
            h_ko = (h_ko if at == 0 else np.maximum(h_ko, 0)) @ w_io + b_1o
        before_ko, after_ko = h_ko[:-1], h_ko[1:]
        k, o = np.nonzero(before_ko * after_ko < 0)
        start, end = before_ko[k, o], after_ko[k, o]
        turned = kinks_k[k] + (kinks_k[k + 1] - kinks_k[k]) * start / (start - end)
        kinks_k = np.union1d(kinks_k, turned)
    middles_k = (kinks_k[:-1] + kinks_k[1:]) / 2
    gradients_ki = _gradients(layers, middles_k[:, None] * input_i)
    return np.asarray((np.diff(kinks_k) @ gradients_ki) * input_i)


def _gradients(layers: Sequence[tuple[np.ndarray, np.ndarray]], inputs: np.ndarray) -> np.ndarray:
    """The margin's gradient at each row of inputs, (k, I)."""
    on = []
    h = inputs
    for w_io, b_1o in layers[:-1]:
        h = h @ w_io + b_1o
        on.append(h > 0)
        h = np.maximum(h, 0)
    gradient = np.broadcast_to(layers[-1][0][:, 0], (len(inputs), layers[-1][0].shape[0]))
    for (w_io, _), on_ko in zip(reversed(layers[:-1]), reversed(on), strict=True):
        gradient = (gradient * on_ko) @ w_io.T
    return np.asarray(gradient)
