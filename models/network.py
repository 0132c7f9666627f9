"""Small neural networks (MLP): K of one shape train as one batched product.

A network of a few thousand weights leaves most of a step to overhead; stacked along a leading
axis K, the pack pays that overhead once. All see the same batches in the same order, and each
keeps its own learning rate, weight decay, dropout, patience and seed. What the first layer takes
of a row is `models/network_inputs.py`'s; how a pack trains, `models/network_training.py`'s.

Suffixes: B rows, I and O inputs and outputs of a layer.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from models.families import (
    FREE,
    Fitted,
    TrainingData,
    Variant,
    VariantError,
    alike,
    completed,
    require_above_zero,
    require_at_least,
)
from models.metrics import METRICS, MetricError
from models.naming import suggestion
from models.network_inputs import Scaling, Vectors, columns_of, scaled
from models.network_training import PRECISIONS, best_epoch, precision_on, probability, train

DEFAULTS: dict[str, Any] = {
    "width": 32,
    "depth": 2,
    "epochs": 10,
    "batch_rows": 256,
    "order_seed": 0,
    "learning_rate": 0.003,
    "weight_decay": 0.01,
    "dropout": 0.0,
    "category_size": 0,
    "number_size": 0,
    "frequencies": 16,
    "frequency_scale": 0.1,
    "positive_weight": 1.0,
    "patience": 0,
    "precision": "auto",
    "seed": 0,
}


def fit_pack(
    variants: Sequence[Variant],
    data: TrainingData,
    *,
    accelerator: str = "cpu",
    metric: str = "auc",
) -> list[Fitted]:
    """Trains each variant, equal to training it alone up to float32 rounding.

    Args:
        variants: Settings out of `DEFAULTS`; "seed" draws the first weights and what is dropped,
            "order_seed" the order of the rows, "depth" counts hidden layers. "dropout" is the
            share of a hidden layer's outputs left out at each step. "category_size" and
            "number_size" are the sizes of a column's vector, 0 for none; a number's is made of
            "frequencies" that are drawn with the standard deviation "frequency_scale". With
            "patience", a network is done once so many epochs brought no better validation metric,
            and its best epoch's weights predict. "precision" is of
            `models.network_training.PRECISIONS`.
        data: Rows to train on and to score.
        accelerator: Lightning's name of the device, "cpu" or "gpu".
        metric: Of `models.metrics.METRICS`, that the curve has and patience goes by.

    Returns:
        One `Fitted` a variant, in their order; `predict` runs in numpy on the CPU, in float32.

    Raises:
        VariantError: A setting isn't known or out of range, or the GPU hasn't the precision.
    """
    settings = [completed("network", variant, DEFAULTS) for variant in variants]
    for each in settings:
        _check(each)

    fitted: dict[int, Fitted] = {}
    for places in alike(settings, FREE["network"]):
        started = time.perf_counter()
        shape = settings[places[0]]
        precision = precision_on(accelerator, str(shape["precision"]))
        columns = columns_of(
            data.x_train,
            data.categories,
            **{name: shape[name] for name in ("category_size", "number_size", "frequencies")},
        )
        trained = train(
            [settings[place] for place in places],
            columns,
            data,
            accelerator=accelerator,
            precision=precision,
            metric=metric,
        )
        codes = columns.codes_of(data.x_train) if columns.categories.size else None
        rows_valid = columns.rows_of(data.x_valid)
        shared_s = time.perf_counter() - started
        for network, place in zip(trained, places, strict=True):
            started = time.perf_counter()
            layers = tuple(network.layers)
            if columns.plain:
                predict = partial(predict_layers, columns.scaling, layers)
                scores = _through(layers, *rows_valid)
            else:
                vectors = Vectors.of(columns, network.vectors, codes)
                predict = partial(predict_vectors, vectors, layers)
                scores = _through(layers, vectors.of_rows(*rows_valid))
            curve = network.curve
            if not settings[place]["patience"]:
                # Scores of one class, or that aren't numbers: the caller tells of it.
                with suppress(MetricError):
                    last = METRICS[metric].score(data.y_valid, scores)
                    curve = [*curve, (shape["epochs"], last)]
            fitted[place] = Fitted(
                variant=dict(variants[place]),
                valid_scores=scores,
                seconds=shared_s / len(places) + time.perf_counter() - started,
                predict=predict,
                curve=tuple(curve),
                ran={"precision": precision},
            )
    return [fitted[place] for place in range(len(settings))]


def _check(settings: dict[str, Any]) -> None:
    counts = ("width", "depth", "epochs", "batch_rows", "frequencies")
    require_at_least("network", settings, counts, 1)
    from_zero = (
        *("weight_decay", "dropout", "patience", "seed", "order_seed"),
        *("category_size", "number_size"),
    )
    require_at_least("network", settings, from_zero, 0)
    require_above_zero("network", settings, ("learning_rate", "positive_weight", "frequency_scale"))
    if settings["dropout"] >= 1:
        raise VariantError(
            f"setting 'dropout' of 'network' is {settings['dropout']!r}; give a share below 1"
        )
    # 32 is a number to YAML.
    if str(settings["precision"]) not in PRECISIONS:
        raise VariantError(
            f"setting 'precision' of 'network' is {settings['precision']!r}; allowed: "
            f"{', '.join(PRECISIONS)}{suggestion(str(settings['precision']), PRECISIONS)}"
        )


def settled(variant: Variant, curve: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The variant as it is trained where there is nothing to watch: with its best epochs.

    Args:
        variant: Settings out of `DEFAULTS`.
        curve: Epochs and score of what was trained with them, from `Fitted` or an outcome.

    Returns:
        The settings; where patience chose the epochs, those epochs and a patience of 0.
    """
    if not variant.get("patience", DEFAULTS["patience"]) or not curve:
        return dict(variant)
    return {**variant, "epochs": best_epoch(curve), "patience": 0}


def predict_layers(
    scaling: Scaling, layers: Sequence[tuple[np.ndarray, np.ndarray]], x: np.ndarray
) -> np.ndarray:
    """Probability of 1 a row, (n,) float64, from layers of weights (I, O) and biases (1, O)."""
    return _through(layers, scaled(scaling, x))


def predict_vectors(
    vectors: Vectors, layers: Sequence[tuple[np.ndarray, np.ndarray]], x: np.ndarray
) -> np.ndarray:
    """The same of a network whose columns have vectors."""
    return _through(layers, vectors(x))


def _through(layers: Sequence[tuple[np.ndarray, np.ndarray]], h: np.ndarray) -> np.ndarray:
    for at, (w_io, b_1o) in enumerate(layers):
        # Not a matrix product: BLAS sums in an order that depends on the other rows, and a row
        # must score the same alone as among others.
        h = np.einsum("bi,io->bo", h if at == 0 else np.maximum(h, 0), w_io) + b_1o
    return probability(h[:, 0])


# The name by which models that are registered already were pickled.
_predict = predict_layers
