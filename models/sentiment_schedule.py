"""What each step of a sentiment training sees, and at which rate: planned before the first step.

Rates decay by layer (Howard and Ruder 2018: the lower, the slower), warm up and fall linearly.
Batches hold texts of one length where they can, so that nothing is padded and attention needs no
mask. Knows nothing of Lightning.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to train; the defaults are those of the published figures in English.

    Attributes:
        epochs: Passes over the texts; fractions too.
        batch: Texts a step, over all processes.
        learning_rate: Of the head and the highest layer, at its highest.
        layer_decay: Each layer's rate is this times the one above it.
        warm_up: Share of the steps over which the rate rises.
        weight_decay: AdamW's, on matrices.
        smoothing: Of labels: what of the target is spread over all classes.
        class_weights: Whether classes weigh by the inverse of their frequency.
        freeze_words: Whether word embeddings stay as they are; saves a third of the optimizer.
        precision: "bf16" multiplies in bfloat16 and keeps weights in float32.
        checks: Validations an epoch.
        choose_by: The validation metric whose best weights are kept.
        patience: Validations without a better one after which it stops; None never.
        checkpoint_steps: Steps between checkpoints.
        seed: Of the order, dropout and nothing else.
    """

    epochs: float = 2.0
    batch: int = 32
    learning_rate: float = 1.0e-4
    layer_decay: float = 0.9
    warm_up: float = 0.06
    weight_decay: float = 0.01
    smoothing: float = 0.05
    class_weights: bool = True
    freeze_words: bool = True
    precision: Literal["bf16", "fp32"] = "bf16"
    checks: int = 2
    choose_by: Literal["macro_recall", "macro_f1"] = "macro_f1"
    patience: int | None = None
    checkpoint_steps: int = 200
    seed: int = 0


def plan(lengths: Sequence[int], settings: Settings) -> list[np.ndarray]:
    """The batches of every step: places of texts, as many as `settings.batch`.

    Each epoch the texts are shuffled, put in order of length, and cut; the batches then go in
    any order. A text is in one batch an epoch; the last few of an epoch fill up with its first.

    Args:
        lengths: Tokens of each text.
        settings: epochs, batch and seed are used.
    """
    sizes = np.asarray(lengths)
    per_epoch = math.ceil(len(sizes) / settings.batch)
    steps = max(1, round(per_epoch * settings.epochs))
    planned: list[np.ndarray] = []
    epoch = 0
    while len(planned) < steps:
        draws = np.random.default_rng([settings.seed, epoch])
        order = draws.permutation(len(sizes))
        order = order[np.argsort(sizes[order], kind="stable")]
        order = np.resize(order, per_epoch * settings.batch)
        rows = order.reshape(per_epoch, settings.batch)
        planned += list(rows[draws.permutation(per_epoch)])
        epoch += 1
    return planned[:steps]


def parameter_groups(module: Any, settings: Settings) -> list[dict[str, Any]]:
    """AdamW's groups: a rate for each layer, and weight decay on matrices only."""
    depth = int(getattr(module.encoder.config, "num_hidden_layers", 0))
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = re.search(r"\blayers?\.(\d+)\.", name)
        below = depth - 1 - int(layer[1]) if layer else depth * name.startswith("encoder.")
        rate = settings.learning_rate * settings.layer_decay**below
        decay = settings.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": each, "lr": rate, "weight_decay": decay}
        for (rate, decay), each in groups.items()
    ]


def rate_at(step: int, steps: int, warm_up: float) -> float:
    """The share of the highest rate at a step, from 0: up over the warm-up, then down to 0."""
    rising = max(1, round(steps * warm_up))
    if step < rising:
        return (step + 1) / rising
    return max(0.0, (steps - step) / max(1, steps - rising))
