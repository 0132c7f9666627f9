"""The best of a sweep, alone, together and calibrated, in a real registry."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from jobs.register import Registered, RegisterError, register
from jobs.sweep import Outcome, train_pack
from jobs.training_set import LABEL, SPLIT, FeatureColumn, Matrices, encode
from models.families import FAMILIES, Fitted, TrainingData, Variant, packs
from models.metrics import auc
from models.registry import Registry

NAMES = ["a", "b", "c"]
VARIANTS = [
    {"family": "logistic", "l2": 1.0},
    {"family": "boosting", "rounds": 30, "depth": 2, "seed": 1},
    {"family": "forest", "trees": 20, "depth": 5, "seed": 1},
    {"family": "boosting", "rounds": 1, "depth": 1, "seed": 1},
]


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    draws = np.random.default_rng(6)
    x = draws.standard_normal((3000, 3))
    logit = x[:, 0] + x[:, 1] ** 2 - 1
    y = draws.random(3000) < 1 / (1 + np.exp(-logit))
    part = np.repeat(["train", "validate", "test"], 1000)
    return pl.DataFrame(x, NAMES).with_columns(
        pl.Series(LABEL, y.astype(np.int8)), pl.Series(SPLIT, part)
    )


@pytest.fixture(scope="module")
def matrices(frame: pl.DataFrame) -> Matrices:
    return encode(frame, NAMES)


@pytest.fixture(scope="module")
def outcomes(matrices: Matrices) -> list[Outcome]:
    return [each for pack in packs(VARIANTS) for each in train_pack(pack, matrices.training_data)]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    yield Registry(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.fixture
def registered(
    frame: pl.DataFrame, matrices: Matrices, registry: Registry, tmp_path: Path
) -> Callable[..., Registered]:
    """Registers the best of outcomes; further arguments are `register`'s."""
    said = [FeatureColumn(name=name, description=name, unit="") for name in NAMES]

    def registered(outcomes: Sequence[Outcome], **how: Any) -> Registered:
        settings = {
            "baseline_features": (), "data_version": "training/target@0", "seed": 1,
            "git_revision": "0a1b2c3", "evaluation": tmp_path / "evaluation.json",
        } | how  # fmt: skip
        return register("target", outcomes, frame, matrices, said, registry, **settings)

    return registered


def test_the_best_together_beat_the_best_alone_and_score_as_they_were_tested(
    frame: pl.DataFrame,
    matrices: Matrices,
    outcomes: list[Outcome],
    registry: Registry,
    registered: Callable[..., Registered],
) -> None:
    test_rows = frame.filter(pl.col(SPLIT) == "test")
    found = []
    for together, calibrate in ((0, False), (3, False), (3, True)):
        done = registered(outcomes, baseline_features=["a"], together=together, calibrate=calibrate)
        card, scorer = registry.load("target", done.model_version)
        assert auc(matrices.y["test"], scorer.score(test_rows)) == done.test["auc"]
        assert (card.family, card.variant) == (done.family, done.variant)
        found.append(done)
    alone, together_, calibrated = found
    assert alone.family == "boosting" and alone.variant == VARIANTS[1]
    assert together_.family == "ensemble"
    assert together_.valid_score > alone.valid_score
    members = together_.variant["members"]
    if "offset" not in together_.variant:
        assert sum(member["weight"] for member in members) == pytest.approx(1)
    assert all({k: v for k, v in m.items() if k != "weight"} in VARIANTS[:3] for m in members)
    assert calibrated.test["log_loss"] < together_.test["log_loss"] + 0.01
    assert calibrated.variant.get("calibration") in (None, "platt", "isotonic")


def test_what_was_chosen_is_trained_once_more_on_all_rows(
    frame: pl.DataFrame,
    matrices: Matrices,
    outcomes: list[Outcome],
    registry: Registry,
    registered: Callable[..., Registered],
) -> None:
    boosters = [outcome for outcome in outcomes if outcome.variant["family"] == "boosting"]
    done, again = (
        registered(boosters, together=2, calibrate=True, refit=seeds) for seeds in (0, 2)
    )
    # What validation decides, it decides before it trains anything.
    assert again.variant == {**done.variant, "refit": 2}
    assert again.valid_score == done.valid_score
    _, first = registry.load("target", done.model_version)
    _, second = registry.load("target", again.model_version)
    test_rows = frame.filter(pl.col(SPLIT) == "test")
    assert auc(matrices.y["test"], second.score(test_rows)) == again.test["auc"]
    assert not np.array_equal(second.score(test_rows), first.score(test_rows))


def test_a_loss_as_the_metric(
    matrices: Matrices,
    outcomes: list[Outcome],
    registered: Callable[..., Registered],
) -> None:
    by_loss = [
        train_pack([each.variant], matrices.training_data, metric="log_loss")[0]
        for each in outcomes
    ]
    done = registered(by_loss, metric="log_loss")
    assert done.valid_score == max(each.score for each in by_loss if each.score is not None) < 0
    worst = [min(by_loss, key=lambda each: each.score or 0)]
    again = registered(worst, metric="log_loss")
    assert not again.promoted
    assert again.reason.startswith(f"test log loss {again.test['log_loss']:.4f} does not beat")
    assert again.test["log_loss"] > done.test["log_loss"]


def test_a_model_that_is_too_slow_is_not_registered(
    outcomes: list[Outcome],
    registered: Callable[..., Registered],
) -> None:
    timed = [replace(each, metrics={"row_us": 10.0 - at}) for at, each in enumerate(outcomes)]
    done = registered(timed, slowest_us=7.0, together=4)
    assert done.variant == outcomes[3].variant
    with pytest.raises(RegisterError, match=r"within slowest_us 0.5; the quickest takes 7.00"):
        registered(timed, slowest_us=0.5, together=4)


def test_what_was_stopped_early_is_not_registered(
    outcomes: list[Outcome],
    registered: Callable[..., Registered],
) -> None:
    stopped = [replace(each, pruned_at=5) for each in outcomes]
    best = next(at for at, each in enumerate(outcomes) if each.variant == VARIANTS[0])
    stopped[best] = outcomes[best]
    done = registered(stopped, together=5)
    assert (done.family, done.pruned) == ("logistic", 3)
    failed = [replace(each, score=None, error="ValueError: no") for each in outcomes]
    with pytest.raises(RegisterError, match="all 4 variants failed"):
        registered(failed)


@dataclass(frozen=True)
class Squeezed:
    """A model whose scores an average would drown."""

    predict: Callable[[np.ndarray], np.ndarray]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.predict(x) * 1e-3


def test_a_stack_is_registered_where_validation_says_so(
    frame: pl.DataFrame,
    matrices: Matrices,
    outcomes: list[Outcome],
    registry: Registry,
    registered: Callable[..., Registered],
) -> None:
    def squeezed(variants: Sequence[Variant], data: TrainingData) -> list[Fitted]:
        first, *others = [FAMILIES[v["family"]]([v], data)[0] for v in variants]
        return [
            first,
            *(
                replace(each, predict=Squeezed(each.predict), valid_scores=each.valid_scores * 1e-3)
                for each in others
            ),
        ]

    done = registered(outcomes, together=4, fit=squeezed)
    assert done.family == "ensemble" and done.variant["offset"] > 0
    assert min(member["weight"] for member in done.variant["members"]) > 0
    _, scorer = registry.load("target", done.model_version)
    test_rows = frame.filter(pl.col(SPLIT) == "test")
    assert auc(matrices.y["test"], scorer.score(test_rows)) == done.test["auc"]
