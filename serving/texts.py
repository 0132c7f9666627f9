"""Texts in, sentiment and its reasons out, by the registry's champion of texts.

A model is loaded when it is first asked for, and followed after that. Knows nothing of HTTP.
"""

import json
import logging
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from models import sentiment, sentiment_explain
from models.registry import Registry
from models.registry_connection import RegistryError
from models.registry_versions import Card
from models.sentiment_engines import Engine, torch_engine
from models.text import clean
from serving.schema import Problem, RequestError

MODEL = "sentiment"
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["texts"],
                    "properties": {"texts": {"type": "array", "items": {"type": "string"}}},
                },
                "example": {"texts": ["Delivered a day early, thank you!", "Zwrot trwa za długo."]},
            }
        },
    }
}

log = logging.getLogger("ray.serve")


class NoTextModel(ValueError):
    """There is no champion of texts, or it can't be loaded; the message says which."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """A loaded model."""

    card: Card
    model: sentiment.Sentiment
    engine: Engine


class TextModel:
    """The champion named `sentiment`, kept as the registry has it."""

    def __init__(self, registry: Registry, refresh_s: float) -> None:
        """Loads nothing yet."""
        self._registry, self._refresh_s = registry, refresh_s
        self._held: Held | None = None
        self._looked = float("-inf")
        self._lock = threading.Lock()

    def find(self) -> Held:
        """The model; blocks while it is loaded.

        Raises:
            NoTextModel: There is none.
            OSError: The registry can't be read, and nothing is loaded.
        """
        with self._lock:
            if self._held is not None and time.monotonic() - self._looked < self._refresh_s:
                return self._held
            try:
                card = self._registry.champion(MODEL)
                if card is None or card.family != MODEL:
                    raise NoTextModel(
                        f"no champion {MODEL!r} of texts in the registry; train one with "
                        "`liftyard sentiment train`"
                    )
                if self._held is None or self._held.card.version != card.version:
                    self._held = _load(self._registry, card)
            except (OSError, ValueError) as error:
                if self._held is None:
                    raise
                # What is loaded goes on answering.
                log.error(f"sentiment stays at version {self._held.card.version}: {error}")
            self._looked = time.monotonic()
            return self._held


def _load(registry: Registry, card: Card) -> Held:
    try:
        with tempfile.TemporaryDirectory() as folder:
            _, files = registry.folder(MODEL, Path(folder), card.version)
            model = sentiment.load(files)
        return Held(card=card, model=model, engine=torch_engine(model))
    except (RegistryError, sentiment.SentimentError) as error:
        raise NoTextModel(f"{MODEL!r} version {card.version} can't be loaded: {error}") from error


def parse(body: bytes, *, most: int) -> list[str]:
    """The texts of a request's body, JSON of the form `{"texts": [...]}`.

    Raises:
        RequestError: With status 400 the body isn't JSON; with 422 it isn't of this form.
    """
    try:
        said = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        reason = f'the body isn\'t JSON: {error}; send {{"texts": ["..."]}}'
        raise RequestError([Problem(reason=reason)], status=400) from error
    if not isinstance(said, dict) or set(said) != {"texts"} or not isinstance(said["texts"], list):
        raise RequestError([Problem(reason='the body must be {"texts": [...]} and nothing else')])
    return require_texts(said["texts"], most=most)


def require_texts(texts: list[Any], *, most: int) -> list[str]:
    """The texts, where they are some and not too many.

    Raises:
        RequestError: They aren't, or one is no text.
    """
    if not 0 < len(texts) <= most:
        reason = f"{len(texts)} texts; allowed: 1 to {most} a request"
        raise RequestError([Problem(reason=reason)])
    wrong = [
        Problem(row=place, reason=f"a {type(each).__name__}; allowed: a string")
        for place, each in enumerate(texts)
        if not isinstance(each, str)
    ]
    if wrong:
        raise RequestError(wrong)
    return texts


def score(held: Held, texts: list[str]) -> list[dict[str, Any]]:
    """Each text's label, probabilities, sentiment (-1 to 1), outcome and language.

    A text that says nothing, or isn't one, has nulls, and its outcome says why.
    """
    cleaned = clean(pl.Series("text", texts, dtype=pl.String))
    places = np.flatnonzero(cleaned["outcome"].is_in(["ok", "truncated"]).to_numpy())
    kept = cleaned["text"].gather(places).to_list()
    found = held.engine.probabilities(held.model.tokenize(kept))
    labels = held.model.labels
    by_place = dict(zip(places.tolist(), found.astype(np.float64).tolist(), strict=True))
    answers = []
    for place, (outcome, language) in enumerate(cleaned.select("outcome", "language").iter_rows()):
        shares = by_place.get(place)
        told = None if shares is None else dict(zip(labels, shares, strict=True))
        both = told is not None and {"positive", "negative"} <= told.keys()
        answers.append(
            {
                "label": None if told is None else max(told, key=lambda label: told[label]),
                "probabilities": told,
                "sentiment": told["positive"] - told["negative"] if told and both else None,
                "outcome": outcome,
                "language": language,
            }
        )
    return answers


def explain(held: Held, texts: list[str]) -> list[dict[str, Any]]:
    """What each token adds to its text's label, by integrated gradients, and as HTML.

    Raises:
        RequestError: A text has nothing to explain.
    """
    cleaned = clean(pl.Series("text", texts, dtype=pl.String))
    wrong = [
        Problem(row=place, reason=f"the text is {outcome!r}: there is nothing to explain")
        for place, outcome in enumerate(cleaned["outcome"])
        if outcome not in ("ok", "truncated")
    ]
    if wrong:
        raise RequestError(wrong)
    found = []
    for text in cleaned["text"]:
        try:
            why = sentiment_explain.explain(held.model, text, tolerance=0.1)
        except sentiment_explain.ExplanationError as error:
            raise RequestError([Problem(reason=f"{text!r}: {error}")]) from error
        found.append({**asdict(why), "html": sentiment_explain.html([why])})
    return found
