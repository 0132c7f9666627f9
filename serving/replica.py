"""A replica's champions in memory, kept as the registry has them, and smoke-tested on load.

Knows nothing of HTTP.
"""

import asyncio
import hashlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cluster.device import Device
from models.encoding import Encoder
from models.registry import Registry
from models.registry_connection import RegistryError
from models.registry_versions import Card
from models.scoring import Scorer
from serving.batching import Batcher
from serving.device import CPU, placed
from serving.online import StoreError, Stores
from serving.schema import RowReader, smoke_rows
from serving.settings import Rollout, Settings
from serving.shadow import Shadow
from serving.texts import TextModel

CHAMPION, CHALLENGER = "champion", "challenger"

# With no models named, a model with its first champion is found by every tenth look.
LOOKS_A_SURVEY = 10

# A model that scores this many rows in so many seconds does so in the event loop.
INLINE_ROWS = 64
INLINE_S = 0.002

log = logging.getLogger("ray.serve.liftyard")
log.setLevel(logging.INFO)


class UnknownModel(ValueError):
    """No such model is served; the message names those there are."""


class RefusedModel(ValueError):
    """The model's version failed on load, and there is none before it."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A loaded version, where it scores, and what stands in front of it."""

    card: Card
    device: Device
    scorer: Scorer
    reader: RowReader
    batcher: Batcher


class Models:
    """The models of a replica.

    `elsewhere` has the names of those with replicas of their own, which answer for them.
    """

    def __init__(
        self, settings: Settings, *, alone: str | None = None, device: Device = CPU
    ) -> None:
        """Loads the champions.

        Args:
            settings: What is served.
            alone: The model that this replica holds alone; None for those that share.
            device: Where models score that can do so there.

        Raises:
            OSError: The registry or the store of features can't be read.
        """
        self.settings = settings
        self.alone, self.device = alone, device
        self.elsewhere: frozenset[str] = frozenset()
        self.registry = Registry(settings.registry)
        self.served: dict[str, Served] = {}
        # By model, where it is a canary or a shadow.
        self.challengers: dict[str, Served] = {}
        # By model and what it was to become, champion or challenger: the version, and why not.
        self._refused: dict[tuple[str, str], tuple[int, str]] = {}
        self.shadow = Shadow()
        self.texts = TextModel(self.registry, settings.refresh_s)
        self.stores = _stores(settings)
        # Why settings that were to be taken on weren't.
        self.not_applied: str | None = None
        self._names_of: dict[str, str] = {}
        self._known: list[str] = []
        self._until_survey = 0
        self._one_at_a_time = threading.RLock()
        self._refresh()

    @property
    def refused(self) -> dict[str, tuple[int, str]]:
        """By model: the version that was refused in place of the one that answers, and why."""
        return {name: why for (name, role), why in self._refused.items() if role == CHAMPION}

    @property
    def refused_challengers(self) -> dict[str, tuple[int, str]]:
        """By model: the challenger that was refused, and why."""
        return {name: why for (name, role), why in self._refused.items() if role == CHALLENGER}

    async def keep_fresh(self) -> None:
        """Follows the registry for as long as the replica lives."""
        unreachable = False
        while True:
            await asyncio.sleep(self.settings.refresh_s)
            try:
                await asyncio.to_thread(self._refresh)
                unreachable = False
            except Exception as error:
                # What is loaded goes on answering; once is enough to say so.
                if not unreachable:
                    log.error(f"the registry can't be read, models stay as they are: {error}")
                unreachable = True

    def adapt(self, settings: Settings) -> None:
        """Serves by other settings from now on; what they leave as it was isn't loaded again.

        Raises:
            OSError: The registry can't be read; then all stays as it was.
        """
        if settings.registry != self.settings.registry:
            other = Models(settings, alone=self.alone, device=self.device)
            with self._one_at_a_time:
                self.elsewhere |= other.elsewhere
                self.settings, self.registry = settings, other.registry
                self.served, self.challengers = other.served, other.challengers
                self.stores, self.texts = other.stores, other.texts
                self._refused, self._names_of = other._refused, other._names_of
                self._known, self._until_survey = other._known, other._until_survey
                self.elsewhere = other.elsewhere
            return
        before, stores = self.settings, self.stores
        if settings.store != before.store:
            stores = _stores(settings)
        # Not in the middle of another look, which would end by other settings than it began with.
        with self._one_at_a_time:
            self.settings = settings
            try:
                self._until_survey = 0
                self._refresh()
            except BaseException:
                self.settings = before
                raise
            self.stores = stores

    def _refresh(self) -> None:
        with self._one_at_a_time:
            if self.stores is not None:
                try:
                    self.stores.reload()
                except StoreError as error:
                    log.error(f"online features stay as they are: {error}")
            names = self._names()
            for name in names:
                rollout = self.settings.rollout(name)
                self._follow(name, CHAMPION, self._answering(name, rollout))
                challenger = self.registry.challenger(name) if rollout.challenged else None
                self._follow(name, CHALLENGER, challenger)
            # New dicts, never a change of one: requests read them in another thread. At each moment
            # a model is in one of the first two, and one that is held is asked here.
            self.elsewhere = frozenset(self.settings.alone if self.alone is None else ())
            self.served = _of(names, self.served)
            self.challengers = _of(names, self.challengers)
            self._refused = {key: why for key, why in self._refused.items() if key[0] in names}
            self._names_of = {
                alias: name
                for name in (*names, *self.elsewhere)
                for alias in self.settings.rollout(name).aliases
            }

    def _answering(self, name: str, rollout: Rollout) -> Card | None:
        if rollout.version is None:
            return self.registry.champion(name)
        try:
            return self.registry.card(name, rollout.version)
        except RegistryError as error:
            self._refuse(name, CHAMPION, rollout.version, str(error))
            return None

    def _names(self) -> Sequence[str]:
        held = self.settings.held(self.alone)
        if held is not None:
            return held
        if self._until_survey == 0:
            # Reads every version there is, so not every time.
            self._until_survey = LOOKS_A_SURVEY
            self._known = sorted(champions(self.registry))
        self._until_survey -= 1
        return self._known

    def _follow(self, name: str, role: str, card: Card | None) -> None:
        """Brings what is in memory to the version that the registry has."""
        here = self.served if role == CHAMPION else self.challengers
        if card is None:
            # A champion stays while it has no successor; a challenger goes.
            if role == CHALLENGER:
                self._now(name, role, None)
            return
        held = here.get(name)
        if held is not None and held.card.version == card.version:
            self._now(name, role, replace(held, card=card))
        elif self._refused.get((name, role), (None,))[0] != card.version:
            self._load(name, role, card)

    def _load(self, name: str, role: str, card: Card) -> None:
        # A challenger that wins, or a champion that went back, is in memory already.
        others = [self.served.get(name), self.challengers.get(name)]
        held = next((each for each in others if each and each.card.version == card.version), None)
        if held is not None:
            self._now(name, role, replace(held, card=card))
            return
        try:
            _, loaded = self.registry.load(name, card.version)
            scorer, device = placed(loaded, self.device)
            _smoke_test(scorer)
            quick = _is_quick(scorer)
            if role == CHALLENGER and name in self.served:
                _require_same_rows(self.served[name].scorer.encoder, scorer.encoder)
        except Exception as error:
            # Not stopped by whatever a stored model raises: the others go on answering.
            self._refuse(name, role, card.version, f"{type(error).__name__}: {error}")
            if role == CHALLENGER:
                self.challengers = {
                    other: each for other, each in self.challengers.items() if other != name
                }
            return
        log.info(f"model {name!r} version {card.version} scores on {device.kind}: {device.reason}")
        self._now(
            name,
            role,
            Served(
                card=card,
                device=device,
                scorer=scorer,
                reader=RowReader(scorer.encoder),
                batcher=Batcher(scorer.predict, inline_rows=INLINE_ROWS if quick else 0),
            ),
        )

    def _refuse(self, name: str, role: str, version: int, reason: str) -> None:
        if self._refused.get((name, role), (None,))[0] != version:
            log.error(f"model {name!r} version {version} is refused as {role}: {reason}")
        self._refused = {**self._refused, (name, role): (version, reason)}

    def _now(self, name: str, role: str, served: Served | None) -> None:
        here = self.served if role == CHAMPION else self.challengers
        now = {other: each for other, each in here.items() if other != name or served is not None}
        if served is not None:
            now[name] = served
        if role == CHAMPION:
            self.served = now
        else:
            self.challengers = now
        if (name, role) in self._refused:
            self._refused = {key: why for key, why in self._refused.items() if key != (name, role)}

    def __contains__(self, name: object) -> bool:
        """Whether the model is served, here or elsewhere."""
        return name in self.served or name in self.elsewhere

    def away(self, name: str | None) -> bool:
        """Whether replicas of its own answer for the model."""
        return name in self.elsewhere and name not in self.served

    def name(self, asked: str) -> str:
        """The model that a client means by a name or an alias."""
        return self._names_of.get(asked, asked)

    def require(self, name: str) -> None:
        """The model is served.

        Raises:
            UnknownModel, RefusedModel: As `find`.
        """
        if name not in self:
            self.find(name)

    def find(self, name: str) -> Served:
        """The model, held here.

        Raises:
            UnknownModel: It isn't served.
            RefusedModel: It failed on load.
        """
        served = self.served.get(name)
        if served is None and name in self.refused:
            version, reason = self.refused[name]
            raise RefusedModel(f"model {name!r} version {version} was refused: {reason}")
        if served is None:
            there = sorted(self.served.keys() | self.elsewhere)
            raise UnknownModel(f"no model {name!r} is served; there are {there}")
        return served

    def pick(self, name: str, key: bytes) -> Served:
        """The version that answers a request: of the canary's share of keys, the challenger.

        A key always gets the same while the share stays, and those that get the challenger still
        do when the share grows.

        Args:
            name: The model.
            key: Whatever the request is told apart by.

        Raises:
            UnknownModel, RefusedModel: As `find`.
        """
        served = self.find(name)
        share = self.settings.rollout(name).canary
        challenger = self.challengers.get(name) if share else None
        if challenger is None:
            return served
        # The name too, so that not the same customers are every model's canaries.
        digest = hashlib.blake2b(name.encode() + b"\0" + key, digest_size=8).digest()
        return challenger if int.from_bytes(digest) < share * 2**64 else served

    def health(self) -> dict[str, Any]:
        """What /healthz tells of this replica: "status" is "ready" or "not ready"."""
        held = self.settings.held(self.alone)
        wanted = set(held or ()) | self.served.keys() | self.refused.keys()
        absent = sorted(wanted - self.served.keys())
        empty = not self.served and not self.elsewhere
        return {
            "status": "not ready" if absent or empty else "ready",
            "models": {name: served.card.version for name, served in self.served.items()},
            "challengers": {name: each.card.version for name, each in self.challengers.items()},
            "not_loaded": absent,
            "settings": self.settings.digest(),
            "refused": _told(self.refused),
            "refused_challengers": _told(self.refused_challengers),
            "not_applied": self.not_applied,
        }


def _stores(settings: Settings) -> Stores | None:
    return None if settings.store is None else Stores(Path(settings.store))


def _of(names: Sequence[str], here: Mapping[str, Served]) -> dict[str, Served]:
    return {name: each for name, each in here.items() if name in names}


def _told(refused: Mapping[str, tuple[int, str]]) -> dict[str, str]:
    return {name: f"version {version}: {reason}" for name, (version, reason) in refused.items()}


def champions(registry: Registry) -> set[str]:
    """Names of the models that have a champion; what has no features isn't of rows."""
    return {card.name for card in registry.models() if "champion" in card.aliases and card.features}


def _require_same_rows(here: Encoder, there: Encoder) -> None:
    """A request is written for the one that answers, before it is known which will."""
    mine = {column.name: column.kind for column in here.columns}
    other = {column.name: column.kind for column in there.columns}
    if mine != other:
        apart = sorted(mine.items() ^ other.items())
        raise ValueError(
            f"takes other rows than the version that answers ({apart}), so the two can't share "
            "requests; promote it, or serve it by a name of its own"
        )


def _smoke_test(scorer: Scorer) -> None:
    """Scores a row of nulls and a row of plain values; both are probabilities, or it's an error."""
    scores_n = scorer.predict(scorer.encoder.transform_rows(smoke_rows(scorer.encoder)))
    if scores_n.shape != (2,) or not np.all((scores_n >= 0) & (scores_n <= 1)):
        raise ValueError(
            f"the smoke test of two rows gave {scores_n}, not two probabilities; "
            "register a version that scores rows of nulls, and roll this one back"
        )


def _is_quick(scorer: Scorer) -> bool:
    x = scorer.encoder.transform_rows(smoke_rows(scorer.encoder)[1:] * INLINE_ROWS)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        scorer.predict(x)
        seconds.append(time.perf_counter() - started)
    return min(seconds) <= INLINE_S
