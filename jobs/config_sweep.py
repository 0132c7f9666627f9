"""What a pipeline file may say of its sweep: families, and what variants are drawn from."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from jobs.search import SAMPLERS, SETTINGS, SPACE, WORDS, draw
from models.families import FAMILIES
from models.naming import suggestion


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Range(_Model):
    """Values from min to max, whole where both are; `log` draws small ones as often as large."""

    min: int | float
    max: int | float
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if self.min > self.max or (self.log and self.min <= 0):
            raise ValueError(f"range from {self.min} to {self.max}: min <= max, above 0 for log")
        return self


class Space(_Model):
    """What a family's variants are drawn from.

    Each of `packs` draws is tried with `pack_size` draws of the settings in which variants share
    work (`models.families.FREE`). A setting is a value, a list of choices or a range.
    """

    packs: int = Field(ge=1)
    pack_size: int = Field(ge=1)
    settings: dict[str, Range | list[int | float | str] | int | float | str] = {}


class Halved(_Model):
    """Successive halving of boosters; see `jobs.sweep.Halving`."""

    rungs: list[int] = Field(min_length=1)
    keep: float = Field(default=1 / 3, gt=0, lt=1)
    bracket: int = Field(default=27, ge=2)
    hyperband: bool = False

    @field_validator("rungs")
    @classmethod
    def _ascending(cls, rungs: list[int]) -> list[int]:
        if rungs[0] < 1 or rungs != sorted(set(rungs)):
            raise ValueError(f"rungs {rungs}: give rounds from 1 up, ascending")
        return rungs


class Sweep(_Model):
    """The families that a sweep trains; what a family leaves out is its default space's.

    `sampler` draws the variants; one that learns from outcomes asks for `ahead` packs beyond those
    told. `metric`, on the validation rows, is what models are compared by; with `folds`, variants
    are by its mean over so many folds of the training rows. `latency` measures what
    a row's score takes as well, for the report's Pareto front, and a model that takes more than
    `slowest_us` isn't registered. `halving` stops boosters early. `ensemble` is how many of the
    best are tried together (0: the best alone), and `calibrate` lets validation choose among raw
    scores, Platt's sigmoid and isotonic regression. `refit` is by how many seeds what was chosen
    is trained once more, on validation's rows too (0: it isn't). `gpus` are those of a worker where
    the run is on CUDA; below 1, several workers share one.
    """

    sampler: Literal["random", "grid", "tpe", "cmaes"] = "random"
    ahead: int = Field(default=16, ge=1)
    metric: Literal["auc", "average_precision", "log_loss", "brier", "top_decile_lift"] = "auc"
    folds: int = Field(default=0, ge=0, le=50)
    latency: bool = False
    slowest_us: float | None = Field(default=None, gt=0)
    halving: Halved | None = None
    gpus: float = Field(default=1, gt=0)
    ensemble: int = Field(default=10, ge=0, le=50)
    calibrate: bool = False
    refit: int = Field(default=0, ge=0, le=20)
    families: dict[str, Space] = Field(
        default_factory=lambda: {name: Space.model_validate(space) for name, space in SPACE.items()}
    )

    @field_validator("families", mode="before")
    @classmethod
    def _completed(cls, families: object) -> object:
        if not isinstance(families, dict):
            return families
        for name, space in families.items():
            if name not in FAMILIES:
                raise ValueError(
                    f"family {name!r}; allowed: {', '.join(FAMILIES)}"
                    f"{suggestion(name, list(FAMILIES))}"
                )
            for setting in (space or {}).get("settings", {}):
                if setting not in SETTINGS[name]:
                    raise ValueError(
                        f"{setting!r} isn't a setting of {name!r}; allowed: "
                        f"{', '.join(SETTINGS[name])}{suggestion(setting, list(SETTINGS[name]))}"
                    )
        return {name: {**SPACE[name], **(space or {})} for name, space in families.items()}

    @model_validator(mode="after")
    def _words_fit(self) -> Sweep:
        for family, space in self.families.items():
            for setting, how in space.settings.items():
                for value in how if isinstance(how, list) else [how]:
                    allowed = WORDS.get(setting)
                    if isinstance(value, str) and value not in (allowed or ()):
                        what = f"allowed: {', '.join(allowed)}" if allowed else "give a number"
                        raise ValueError(f"{setting!r} of {family!r} is {value!r}; {what}")
        return self

    @model_validator(mode="after")
    def _sampler_fits(self) -> Sweep:
        if self.folds == 1:
            raise ValueError("folds 1: give 2 or more, or 0 to score on the validation rows")
        if self.slowest_us is not None and not self.latency:
            raise ValueError(f"slowest_us {self.slowest_us} needs latency: true")
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus {self.gpus}: give a share of one GPU, or a whole number")
        if self.sampler == "grid":
            draw(self.families, 0, "grid")
        if self.halving and SAMPLERS[self.sampler] and self.ahead < self.halving.bracket:
            raise ValueError(
                f"sampler {self.sampler!r} asks {self.ahead} packs ahead, fewer than the "
                f"{self.halving.bracket} that a bracket waits for; raise ahead or lower bracket"
            )
        return self
