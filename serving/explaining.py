"""Why rows have their scores: the body of an answer to /explain. Knows nothing of HTTP."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from models import explain
from serving.replica import Served


def explanations(
    served: Served,
    rows: Sequence[Mapping[str, Any]],
    x_np: np.ndarray,
    visible: Callable[[Mapping[str, float]], Mapping[str, float]],
) -> dict[str, Any]:
    """Scores, contributions and the main reasons in words.

    Args:
        served: The model.
        rows: n rows as they were sent, already checked.
        x_np: (n, p) float32, the same rows as the model takes them.
        visible: Of contributions by feature, those that the answer shows; the reasons are of these.

    Raises:
        ExplainError: The model is of a kind that has no explanation.
    """
    found = explain.explain(served.scorer.predict, x_np)
    scores_n = served.scorer.predict(x_np)
    names = served.scorer.encoder.feature_names
    described = {feature["name"]: feature for feature in served.card.features}
    told = []
    for at, row in enumerate(rows):
        contributions = dict(zip(names, found.contributions_np[at].tolist(), strict=True))
        shown = visible(contributions)
        reasons = explain.reasons(
            np.array(list(shown.values())), row, [described[name] for name in shown]
        )
        told.append(
            {
                "score": float(scores_n[at]),
                "base": float(found.base_n[at]),
                "contributions": shown,
                "reasons": reasons,
            }
        )
    return {
        "model": served.card.name,
        "version": served.card.version,
        "scale": found.scale,
        "explanations": told,
    }
