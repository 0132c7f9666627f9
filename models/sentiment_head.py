"""The quick training: only the head, by logistic regression on the encoder's embeddings."""

import numpy as np
import polars as pl

from models.sentiment import Sentiment


class TrainingError(ValueError):
    """Texts or settings can't be trained on; the message says which and what to do."""


def fit_head(
    model: Sentiment, train: pl.DataFrame, *, c: float = 1.0, class_weights: bool = True
) -> Sentiment:
    """Only the head, by logistic regression on the encoder's embeddings: the quick option.

    Args:
        model: Its encoder stays as it is; its head is set.
        train: Columns text (cleaned) and label.
        c: Inverse of the L2 penalty on standardised embeddings.
        class_weights: Whether classes weigh by the inverse of their frequency.

    Returns:
        The model, its head trained.

    Raises:
        TrainingError: A label isn't known, or a class has no text.
    """
    return set_head(
        model,
        model.embeddings(train["text"].to_list()),
        label_places(model, train),
        c=c,
        class_weights=class_weights,
    )


def set_head(
    model: Sentiment, x: np.ndarray, y: np.ndarray, *, c: float = 1.0, class_weights: bool = True
) -> Sentiment:
    """`fit_head` on embeddings that are there: x (n, width) float32, y (n,) places of labels."""
    import torch
    from sklearn.linear_model import LogisticRegression

    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-6
    regression = LogisticRegression(
        C=c, max_iter=2000, class_weight="balanced" if class_weights else None
    ).fit((x - mean) / scale, y)
    weights, bias = regression.coef_, regression.intercept_
    if len(weights) == 1:
        # Of two classes scikit-learn keeps the second's; the softmax of ±half of it is the same.
        weights, bias = np.vstack([-weights, weights]) / 2, np.concatenate([-bias, bias]) / 2
    # The standardisation goes into the weights, so that the head takes plain embeddings.
    weights = weights / scale
    bias = bias - weights @ mean
    with torch.no_grad():
        model.module.head.weight.copy_(torch.from_numpy(weights.astype(np.float32)))
        model.module.head.bias.copy_(torch.from_numpy(bias.astype(np.float32)))
    return model


def label_places(model: Sentiment, rows: pl.DataFrame) -> np.ndarray:
    """(n,) int64 places of the rows' labels among the model's; each label must occur."""
    places = {label: place for place, label in enumerate(model.labels)}
    unknown = sorted(set(rows["label"].unique().to_list()) - set(places), key=str)
    if unknown:
        raise TrainingError(f"labels {unknown} aren't the model's: {list(model.labels)}")
    y = rows["label"].replace_strict(places, return_dtype=pl.Int64).to_numpy()
    missing = [label for label in model.labels if places[label] not in set(y.tolist())]
    if missing:
        raise TrainingError(
            f"no text is labelled {missing}; give some, or leave the label out of `labels`"
        )
    return y
