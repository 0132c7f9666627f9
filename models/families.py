"""What the model families share: training data, a fitted variant, and which variants pack.

A variant is a mapping of settings, such as {"family": "boosting", "rounds": 200, "depth": 4}.
A family is one module with one function, `fit_pack(variants, data) -> list[Fitted]`, that
trains variants that share work for less than each alone, with the same result.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from models.naming import suggestion

Variant = Mapping[str, Any]


class VariantError(ValueError):
    """A variant's settings aren't allowed; the message names the setting."""


class TrainingDataError(ValueError):
    """The arrays can't be trained on; the message says which and why."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingData:
    """Encoded rows and their targets; equal only to itself, so that caches can go by it.

    Attributes:
        x_train: (n, p) float32, NaN where missing.
        y_train: (n,) int8, 0 or 1.
        x_valid: (m, p) float32, NaN where missing.
        y_valid: (m,) int8, 0 or 1.
        categories: How many values each column knows whose numbers are codes, from 0 on; 0 for
            other columns, and empty where no column has codes. Networks may look them up.

    Raises:
        TrainingDataError: Shapes disagree, a type is another, a value is infinite, or y_train
            has one class only.
    """

    x_train: np.ndarray
    y_train: np.ndarray
    x_valid: np.ndarray
    y_valid: np.ndarray
    categories: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for part, x, y in (
            ("train", self.x_train, self.y_train),
            ("valid", self.x_valid, self.y_valid),
        ):
            if x.ndim != 2 or y.shape != x.shape[:1] or x.size == 0:
                raise TrainingDataError(
                    f"x_{part} has shape {x.shape} and y_{part} {y.shape}; "
                    "give (rows, features) and (rows,), neither empty"
                )
            if x.dtype != np.float32 or y.dtype != np.int8:
                raise TrainingDataError(
                    f"x_{part} is {x.dtype} and y_{part} is {y.dtype}; "
                    "cast them with astype to float32 and int8"
                )
            if np.isinf(x).any():
                columns = np.flatnonzero(np.isinf(x).any(axis=0)).tolist()
                raise TrainingDataError(
                    f"x_{part} is infinite in columns {columns}; cap those values, or make them NaN"
                )
            if not np.isin(y, (0, 1)).all():
                raise TrainingDataError(
                    f"y_{part} has the values {np.unique(y)[:5].tolist()}; only 0 and 1 are allowed"
                )
        if self.x_train.shape[1] != self.x_valid.shape[1]:
            raise TrainingDataError(
                f"x_train has {self.x_train.shape[1]} features and x_valid "
                f"{self.x_valid.shape[1]}; encode both with the same encoder"
            )
        if self.categories and len(self.categories) != self.x_train.shape[1]:
            raise TrainingDataError(
                f"categories has {len(self.categories)} counts for {self.x_train.shape[1]} "
                "features; give one a feature (Encoder.categories), or none"
            )
        if self.y_train.min() == self.y_train.max():
            raise TrainingDataError(
                f"y_train is {self.y_train[0]} in all {self.y_train.size} rows; "
                "give rows of both classes"
            )


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """One trained variant; it can be pickled.

    Attributes:
        variant: The settings as they were given.
        valid_scores: (m,) float64, probability of 1 for each row of x_valid.
        seconds: Wall seconds; work that a pack shares is split evenly among its variants.
        predict: (n, p) float32 to (n,) float64, probability of 1.
        curve: Validation score after so many rounds or epochs, for families that train so.
        pruned_at: Rounds after which it was stopped short of what it asks for, or None.
        ran: Facts of how it was trained, by name, where a family has a choice.
    """

    variant: dict[str, Any]
    valid_scores: np.ndarray
    seconds: float
    predict: Callable[[np.ndarray], np.ndarray]
    curve: tuple[tuple[int, float], ...] = ()
    pruned_at: int | None = None
    ran: Mapping[str, str] = field(default_factory=dict)


class FitPack(Protocol):
    """A family's function, with what not every family takes left aside."""

    def __call__(
        self,
        variants: Sequence[Variant],
        data: TrainingData,
        *,
        device: str = "cpu",
        metric: str = "auc",
        **halved: Any,
    ) -> list[Fitted]:
        """Trains each variant; `metric` is what patience goes by, `halved` boosting's own."""


# The family modules import this one for its types, hence the imports inside.
def _boosting(
    variants: Sequence[Variant],
    data: TrainingData,
    *,
    device: str = "cpu",
    metric: str = "auc",
    **halved: Any,
) -> list[Fitted]:
    from models import boosting

    return boosting.fit_pack(variants, data, device=device, metric=metric, **halved)


def _forest(
    variants: Sequence[Variant],
    data: TrainingData,
    *,
    device: str = "cpu",
    metric: str = "auc",
    **halved: Any,
) -> list[Fitted]:
    from models import forest

    return forest.fit_pack(variants, data)


def _network(
    variants: Sequence[Variant],
    data: TrainingData,
    *,
    device: str = "cpu",
    metric: str = "auc",
    **halved: Any,
) -> list[Fitted]:
    from models import network

    accelerator = "gpu" if device == "cuda" else "cpu"
    return network.fit_pack(variants, data, accelerator=accelerator, metric=metric)


def _logistic(
    variants: Sequence[Variant],
    data: TrainingData,
    *,
    device: str = "cpu",
    metric: str = "auc",
    **halved: Any,
) -> list[Fitted]:
    from models import logistic

    return logistic.fit_pack(variants, data)


FAMILIES: dict[str, FitPack] = {
    "boosting": _boosting,
    "forest": _forest,
    "network": _network,
    "logistic": _logistic,
}

# Those that train on a GPU where a worker has one.
ON_GPU = frozenset({"boosting", "forest", "network"})

# The settings in which variants of one pack may differ.
FREE: dict[str, frozenset[str]] = {
    "boosting": frozenset({"rounds"}),
    "forest": frozenset({"trees"}),
    "network": frozenset({"learning_rate", "weight_decay", "dropout", "patience", "seed"}),
    "logistic": frozenset({"l2"}),
}


def packs(variants: Sequence[Variant], *, largest: int = 64) -> list[list[Variant]]:
    """Groups variants that share work.

    Args:
        variants: Each names its "family".
        largest: Most variants in a pack, so that one pack doesn't hold up a whole sweep.

    Returns:
        Packs in the order of their first variant; each variant is in one of them.

    Raises:
        VariantError: A family isn't known, or largest is below 1.
    """
    if largest < 1:
        raise VariantError(f"largest is {largest}; give 1 or more")
    for variant in variants:
        if variant.get("family") not in FAMILIES:
            raise VariantError(
                f"family {variant.get('family')!r} in {dict(variant)} isn't known; "
                f"allowed: {sorted(FAMILIES)}"
            )
    found: list[list[Variant]] = []
    for family in FAMILIES:
        of_family = [variant for variant in variants if variant["family"] == family]
        for places in alike(of_family, FREE[family]):
            members = [of_family[place] for place in places]
            found += [members[at : at + largest] for at in range(0, len(members), largest)]
    first = {id(variant): place for place, variant in reversed(list(enumerate(variants)))}
    return sorted(found, key=lambda pack: first[id(pack[0])])


def cost(pack: Sequence[Variant]) -> float:
    """Roughly how long a pack takes beside others, in seconds a hundred thousand rows.

    Measured on one core with a hundred features; good enough to start the longest first.
    """

    def most(setting: str, default: float) -> float:
        return max(float(variant.get(setting, default)) for variant in pack)

    match pack[0]["family"]:
        case "boosting":
            levels = most("depth", 6) or math.log2(most("leaves", 0)) + 1
            return 0.0045 * most("rounds", 100) * levels
        case "forest":
            return 0.17 * most("trees", 100) * most("depth", 12) * most("feature_share", 0.5)
        case "network":
            return 0.25 * len(pack) * most("epochs", 10) * (1 + most("width", 32) / 64)
        case _:
            return 0.7 * len(pack)


def alike(variants: Sequence[Variant], free: Collection[str]) -> list[list[int]]:
    """Positions of the variants that are equal but for the `free` settings, grouped."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for place, variant in enumerate(variants):
        key = tuple(sorted((name, repr(v)) for name, v in variant.items() if name not in free))
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def completed(family: str, variant: Variant, defaults: Variant) -> dict[str, Any]:
    """The variant's settings with the family's defaults where it gives none.

    Raises:
        VariantError: The variant is of another family, or has a setting that isn't known.
    """
    if variant.get("family", family) != family:
        raise VariantError(
            f"variant of family {variant['family']!r} was given to {family!r}; "
            "send each family its own (see packs)"
        )
    settings = {**defaults, **{name: v for name, v in variant.items() if name != "family"}}
    for name in settings:
        if name not in defaults:
            raise VariantError(
                f"setting {name!r} isn't known to {family!r}; allowed: {sorted(defaults)}"
                f"{suggestion(name, defaults)}"
            )
        if type(defaults[name]) is int and (type(settings[name]) is not int):
            raise VariantError(
                f"setting {name!r} of {family!r} is {settings[name]!r}; give a whole number"
            )
        if type(defaults[name]) is float and (
            isinstance(settings[name], bool)
            or not isinstance(settings[name], int | float)
            or not np.isfinite(settings[name])
        ):
            raise VariantError(
                f"setting {name!r} of {family!r} is {settings[name]!r}; give a finite number"
            )
    return settings


def require_above_zero(family: str, settings: Variant, names: Sequence[str]) -> None:
    """Refuses settings that aren't above 0.

    Raises:
        VariantError: Naming the first such setting.
    """
    for name in names:
        if settings[name] <= 0:
            raise VariantError(
                f"setting {name!r} of {family!r} is {settings[name]!r}; give a number above 0"
            )


def require_at_least(family: str, settings: Variant, names: Sequence[str], least: int) -> None:
    """Refuses settings below `least`.

    Raises:
        VariantError: Naming the first such setting.
    """
    for name in names:
        if settings[name] < least:
            raise VariantError(
                f"setting {name!r} of {family!r} is {settings[name]!r}; give {least} or more"
            )
