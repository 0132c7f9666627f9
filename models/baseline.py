"""A logistic regression on a few counts and ages: what a score must beat to be worth its cost.

On recency and frequency this is the classical RF model of response (D. Shepard, The New Direct
Marketing, 1999).
"""

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl


class BaselineError(ValueError):
    """A feature can't be used in a baseline."""


def fit(
    frame: pl.DataFrame, features: Sequence[str], y: np.ndarray
) -> Callable[[pl.DataFrame], np.ndarray]:
    """Train on sign(x) log(1 + |x|) of each feature, standardised; a null takes the median.

    Args:
        frame: (n,) rows with the features, all of them numbers.
        features: Which columns to use.
        y: (n,) 0 or 1, both present.

    Returns:
        Takes rows with the features; gives (m,) float64, the probability of 1.

    Raises:
        BaselineError: A feature isn't a number.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    for name in features:
        if not (frame.schema[name].is_numeric() or frame.schema[name] == pl.Boolean):
            raise BaselineError(f"baseline feature {name!r} is {frame.schema[name]}; name numbers")
    numbers = [pl.col(name).cast(pl.Float64).fill_nan(None) for name in features]
    medians = frame.select(number.median().fill_null(0) for number in numbers).row(0)
    filled = [number.fill_null(median) for number, median in zip(numbers, medians, strict=True)]
    shrunk = [value.sign() * (value.abs() + 1).log() for value in filled]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1_000))
    model.fit(frame.select(shrunk).to_numpy(), y)

    def predict(rows: pl.DataFrame) -> np.ndarray:
        scores: np.ndarray = model.predict_proba(rows.select(shrunk).to_numpy())[:, 1]
        return scores

    return predict
