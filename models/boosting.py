"""Gradient-boosted trees (XGBoost): variants that differ only in rounds are one booster.

Boosting adds a tree at a time, so the booster of 50 rounds is the first 50 of one of 500: a
pack trains the longest and scores the others as its prefixes.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from models.families import (
    FREE,
    Fitted,
    TrainingData,
    Variant,
    alike,
    completed,
    require_at_least,
)

DEFAULTS: dict[str, Any] = {
    "rounds": 100,
    "depth": 6,
    "learning_rate": 0.1,
    "min_child_weight": 1.0,
    "l2": 1.0,
    "row_share": 1.0,
    "feature_share": 1.0,
    "seed": 0,
}


def fit_pack(
    variants: Sequence[Variant], data: TrainingData, *, device: str = "cpu"
) -> list[Fitted]:
    """Trains each variant, identical to the bit to training it alone.

    Args:
        variants: Settings out of `DEFAULTS`; the rows are binned once for all of them.
        data: Rows to train on and to score.
        device: XGBoost's name of the device, "cpu" or "cuda".

    Returns:
        One `Fitted` a variant, in their order.

    Raises:
        VariantError: A setting isn't known or out of range.
    """
    import xgboost

    settings = [completed("boosting", variant, DEFAULTS) for variant in variants]
    for each in settings:
        require_at_least("boosting", each, ("rounds", "depth"), 1)
    if not settings:
        return []
    started = time.perf_counter()
    binned = xgboost.QuantileDMatrix(data.x_train, data.y_train, max_bin=64, nthread=1)
    binning_s = time.perf_counter() - started

    fitted: dict[int, Fitted] = {}
    for places in alike(settings, FREE["boosting"]):
        started = time.perf_counter()
        shared = settings[places[0]]
        booster = xgboost.train(
            {
                "objective": "binary:logistic",
                "tree_method": "hist",
                "device": device,
                "nthread": 1,
                "max_bin": 64,
                # Else a round's draw depends on the draws before it, and a continued booster
                # differs from one trained in one go.
                "seed_per_iteration": True,
                "seed": shared["seed"],
                "max_depth": shared["depth"],
                "learning_rate": shared["learning_rate"],
                "min_child_weight": shared["min_child_weight"],
                "lambda": shared["l2"],
                "subsample": shared["row_share"],
                "colsample_bytree": shared["feature_share"],
            },
            binned,
            num_boost_round=max(settings[place]["rounds"] for place in places),
        )
        training_s = time.perf_counter() - started
        for place in places:
            started = time.perf_counter()
            predict = partial(_predict, booster, settings[place]["rounds"])
            scores = predict(data.x_valid)
            fitted[place] = Fitted(
                variant=dict(variants[place]),
                valid_scores=scores,
                seconds=binning_s / len(settings)
                + training_s / len(places)
                + time.perf_counter()
                - started,
                predict=predict,
            )
    return [fitted[place] for place in range(len(settings))]


def _predict(booster: Any, rounds: int, x: np.ndarray) -> np.ndarray:
    import xgboost

    matrix = xgboost.DMatrix(x, nthread=1)
    scores: np.ndarray = booster.predict(matrix, iteration_range=(0, rounds))
    return scores.astype(np.float64)
