"""The typed answers of `serving.client`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of n rows, in their order.

    Attributes:
        model: What answered; an alias that was asked for is told by its name.
        version: Of the model.
        scores: (n,) float64, the probability of 1.
    """

    model: str
    version: int
    scores: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a row has its score.

    Attributes:
        score: The probability of 1.
        base: `base` and all contributions sum to the score on the answer's scale.
        contributions: By feature; those that the asker may see.
        reasons: The main ones: "feature", "description", "unit", "value", "contribution", "text".
    """

    score: float
    base: float
    contributions: Mapping[str, float]
    reasons: Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Explained:
    """Of n rows, in their order; `scale` is "probability" or "log-odds"."""

    model: str
    version: int
    scale: str
    explanations: Sequence[Explanation]


@dataclass(frozen=True, kw_only=True)
class ModelScore:
    """What one model says of a customer."""

    version: int
    score: float


@dataclass(frozen=True, kw_only=True)
class Customer:
    """What is known of a customer.

    Attributes:
        customer: The pseudonym.
        cutoff: When the features are from, ISO 8601, UTC.
        features: The latest, by name; those that the asker may see.
        scores: By model, of those that the asker may score with.
        segment: The feature of that name; None where there is none.
        sentiment: The feature of that name; None where there is none.
    """

    customer: int | str
    cutoff: str
    features: Mapping[str, Any]
    scores: Mapping[str, ModelScore]
    segment: Any
    sentiment: Any


@dataclass(frozen=True, kw_only=True)
class CustomerScore:
    """A customer's score as of `cutoff`, and the features that it is made of."""

    model: str
    version: int
    customer: int | str
    cutoff: str
    score: float
    features: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What one text says; with an outcome other than "ok" and "truncated" there is no label.

    Attributes:
        label: The likeliest class.
        probabilities: By class.
        sentiment: From -1 to 1, where there are classes positive and negative.
        outcome: Of `models.text.clean`.
        language: Of the text, where it is told.
    """

    label: str | None
    probabilities: Mapping[str, float] | None
    sentiment: float | None
    outcome: str
    language: str | None


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Of n texts, in their order."""

    model: str
    version: int
    results: Sequence[Labelled]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What answers by one name.

    Attributes:
        name: By which it is asked for.
        version: The one that answers.
        features: What a row has: "name", "kind" (number, string, boolean), "description", "unit".
        metrics: On the test rows.
    """

    name: str
    version: int
    features: Sequence[Mapping[str, str]]
    metrics: Mapping[str, float]
