"""Contributions sum to the score, and are Shapley values where they are said to be."""

import itertools
import math
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import calibration, ensemble, explain, network_inputs
from models.families import FAMILIES, TrainingData

VARIANTS: dict[str, dict[str, object]] = {
    "boosting": {"rounds": 12, "depth": 3},
    "forest": {"trees": 7, "depth": 4, "positive_weight": 3.0},
    "network": {"width": 8, "depth": 3, "epochs": 4},
    "logistic": {},
}
KINDS = (
    *VARIANTS,
    "vectors",
    "stack",
    "ensemble",
    "platt",
    "platt of forest",
    "isotonic",
    "isotonic of forest",
)


def draw_x(rows: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = random.normal(size=(rows, 5)).astype(np.float32)
    x[:, 3] = random.integers(0, 3, rows)
    x[random.random(x.shape) < 0.1] = np.nan
    x[:, 4] = random.normal(size=rows)
    return x


def data() -> TrainingData:
    x = draw_x(500, 1)
    filled = np.nan_to_num(x)
    y = (filled[:, 0] * filled[:, 1] + filled[:, 3] > 0.7).astype(np.int8)
    return TrainingData(
        x_train=x[:400],
        y_train=y[:400],
        x_valid=x[400:],
        y_valid=y[400:],
        categories=(0, 0, 0, 3, 0),
    )


@cache
def model(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    if kind in VARIANTS:
        (fitted,) = FAMILIES[kind]([{"family": kind, **VARIANTS[kind]}], data())
        return fitted.predict
    if kind == "vectors":
        of_columns = {"category_size": 2, "number_size": 3, "frequencies": 4}
        (fitted,) = FAMILIES["network"]([{**VARIANTS["network"], **of_columns}], data())
        return fitted.predict
    if kind == "stack":
        models = (model("boosting"), model("forest"), model("network"))
        return ensemble.Stack(models=models, weights=(0.5, 0.9, 0.2), offset=-0.1)
    if kind == "ensemble":
        models = (model("boosting"), model("forest"), model("network"))
        return ensemble.Average(models=models, weights=(0.5, 0.3, 0.2))
    method, _, of = kind.partition(" of ")
    inner = model(of or "boosting")
    fit = calibration.fit(method, data().y_valid, inner(data().x_valid))
    return calibration.Calibrated(model=inner, calibration=fit)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 10_000), far=st.sampled_from([1, 30]))
@settings(max_examples=15, deadline=None)
def test_contributions_sum_to_the_score(kind: str, seed: int, far: int) -> None:
    x = draw_x(6, seed) * np.float32(far)
    x[0] = np.nan
    found = explain.explain(model(kind), x)
    assert found.contributions_np.shape == x.shape
    total = found.total_n()
    if found.scale == explain.LOG_ODDS:
        total = 0.5 * (1 + np.tanh(0.5 * total))
    np.testing.assert_allclose(total, model(kind)(x), atol=2e-6)
    again = found.as_probability()
    assert again.scale == explain.PROBABILITY
    np.testing.assert_allclose(again.total_n(), model(kind)(x), atol=2e-6)


def test_a_forest_gets_the_shapley_values_of_its_trees() -> None:
    predict = model("forest")
    assert isinstance(predict, partial)
    forest, bins = predict.args
    x = draw_x(4, 3)
    found = explain.explain(predict, x)
    codes = bins.codes(x)
    for row in range(len(x)):
        values = {
            known: sum(_expected(tree.tree_, codes[row], known) for tree in forest.estimators_)
            / len(forest.estimators_)
            for size in range(6)
            for known in itertools.combinations(range(5), size)
        }
        for feature in range(5):
            shapley = 0.0
            others = [other for other in range(5) if other != feature]
            for size in range(5):
                weight = math.factorial(size) * math.factorial(4 - size) / math.factorial(5)
                for known in itertools.combinations(others, size):
                    more = tuple(sorted((*known, feature)))
                    shapley += weight * (values[more] - values[known])
            assert found.contributions_np[row, feature] == pytest.approx(shapley, abs=1e-5)


def _expected(tree: object, codes: np.ndarray, known: tuple[int, ...], node: int = 0) -> float:
    """The tree's mean over what isn't known, by the training weight on each way."""
    left, right = tree.children_left[node], tree.children_right[node]
    if left < 0:
        return float(tree.value[node, 0, 1] / tree.value[node, 0].sum())
    feature = tree.feature[node]
    if feature in known:
        way = left if codes[feature] <= tree.threshold[node] else right
        return _expected(tree, codes, known, way)
    weight = tree.weighted_n_node_samples
    return float(
        weight[left] * _expected(tree, codes, known, left)
        + weight[right] * _expected(tree, codes, known, right)
    ) / float(weight[node])


@pytest.mark.parametrize("kind", ["network", "vectors"])
def test_integrated_gradients_are_the_integral(kind: str) -> None:
    predict = model(kind)
    assert isinstance(predict, partial)
    before, layers = predict.args
    x = draw_x(3, 5)
    if kind == "network":
        inputs = network_inputs.scaled(before, x).astype(np.float64)
        base, owners = np.zeros(inputs.shape[1]), [*range(5), *before[2]]
    else:
        inputs, base = before(x).astype(np.float64), before.base_i.astype(np.float64)
        # Four numbers of three each, their gaps, and the category's two.
        owners = [*np.repeat([0, 1, 2, 4], 3), 0, 1, 2, 3, 3]
    wide = [(w.astype(np.float64), b.astype(np.float64)) for w, b in layers]
    steps = (np.arange(20_000) + 0.5) / 20_000
    for at, input_i in enumerate(inputs):
        h, on = base + steps[:, None] * (input_i - base), []
        for w_io, b_1o in wide[:-1]:
            h = h @ w_io + b_1o
            on.append(h > 0)
            h = np.maximum(h, 0)
        gradient = np.tile(wide[-1][0][:, 0], (len(steps), 1))
        for (w_io, _), lit in zip(reversed(wide[:-1]), reversed(on), strict=True):
            gradient = (gradient * lit) @ w_io.T
        expected = gradient.mean(axis=0) * (input_i - base)
        found = explain.explain(predict, x[at : at + 1]).contributions_np[0]
        whole = np.bincount(owners, expected, minlength=5)
        np.testing.assert_allclose(found, whole, atol=1e-3)


def test_reasons_are_the_largest_in_words() -> None:
    features = [
        {"name": "visits_90d", "description": "Visits in 90 days", "unit": "visits"},
        {"name": "spend", "description": "", "unit": "USD"},
        {"name": "segment", "description": "Segment", "unit": ""},
        {"name": "idle", "description": "", "unit": ""},
    ]
    row = {"visits_90d": 3.0, "spend": None, "segment": "gold", "idle": 1}
    found = explain.reasons(np.array([0.2, -0.5, 0.1, 0.0]), row, features, count=9)
    assert [(reason["feature"], reason["contribution"]) for reason in found] == [
        ("spend", -0.5),
        ("visits_90d", 0.2),
        ("segment", 0.1),
    ]
    assert [reason["text"] for reason in found] == [
        "spend: missing, which lowers the score",
        "Visits in 90 days: 3 visits, which raises the score",
        "Segment: gold, which raises the score",
    ]


def test_another_kind_of_model_is_told() -> None:
    with pytest.raises(explain.ExplainError, match="no explanation for a model of <lambda>"):
        explain.explain(lambda x: x[:, 0], draw_x(1, 1))
