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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from cluster import storage
from cluster.files import replace_text
from jobs import progress
from jobs.sentiment_actors import Actor, SentimentScoringError, added, pool, scored
from models.naming import suggestion
from models.sentiment import Sentiment, load
from models.sentiment_engines import (
    Chosen,
    Recipe,
    agreement,
    recipe,
    torch_engine,
)
from models.text import clean, masked

BATCH_ROWS = 4_096
SAMPLE_TEXTS = 1_800
# Calibrating takes about as long as int8 saves on so many.
FEW_TEXTS = 10_000
# Of a table's output in a file; what the driver holds at its end.
_STAGED_ROWS = 250_000
_FILES = (".csv", ".parquet")


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
    partitions: str | None


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
    mask: bool = False,
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
        mask: Whether the texts are written masked (`models.text`), and not as they came.
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
    new = list(added(sentiment.labels))
    if text_column not in columns:
        raise SentimentScoringError(
            f"{file} has no column {text_column!r}: there are {', '.join(columns)}"
            f"{suggestion(text_column, columns)}"
        )
    if taken := [name for name in new if name in columns]:
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
        "mask": mask,
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
    with pool(packed, sentiment, device, workers) as actors:
        if device == "cuda" and sample:
            chosen = _gated(actors[0], sentiment, sample, at_least, chosen)
        for number, rows, found in scored(left, text_column, actors):
            if mask:
                rows = rows.with_columns(masked(pl.col(text_column).cast(pl.String, strict=False)))
            _commit(parts, number, rows.hstack(found))
            on_done(rows.height)
    seconds = time.monotonic() - began
    numbers = range(max(1, -(-source.rows // batch_rows)))
    if source.rows == 0:
        empty = source.frame.head(0).collect()
        _commit(parts, 0, empty.hstack(pl.DataFrame(schema=added(sentiment.labels))))
    every = pl.scan_parquet([_part(parts, number) for number in numbers])
    outcomes = dict(every.group_by("outcome").len().collect(engine="streaming").iter_rows())
    if _is_table(out):
        metadata = {"sentiment_engine": chosen.reason, "source": file}
        _publish_table(every, out, storage_root, source.partitions, metadata)
    else:
        _publish_file(every, Path(out))
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
        partitions = storage.metadata(root, file, version).get("partitions")
    else:
        path = Path(file)
        if not path.is_file():
            raise SentimentScoringError(f"no file {file}")
        about = path.stat()
        identity = f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"
        partitions = "1"
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
    return _Source(frame=frame, rows=rows, identity=identity, partitions=partitions)


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
    actor: Actor, sentiment: Sentiment, sample: Sequence[str], at_least: float, chosen: Chosen
) -> Chosen:
    import ray

    ids = sentiment.tokenize(sample)
    share = agreement(ray.get(actor.probabilities(ids)), torch_engine(sentiment).probabilities(ids))
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


def _publish_table(
    rows: pl.LazyFrame,
    out: str,
    root: str,
    partitions: str | None,
    metadata: Mapping[str, str],
) -> None:
    """Stages the rows some at a time, in the partitions of their source, and commits once."""
    onto = storage.latest(root, out)
    if partitions is not None:
        # An entity's rows stay in its partition, which features of the table are made by.
        metadata = {**metadata, "partitions": partitions}
    if storage.PART not in rows.collect_schema():
        rows = storage.with_partition(rows, None, 1)
    staged = [
        storage.stage(root, out, part, piece.drop(storage.PART))
        for batch in _batches(rows, _STAGED_ROWS)
        for (part,), piece in batch.group_by(storage.PART, maintain_order=True)
    ] or [storage.stage(root, out, 0, rows.head(0).collect().drop(storage.PART))]
    storage.commit(root, out, staged, mode="overwrite", onto=onto, metadata=metadata)


def _publish_file(rows: pl.LazyFrame, path: Path) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        if path.suffix == ".csv":
            rows.sink_csv(draft)
        else:
            rows.sink_parquet(draft)
        draft.replace(path)
    except pl.exceptions.PolarsError as error:
        raise SentimentScoringError(f"{path} can't be written: {error}") from error
    finally:
        draft.unlink(missing_ok=True)


def _digest_of(folder: Path) -> str:
    """Of a model's files by name and content."""
    made = hashlib.blake2b(digest_size=16)
    for each in sorted(folder.iterdir()):
        if each.is_file():
            made.update(each.name.encode() + each.read_bytes())
    return made.hexdigest()
