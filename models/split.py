"""Splits rows into train, validate and test, so that no label reaches into a later part.

By time: a row whose label is known only after the next part begins would carry that part's
outcomes into training, so it is purged (M. López de Prado, Advances in Financial Machine Learning,
2018, section 7.4.1). Stratified: drawn, each part with the classes' shares of the whole.
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
