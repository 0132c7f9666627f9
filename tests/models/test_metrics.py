import numpy as np
import polars as pl
import pytest
import sklearn.calibration
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st

from models import metrics
from models.encoding import Encoder, EncodingError


@st.composite
def targets_and_scores(draw):
    n = draw(st.integers(2, 60))
    y = draw(st.lists(st.integers(0, 1), min_size=n, max_size=n).filter(lambda v: 0 < sum(v) < n))
    # A coarse grid, so that ties are common.
    grid = draw(st.sampled_from([3, 20, 10_000]))
    p = draw(st.lists(st.integers(0, grid), min_size=n, max_size=n))
    return np.array(y, dtype=np.int8), np.array(p) / grid


@settings(deadline=None, max_examples=200)
@given(targets_and_scores())
def test_metrics_equal_scikit_learn(case):
    y, p = case
    found = metrics.evaluate(y, p)
    assert found["auc"] == pytest.approx(sklearn.metrics.roc_auc_score(y, p))
    assert found["average_precision"] == pytest.approx(
        sklearn.metrics.average_precision_score(y, p)
    )
    assert found["log_loss"] == pytest.approx(sklearn.metrics.log_loss(y, p))
    assert found["brier"] == pytest.approx(sklearn.metrics.brier_score_loss(y, p))


@settings(deadline=None, max_examples=50)
@given(targets_and_scores(), st.randoms(use_true_random=False))
def test_row_order_does_not_matter(case, random):
    y, p = case
    order = list(range(y.size))
    random.shuffle(order)
    assert metrics.evaluate(y[order], p[order]) == pytest.approx(metrics.evaluate(y, p))
    for one, other in zip(
        metrics.calibration_curve(y[order], p[order]), metrics.calibration_curve(y, p), strict=True
    ):
        np.testing.assert_allclose(one, other)


def test_calibration_curve_equals_scikit_learn_on_distinct_scores():
    draws = np.random.default_rng(3)
    p = draws.permutation(1000) / 1000
    y = (draws.random(1000) < p).astype(np.int8)
    mean, rate, count = metrics.calibration_curve(y, p, bins=10)
    rate_sk, mean_sk = sklearn.calibration.calibration_curve(y, p, n_bins=10, strategy="quantile")
    np.testing.assert_allclose(mean, mean_sk)
    np.testing.assert_allclose(rate, rate_sk)
    assert count.tolist() == [100] * 10


def test_top_decile_lift():
    y = np.array([1, 1] + [0] * 18)
    assert metrics.top_decile_lift(y, np.linspace(1, 0, 20)) == pytest.approx(10)
    assert metrics.top_decile_lift(y, np.zeros(20)) == pytest.approx(1)
    # The best two of three tied rows, of which two are 1.
    tied = np.array([0.9, 0.9, 0.9] + [0.1] * 17)
    assert metrics.top_decile_lift(y, tied) == pytest.approx(2 / 3 / 0.1)


@pytest.mark.parametrize("target", [0, 1])
def test_one_class_is_refused_for_auc(target):
    with pytest.raises(metrics.MetricError, match=f"both classes, but all 5 targets are {target}"):
        metrics.auc(np.full(5, target), np.linspace(0, 1, 5))


def test_malformed_inputs_are_refused():
    with pytest.raises(metrics.MetricError, match="same length"):
        metrics.auc(np.array([0, 1]), np.array([0.5]))
    with pytest.raises(metrics.MetricError, match="only 0 and 1"):
        metrics.auc(np.array([0, 2]), np.array([0.5, 0.1]))
    with pytest.raises(metrics.MetricError, match="1 values that aren't finite"):
        metrics.auc(np.array([0, 1]), np.array([0.5, np.nan]))
    with pytest.raises(metrics.MetricError, match="sigmoid"):
        metrics.brier(np.array([0, 1]), np.array([0.5, 2.0]))
    with pytest.raises(metrics.MetricError, match="needs a target of 1"):
        metrics.top_decile_lift(np.array([0, 0]), np.array([0.5, 0.2]))


FRAME = pl.DataFrame(
    {
        "spend": [1.5, None, 3.0],
        "visits": [1, 2, 3],
        "channel": ["web", "app", None],
        "member": [True, None, False],
    }
)


def test_encoder_codes_each_kind_and_survives_json():
    encoder = Encoder.fit(FRAME, ["channel", "spend", "member", "visits"])
    assert encoder.feature_names == ("channel", "spend", "member", "visits")
    nan = np.nan
    x = encoder.transform(FRAME)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, [[1, 1.5, 1, 1], [0, nan, nan, 2], [nan, 3, 0, 3]])

    stored = Encoder.from_json(encoder.to_json())
    assert stored == encoder
    unseen = FRAME.with_columns(channel=pl.Series(["web", "post", "app"]), spend=None)
    np.testing.assert_array_equal(stored.transform(unseen)[:, 0], [1, nan, 0])
    assert np.isnan(stored.transform(unseen)[:, 1]).all()


def test_encoder_refusals_name_the_column():
    with pytest.raises(EncodingError, match="'chanel': did you mean 'channel'"):
        Encoder.fit(FRAME, ["chanel"])
    with pytest.raises(EncodingError, match="column 'day' has type Date"):
        Encoder.fit(pl.DataFrame({"day": [None]}, schema={"day": pl.Date}), ["day"])
    encoder = Encoder.fit(FRAME, ["visits"])
    with pytest.raises(EncodingError, match="'visits' has type String, but was a number"):
        encoder.transform(FRAME.with_columns(pl.col("visits").cast(pl.String)))
    with pytest.raises(EncodingError, match="not a stored encoder"):
        Encoder.from_json("{}")


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 5)), min_size=2, max_size=60))
def test_the_gain_curve_meets_the_lift_of_the_top_decile(rows: list[tuple[int, int]]) -> None:
    # 10 copies of each row, so that a tenth of them is whole rows.
    y = np.array([target for target, _ in rows] * 10 + [1] * 10)
    p = np.array([score / 5 for _, score in rows] * 10 + [0.5] * 10)
    share, gain = metrics.gain_curve(y, p, points=10)
    assert (gain[0], gain[-1]) == (0, 1)
    assert (np.diff(gain) >= 0).all()
    assert np.isclose(gain[1] / share[1], metrics.top_decile_lift(y, p))
