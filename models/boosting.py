"""Gradient-boosted trees (XGBoost): variants that differ only in rounds are one booster.

Boosting adds a tree at a time, so the booster of 50 rounds is the first 50 of one of 500: a
pack trains the longest and scores the others as its prefixes. A booster that is held goes on
where it stopped, which is what successive halving needs.
"""

import time
from collections.abc import Collection, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from models.families import (
    FREE,
    Fitted,
    TrainingData,
    Variant,
    alike,
    completed,
    require_above_zero,
    require_at_least,
)
from models.metrics import METRICS, MetricError

DEFAULTS: dict[str, Any] = {
    "rounds": 100,
    "depth": 6,
    "leaves": 0,
    "learning_rate": 0.1,
    "min_child_weight": 1.0,
    "l2": 1.0,
    "row_share": 1.0,
    "feature_share": 1.0,
    "positive_weight": 1.0,
    "max_bin": 64,
    "patience": 0,
    "seed": 0,
}

# With patience, validation is looked at every so many rounds.
STEP = 10
# Without, at these: enough of a curve to read, few enough to cost nothing.
SPARSE = tuple(place * 10**power for power in range(1, 5) for place in (1, 2, 5))


@dataclass(frozen=True, kw_only=True)
class _Matrices:
    train: Any
    valid: Any


# The rows binned once a process: by the data itself, then by bins and device.
_BINNED: "WeakKeyDictionary[TrainingData, dict[tuple[int, str], _Matrices]]" = WeakKeyDictionary()


def fit_pack(
    variants: Sequence[Variant],
    data: TrainingData,
    *,
    device: str = "cpu",
    until: int | None = None,
    held: MutableMapping[str, Any] | None = None,
    looks: Sequence[int] = (),
    metric: str = "auc",
) -> list[Fitted]:
    """Trains each variant, identical to the bit to training it alone.

    Args:
        variants: Settings out of `DEFAULTS`. Trees grow level by level to `depth`; with `leaves`,
            the leaf that gains most is split next until there are so many, and a `depth` of 0 is
            no limit (best-first trees, Shi 2007). With `patience`, a booster stops once its
            validation metric, looked at every `STEP` rounds, hasn't risen for so many rounds, and
            its best look is what predicts.
        data: Rows to train on and to score; binned once a process for each `max_bin`.
        device: XGBoost's name of the device, "cpu" or "cuda".
        until: Stop after so many rounds; variants that ask for more are `pruned_at` that.
        held: Boosters that an earlier call stopped; they go on from there, and stopped ones are
            put there. One from another process wouldn't give the same bits.
        looks: Further rounds at which the curve has a point.
        metric: Of `models.metrics.METRICS`, that the curve has.

    Returns:
        One `Fitted` a variant, in their order.

    Raises:
        VariantError: A setting isn't known or out of range.
    """
    settings = [completed("boosting", variant, DEFAULTS) for variant in variants]
    for each in settings:
        require_at_least("boosting", each, ("rounds",), 1)
        require_at_least("boosting", each, ("leaves",), 0)
        # Without either, a tree would grow until each row is a leaf.
        require_at_least("boosting", each, ("depth",), 0 if each["leaves"] else 1)
        require_at_least("boosting", each, ("max_bin",), 2)
        require_at_least("boosting", each, ("patience", "seed"), 0)
        require_above_zero("boosting", each, ("positive_weight", "learning_rate"))
    held = {} if held is None else held
    fitted: dict[int, Fitted] = {}
    for places in alike(settings, FREE["boosting"]):
        started = time.perf_counter()
        shared = {name: v for name, v in settings[places[0]].items() if name != "rounds"}
        key = repr(sorted(shared.items()))
        growing = held.pop(key, None) or _Growing(shared, data, device, metric)
        sizes = {settings[place]["rounds"] for place in places}
        longest = max(sizes)
        growing.grow(longest if until is None else min(until, longest), looks, sizes)
        if until is not None and until < longest and not growing.stopped:
            held[key] = growing
        training_s = time.perf_counter() - started
        for place in places:
            started = time.perf_counter()
            asked = settings[place]["rounds"]
            rounds, curve = growing.chosen(asked)
            how = _predict if device == "cpu" else _predict_on_device
            predict = partial(how, growing.booster, rounds)
            pruned = until is not None and until < asked and not growing.stopped
            fitted[place] = Fitted(
                variant=dict(variants[place]),
                valid_scores=growing.scores(rounds),
                seconds=training_s / len(places) + time.perf_counter() - started,
                predict=predict,
                curve=curve,
                pruned_at=until if pruned else None,
            )
    return [fitted[place] for place in range(len(settings))]


class _Growing:
    """A booster that is trained a few rounds at a time."""

    def __init__(
        self, settings: Mapping[str, Any], data: TrainingData, device: str, metric: str
    ) -> None:
        import xgboost

        self.matrices = _binned(data, settings["max_bin"], device)
        self._y_valid = data.y_valid
        self._metric = METRICS[metric]
        self._on_cpu = device == "cpu"
        self._patience = settings["patience"]
        self.booster = xgboost.Booster(
            {
                "objective": "binary:logistic",
                "tree_method": "hist",
                "device": device,
                "nthread": 1,
                "max_bin": settings["max_bin"],
                # Else a round's draw depends on the draws before it, and boosters that take turns
                # in a process differ from ones trained in one go.
                "seed_per_iteration": True,
                "seed": settings["seed"],
                "max_depth": settings["depth"],
                "max_leaves": settings["leaves"],
                "grow_policy": "lossguide" if settings["leaves"] else "depthwise",
                "learning_rate": settings["learning_rate"],
                "min_child_weight": settings["min_child_weight"],
                "lambda": settings["l2"],
                "subsample": settings["row_share"],
                "colsample_bytree": settings["feature_share"],
                "scale_pos_weight": settings["positive_weight"],
            },
            cache=[self.matrices.train],
        )
        self._done = 0
        self._curve: list[tuple[int, float]] = []
        # Rounds of the curve's points, but for a variant's last: those that no pack decides.
        self._regular: set[int] = set()
        # By rounds; those asked for, the last and, with patience, the best so far.
        self._seen: dict[int, np.ndarray] = {}
        self.stopped = False

    def grow(self, rounds: int, looks: Sequence[int], sizes: Collection[int]) -> None:
        """Trains up to so many rounds in all, looking at validation on the way."""
        steps = range(STEP, rounds + 1, STEP) if self._patience else SPARSE
        self._regular |= {*steps, *looks}
        due = {*self._regular, *sizes, rounds}
        while self._done < rounds and not self.stopped:
            self.booster.update(self.matrices.train, self._done)
            self._done += 1
            if self._done in due:
                self._look(sizes)

    def _look(self, sizes: Collection[int]) -> None:
        # XGBoost goes on from the last look's margins, so that all looks cost one prediction.
        scores_m = self.booster.predict(self.matrices.valid).astype(np.float64)
        # Not on validation rows of one class, which the caller tells of.
        with suppress(MetricError):
            self._curve.append((self._done, self._metric.score(self._y_valid, scores_m)))
        best = _best(self._curve)
        kept = {*sizes, best} if self._patience else set(sizes)
        self._seen = {k: v for k, v in self._seen.items() if k in kept} | {self._done: scores_m}
        if self._patience and self._done % STEP == 0 and self._curve:
            self.stopped = self._done - best >= self._patience

    def scores(self, rounds: int) -> np.ndarray:
        """Validation scores (m,) float64 of its first rounds, the bits of one prediction."""
        # On a GPU each look's trees are summed by themselves, which rounds otherwise.
        if self._on_cpu and rounds in self._seen:
            return self._seen[rounds]
        return _scores(self.booster, rounds, self.matrices.valid)

    def chosen(self, asked: int) -> tuple[int, tuple[tuple[int, float], ...]]:
        """Rounds that predict for a variant of so many, and its curve."""
        shown = {*self._regular, min(asked, self._done)}
        curve = tuple(point for point in self._curve if point[0] <= asked and point[0] in shown)
        rounds = min(asked, self._done)
        if self._patience and rounds >= STEP and curve:
            rounds = _best(curve)
        return rounds, curve


def settled(variant: Variant, curve: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The variant as it is trained where there is nothing to watch: with its best rounds.

    Args:
        variant: Settings out of `DEFAULTS`.
        curve: Rounds and score of what was trained with them, from `Fitted` or an outcome.

    Returns:
        The settings; where patience chose the rounds, those rounds and a patience of 0.
    """
    stops = [(int(rounds), score) for rounds, score in curve if rounds % STEP == 0]
    if not variant.get("patience", DEFAULTS["patience"]) or not stops:
        return dict(variant)
    return {**variant, "rounds": _best(stops), "patience": 0}


def _best(curve: Sequence[tuple[int, float]]) -> int:
    """Rounds of the highest step, the first of equals; 0 where there is none."""
    steps = (point for point in curve if point[0] % STEP == 0)
    return max(steps, key=lambda point: (point[1], -point[0]), default=(0, 0.0))[0]


def _binned(data: TrainingData, max_bin: int, device: str) -> _Matrices:
    import xgboost

    made = _BINNED.setdefault(data, {})
    if (max_bin, device) not in made:
        train = xgboost.QuantileDMatrix(data.x_train, data.y_train, max_bin=max_bin, nthread=1)
        valid = xgboost.DMatrix(data.x_valid, nthread=1)
        made[max_bin, device] = _Matrices(train=train, valid=valid)
    return made[max_bin, device]


def _scores(booster: Any, rounds: int, matrix: Any) -> np.ndarray:
    scores: np.ndarray = booster.predict(matrix, iteration_range=(0, rounds))
    return scores.astype(np.float64)


def _predict(booster: Any, rounds: int, x: np.ndarray) -> np.ndarray:
    # The bits of a matrix's prediction, in about half the time for a single row.
    scores: np.ndarray = booster.inplace_predict(x, iteration_range=(0, rounds))
    return scores.astype(np.float64)


def _predict_on_device(booster: Any, rounds: int, x: np.ndarray) -> np.ndarray:
    import xgboost

    # A booster on a GPU doesn't take rows of this machine's memory as they are.
    return _scores(booster, rounds, xgboost.DMatrix(x, nthread=1))
