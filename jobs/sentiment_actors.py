"""The warm actors that label texts: what each holds, and how batches go to them and come back.

Knows nothing of files or of what is kept.
"""

import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from models.sentiment import Sentiment, load
from models.sentiment_engines import Engine, cuda_engine, distinct
from models.sentiment_gate import Recipe
from models.text import clean

# Of the texts that an actor remembers: comments such as "thank you" come again and again.
_REMEMBERED_BYTES = 32 << 20
# What Python keeps beside a text's characters: the string's, the row's and the dictionary's own.
_KEPT_BESIDE = 300


class SentimentScoringError(ValueError):
    """Texts can't be scored as asked; the message says why."""


def added(labels: Sequence[str]) -> dict[str, Any]:
    """The columns that are added, and their types."""
    types: dict[str, Any] = {"label": pl.String, "score": pl.Float32}
    types |= {f"p_{label}": pl.Float32 for label in labels}
    if {"negative", "positive"} <= set(labels):
        types["sentiment"] = pl.Float32
    return types | {"outcome": pl.String}


class _Scorer:
    """An actor: what it needs comes by Ray, so it needs no file of the driver's.

    It comes with each call, as references to the object store, and is read at the first one: Ray
    warns of references given to an actor that may have to start again without them.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self._labels = list(labels)
        self._ready: tuple[Engine, Any] | None = None
        self._model, self._memory = threading.Lock(), threading.Lock()
        self._remembered: dict[str, np.ndarray] = {}
        self._remembered_bytes = 0

    def _opened(self, needed: Sequence[Any]) -> tuple[Engine, Any]:
        """The engine and the tokenizer."""
        import ray
        from tokenizers import Tokenizer

        with self._model:
            if self._ready is None:
                packed, tokenizer = ray.get(list(needed))
                engine = packed.engine() if isinstance(packed, Recipe) else _on_card(packed)
                self._ready = engine, Tokenizer.from_str(tokenizer)
            return self._ready

    def probabilities(self, needed: Sequence[Any], ids: Sequence[np.ndarray]) -> np.ndarray:
        engine, _ = self._opened(needed)
        with self._model:
            return engine.probabilities(ids)

    def score(self, needed: Sequence[Any], texts: Any) -> pl.DataFrame:
        """The added columns of an Arrow array of texts."""
        _, tokenizer = self._opened(needed)
        cleaned = clean(pl.Series(texts))
        scored = np.flatnonzero((cleaned["text"] != "").to_numpy())
        once, places = distinct(cleaned["text"].gather(scored))
        names = once.to_list()
        known = [self._remembered.get(each) for each in names]
        new = [place for place, each in enumerate(known) if each is None]
        by_text = np.empty((len(names), len(self._labels)), np.float32)
        for place, each in enumerate(known):
            if each is not None:
                by_text[place] = each
        if new:
            encoded = tokenizer.encode_batch_fast([names[place] for place in new])
            # The other thread cleans and tokenises the next batch meanwhile.
            ids = [np.array(each.ids, np.int32) for each in encoded]
            by_text[new] = self.probabilities(needed, ids)
            self._remember({names[place]: by_text[place].copy() for place in new})
        return self._columns(cleaned["outcome"], scored, by_text[places])

    def _remember(self, found: Mapping[str, np.ndarray]) -> None:
        size = sum(_KEPT_BESIDE + len(text.encode()) for text in found)
        with self._memory:
            if self._remembered_bytes + size > _REMEMBERED_BYTES:
                self._remembered.clear()
                self._remembered_bytes = 0
            self._remembered.update(found)
            self._remembered_bytes += size

    def _columns(
        self, outcome: pl.Series, scored: np.ndarray, probabilities: np.ndarray
    ) -> pl.DataFrame:
        every = np.full((len(outcome), len(self._labels)), np.nan, np.float32)
        every[scored] = probabilities
        names = pl.Series(self._labels, dtype=pl.String)
        likeliest = np.where(np.isnan(every[:, 0]), 0, every.argmax(1))
        columns: dict[str, Any] = {
            "label": names.gather(likeliest),
            "score": every[np.arange(len(every)), likeliest],
        }
        columns |= {f"p_{label}": every[:, place] for place, label in enumerate(self._labels)}
        types = added(self._labels)
        if "sentiment" in types:
            columns["sentiment"] = columns["p_positive"] - columns["p_negative"]
        blank = np.isnan(every[:, 0])
        return pl.DataFrame({**columns, "outcome": outcome}, schema=types).with_columns(
            pl.when(~pl.Series(blank)).then(pl.col(name)).alias(name)
            for name in types
            if name != "outcome"
        )


def _on_card(files: Mapping[str, bytes]) -> Engine:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        return cuda_engine(load(Path(folder)))


@dataclass(frozen=True)
class Actor:
    """A `_Scorer` somewhere, with what it needs; its calls give Ray's references."""

    handle: Any
    needed: Sequence[Any]

    def probabilities(self, ids: Sequence[np.ndarray]) -> Any:
        """(n, labels) float32 of tokens."""
        return self.handle.probabilities.remote(self.needed, ids)

    def score(self, texts: Any) -> Any:
        """The columns `added`, of an Arrow array of texts."""
        return self.handle.score.remote(self.needed, texts)


@contextmanager
def pool(
    packed: Recipe | dict[str, bytes], sentiment: Sentiment, device: str, workers: int | None
) -> Iterator[list[Actor]]:
    """Actors, one a CPU or GPU; they end with the block.

    Args:
        packed: What makes the engine: a recipe, or on CUDA the model's files by name.
        sentiment: Its tokenizer and labels are used.
        device: "cpu" or "cuda".
        workers: How many; None takes the CPUs (GPUs) that are free.
    """
    import ray

    kind = "GPU" if device == "cuda" else "CPU"
    if workers is None:
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        # At least one: it waits for room.
        workers = max(1, int(free.get(kind, 0)))
    # Ray's own types don't know max_concurrency.
    remote: Any = ray.remote
    actor = remote(
        num_cpus=1,
        num_gpus=1 if device == "cuda" else 0,
        max_restarts=-1,
        max_task_retries=3,
        max_concurrency=2,
        # Each has one CPU; the libraries would start a thread for each CPU of the node.
        runtime_env={
            "env_vars": {
                "OMP_NUM_THREADS": "1",
                "POLARS_MAX_THREADS": "1",
                "TOKENIZERS_PARALLELISM": "false",
            }
        },
    )(_Scorer)
    needed = [ray.put(packed), ray.put(sentiment.tokenizer.to_str())]
    actors = [Actor(actor.remote(sentiment.labels), needed) for _ in range(workers)]
    try:
        yield actors
    finally:
        for each in actors:
            ray.kill(each.handle)


def scored(
    batches: Iterator[tuple[int, pl.DataFrame]], text_column: str, actors: Sequence[Actor]
) -> Iterator[tuple[int, pl.DataFrame, pl.DataFrame]]:
    """Batches as they finish, numbered, with the columns `added`; each actor has two in hand.

    Raises:
        SentimentScoringError: A batch lost its actor four times.
        TextError: The column isn't text.
    """
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    free = deque([*actors, *actors])
    waiting: dict[Any, tuple[Actor, int, pl.DataFrame]] = {}
    more = True
    while more or waiting:
        while free and more:
            batch = next(batches, None)
            if batch is None:
                more = False
                break
            actor = free.popleft()
            number, rows = batch
            waiting[actor.score(rows[text_column].to_arrow())] = (actor, number, rows)
        if not waiting:
            return
        (ready, *_), _ = ray.wait(list(waiting), num_returns=1)
        actor, number, rows = waiting.pop(ready)
        free.append(actor)
        try:
            found = ray.get(ready)
        except RayTaskError as error:
            raise error.as_instanceof_cause() from error  # type: ignore[no-untyped-call]
        except RayActorError as error:
            raise SentimentScoringError(
                f"batch {number} lost its actor four times, perhaps for want of memory: {error}; "
                "what is finished is kept, run again to go on"
            ) from error
        yield number, rows, found
