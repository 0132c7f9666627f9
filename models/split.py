"""Splits rows by time into train, validate and test, so that no label reaches into a later part.

A row's label is known only at cutoff + horizon. A row whose label ends after the next part begins
would carry that part's outcomes into training, so it is purged (M. López de Prado, Advances in
Financial Machine Learning, 2018, section 7.4.1).
"""

from datetime import datetime, timedelta

import polars as pl


class SplitError(ValueError):
    """The rows can't be split as asked; the message says what they offer."""


def by_time(
    cutoffs: pl.Series, *, horizon: timedelta, validate: datetime, test: datetime
) -> pl.Series:
    """Assign each row to its part.

    Args:
        cutoffs: (n,) Datetime, naive UTC.
        horizon: How far a label looks ahead of its cutoff.
        validate: Rows from this cutoff on validate.
        test: Rows from this cutoff on test.

    Returns:
        (n,) String: "train", "validate", "test", or null where the row is purged.

    Raises:
        SplitError: `validate` isn't before `test`, or a part is empty.
    """
    if validate >= test:
        raise SplitError(f"validate from {validate} and test from {test}: validate must be earlier")
    cutoff, known = pl.col("cutoff"), pl.col("cutoff") + horizon
    part = (
        pl.when(cutoff >= test)
        .then(pl.lit("test"))
        .when((cutoff >= validate) & (known <= test))
        .then(pl.lit("validate"))
        .when((cutoff < validate) & (known <= validate))
        .then(pl.lit("train"))
    )
    parts = pl.DataFrame({"cutoff": cutoffs}).select(split=part)["split"]
    for name in ("train", "validate", "test"):
        if not (parts == name).any():
            first, last = cutoffs.dt.min(), cutoffs.dt.max()
            raise SplitError(
                f"no row to {name}: cutoffs go from {first!s} to {last!s}, labels look "
                f"{horizon.days} days ahead, validate is from {validate} and test from {test}"
            )
    return parts
