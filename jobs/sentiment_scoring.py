"""Labels every text of a file or table on the connected Ray cluster, and forgets nothing finished.

The driver cuts the rows into numbered batches; warm actors, one CPU (or GPU) each, clean, tokenise
and score them, two at a time, so that one batch is made ready while another is in the model. A
finished batch is a file, written aside and renamed, so a killed driver goes on after it, and a
killed actor repeats only what it had in hand. At the end the batches become the output, in order
and at once. Neither side ever holds more than a few batches.
"""

import hashlib
import json
import os
import secrets
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console

from cluster import storage
from cluster.files import replace_text
from jobs import progress
from models.naming import suggestion
from models.sentiment import Sentiment, load
from models.sentiment_engines import (
    Chosen,
    Engine,
    Recipe,
    agreement,
    cuda_engine,
    distinct,
    recipe,
    torch_engine,
)
from models.text import clean

BATCH_ROWS = 4_096
SAMPLE_TEXTS = 1_800
# Calibrating takes about as long as int8 saves on so many.
FEW_TEXTS = 10_000
# Texts that an actor remembers: comments such as "thank you" come again and again.
_REMEMBERED = 50_000
_FILES = (".csv", ".parquet")


class SentimentScoringError(ValueError):
    """Texts can't be scored as asked; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What was done.

    Attributes:
        rows: Of the output.
        resumed: Rows among them that an earlier run had finished.
        seconds: From the first batch to the last.
        engine: Which engine scored, and why.
        outcomes: Rows by outcome of `models.text.clean`.
    """

    rows: int
    resumed: int
    seconds: float
    engine: Chosen
    outcomes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class _Source:
    frame: pl.LazyFrame
    rows: int
    identity: str


def score_file(
    file: str,
    out: str,
    *,
    text_column: str,
    model: Path,
    storage_root: str,
    work: Path,
    engine: str = "auto",
    at_least: float = 0.998,
    device: str = "cpu",
    workers: int | None = None,
    batch_rows: int = BATCH_ROWS,
    cache: Path | None = None,
    on_start: Callable[[int, Chosen], None] = lambda rows, chosen: None,
    on_done: Callable[[int], None] = lambda rows: None,
) -> Scored:
    """Writes the rows in their order with `label`, `score`, `p_CLASS` and `outcome`.

    Where the classes are negative and positive among others, `sentiment`, the probability of
    positive less that of negative, is a column too: the number for features over time. A text
    that can't be scored has nulls, and its outcome says why.

    Args:
        file: `.csv` (read as text) or `.parquet`, or the name of a table under `storage_root`.
        out: `.csv` or `.parquet`, written whole or not at all, or a table's name.
        text_column: Of the texts.
        model: Folder of `models.sentiment`.
        storage_root: Where tables are.
        work: Folder for the batches of a table; those of a file lie beside it, in `OUT.parts`.
        engine: Of `models.sentiment_engines.ENGINES`; "auto" takes bf16 for few texts.
        at_least: Share of a sample's texts whose label must be fp32's.
        device: "cpu", or "cuda" for bf16 on a GPU an actor.
        workers: Actors; None takes the CPUs (GPUs) that are free.
        batch_rows: Rows in a batch; what a killed actor repeats.
        cache: Of converted models; None for the user's.
        on_start: Told the rows and the engine.
        on_done: Told the rows of each finished batch.

    Raises:
        SentimentScoringError: A file, column or setting isn't as it must be, a batch lost its
            actor four times, or the batches beside `out` are another run's.
        TextError: The column isn't text.
        EngineError: There is no such engine.
        OSError: Something can't be read or written.
    """
    source = _open(file, storage_root)
    sentiment = load(model)
    columns = list(source.frame.collect_schema())
    added = list(_nothing(sentiment.labels))
    if text_column not in columns:
        raise SentimentScoringError(
            f"{file} has no column {text_column!r}: there are {', '.join(columns)}"
            f"{suggestion(text_column, columns)}"
        )
    if taken := [name for name in added if name in columns]:
        raise SentimentScoringError(
            f"{file} already has columns {taken}, which are to be written: rename them"
        )
    sample = _sample(source, text_column)
    few = engine == "auto" and device == "cpu" and source.rows < FEW_TEXTS
    packed, chosen = _prepared(
        sentiment, sample, "bf16" if few and sample else engine, at_least, cache, device, model
    )
    parts = work / f"{out}.parts" if _is_table(out) else Path(f"{out}.parts")
    said = {
        "source": source.identity,
        "text_column": text_column,
        "model": _digest_of(model),
        "engine": f"{engine} {at_least} {device}",
        "batch_rows": batch_rows,
    }
    _begin(parts, said)
    on_start(source.rows, chosen)
    began = time.monotonic()
    done = {int(part.stem) for part in parts.glob("*.parquet")}
    resumed = sum(min(batch_rows, source.rows - number * batch_rows) for number in done)
    if resumed:
        on_done(resumed)
    left = (
        (number, rows)
        for number, rows in enumerate(_batches(source.frame, batch_rows))
        if number not in done
    )
    with _pool(packed, sentiment, device, workers) as actors:
        if device == "cuda" and sample:
            chosen = _gated(actors[0], sentiment, sample, at_least, chosen)
        for number, rows, found in _scored(left, text_column, actors):
            _commit(parts, number, rows.hstack(found))
            on_done(rows.height)
    seconds = time.monotonic() - began
    numbers = range(max(1, -(-source.rows // batch_rows)))
    if source.rows == 0:
        empty = source.frame.head(0).collect()
        _commit(parts, 0, empty.hstack(pl.DataFrame(schema=_nothing(sentiment.labels))))
    every = pl.scan_parquet([_part(parts, number) for number in numbers])
    outcomes = dict(every.group_by("outcome").len().collect(engine="streaming").iter_rows())
    _publish(every, out, storage_root, {"sentiment_engine": chosen.reason, "source": file})
    shutil.rmtree(parts)
    return Scored(
        rows=source.rows, resumed=resumed, seconds=seconds, engine=chosen, outcomes=outcomes
    )


@contextmanager
def shown(
    console: Console,
) -> Iterator[tuple[Callable[[int, Chosen], None], Callable[[int], None]]]:
    """A live bar with texts a second and time left: `on_start` and `on_done` of `score_file`."""
    with progress.bars(console) as bars:
        bar = bars.add_task("getting ready", total=None, said="")
        state = {"rows": 0, "done": 0, "counted": 0, "began": time.monotonic()}

        def on_start(rows: int, chosen: Chosen) -> None:
            console.print(f"engine {chosen.name}: {chosen.reason}", soft_wrap=True, markup=False)
            state.update(rows=rows, began=time.monotonic())
            bars.update(bar, description="texts", total=rows)

        def on_done(rows: int) -> None:
            state["done"] += rows
            # What an earlier run had done comes at once, and is no rate.
            passed = time.monotonic() - state["began"]
            if passed > 0.1:
                state["counted"] += rows
            rate = state["counted"] / max(passed, 1e-9)
            left = f"{(state['rows'] - state['done']) / rate:,.0f} s left" if rate else ""
            bars.update(bar, advance=rows, said=f"{rate:,.0f} texts/s, {left}")

        yield on_start, on_done


# --- what is scored


def _is_table(name: str) -> bool:
    return Path(name).suffix not in _FILES


def _open(file: str, root: str) -> _Source:
    if _is_table(file):
        if Path(file).exists() and Path(file).is_file():
            raise SentimentScoringError(f"{file}: allowed are .csv and .parquet files, and tables")
        version = storage.version(root, file)
        frame = storage.scan(root, file, version)
        identity = f"{root}/{file}@{version}"
    else:
        path = Path(file)
        if not path.is_file():
            raise SentimentScoringError(f"no file {file}")
        about = path.stat()
        identity = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
        frame = (
            pl.scan_parquet(path)
            if path.suffix == ".parquet"
            else pl.scan_csv(path, infer_schema=False)
        )
    try:
        rows = int(frame.select(pl.len()).collect(engine="streaming").item())
    except pl.exceptions.NoDataError:
        raise SentimentScoringError(f"{file} is empty: it has no header") from None
    except (OSError, pl.exceptions.PolarsError) as error:
        raise SentimentScoringError(f"{file}: can't be read: {error}") from error
    return _Source(frame=frame, rows=rows, identity=identity)


def _sample(source: _Source, text_column: str) -> list[str]:
    """Cleaned texts from all over the source, the same ones each time."""
    every = max(1, source.rows // (2 * SAMPLE_TEXTS))
    taken = source.frame.select(text_column).gather_every(every).collect(engine="streaming")
    cleaned = clean(taken[text_column]).filter(pl.col("text") != "")
    # Shuffled, since the first calibrate and the others judge.
    texts = cleaned["text"].unique(maintain_order=True)
    return texts.sample(min(SAMPLE_TEXTS, len(texts)), shuffle=True, seed=0).to_list()


def _batches(frame: pl.LazyFrame, rows: int) -> Iterator[pl.DataFrame]:
    """The frame in pieces of exactly `rows`, the last one shorter, read as they are asked for."""
    held: list[pl.DataFrame] = []
    height = 0
    for piece in frame.collect_batches(chunk_size=rows, maintain_order=True):
        while height + piece.height >= rows:
            held.append(piece.head(rows - height))
            piece = piece.slice(held[-1].height)
            yield pl.concat(held)
            held, height = [], 0
        if piece.height:
            held.append(piece)
            height += piece.height
    if held:
        yield pl.concat(held)


def _nothing(labels: Sequence[str]) -> dict[str, Any]:
    """The columns that are added, and their types."""
    types: dict[str, Any] = {"label": pl.String, "score": pl.Float32}
    types |= {f"p_{label}": pl.Float32 for label in labels}
    if {"negative", "positive"} <= set(labels):
        types["sentiment"] = pl.Float32
    return types | {"outcome": pl.String}


# --- the engine


def _prepared(
    sentiment: Sentiment,
    sample: Sequence[str],
    engine: str,
    at_least: float,
    cache: Path | None,
    device: str,
    model: Path,
) -> tuple[Recipe | dict[str, bytes], Chosen]:
    if device == "cuda":
        if engine not in ("auto", "bf16"):
            raise SentimentScoringError(f"engine {engine!r} on cuda: allowed are auto and bf16")
        files = {each.name: each.read_bytes() for each in model.iterdir() if each.is_file()}
        return files, Chosen(name="bf16", reason="torch in bf16 on CUDA", agreement={}, refused={})
    # Without a text to score there is nothing to agree on.
    wanted = engine if sample else "fp32"
    return recipe(sentiment, sample, wanted=wanted, at_least=at_least, cache=cache)


def _gated(
    actor: Any, sentiment: Sentiment, sample: Sequence[str], at_least: float, chosen: Chosen
) -> Chosen:
    import ray

    ids = sentiment.tokenize(sample)
    share = agreement(
        ray.get(actor.probabilities.remote(ids)), torch_engine(sentiment).probabilities(ids)
    )
    if share < at_least:
        raise SentimentScoringError(
            f"bf16 on CUDA: labels equal fp32's in {share:.2%} of the sample, at least "
            f"{at_least:.2%} asked; use --device cpu or a lower --agreement"
        )
    return Chosen(
        name="bf16",
        reason=f"{chosen.reason}: labels equal fp32's in {share:.2%} of {len(ids)} texts",
        agreement={"bf16": share},
        refused={},
    )


class _Scorer:
    """An actor: what it needs is in its arguments, so it needs no file of the driver's."""

    def __init__(
        self, packed: Recipe | dict[str, bytes], tokenizer: str, labels: Sequence[str]
    ) -> None:
        from tokenizers import Tokenizer

        self._tokenizer: Any = Tokenizer.from_str(tokenizer)
        self._labels = list(labels)
        self._engine = packed.engine() if isinstance(packed, Recipe) else _on_card(packed)
        self._model = threading.Lock()
        self._remembered: dict[str, np.ndarray] = {}

    def probabilities(self, ids: Sequence[np.ndarray]) -> np.ndarray:
        with self._model:
            return self._engine.probabilities(ids)

    def score(self, texts: Any) -> pl.DataFrame:
        """The added columns of an Arrow array of texts."""
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
            encoded = self._tokenizer.encode_batch_fast([names[place] for place in new])
            # The other thread cleans and tokenises the next batch meanwhile.
            by_text[new] = self.probabilities([np.array(each.ids, np.int32) for each in encoded])
            if len(self._remembered) + len(new) > _REMEMBERED:
                self._remembered.clear()
            self._remembered.update((names[place], by_text[place].copy()) for place in new)
        return self._columns(cleaned["outcome"], scored, by_text[places])

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
        types = _nothing(self._labels)
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


@contextmanager
def _pool(
    packed: Recipe | dict[str, bytes], sentiment: Sentiment, device: str, workers: int | None
) -> Iterator[list[Any]]:
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
    stored = ray.put(packed)
    tokenizer = sentiment.tokenizer.to_str()
    actors = [actor.remote(stored, tokenizer, sentiment.labels) for _ in range(workers)]
    try:
        yield actors
    finally:
        for each in actors:
            ray.kill(each)


def _scored(
    batches: Iterator[tuple[int, pl.DataFrame]], text_column: str, actors: Sequence[Any]
) -> Iterator[tuple[int, pl.DataFrame, pl.DataFrame]]:
    """Batches as they finish; each actor has two in hand."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    free = deque([*actors, *actors])
    waiting: dict[Any, tuple[Any, int, pl.DataFrame]] = {}
    more = True
    while more or waiting:
        while free and more:
            batch = next(batches, None)
            if batch is None:
                more = False
                break
            actor = free.popleft()
            number, rows = batch
            waiting[actor.score.remote(rows[text_column].to_arrow())] = (actor, number, rows)
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


# --- what is kept


def _begin(parts: Path, said: Mapping[str, Any]) -> None:
    """Makes the folder of batches, or makes sure that it is this run's."""
    about = parts / "run.json"
    if about.exists():
        before = json.loads(about.read_text(encoding="utf-8"))
        if other := [key for key in said if before.get(key) != said[key]]:
            shown_before = ", ".join(f"{key} {before.get(key)!r}" for key in other)
            raise SentimentScoringError(
                f"{parts} holds the batches of a run that was stopped, with {shown_before}: give "
                "the same again to go on with it, or remove the folder to begin anew"
            )
        return
    parts.mkdir(parents=True, exist_ok=True)
    replace_text(about, json.dumps(said, indent=2))


def _part(parts: Path, number: int) -> Path:
    return parts / f"{number:08d}.parquet"


def _commit(parts: Path, number: int, rows: pl.DataFrame) -> None:
    part = _part(parts, number)
    draft = part.with_name(f"{part.name}.{secrets.token_hex(4)}")
    try:
        rows.write_parquet(draft, compression="lz4")
        draft.replace(part)
    finally:
        draft.unlink(missing_ok=True)


def _publish(rows: pl.LazyFrame, out: str, root: str, metadata: Mapping[str, str]) -> None:
    if _is_table(out):
        onto = storage.latest(root, out)
        storage.write(root, out, rows, mode="overwrite", onto=onto, metadata=metadata)
        return
    path = Path(out)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".csv":
            rows.sink_csv(draft)
        else:
            rows.sink_parquet(draft)
        draft.replace(path)
    except pl.exceptions.PolarsError as error:
        raise SentimentScoringError(f"{out} can't be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def _digest_of(folder: Path) -> str:
    """Of a model's files by name and content."""
    made = hashlib.blake2b(digest_size=16)
    for each in sorted(folder.iterdir()):
        if each.is_file():
            made.update(each.name.encode() + each.read_bytes())
    return made.hexdigest()
