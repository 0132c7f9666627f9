"""Draws a sweep's variants from their declared space.

Knows nothing of how variants are trained. All of them are drawn up front, so that the same seed
gives the same variants whatever the workers do.
"""

from collections.abc import Mapping
from typing import Any

from models import boosting, forest, network
from models.families import FREE, Variant

# Every setting of every family, with its default.
SETTINGS = {
    "boosting": boosting.DEFAULTS,
    "forest": forest.DEFAULTS,
    "network": network.DEFAULTS,
}

# 216 variants; what a pipeline without a `sweep` of its own tries.
SPACE: dict[str, dict[str, Any]] = {
    "boosting": {
        "packs": 20,
        "pack_size": 4,
        "settings": {
            "rounds": [50, 100, 200, 300],
            "depth": {"min": 2, "max": 6},
            "learning_rate": {"min": 0.02, "max": 0.2, "log": True},
            "min_child_weight": {"min": 1.0, "max": 30.0, "log": True},
            "l2": {"min": 0.1, "max": 30.0, "log": True},
            "row_share": {"min": 0.5, "max": 1.0},
            "feature_share": {"min": 0.3, "max": 1.0},
        },
    },
    "forest": {
        "packs": 10,
        "pack_size": 4,
        "settings": {
            "trees": [25, 50, 100, 200],
            "depth": {"min": 4, "max": 12},
            "min_leaf": {"min": 2, "max": 50, "log": True},
            "feature_share": {"min": 0.05, "max": 0.3, "log": True},
        },
    },
    "network": {
        "packs": 6,
        "pack_size": 16,
        "settings": {
            "width": [16, 32, 64],
            "depth": [1, 2],
            "epochs": [4, 8],
            "learning_rate": {"min": 0.0005, "max": 0.01, "log": True},
            "weight_decay": {"min": 0.001, "max": 1.0, "log": True},
        },
    },
}


def draw(families: Mapping[str, Any], seed: int) -> list[Variant]:
    """Draws every family's variants with Optuna's random sampler.

    Args:
        families: Name to `jobs.config.Space`.
        seed: Draws are a function of it and of the space.

    Returns:
        Variants in the order of the families; packs x pack_size of each, at most: a draw that
        repeats an earlier one is left out.
    """
    found: dict[tuple[tuple[str, Any], ...], Variant] = {}
    for family, space in families.items():
        for variant in _draw_family(family, space, seed):
            found[tuple(sorted(variant.items()))] = variant
    return list(found.values())


def _draw_family(family: str, space: Any, seed: int) -> list[Variant]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    free = {name: how for name, how in space.settings.items() if name in FREE[family]}
    fixed = {name: how for name, how in space.settings.items() if name not in FREE[family]}
    variants: list[Variant] = []
    for _ in range(space.packs):
        shared = _ask(study, fixed)
        for member in range(space.pack_size):
            own = _ask(study, {k: how for k, how in free.items() if not isinstance(how, list)})
            # Choices go round, so that a pack tries each before it repeats one.
            turns = {k: how[member % len(how)] for k, how in free.items() if isinstance(how, list)}
            seeds = {"seed": seed + member} if "seed" in FREE[family] else {"seed": seed}
            variants.append({"family": family, **seeds, **shared, **own, **turns})
    return variants


def _ask(study: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if not settings:
        return {}
    drawn: dict[str, Any] = study.ask({k: _distribution(how) for k, how in settings.items()}).params
    return drawn


def _distribution(how: Any) -> Any:
    from optuna import distributions

    if isinstance(how, list):
        return distributions.CategoricalDistribution(how)
    if isinstance(how, int | float):
        return distributions.CategoricalDistribution([how])
    if isinstance(how.min, int) and isinstance(how.max, int):
        return distributions.IntDistribution(how.min, how.max, log=how.log)
    return distributions.FloatDistribution(how.min, how.max, log=how.log)
