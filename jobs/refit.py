"""Trains chosen models again on training and validation rows together.

Validation has done its work once it has chosen the models, their rounds or epochs and their
weights; more rows then make them better, and so does a mean over several seeds (bagging without
resampling; Breiman 1996).
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from models import boosting, ensemble, network
from models.families import Fitted, TrainingData, Variant

# Trains variants, in their order: `jobs.sweep.fit` on a pool, or in this process.
Fit = Callable[[Sequence[Variant], TrainingData], list[Fitted]]

# Between a variant's seeds; a sweep's own are next to one another.
_APART = 1_000

# Families in which nothing is drawn.
_CERTAIN = {"logistic"}


def refit(
    chosen: Sequence[Fitted], data: TrainingData, *, fit: Fit, seeds: int = 1
) -> list[Fitted]:
    """The chosen models again, in their order, of a quarter or a third more rows.

    Args:
        chosen: From `jobs.sweep.fit`. A booster that patience stopped gets the rounds that it
            predicted with, a network the epochs.
        data: The rows that they were trained and chosen on.
        fit: Trains variants.
        seeds: How many times each is trained; with several, each but the first by another seed, a
            model is their mean. Where nothing is drawn, once does.

    Returns:
        One a model. Their `valid_scores` are of rows that trained them: good for no choice, no
        calibration and no report.

    Raises:
        SweepError: A variant fails now, or a pack lost its worker three times.
    """
    whole = replace(
        data,
        x_train=np.concatenate([data.x_train, data.x_valid]),
        y_train=np.concatenate([data.y_train, data.y_valid]),
    )
    members = [_seeded(_settled(each), seeds) for each in chosen]
    fitted = iter(fit([variant for each in members for variant in each], whole))
    return [_mean([next(fitted) for _ in each]) for each in members]


def _seeded(variant: Variant, seeds: int) -> list[Variant]:
    if variant["family"] in _CERTAIN:
        return [variant]
    first: Any = variant.get("seed", 0)
    return [variant, *({**variant, "seed": first + _APART * at} for at in range(1, seeds))]


def _mean(trained: Sequence[Fitted]) -> Fitted:
    if len(trained) == 1:
        return trained[0]
    weights = (1 / len(trained),) * len(trained)
    return replace(
        trained[0],
        predict=ensemble.Average(models=tuple(each.predict for each in trained), weights=weights),
        valid_scores=ensemble.mean([each.valid_scores for each in trained], weights),
        seconds=sum(each.seconds for each in trained),
    )


def _settled(fitted: Fitted) -> Variant:
    match fitted.variant["family"]:
        case "boosting":
            return boosting.settled(fitted.variant, fitted.curve)
        case "network":
            return network.settled(fitted.variant, fitted.curve)
        case _:
            return fitted.variant
