"""The replica: the champions in memory, kept as the registry has them, and smoke-tested on load.

Knows nothing of HTTP.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from models.registry import Card, Registry
from models.scoring import Scorer
from serving.batching import Batcher
from serving.gate import Gate
from serving.schema import RowReader, smoke_rows
from serving.settings import Settings

# With no models named, a model with its first champion is found by every tenth look.
LOOKS_A_SURVEY = 10

# A model that scores this many rows in so many seconds does so in the event loop.
INLINE_ROWS = 64
INLINE_S = 0.002

log = logging.getLogger("ray.serve")


class UnknownModel(ValueError):
    """No such model is served; the message names those there are."""


class RefusedModel(ValueError):
    """The model's champion failed on load, and there is none before it."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """A loaded model and what stands in front of it."""

    card: Card
    scorer: Scorer
    reader: RowReader
    batcher: Batcher


class Models:
    """The models served."""

    def __init__(self, settings: Settings) -> None:
        """Loads the champions.

        Raises:
            OSError: The registry can't be read.
        """
        self.settings = settings
        self.registry = Registry(settings.registry)
        self.served: dict[str, Served] = {}
        # By model: the version that was refused, and why.
        self.refused: dict[str, tuple[int, str]] = {}
        self._known: list[str] = []
        self._until_survey = 0
        self._refresh()

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

    def _refresh(self) -> None:
        for name in self._names():
            card = self.registry.champion(name)
            if card is None:
                continue
            served = self.served.get(name)
            if served is not None and served.card.version == card.version:
                self._now_serves(replace(served, card=card))
            elif self.refused.get(name, (None,))[0] != card.version:
                self._load(name, card)

    def _names(self) -> Sequence[str]:
        if self.settings.models is not None:
            return self.settings.models
        if self._until_survey == 0:
            # Reads every version there is, so not every time.
            self._until_survey = LOOKS_A_SURVEY
            self._known = sorted(champions(self.registry))
        self._until_survey -= 1
        return self._known

    def _load(self, name: str, card: Card) -> None:
        try:
            _, scorer = self.registry.load(name, card.version)
            _smoke_test(scorer)
            quick = _is_quick(scorer)
        except Exception as error:
            # Not stopped by whatever a stored model raises: the others go on answering.
            reason = f"{type(error).__name__}: {error}"
            self.refused = {**self.refused, name: (card.version, reason)}
            log.error(f"model {name!r} version {card.version} is refused: {reason}")
            return
        self._now_serves(
            Served(
                card=card,
                scorer=scorer,
                reader=RowReader(scorer.encoder),
                batcher=Batcher(scorer.predict, inline_rows=INLINE_ROWS if quick else 0),
            )
        )

    def _now_serves(self, served: Served) -> None:
        # Requests read these in another thread: a new dict, never a change of one.
        name = served.card.name
        self.served = {**self.served, name: served}
        self.refused = {other: why for other, why in self.refused.items() if other != name}

    def find(self, name: str) -> Served:
        """The model.

        Raises:
            UnknownModel: It isn't served.
            RefusedModel: It failed on load.
        """
        served = self.served.get(name)
        if served is None and name in self.refused:
            version, reason = self.refused[name]
            raise RefusedModel(f"model {name!r} version {version} was refused: {reason}")
        if served is None:
            raise UnknownModel(f"no model {name!r} is served; there are {list(self.served)}")
        return served

    def health(self) -> dict[str, Any]:
        """What /healthz tells: "status" is "ready" or "not ready"."""
        wanted = set(self.settings.models or ()) | self.served.keys() | self.refused.keys()
        absent = sorted(wanted - self.served.keys())
        return {
            "status": "not ready" if absent or not self.served else "ready",
            "models": {name: served.card.version for name, served in self.served.items()},
            "not_loaded": absent,
            "settings": self.settings.digest(),
            "refused": {
                name: f"version {version}: {reason}"
                for name, (version, reason) in self.refused.items()
            },
        }


class Server:
    """What Ray Serve makes a replica of."""

    def __init__(self, settings: Settings) -> None:
        self.models = Models(settings)
        self.gate = Gate(settings)
        loop = asyncio.get_running_loop()
        every = settings.refresh_s
        self._watch = [
            loop.create_task(self.models.keep_fresh()),
            loop.create_task(self.gate.keep_fresh(every)),
        ]

    def __serve_build_asgi_app__(self) -> Any:
        from serving.routes import application

        return application(self.models, self.gate)


def champions(registry: Registry) -> set[str]:
    """Names of the models that have a champion."""
    return {card.name for card in registry.models() if "champion" in card.aliases}


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
