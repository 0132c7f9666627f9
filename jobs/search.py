"""Draws a sweep's variants from their declared space.

Knows nothing of how variants are trained. What doesn't learn from outcomes is drawn up front, and
what learns is told of packs in the order in which it was asked for them: the same seed gives the
same variants whatever the workers do.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from models import boosting, forest, logistic, network
from models.families import FREE, Variant
from models.network_training import PRECISIONS

# Every setting of every family, with its default.
SETTINGS = {
    "boosting": boosting.DEFAULTS,
    "forest": forest.DEFAULTS,
    "network": network.DEFAULTS,
    "logistic": logistic.DEFAULTS,
}

# Of the settings whose values are words, those that are allowed.
WORDS = {"precision": PRECISIONS}

# By name: whether they learn from outcomes.
SAMPLERS = {"random": False, "grid": False, "tpe": True, "cmaes": True}


class SearchError(ValueError):
    """A sampler can't draw from a space; the message says what to change."""


# 224 variants; what a pipeline without a `sweep` of its own tries.
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
            "trees": [25, 50, 75, 100],
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
            "category_size": 4,
            "learning_rate": {"min": 0.0005, "max": 0.01, "log": True},
            "weight_decay": {"min": 0.001, "max": 1.0, "log": True},
        },
    },
    "logistic": {
        "packs": 1,
        "pack_size": 8,
        "settings": {"l2": [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]},
    },
}


def draw(families: Mapping[str, Any], seed: int, sampler: str = "random") -> list[Variant]:
    """Draws every family's variants, by a sampler that doesn't learn.

    Args:
        families: Name to `jobs.config_sweep.Space`.
        seed: Draws are a function of it and of the space.
        sampler: "random" draws packs x pack_size of each family at most, with Optuna: a draw that
            repeats an earlier one is left out. "grid" gives every combination of the choices.

    Returns:
        Variants in the order of the families.

    Raises:
        SearchError: The grid has a range in it.
    """
    found: dict[tuple[tuple[str, Any], ...], Variant] = {}
    for family, space in families.items():
        drawn = _grid if sampler == "grid" else _draw_family
        for variant in drawn(family, space, seed):
            found[tuple(sorted(variant.items()))] = variant
    return list(found.values())


def variants(declared: Any, seed: int) -> "list[Variant] | Learned":
    """What a sweep tries: a list, or what asks for more as it learns.

    Args:
        declared: `jobs.config_sweep.Sweep`.
        seed: Of the draws.
    """
    if SAMPLERS[declared.sampler]:
        return Learned(declared.families, seed, sampler=declared.sampler, ahead=declared.ahead)
    return draw(declared.families, seed, declared.sampler)


def most(families: Mapping[str, Any], seed: int, sampler: str) -> list[str]:
    """The family of each variant that a sweep may try; a few may be drawn twice and fall out."""
    if SAMPLERS[sampler]:
        return [f for f, space in families.items() for _ in range(space.packs * space.pack_size)]
    return [str(variant["family"]) for variant in draw(families, seed, sampler)]


class Learned:
    """Packs from an Optuna sampler that learns, a study a family, families in turn.

    All members of a pack are trials, so that all teach; the first is drawn freely and the others
    take from it what a pack shares.
    """

    def __init__(
        self, families: Mapping[str, Any], seed: int, *, sampler: str, ahead: int = 16
    ) -> None:
        """Makes the studies.

        Args:
            families: Name to `jobs.config_sweep.Space`.
            seed: Of the sampler.
            sampler: "tpe" or "cmaes".
            ahead: Packs asked for beyond those told. Many keep workers busy, few teach sooner.

        Raises:
            SearchError: The sampler isn't installed.
        """
        self.ahead: int | None = ahead
        self._families, self._seed = families, seed
        self._studies = {family: _study(sampler, seed) for family in families}
        turns = [[family] * space.packs for family, space in families.items()]
        self._turns = [f for turn in itertools.zip_longest(*turns) for f in turn if f is not None]
        self._asked: list[tuple[str, list[Any]]] = []
        self._told = 0

    def ask(self) -> list[Variant] | None:
        """The next pack, or None when the budget is spent."""
        if len(self._asked) == len(self._turns):
            return None
        family = self._turns[len(self._asked)]
        space, study = self._families[family], self._studies[family]
        how = {name: _distribution(each) for name, each in space.settings.items()}
        turns = {
            name: each
            for name, each in space.settings.items()
            if name in FREE[family] and isinstance(each, list)
        }
        trials: list[Any] = []
        pack: list[Variant] = []
        for member in range(space.pack_size):
            fixed = {name: each[member % len(each)] for name, each in turns.items()}
            if trials:
                fixed |= {k: v for k, v in trials[0].params.items() if k not in FREE[family]}
            if fixed:
                study.enqueue_trial(fixed)
            trial = study.ask(how)
            trials.append(trial)
            own = {"seed": self._seed + member} if "seed" in FREE[family] else {"seed": self._seed}
            pack.append({"family": family, **own, **trial.params})
        self._asked.append((family, trials))
        return pack

    def tell(self, outcomes: Sequence[Any]) -> None:
        """Takes the outcomes (`jobs.sweep.Outcome`) of the first pack not told yet."""
        import optuna

        family, trials = self._asked[self._told]
        self._told += 1
        for trial, outcome in zip(trials, outcomes, strict=True):
            if outcome.score is None:
                self._studies[family].tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                self._studies[family].tell(trial, outcome.score)


def _study(sampler: str, seed: int) -> Any:
    import importlib.util
    import warnings

    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if sampler == "tpe":
        made: Any = optuna.samplers.TPESampler(seed=seed)
    elif importlib.util.find_spec("cmaes") is None:
        raise SearchError(
            "sampler 'cmaes' needs the package 'cmaes', which isn't installed: "
            "`pip install cmaes`, or take tpe"
        )
    else:
        with warnings.catch_warnings():
            # Choices are drawn at random beside it, which the docs say.
            warnings.simplefilter("ignore")
            made = optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    return optuna.create_study(direction="maximize", sampler=made)


def _grid(family: str, space: Any, seed: int) -> list[Variant]:
    for name, how in space.settings.items():
        if not isinstance(how, list | int | float | str):
            raise SearchError(
                f"setting {name!r} of {family!r} is a range, and a grid takes choices: "
                "list values, or take another sampler"
            )
    choices = {
        name: how if isinstance(how, list) else [how] for name, how in space.settings.items()
    }
    choices = {"seed": [seed], **choices}
    return [
        {"family": family, **dict(zip(choices, values, strict=True))}
        for values in itertools.product(*choices.values())
    ]


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
    if isinstance(how, int | float | str):
        return distributions.CategoricalDistribution([how])
    if isinstance(how.min, int) and isinstance(how.max, int):
        return distributions.IntDistribution(how.min, how.max, log=how.log)
    return distributions.FloatDistribution(how.min, how.max, log=how.log)
