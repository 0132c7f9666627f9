"""Greedy averages and calibration."""

import pickle

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from models import calibration, ensemble
from models.metrics import auc, log_loss


@pytest.fixture(scope="module")
def scored() -> tuple[np.ndarray, list[np.ndarray]]:
    draws = np.random.default_rng(2)
    truth = draws.standard_normal(4000)
    y = (draws.random(4000) < 1 / (1 + np.exp(1 - 2 * truth))).astype(np.int8)
    noisy = [truth + spread * draws.standard_normal(4000) for spread in (0.8, 0.9, 1.0, 6.0)]
    return y, [1 / (1 + np.exp(1 - each)) for each in noisy]


def test_an_average_of_independent_models_beats_each(
    scored: tuple[np.ndarray, list[np.ndarray]],
) -> None:
    y, scores = scored
    weights = ensemble.greedy(y[:2000], [each[:2000] for each in scores])
    assert sum(weights) == pytest.approx(1)
    assert all(weight > 0 for weight in weights[:3]) and weights[3] < 0.1
    together = ensemble.mean([each[2000:] for each in scores], weights)
    assert auc(y[2000:], together) > 0.01 + max(auc(y[2000:], each[2000:]) for each in scores)


def test_a_model_that_nothing_helps_stays_alone() -> None:
    y = np.array([0, 0, 1, 1] * 10, dtype=np.int8)
    perfect, bad = y * 0.8 + 0.1, np.linspace(0, 1, 40)
    assert ensemble.greedy(y, [perfect, bad]) == [1.0, 0.0]
    with pytest.raises(ensemble.EnsembleError, match="0 models"):
        ensemble.greedy(y, [])


def test_a_stack_is_what_scikit_learn_finds_and_beats_the_mean_where_scores_are_off(
    scored: tuple[np.ndarray, list[np.ndarray]],
) -> None:
    y, scores = scored
    weights, offset = ensemble.stacked(y, scores)
    z = np.column_stack([ensemble.log_odds(each) for each in scores])
    # Its penalty pulls to 0, not to the mean: little on so many rows.
    theirs = LogisticRegression(C=1.0, tol=1e-8, max_iter=1000).fit(z, y)
    assert min(weights) >= 0 and theirs.coef_[0].min() > -0.05
    np.testing.assert_allclose(weights, theirs.coef_[0].clip(0), atol=0.02)
    assert offset == pytest.approx(float(theirs.intercept_[0]), abs=0.02)
    # Squeezed towards one end, a model drowns in an average.
    squeezed = [scores[0], scores[1] * 1e-3, scores[2] * 1e-3]
    assert ensemble.stacking_helps(y, squeezed)
    assert not ensemble.stacking_helps(y, scores[:1])
    p = ensemble.stack(squeezed, *ensemble.stacked(y, squeezed))
    assert auc(y, p) > auc(y, ensemble.mean(squeezed, ensemble.greedy(y, squeezed)))
    bound = ensemble.Stack(models=(_double, _double), weights=(0.5, 0.2), offset=0.3)
    x = np.linspace(0, 0.5, 37, dtype=np.float32)[:, None]
    np.testing.assert_array_equal([bound(row[None])[0] for row in x], bound(x))


def _double(x: np.ndarray) -> np.ndarray:
    return x[:, 0].astype(np.float64) / 2


def _first(x: np.ndarray) -> np.ndarray:
    return x[:, 0].astype(np.float64)


def test_an_average_is_called_like_a_model_and_pickles() -> None:
    whole = ensemble.Average(models=(_double, _first), weights=(0.25, 0.75))
    x = np.linspace(0, 1, 7, dtype=np.float32)[:, None]
    np.testing.assert_allclose(pickle.loads(pickle.dumps(whole))(x), x[:, 0] * 0.875)
    calibrated = calibration.Calibrated(
        model=whole, calibration=calibration.Isotonic(scores=(0.0, 1.0), rates=(0.1, 0.3))
    )
    np.testing.assert_allclose(calibrated(x), 0.1 + 0.2 * whole(x))


@pytest.mark.parametrize("method", ["platt", "isotonic"])
def test_calibration_mends_scores_that_are_too_sure_and_keeps_the_ranking(
    scored: tuple[np.ndarray, list[np.ndarray]], method: str
) -> None:
    y, (p, *_) = scored
    sure = p**3
    fitted = calibration.fit(method, y[:2000], sure[:2000])
    after = fitted(sure[2000:])
    assert log_loss(y[2000:], after) < 0.9 * log_loss(y[2000:], sure[2000:])
    assert auc(y[2000:], after) == pytest.approx(auc(y[2000:], sure[2000:]), abs=1e-3)
    assert (np.diff(fitted(np.linspace(0, 1, 500))) >= 0).all()


def test_validation_chooses_none_where_scores_are_right_and_one_where_not() -> None:
    draws = np.random.default_rng(8)
    p = draws.beta(2, 5, size=5000)
    y = (draws.random(5000) < p).astype(np.int8)
    assert calibration.choose(y, p) in ("raw", "platt")
    assert log_loss(y, calibration.fit(calibration.choose(y, p), y, p)(p)) <= log_loss(y, p) + 1e-3
    stepped = np.where(p > 0.3, 0.9, 0.2) * 0.5 + p * 0.01
    assert calibration.choose(y, stepped) != "raw"


def test_rows_that_cannot_calibrate_are_told() -> None:
    y, p = np.zeros(20, dtype=np.int8), np.linspace(0, 1, 20)
    with pytest.raises(calibration.CalibrationError, match="both classes"):
        calibration.fit("platt", y, p)
    with pytest.raises(calibration.CalibrationError, match="20 rows of 0 and 0 of 1"):
        calibration.choose(y, p)
    with pytest.raises(calibration.CalibrationError, match="allowed: raw, platt, isotonic"):
        calibration.fit("beta", y, p)
