"""The regularisation path against plain scikit-learn, and against each variant alone."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from models import boosting, forest, logistic, network, network_inputs
from models.families import TrainingData, VariantError
from models.metrics import auc


@pytest.fixture(scope="module")
def data() -> TrainingData:
    draws = np.random.default_rng(3)
    x = draws.standard_normal((1500, 6)).astype(np.float32)
    y = (draws.random(1500) < 1 / (1 + np.exp(1.5 - 2 * x[:, 0] + x[:, 1]))).astype(np.int8)
    x[draws.random(x.shape) < 0.1] = np.nan
    return TrainingData(x_train=x[:1000], y_train=y[:1000], x_valid=x[1000:], y_valid=y[1000:])


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_each_step_is_what_scikit_learn_finds(data: TrainingData, weight: float) -> None:
    penalties = (0.5, 20.0, 3000.0)
    packed = logistic.fit_pack([{"l2": l2, "positive_weight": weight} for l2 in penalties], data)
    scaling = network_inputs.scaling_of(data.x_train)
    x_train, x_valid = (network_inputs.scaled(scaling, x) for x in (data.x_train, data.x_valid))
    for l2, ours in zip(penalties, packed, strict=True):
        theirs = LogisticRegression(C=1 / l2, tol=1e-10, max_iter=1000, class_weight={1: weight})
        theirs.fit(x_train.astype(float), data.y_train)
        expected = theirs.predict_proba(x_valid.astype(float))[:, 1]
        np.testing.assert_allclose(ours.valid_scores, expected, atol=1e-4)


def test_a_variant_is_the_same_to_the_bit_whatever_its_pack(data: TrainingData) -> None:
    variants = [{"l2": l2} for l2 in (7.0, 0.01, 300.0, 1e9)]
    for variant, packed in zip(variants, logistic.fit_pack(variants, data), strict=True):
        (alone,) = logistic.fit_pack([variant], data)
        np.testing.assert_array_equal(packed.valid_scores, alone.valid_scores)


def test_a_constant_column_and_classes_that_part_cleanly_are_fitted() -> None:
    x = np.ones((200, 2), dtype=np.float32)
    x[:, 0] = np.arange(200)
    y = (np.arange(200) >= 100).astype(np.int8)
    whole = TrainingData(x_train=x, y_train=y, x_valid=x, y_valid=y)
    (fitted,) = logistic.fit_pack([{"l2": 1e-4}], whole)
    assert auc(y, fitted.valid_scores) == 1


def test_a_penalty_of_nothing_is_refused(data: TrainingData) -> None:
    with pytest.raises(VariantError, match="'l2' of 'logistic' is 0; give a number above 0"):
        logistic.fit_pack([{"l2": 0}], data)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (boosting, {"rounds": 20}),
        (forest, {"trees": 20}),
        (network, {"epochs": 3}),
        (logistic, {}),
    ],
)
def test_a_weight_on_the_positives_raises_their_scores(
    data: TrainingData, family: object, settings: dict[str, int]
) -> None:
    plain, weighted = (
        family.fit_pack([{**settings, "positive_weight": weight}], data)[0]  # type: ignore[attr-defined]
        for weight in (1.0, 5.0)
    )
    assert weighted.valid_scores.mean() > 1.3 * plain.valid_scores.mean()
    assert auc(data.y_valid, weighted.valid_scores) > 0.75
