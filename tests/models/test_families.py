import pickle

import numpy as np
import pytest
import torch
import xgboost
from sklearn.ensemble import RandomForestClassifier

from models import boosting, forest, metrics, network
from models.families import (
    FAMILIES,
    TrainingData,
    TrainingDataError,
    VariantError,
    cost,
    packs,
)


@pytest.fixture(scope="module")
def data():
    draws = np.random.default_rng(7)
    x = draws.standard_normal((3000, 10)).astype(np.float32)
    logit = x[:, 0] + x[:, 1] * x[:, 2] - 0.5 * x[:, 3]
    y = (draws.random(3000) < 1 / (1 + np.exp(-2 * logit))).astype(np.int8)
    x[draws.random(x.shape) < 0.05] = np.nan
    x[:, 9] = draws.standard_normal(3000)  # One feature without gaps.
    return TrainingData(x_train=x[:2000], y_train=y[:2000], x_valid=x[2000:], y_valid=y[2000:])


@pytest.mark.parametrize(
    "shared", [{"seed": 3}, {"row_share": 0.7, "feature_share": 0.5, "seed": 5}]
)
def test_boosters_in_a_pack_are_bit_identical_to_alone(data, shared):
    variants = [{"family": "boosting", "rounds": rounds, **shared} for rounds in (20, 5, 40)]
    for variant, packed in zip(variants, boosting.fit_pack(variants, data), strict=True):
        (alone,) = boosting.fit_pack([variant], data)
        assert packed.variant == variant
        np.testing.assert_array_equal(packed.valid_scores, alone.valid_scores)
        np.testing.assert_array_equal(packed.predict(data.x_train), alone.predict(data.x_train))


def test_forests_in_a_pack_equal_forests_alone(data):
    variants = [{"trees": trees, "depth": 6, "seed": 11} for trees in (10, 3, 25)]
    for variant, packed in zip(variants, forest.fit_pack(variants, data), strict=True):
        (alone,) = forest.fit_pack([variant], data)
        np.testing.assert_array_equal(packed.valid_scores, alone.valid_scores)


def test_forest_factory_without_trees_to_show_is_trained_per_size(data):
    class Opaque:
        def __init__(self, **settings):
            self._forest = forest.sklearn_forest(**settings)

        def fit(self, x, y):
            assert not np.isnan(x).any()
            self._forest.fit(x, y)

        def predict_proba(self, x):
            return self._forest.predict_proba(x)

    variants = [{"trees": 3, "depth": 4}, {"trees": 6, "depth": 4}]
    opaque = forest.fit_pack(variants, data, factory=Opaque)
    for one, other in zip(opaque, forest.fit_pack(variants, data), strict=True):
        np.testing.assert_array_equal(one.valid_scores, other.valid_scores)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_networks_in_a_pack_equal_networks_alone(data, depth):
    shape = {"epochs": 4, "depth": depth, "batch_rows": 64}
    variants = [
        {**shape, "learning_rate": rate, "weight_decay": decay, "seed": seed}
        for rate, decay, seed in ((0.001, 0.0, 1), (0.01, 0.1, 2), (0.003, 0.01, 1))
    ]
    together = network.fit_pack(variants, data)
    for variant, packed in zip(variants, together, strict=True):
        (alone,) = network.fit_pack([variant], data)
        np.testing.assert_allclose(packed.valid_scores, alone.valid_scores, atol=1e-6)
    assert np.abs(together[0].valid_scores - together[2].valid_scores).max() > 0.01


def test_network_equals_plain_torch_with_adamw(data):
    """One batch an epoch, so that the order of rows doesn't matter, without gaps in the data."""
    whole = TrainingData(
        x_train=np.nan_to_num(data.x_train),
        y_train=data.y_train,
        x_valid=np.nan_to_num(data.x_valid),
        y_valid=data.y_valid,
    )
    variant = {"epochs": 30, "batch_rows": 2000, "learning_rate": 0.02, "weight_decay": 0.5}
    (ours,) = network.fit_pack([{**variant, "width": 8, "depth": 1, "seed": 4}], whole)

    draws = np.random.default_rng(4)
    hidden, out = torch.nn.Linear(10, 8), torch.nn.Linear(8, 1)
    with torch.no_grad():
        for layer in (hidden, out):
            o, i = layer.weight.shape
            drawn = draws.standard_normal((i, o)) * np.sqrt(2 / i)
            layer.weight.copy_(torch.from_numpy(drawn.T))
            layer.bias.zero_()
    plain = torch.nn.Sequential(hidden, torch.nn.ReLU(), out)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.02, weight_decay=0.5)
    mean, spread = whole.x_train.mean(axis=0), whole.x_train.std(axis=0)
    x = torch.from_numpy((whole.x_train - mean) / spread)
    y = torch.from_numpy(whole.y_train.astype(np.float32))
    for _ in range(30):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(plain(x)[:, 0], y).backward()
        optimizer.step()
    with torch.no_grad():
        x_valid = torch.from_numpy((whole.x_valid - mean) / spread)
        theirs = torch.sigmoid(plain(x_valid))[:, 0].numpy()
    np.testing.assert_allclose(ours.valid_scores, theirs, atol=1e-5)


def test_boosting_is_what_plain_xgboost_trains(data):
    variant = {"rounds": 30, "depth": 4, "row_share": 0.7, "feature_share": 0.6, "seed": 9}
    longer = {**variant, "rounds": 45}
    packed, long = boosting.fit_pack([variant, longer], data)
    plain = xgboost.train(
        {
            "objective": "binary:logistic",
            "tree_method": "hist",
            "nthread": 1,
            "max_bin": 64,
            "seed_per_iteration": True,
            "seed": 9,
            "max_depth": 4,
            "learning_rate": 0.1,
            "subsample": 0.7,
            "colsample_bytree": 0.6,
        },
        xgboost.QuantileDMatrix(data.x_train, data.y_train, max_bin=64),
        num_boost_round=30,
    )
    np.testing.assert_array_equal(packed.valid_scores, plain.predict(xgboost.DMatrix(data.x_valid)))
    assert [step for step, _ in packed.curve] == [10, 20, 30]
    assert packed.curve[-1][1] == metrics.auc(data.y_valid, packed.valid_scores)
    (alone,) = boosting.fit_pack([longer], data)
    assert long.curve == alone.curve


def test_boosting_by_leaves_is_what_plain_xgboost_grows(data):
    variant = {"rounds": 20, "depth": 0, "leaves": 12, "seed": 2}
    (ours,) = boosting.fit_pack([variant], data)
    plain = xgboost.train(
        {
            "objective": "binary:logistic",
            "nthread": 1,
            "max_bin": 64,
            "seed": 2,
            "learning_rate": 0.1,
            "grow_policy": "lossguide",
            "max_depth": 0,
            "max_leaves": 12,
        },
        xgboost.QuantileDMatrix(data.x_train, data.y_train, max_bin=64),
        num_boost_round=20,
    )
    np.testing.assert_array_equal(ours.valid_scores, plain.predict(xgboost.DMatrix(data.x_valid)))
    leaves = plain.trees_to_dataframe().query("Feature == 'Leaf'").groupby("Tree").size()
    assert leaves.max() == 12
    assert cost([{"family": "boosting", **variant}]) < cost(
        [{"family": "boosting", **variant, "leaves": 500}]
    )


def test_a_held_booster_goes_on_to_the_same_bits(data):
    variants = [{"rounds": rounds, "row_share": 0.7, "seed": 4} for rounds in (10, 40)]
    whole = boosting.fit_pack(variants, data)
    held = {}
    short, cut = boosting.fit_pack(variants, data, until=15, held=held, looks=(15,))
    assert (short.pruned_at, cut.pruned_at) == (None, 15)
    assert cut.curve[-1][0] == 15 and len(held) == 1
    other = boosting.fit_pack([{**variants[1], "depth": 2}], data)
    for each, expected in zip(boosting.fit_pack(variants, data, held=held), whole, strict=True):
        np.testing.assert_array_equal(each.valid_scores, expected.valid_scores)
        assert each.pruned_at is None
    assert not held
    assert np.abs(other[0].valid_scores - whole[1].valid_scores).max() > 0


def test_patience_stops_a_booster_at_its_best_look_whatever_its_pack(data):
    variants = [
        {"rounds": rounds, "learning_rate": 0.5, "patience": 20, "seed": 1}
        for rounds in (15, 100, 400)
    ]
    packed = boosting.fit_pack(variants, data)
    for variant, each in zip(variants, packed, strict=True):
        (alone,) = boosting.fit_pack([variant], data)
        np.testing.assert_array_equal(each.valid_scores, alone.valid_scores)
    last = packed[2].curve[-1][0]
    assert last < 400
    best = max(value for _, value in packed[2].curve)
    assert metrics.auc(data.y_valid, packed[2].valid_scores) == pytest.approx(best, abs=1e-6)


def test_a_forest_is_what_scikit_learn_grows_on_the_same_codes(data):
    variant = {"trees": 8, "depth": 5, "seed": 3, "min_leaf": 2, "feature_share": 0.5}
    (ours, _) = forest.fit_pack([variant, {**variant, "trees": 12}], data)
    bins, codes, _ = forest.binned(data)
    theirs = RandomForestClassifier(
        8, max_depth=5, min_samples_leaf=2, max_features=0.5, random_state=3
    ).fit(codes, data.y_train)
    expected = theirs.predict_proba(bins.codes(data.x_valid))[:, 1]
    np.testing.assert_array_equal(ours.valid_scores, expected)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_learns_repeats_and_pickles(data, family):
    variant = {"family": family, "seed": 2}
    (first,) = FAMILIES[family]([variant], data)
    (second,) = FAMILIES[family]([variant], data)
    assert metrics.auc(data.y_valid, first.valid_scores) > 0.8
    assert first.valid_scores.dtype == np.float64
    assert first.valid_scores.shape == (1000,)
    assert first.seconds > 0
    np.testing.assert_array_equal(first.valid_scores, second.valid_scores)
    loaded = pickle.loads(pickle.dumps(first))
    np.testing.assert_array_equal(loaded.predict(data.x_valid), first.valid_scores)
    assert FAMILIES[family]([], data) == []


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_row_scores_the_same_alone_as_among_others(data, family):
    (fitted,) = FAMILIES[family]([{"family": family}], data)
    whole = fitted.predict(data.x_valid)
    alone = [fitted.predict(row[None])[0] for row in data.x_valid[:40]]
    np.testing.assert_array_equal(alone, whole[:40])
    np.testing.assert_array_equal(fitted.predict(data.x_valid[100:333]), whole[100:333])


def test_packs_group_what_shares_work():
    short, long = {"family": "boosting", "rounds": 5}, {"family": "boosting", "rounds": 50}
    deep = {"family": "boosting", "rounds": 5, "depth": 9}
    slow, fast = ({"family": "network", "learning_rate": rate} for rate in (0.001, 0.01))
    wide = {"family": "network", "width": 64}
    small = {"family": "forest", "trees": 5}
    variants = [slow, short, deep, small, long, fast, wide]
    assert packs(variants) == [[slow, fast], [short, long], [deep], [small], [wide]]
    assert packs([short, long, short], largest=2) == [[short, long], [short]]
    with pytest.raises(VariantError, match="family 'svm'"):
        packs([{"family": "svm"}])


def test_settings_are_refused_by_name(data):
    with pytest.raises(VariantError, match=r"'round' isn't known.*did you mean 'rounds'"):
        boosting.fit_pack([{"round": 5}], data)
    with pytest.raises(VariantError, match="'trees' of 'forest' is 0; give 1 or more"):
        forest.fit_pack([{"trees": 0}], data)
    with pytest.raises(VariantError, match="'depth' of 'boosting' is 0; give 1 or more"):
        boosting.fit_pack([{"depth": 0}], data)
    with pytest.raises(VariantError, match=r"'width' of 'network' is 8\.0; give a whole number"):
        network.fit_pack([{"width": 8.0}], data)
    with pytest.raises(VariantError, match="given to 'forest'"):
        forest.fit_pack([{"family": "network"}], data)


def test_training_data_is_checked():
    x, y = np.zeros((4, 2), dtype=np.float32), np.array([0, 1, 0, 1], dtype=np.int8)
    with pytest.raises(TrainingDataError, match="cast them"):
        TrainingData(x_train=x.astype(float), y_train=y, x_valid=x, y_valid=y)
    with pytest.raises(TrainingDataError, match="rows of both classes"):
        TrainingData(x_train=x, y_train=np.zeros(4, dtype=np.int8), x_valid=x, y_valid=y)
    with pytest.raises(TrainingDataError, match=r"infinite in columns \[1\]"):
        bad = x.copy()
        bad[0, 1] = np.inf
        TrainingData(x_train=bad, y_train=y, x_valid=x, y_valid=y)
