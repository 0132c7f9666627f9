"""Estimators: the CPU's here, both where there is a GPU."""

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score, roc_auc_score

from cluster import estimators
from cluster.device import Device, choose
from models.forest import DEFAULTS, sklearn_forest

DEVICES = [
    pytest.param("cpu", id="cpu"),
    pytest.param("cuda", id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Device:
    if request.param == "cuda" and choose("auto").kind != "cuda":
        pytest.skip(f"needs CUDA: {choose('auto').reason}")
    return choose(request.param)


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    """(2000, 5) float32 and (2000,) int32, a known linear rule with noise."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(2000, 5)).astype(np.float32)
    log_odds = 2 * x[:, 0] - x[:, 1] + 0.5
    y = (rng.random(2000) < 1 / (1 + np.exp(-log_odds))).astype(np.int32)
    return x, y


def test_the_forest_is_the_factory_of_the_forest_family(device: Device) -> None:
    # A class's weight goes to `fit`, by row.
    settings = {name: value for name, value in DEFAULTS.items() if name != "positive_weight"}
    made = estimators.forest(device, **settings)
    if device.kind == "cpu":
        assert made.get_params() == sklearn_forest(**settings).get_params()
    assert made.get_params()["max_depth"] == DEFAULTS["depth"]


def test_a_forest_ranks_and_repeats(device: Device, rows: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = rows
    settings = {"trees": 40, "depth": 6, "min_leaf": 5, "feature_share": 1}
    first, second, other = (
        estimators.forest(device, **settings, seed=seed).fit(x[:1000], y[:1000]).predict_proba(x)
        for seed in (1, 1, 2)
    )
    assert first.shape == (2000, 2)
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, other)
    # The rule's own AUC on these rows is 0.870.
    assert roc_auc_score(y[1000:], first[1000:, 1]) > 0.84


def test_kmeans_finds_clusters_that_are_there(device: Device) -> None:
    rng = np.random.default_rng(5)
    centers = np.array([[0, 0], [8, 0], [0, 8]], dtype=np.float32)
    truth = np.repeat([0, 1, 2], 300)
    x = (centers[truth] + rng.normal(size=(900, 2))).astype(np.float32)
    fitted = estimators.kmeans(device, clusters=3, seed=1, restarts=3).fit(x)
    assert adjusted_rand_score(truth, fitted.predict(x)) > 0.99
    found = fitted.cluster_centers_[np.argsort(fitted.cluster_centers_.sum(axis=1))]
    np.testing.assert_allclose(found[0], [0, 0], atol=0.3)
    assert fitted.inertia_ == pytest.approx(2 * 900, rel=0.15)


def blobs(outliers: int) -> tuple[np.ndarray, np.ndarray]:
    """(900 + outliers, 2) float32 and their groups, -1 for an outlier; none is near another."""
    rng = np.random.default_rng(6)
    centers = np.array([[0, 0], [8, 0], [0, 8]], dtype=np.float32)
    truth = np.repeat([0, 1, 2], 300)
    x = centers[truth] + rng.normal(size=(900, 2))
    far = 30 * np.arange(1, outliers + 1)[:, None] * np.ones(2)
    return np.concatenate([x, far]).astype(np.float32), np.append(truth, [-1] * outliers)


def test_hdbscan_finds_groups_that_are_there_and_leaves_outliers(device: Device) -> None:
    x, truth = blobs(outliers=4)
    found = estimators.hdbscan(device, least=40).fit(x).labels_
    assert (found[truth == -1] == -1).all()
    kept = found >= 0
    assert kept.mean() > 0.9
    assert adjusted_rand_score(truth[kept], found[kept]) > 0.99


@pytest.mark.gpu
@pytest.mark.parametrize("least", [5, 40])
def test_hdbscan_groups_on_a_gpu_as_on_the_cpu(least: int) -> None:
    if choose("auto").kind != "cuda":
        pytest.skip(f"needs CUDA: {choose('auto').reason}")
    x, _ = blobs(outliers=4)
    ours, theirs = (
        estimators.hdbscan(choose(kind), least=least).fit(x).labels_ for kind in ("cuda", "cpu")
    )
    assert isinstance(ours, np.ndarray)
    # Few rows at an edge may differ, where distances in float32 tie.
    assert adjusted_rand_score(theirs, ours) > 0.98


@pytest.mark.parametrize("strength", [0.1, 50.0])
def test_logistic_minimises_the_stated_loss(
    device: Device, strength: float, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    x, y = rows
    fitted = estimators.logistic(device, strength=strength).fit(x, y)
    coefficients = np.asarray(fitted.coef_, dtype=np.float64).ravel()
    error = np.asarray(fitted.predict_proba(x), dtype=np.float64)[:, 1] - y
    # At the minimum the gradient is 0; its terms are some hundreds large.
    gradient = x.T.astype(np.float64) @ error + strength * coefficients
    assert np.abs(gradient).max() < 2
    assert abs(error.sum()) < 2
