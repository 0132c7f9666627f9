"""Cross-validation: folds of the rows that train, each with its own rows to train on and to score.

Knows nothing of models. Which rows are whose is `models.split`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from models.families import TrainingData, TrainingDataError


@dataclass(frozen=True, kw_only=True, eq=False)
class Folds:
    """Encoded rows once, and each fold's places among them.

    Attributes:
        x: (n, p) float32, NaN where missing.
        y: (n,) int8, 0 or 1.
        parts: Of each fold, the places of the rows that train and of those that are scored.
        categories: As in `TrainingData`.

    Raises:
        TrainingDataError: A fold lacks a class.
    """

    x: np.ndarray
    y: np.ndarray
    parts: Sequence[tuple[np.ndarray, np.ndarray]]
    categories: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for number, parts in enumerate(self.parts, 1):
            for what, places in zip(("trains", "is scored"), parts, strict=True):
                found = np.unique(self.y[places])
                if found.size < 2:
                    raise TrainingDataError(
                        f"fold {number} of {len(self.parts)}: what {what} has the targets "
                        f"{found.tolist()} in {places.size} rows; both 0 and 1 are needed: give "
                        "fewer folds"
                    )

    @cached_property
    def each(self) -> tuple[TrainingData, ...]:
        """The folds' rows; the same objects every time, so that caches go by them."""
        return tuple(
            TrainingData(
                x_train=self.x[train],
                y_train=self.y[train],
                x_valid=self.x[scored],
                y_valid=self.y[scored],
                categories=self.categories,
            )
            for train, scored in self.parts
        )
