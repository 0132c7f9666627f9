"""The best variant of a sweep to a registered model, promoted only if it beats the champion.

The champion and the newcomer score the same test rows; neither was trained on them. Validation
rows choose: the variant, or the weights of the best few together (an average, or stacked where that
does better by cross-validation), and whether to calibrate.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cluster.files import replace_text
from jobs.sweep_board import LATENCY, Outcome
from jobs.training_set import LABEL, SPLIT, FeatureColumn, Matrices
from models import baseline, calibration, ensemble, importance
from models.encoding import EncodingError
from models.families import FAMILIES, Fitted, TrainingData, Variant, packs
from models.metrics import METRICS, calibration_curve, evaluate, gain_curve
from models.registry import Registry
from models.scoring import Scorer


class RegisterError(ValueError):
    """No variant can be registered; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Registered:
    """What `register` left.

    Attributes:
        variants: How many were trained.
        failed: How many of them failed.
        pruned: How many were stopped early.
        family: The best variant's family, or "ensemble".
        variant: Its settings; of an ensemble its `members`, each with its `weight`, and where it
            is stacked the `offset`. With `calibration` where one was chosen.
        metric: What chose it, of `models.metrics.METRICS`.
        valid_score: That on the validation rows, a loss with its sign turned: more than new rows
            will give.
        test: Its metrics on the test rows, by name.
        baseline: The baseline's metrics on the same rows; None where none is declared.
        model_version: The version registered.
        promoted: Whether it became the champion.
        reason: Why, or why not.
    """

    variants: int
    failed: int
    pruned: int
    family: str
    variant: dict[str, Any]
    metric: str
    valid_score: float
    test: dict[str, float]
    baseline: dict[str, float] | None
    model_version: int
    promoted: bool
    reason: str


def register(
    name: str,
    outcomes: Sequence[Outcome],
    frame: pl.DataFrame,
    matrices: Matrices,
    columns: Sequence[FeatureColumn],
    registry: Registry,
    *,
    baseline_features: Sequence[str],
    data_version: str,
    seed: int,
    git_revision: str,
    evaluation: Path,
    together: int = 0,
    calibrate: bool = False,
    metric: str = "auc",
    slowest_us: float | None = None,
    fit: Callable[[Sequence[Variant], TrainingData], list[Fitted]] | None = None,
) -> Registered:
    """Train the best variants again, test them, register one, and promote it if it earns that.

    Args:
        name: The target, which names the model.
        outcomes: The sweep's.
        frame: The training set (`jobs.training_set.load`).
        matrices: The same rows, encoded.
        columns: The features, for people.
        registry: Where it goes.
        baseline_features: Of the logistic regression beside it; empty for none.
        data_version: The training set's table and version.
        seed: The pipeline's.
        git_revision: The code's.
        evaluation: File to leave curves and importance in, as JSON, for the report.
        together: How many of the best are tried as an ensemble; below 2 for none.
        calibrate: Whether validation chooses a calibration.
        metric: Of `models.metrics.METRICS`, that models are compared by.
        slowest_us: Microseconds that a row's score may take (`jobs.sweep_board.LATENCY`): the best
            model within it is taken, alone. None for any.
        fit: Trains variants; None trains them in this process.

    Raises:
        RegisterError: Every variant failed.
        MetricError: The test rows have one class only.
    """
    best = _best(name, outcomes, together, slowest_us)
    data = matrices.training_data
    trained = (fit or _fit)([outcome.variant for outcome in best], data)
    family, variant, predict, valid_n = _together(trained, data.y_valid, metric, seed)
    valid_score = METRICS[metric].score(data.y_valid, valid_n)
    if calibrate:
        method = calibration.choose(data.y_valid, valid_n, seed=seed)
        if method != "raw":
            fitted = calibration.fit(method, data.y_valid, valid_n)
            predict = calibration.Calibrated(model=predict, calibration=fitted)
            variant = {**variant, "calibration": method}
    scorer = Scorer(encoder=matrices.encoder, predict=predict)
    x_test, y_test = matrices.x["test"], matrices.y["test"]
    scores_n = scorer.predict(x_test)
    metrics = evaluate(y_test, scores_n)

    test_rows = frame.filter(pl.col(SPLIT) == "test")
    simple: np.ndarray | None = None
    if baseline_features:
        train = frame.filter(pl.col(SPLIT) == "train")
        rule = baseline.fit(train, baseline_features, train[LABEL].to_numpy())
        simple = rule(test_rows)
    lost_p = importance.permutation(
        predict, matrices.x["validate"], matrices.y["validate"], seed=seed
    )
    told = _evaluation(y_test, scores_n, simple, lost_p, matrices, columns)
    replace_text(evaluation, json.dumps(told))

    said = {column.name: column for column in columns}
    card = registry.register(
        name,
        scorer,
        example=test_rows.select(matrices.encoder.feature_names).head(5),
        family=family,
        variant=variant,
        features=[
            {
                "name": column.name,
                "kind": column.kind,
                "description": said[column.name].description,
                "unit": said[column.name].unit,
            }
            for column in matrices.encoder.columns
        ],
        metrics=metrics,
        data_version=data_version,
        seed=seed,
        git_revision=git_revision,
    )
    promoted, reason = _earned(name, registry, metric, scores_n, test_rows, y_test)
    if promoted:
        registry.promote(name, card.version)
    else:
        registry.challenge(name, card.version)
    return Registered(
        variants=len(outcomes),
        failed=sum(outcome.error is not None for outcome in outcomes),
        pruned=sum(outcome.pruned_at is not None for outcome in outcomes),
        family=card.family,
        variant=variant,
        metric=metric,
        valid_score=valid_score,
        test=metrics,
        baseline=None if simple is None else evaluate(y_test, simple),
        model_version=card.version,
        promoted=promoted,
        reason=reason,
    )


def _best(
    name: str, outcomes: Sequence[Outcome], together: int, slowest_us: float | None
) -> list[Outcome]:
    """The best by validation; what was stopped early isn't what its settings say."""
    trained = [o for o in outcomes if o.score is not None and o.pruned_at is None]
    if not trained:
        raise RegisterError(
            f"target {name!r}: all {len(outcomes)} variants failed, the first with: "
            f"{outcomes[0].error}; change the sweep's space"
        )
    if slowest_us is not None:
        quick = [o for o in trained if o.metrics[LATENCY] <= slowest_us]
        if not quick:
            least = min(outcome.metrics[LATENCY] for outcome in trained)
            raise RegisterError(
                f"target {name!r}: no variant scores a row within slowest_us {slowest_us:g}; the "
                f"quickest takes {least:.2f} microseconds: allow that, or try smaller models"
            )
        # An average takes as long as its members do.
        trained, together = quick, 0
    # The first of equals, so that the choice doesn't depend on who finished first.
    trained.sort(key=lambda outcome: -(outcome.score or 0.0))
    return trained[: max(1, together)]


def _fit(variants: Sequence[Variant], data: TrainingData) -> list[Fitted]:
    fitted = [each for pack in packs(variants) for each in FAMILIES[pack[0]["family"]](pack, data)]
    return [next(f for f in fitted if f.variant == variant) for variant in variants]


def _together(
    trained: Sequence[Fitted], y_valid: np.ndarray, metric: str, seed: int
) -> tuple[str, dict[str, Any], Callable[[np.ndarray], np.ndarray], np.ndarray]:
    """Family, settings, predict function and validation scores of the best, alone or together."""
    scores, by = [each.valid_scores for each in trained], METRICS[metric].score
    if ensemble.stacking_helps(y_valid, scores, metric=by, seed=seed):
        weights, offset = ensemble.stacked(y_valid, scores)
        picked = [(each, w) for each, w in zip(trained, weights, strict=True) if w > 0]
        shares = tuple(w for _, w in picked)
        members = [{**each.variant, "weight": w} for each, w in picked]
        return (
            "ensemble",
            {"family": "ensemble", "members": members, "offset": offset},
            ensemble.Stack(
                models=tuple(each.predict for each, _ in picked), weights=shares, offset=offset
            ),
            ensemble.stack([each.valid_scores for each, _ in picked], shares, offset),
        )
    weights = ensemble.greedy(y_valid, scores, metric=by)
    picked = [(each, w) for each, w in zip(trained, weights, strict=True) if w > 0]
    if len(picked) == 1:
        (alone, _), *_ = picked
        return str(alone.variant["family"]), alone.variant, alone.predict, alone.valid_scores
    shares = tuple(w for _, w in picked)
    return (
        "ensemble",
        {"family": "ensemble", "members": [{**each.variant, "weight": w} for each, w in picked]},
        ensemble.Average(models=tuple(each.predict for each, _ in picked), weights=shares),
        ensemble.mean([each.valid_scores for each, _ in picked], shares),
    )


def _earned(
    name: str,
    registry: Registry,
    metric: str,
    newcomer: np.ndarray,
    test_rows: pl.DataFrame,
    y_test: np.ndarray,
) -> tuple[bool, str]:
    if registry.champion(name) is None:
        return True, "there was no champion"
    card, champion = registry.load(name)
    try:
        scores = champion.score(test_rows)
    except EncodingError as error:
        return False, (
            f"champion {card.version} can't score these test rows ({error}), so the two can't be "
            "compared; `liftyard promote` decides by hand"
        )
    by = METRICS[metric]
    own, standing = by.of(y_test, newcomer), by.of(y_test, scores)
    beats = own > standing if by.more else own < standing
    return beats, (
        f"test {by.title} {own:.4f} {'beats' if beats else 'does not beat'} "
        f"champion {card.version}'s {standing:.4f} on the same rows"
    )


def _evaluation(
    y: np.ndarray,
    champion: np.ndarray,
    simple: np.ndarray | None,
    lost_p: np.ndarray,
    matrices: Matrices,
    columns: Sequence[FeatureColumn],
) -> dict[str, Any]:
    curves: dict[str, Any] = {"champion": _curves(y, champion)}
    if simple is not None:
        curves["baseline"] = _curves(y, simple)
    said = {column.name: column for column in columns}
    order = np.argsort(-lost_p, kind="stable")
    names = matrices.encoder.feature_names
    return {
        "positives": float(y.mean()),
        "curves": curves,
        "importance": [
            {
                "feature": names[place],
                "description": said[names[place]].description,
                "unit": said[names[place]].unit,
                "importance": float(lost_p[place]),
            }
            for place in order
        ],
    }


def _curves(y: np.ndarray, scores: np.ndarray) -> dict[str, Any]:
    share, gain = gain_curve(y, scores)
    predicted, observed, count = calibration_curve(y, scores)
    return {
        "lift": {"share": share.tolist(), "gain": gain.tolist()},
        "calibration": {
            "predicted": predicted.tolist(),
            "observed": observed.tolist(),
            "count": count.tolist(),
        },
    }
