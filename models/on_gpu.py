"""A trained model moved to a GPU to score there: boosting, the family that gains by it."""

from collections.abc import Callable
from functools import partial

import numpy as np

from models import boosting

Predict = Callable[[np.ndarray], np.ndarray]


def on_gpu(predict: Predict) -> Predict | None:
    """The model, to score on the process's first CUDA device; its rows stay in host memory.

    Its scores may differ from those on a CPU in their last bits.

    Args:
        predict: `Fitted.predict`, (n, p) float32 to (n,) float64; not to be used any further.

    Returns:
        The same function of rows, or None for a model of another kind.
    """
    match predict:
        case partial(func=boosting._predict | boosting._predict_on_device, args=(booster, rounds)):
            booster.set_param({"device": "cuda"})
            return partial(boosting._predict_on_device, booster, rounds)
    return None
