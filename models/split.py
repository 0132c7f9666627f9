"""Splits rows into train, validate and test, so that no label reaches into a later part.

By time: a row whose label is known only after the next part begins would carry that part's
outcomes into training, so it is purged (M. López de Prado, Advances in Financial Machine Learning,
2018, section 7.4.1). Stratified: drawn, each part with the classes' shares of the whole. The rows
that train can be split once more, into the folds of a cross-validation, by the same two rules.
"""

from datetime import datetime

import numpy as np
import polars as pl

PARTS = ("train", "validate", "test")


class SplitError(ValueError):
    """The rows can't be split as asked; the message says what they offer."""


def by_time(
    cutoffs: pl.Series, *, known: pl.Series, validate: datetime, test: datetime
) -> pl.Series:
    """Assign each row to its part.

    Args:
        cutoffs: (n,) Datetime, naive UTC.
        known: (n,) Datetime, naive UTC: when each row's label is known.
        validate: Rows from this cutoff on validate.
        test: Rows from this cutoff on test.

    Returns:
        (n,) String: "train", "validate", "test", or null where the row is purged.

    Raises:
        SplitError: `validate` isn't before `test`, or a part is empty.
    """
    if validate >= test:
        raise SplitError(f"validate from {validate} and test from {test}: validate must be earlier")
    cutoff, end = pl.col("cutoff"), pl.col("known")
    part = (
        pl.when(cutoff >= test)
        .then(pl.lit("test"))
        .when((cutoff >= validate) & (end <= test))
        .then(pl.lit("validate"))
        .when((cutoff < validate) & (end <= validate))
        .then(pl.lit("train"))
    )
    parts = pl.DataFrame({"cutoff": cutoffs, "known": known}).select(split=part)["split"]
    for name in PARTS:
        if not (parts == name).any():
            raise SplitError(
                f"no row to {name}: cutoffs go from {cutoffs.dt.min()!s} to {cutoffs.dt.max()!s}, "
                f"their labels are known from {known.dt.min()!s} to {known.dt.max()!s}, validate "
                f"is from {validate} and test from {test}; move these"
            )
    return parts


def stratified(
    labels: pl.Series, *, validate_share: float, test_share: float, seed: int
) -> pl.Series:
    """Draw each row's part, with the classes' shares in each.

    Args:
        labels: (n,) integers.
        validate_share: Share of the rows that validate, in (0, 1).
        test_share: Share of the rows that test, in (0, 1).
        seed: Of the draw, which also depends on the rows' order.

    Returns:
        (n,) String: "train", "validate" or "test".

    Raises:
        SplitError: A part would be empty.
    """
    y_n = labels.to_numpy()
    drawn = np.random.default_rng(seed).permutation(y_n.size)
    part_n = np.full(y_n.size, "train", dtype=object)
    for value in np.unique(y_n):
        rows = drawn[y_n[drawn] == value]
        tests, validates = round(rows.size * test_share), round(rows.size * validate_share)
        part_n[rows[:tests]] = "test"
        part_n[rows[tests : tests + validates]] = "validate"
    parts = pl.Series("split", part_n, dtype=pl.String)
    for name in PARTS:
        if not (parts == name).any():
            raise SplitError(
                f"no row to {name} among {y_n.size}, with validate_share={validate_share:g} and "
                f"test_share={test_share:g}; give more rows or other shares"
            )
    return parts


def folds_by_time(
    cutoffs: pl.Series, *, known: pl.Series, folds: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds whose training rows all come before those scored: a window that grows.

    The rows' times are cut into folds + 1 stretches of as many rows, the first a little longer;
    each but the first is scored once, by what the ones before it teach. Rows of one cutoff stay
    together, and a row whose label is known only after the scored stretch begins is purged.

    Args:
        cutoffs: (n,) Datetime, naive UTC.
        known: (n,) Datetime, naive UTC: when each row's label is known.
        folds: How many, 2 or more.

    Returns:
        Places of the rows that train and of those scored, ascending, a fold each.

    Raises:
        SplitError: There are too few rows or cutoffs, or purging leaves none to train on.
    """
    ordered = cutoffs.sort()
    size = len(ordered) // (folds + 1)
    starts = (
        [ordered[len(ordered) - (folds - fold) * size] for fold in range(folds)] if size else []
    )
    if not starts or [ordered[0], *starts] != sorted({ordered[0], *starts}):
        raise SplitError(
            f"{folds} folds of {len(cutoffs)} training rows with {cutoffs.n_unique()} cutoffs: "
            "each needs cutoffs of its own, and one more to train on first; give fewer folds, or 0"
        )
    parts = []
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        train = ((cutoffs < start) & (known <= start)).arg_true().to_numpy()
        scored = cutoffs >= start if end is None else (cutoffs >= start) & (cutoffs < end)
        if not train.size:
            raise SplitError(
                f"no row trains the fold from {start}: no label of an earlier cutoff is known by "
                "then; give fewer folds"
            )
        parts.append((train, scored.arg_true().to_numpy()))
    return parts


def folds_drawn(
    labels: pl.Series | np.ndarray, *, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Folds drawn with each class spread evenly over them; every row is scored once.

    Args:
        labels: (n,) integers.
        folds: How many, 2 or more.
        seed: Of the draw, which also depends on the rows' order.

    Returns:
        Places of the rows that train and of those scored, ascending, a fold each.

    Raises:
        SplitError: A class has fewer rows than there are folds.
    """
    y_n = np.asarray(labels)
    draws = np.random.default_rng(seed)
    fold_n = np.empty(y_n.size, dtype=np.int64)
    for value in np.unique(y_n):
        rows = draws.permutation(np.flatnonzero(y_n == value))
        if rows.size < folds:
            raise SplitError(
                f"{rows.size} training rows have the label {value}, fewer than {folds} folds; "
                "give fewer folds"
            )
        fold_n[rows] = np.arange(rows.size) % folds
    return [(np.flatnonzero(fold_n != at), np.flatnonzero(fold_n == at)) for at in range(folds)]
