"""The best variant of a sweep to a registered model, promoted only if it beats the champion.

The champion and the newcomer score the same test rows; neither was trained on them. Validation
rows choose: the variant, or the weights of the best few together (an average, or stacked where that
does better by cross-validation), and whether to calibrate.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cluster.files import replace_text
from jobs.refit import Fit
from jobs.refit import refit as trained_again
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
            is stacked the `offset`. With `calibration` where one was chosen, and `refit` where what
            was chosen was trained again.
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
    fit: Fit | None = None,
    refit: int = 0,
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
        refit: By how many seeds what was chosen is trained once more, on validation's rows too
            (`jobs.refit`); what validation has decided, and the importance of features, stay the
            first ones'. 0 registers the first ones.

    Raises:
        RegisterError: Every variant failed.
        MetricError: The test rows have one class only.
    """
    best = _best(name, outcomes, together, slowest_us)
    data = matrices.training_data
    fit = fit or _fit
    trained = fit([outcome.variant for outcome in best], data)
    chosen = _together(trained, data.y_valid, metric, seed)
    valid_score = METRICS[metric].score(data.y_valid, chosen.valid_scores)
    if calibrate:
        chosen = _calibrated(chosen, data.y_valid, seed)
    predict = chosen.predict(chosen.members)
    lost_p = importance.permutation(
        predict, matrices.x["validate"], matrices.y["validate"], seed=seed
    )
    if refit:
        chosen = replace(chosen, variant={**chosen.variant, "refit": refit})
        predict = chosen.predict(trained_again(chosen.members, data, fit=fit, seeds=refit))
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
    told = _evaluation(y_test, scores_n, simple, lost_p, matrices, columns)
    replace_text(evaluation, json.dumps(told))

    said = {column.name: column for column in columns}
    card = registry.register(
        name,
        scorer,
        example=test_rows.select(matrices.encoder.feature_names).head(5),
        family=str(chosen.variant["family"]),
        variant=chosen.variant,
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
        variant=chosen.variant,
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


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """What validation has decided.

    Attributes:
        variant: See `Registered`.
        members: The models that have a part in it.
        predict: Of models in the members' places, a function from rows (n, p) to scores (n,).
        valid_scores: (m,), the members'.
    """

    variant: dict[str, Any]
    members: list[Fitted]
    predict: Callable[[Sequence[Fitted]], Callable[[np.ndarray], np.ndarray]]
    valid_scores: np.ndarray


def _together(trained: Sequence[Fitted], y_valid: np.ndarray, metric: str, seed: int) -> _Chosen:
    """The best, alone or together."""
    scores, by = [each.valid_scores for each in trained], METRICS[metric].score
    offset: float | None = None
    if ensemble.stacking_helps(y_valid, scores, metric=by, seed=seed):
        weights, offset = ensemble.stacked(y_valid, scores)
    else:
        weights = ensemble.greedy(y_valid, scores, metric=by)
    picked = [(each, w) for each, w in zip(trained, weights, strict=True) if w > 0]
    members, shares = [each for each, _ in picked], tuple(w for _, w in picked)
    scores = [each.valid_scores for each in members]
    told = {"family": "ensemble", "members": [{**each.variant, "weight": w} for each, w in picked]}
    if offset is not None:
        return _Chosen(
            variant={**told, "offset": offset},
            members=members,
            predict=lambda models: ensemble.Stack(
                models=_predicts(models), weights=shares, offset=offset
            ),
            valid_scores=ensemble.stack(scores, shares, offset),
        )
    if len(members) == 1:
        return _Chosen(
            variant=members[0].variant,
            members=members,
            predict=lambda models: models[0].predict,
            valid_scores=scores[0],
        )
    return _Chosen(
        variant=told,
        members=members,
        predict=lambda models: ensemble.Average(models=_predicts(models), weights=shares),
        valid_scores=ensemble.mean(scores, shares),
    )


def _predicts(models: Sequence[Fitted]) -> tuple[Callable[[np.ndarray], np.ndarray], ...]:
    return tuple(each.predict for each in models)


def _calibrated(chosen: _Chosen, y_valid: np.ndarray, seed: int) -> _Chosen:
    """With the calibration that does best on the validation rows, if one does better than none."""
    method = calibration.choose(y_valid, chosen.valid_scores, seed=seed)
    if method == "raw":
        return chosen
    fitted = calibration.fit(method, y_valid, chosen.valid_scores)
    return replace(
        chosen,
        variant={**chosen.variant, "calibration": method},
        predict=lambda models: calibration.Calibrated(
            model=chosen.predict(models), calibration=fitted
        ),
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
