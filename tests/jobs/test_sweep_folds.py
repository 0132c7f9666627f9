"""Cross-validated sweeps: the mean of folds trained by hand, whatever the pack and the workers."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import xgboost
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import TimeSeriesSplit

from cluster import session
from jobs import sweep
from jobs.sweep_folds import SPREAD, train_folds
from models import split
from models.families import FAMILIES, TrainingDataError
from models.folds import Folds

BOOSTERS = [{"family": "boosting", "rounds": r, "depth": d} for d in (2, 3) for r in (5, 30)]
OTHERS = [
    *({"family": "forest", "trees": trees, "depth": 4} for trees in (5, 10)),
    *({"family": "logistic", "l2": l2} for l2 in (1.0, 100.0)),
]
NETWORKS = [{"family": "network", "epochs": 1, "seed": seed} for seed in (1, 2)]


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    x = random.normal(size=(900, 6)).astype(np.float32)
    y = (x[:, 0] + 0.5 * x[:, 1] ** 2 + random.normal(size=900) > 0.5).astype(np.int8)
    return x, y


@pytest.fixture(scope="module")
def folds(rows: tuple[np.ndarray, np.ndarray]) -> Folds:
    x, y = rows
    times = pl.Series(range(900)).cast(pl.Datetime("us"))
    return Folds(x=x, y=y, parts=split.folds_by_time(times, known=times, folds=3))


@pytest.fixture(scope="module")
def pools() -> Iterator[tuple[sweep.Pool, sweep.Pool]]:
    with session.connect(cpus=2), sweep.pool(1, cpus=0.5) as one, sweep.pool(2, cpus=0.5) as two:
        yield one, two


def test_boosters_score_the_mean_of_plain_xgboost_over_scikit_learns_folds(
    folds: Folds, rows: tuple[np.ndarray, np.ndarray]
) -> None:
    x, y = rows
    outcomes = train_folds(BOOSTERS, folds)
    losses = train_folds(BOOSTERS, folds, metric="log_loss")
    for outcome, loss in zip(outcomes, losses, strict=True):
        scores, lost = [], []
        for train, scored in TimeSeriesSplit(3).split(x):
            plain = xgboost.train(
                {
                    "objective": "binary:logistic",
                    "tree_method": "hist",
                    "nthread": 1,
                    "max_bin": 64,
                    "seed_per_iteration": True,
                    "max_depth": outcome.variant["depth"],
                    "learning_rate": 0.1,
                },
                xgboost.QuantileDMatrix(x[train], y[train], max_bin=64),
                num_boost_round=outcome.variant["rounds"],
            )
            p = plain.predict(xgboost.DMatrix(x[scored]))
            scores.append(roc_auc_score(y[scored], p))
            lost.append(-log_loss(y[scored], p.astype(np.float64)))
        assert outcome.score == pytest.approx(np.mean(scores), abs=1e-9)
        assert outcome.metrics[SPREAD] == pytest.approx(np.std(scores), abs=1e-9)
        if outcome.curve:
            assert outcome.curve[-1] == [outcome.variant["rounds"], pytest.approx(outcome.score)]
        assert loss.score == pytest.approx(np.mean(lost), rel=1e-6)


def test_scores_do_not_depend_on_packs_or_workers_and_resume(
    tmp_path: Path, folds: Folds, pools: tuple[sweep.Pool, sweep.Pool]
) -> None:
    every = [*BOOSTERS, *OTHERS]
    run = partial(sweep.run, data=folds, train=train_folds)
    one = run(every[::2], journal=tmp_path / "one", on=pools[0])
    two = run(every, journal=tmp_path / "two", on=pools[1])
    assert [each.score for each in two[::2]] == [each.score for each in one]
    resumed = run(every, journal=tmp_path / "one", on=pools[1])
    assert resumed[::2] == one
    assert [each.score for each in resumed] == [each.score for each in two]
    # By each family itself, on each fold's rows; networks here, where torch is imported already.
    for outcome in [*two[4:], *train_folds(NETWORKS, folds)]:
        scores = []
        for (_, scored), data in zip(folds.parts, folds.each, strict=True):
            (fitted,) = FAMILIES[outcome.variant["family"]]([outcome.variant], data)
            scores.append(roc_auc_score(folds.y[scored], fitted.valid_scores))
        assert outcome.score == pytest.approx(np.mean(scores), abs=1e-9)


@pytest.mark.parametrize("patience", [0, 20])
def test_halved_boosters_go_on_in_every_fold(
    tmp_path: Path, folds: Folds, pools: tuple[sweep.Pool, sweep.Pool], patience: int
) -> None:
    variants = [
        {"family": "boosting", "rounds": 60, "learning_rate": rate, "patience": patience}
        for rate in (0.02, 0.1, 0.8)
    ]
    run = partial(sweep.run, variants, folds, train=train_folds)
    whole = run(journal=tmp_path / "whole", on=pools[0])
    halving = sweep.Halving(rungs=(10, 30), keep=0.4, bracket=3)
    halved = run(journal=tmp_path / "halved", on=pools[1], halving=halving)
    went_on = [each.pruned_at is None for each in halved]
    assert any(went_on) and not all(went_on)
    for one, other, on in zip(halved, whole, went_on, strict=True):
        if on:
            assert one.score == other.score
    assert sweep.outcomes(tmp_path / "halved", variants, halving=halving) == halved


def test_a_variant_that_fails_in_a_fold_fails(folds: Folds) -> None:
    good, bad = train_folds([BOOSTERS[0], {**BOOSTERS[0], "depth": 0}], folds)
    assert good.score is not None
    assert bad.score is None and bad.error is not None and bad.error.startswith("fold 1: Variant")


def test_a_fold_of_one_class_is_refused(rows: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = rows
    ones = np.flatnonzero(y == 1)
    with pytest.raises(TrainingDataError, match=r"fold 2 of 2: what is scored .*\[1\]"):
        Folds(x=x, y=y, parts=[(np.arange(600), np.arange(600, 900)), (np.arange(600), ones)])
