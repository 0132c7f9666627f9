"""Trains chosen models again on training and validation rows together.

Validation has done its work once it has chosen the models, their rounds and their weights; more
rows then make them better.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from jobs import sweep
from models import boosting
from models.families import Fitted, TrainingData, Variant


def refit(chosen: Sequence[Fitted], data: TrainingData, *, on: sweep.Pool) -> list[Fitted]:
    """The chosen models again, in their order, of a quarter or a third more rows.

    Args:
        chosen: From `jobs.sweep.fit`. A booster that patience stopped gets the rounds that it
            predicted with.
        data: The rows that they were trained and chosen on.
        on: Actors.

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
    return sweep.fit([_settled(each) for each in chosen], whole, on=on)


def _settled(fitted: Fitted) -> Variant:
    if fitted.variant["family"] == "boosting":
        return boosting.settled(fitted.variant, fitted.curve)
    return fitted.variant
