"""Labels every text of a file or table on the connected Ray cluster, and forgets nothing finished.

The driver cuts the rows into numbered batches; warm actors, one CPU (or GPU) each, clean, tokenise
and score them, two at a time, so that one batch is made ready while another is in the model. A
finished batch is a file, written aside and renamed, so a killed driver goes on after it, and a
killed actor repeats only what it had in hand. At the end the batches become the output, in order
and at once. Neither side ever holds more than a few batches.
"""

import hashlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from rich.console import Console

from cluster import storage
from jobs import batches, progress
from jobs.sentiment_actors import Actor, SentimentScoringError, added, pool, scored
from models.naming import suggestion
from models.sentiment import Sentiment, load
from models.sentiment_engines import agreement, torch_engine
from models.sentiment_gate import Chosen, Recipe, recipe
from models.text import clean, masked

BATCH_ROWS = 4_096
SAMPLE_TEXTS = 1_800
# Calibrating takes about as long as int8 saves on so many.
FEW_TEXTS = 10_000
# Of a table's output in a file; what the driver holds at its end.
_STAGED_ROWS = 250_000


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
        engine: Of `models.sentiment_gate.ENGINES`; "auto" takes bf16 for few texts.
        at_least: Share of a sample's texts whose label must be fp32's.
        device: "cpu", or "cuda" for bf16 on a GPU an actor.
        workers: Actors; None takes the CPUs (GPUs) that are free.
        batch_rows: Rows in a batch; what a killed actor repeats.
        mask: Whether the texts are written masked (`models.text`), and not as they came.
        cache: Of converted models; None for the user's.
        on_start: Told the rows and the engine.
        on_done: Told the rows of each finished batch.

    Raises:
        SentimentScoringError: A file, column or setting isn't as it must be, or a batch lost its
            actor four times.
        BatchesError: A file can't be read or written, or the batches beside `out` are another
            run's.
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
    done = batches.begin(parts, said)
    on_start(source.rows, chosen)
    began = time.monotonic()
    resumed = sum(min(batch_rows, source.rows - number * batch_rows) for number in done)
    if resumed:
        on_done(resumed)
    left = (
        (number, rows)
        for number, rows in enumerate(batches.cut(source.frame, batch_rows))
        if number not in done
    )
    with pool(packed, sentiment, device, workers) as actors:
        if device == "cuda" and sample:
            chosen = _gated(actors[0], sentiment, sample, at_least, chosen)
        for number, rows, found in scored(left, text_column, actors):
            if mask:
                rows = rows.with_columns(masked(pl.col(text_column).cast(pl.String, strict=False)))
            batches.keep(parts, number, rows.hstack(found))
            on_done(rows.height)
    seconds = time.monotonic() - began
    if source.rows == 0:
        empty = source.frame.head(0).collect()
        batches.keep(parts, 0, empty.hstack(pl.DataFrame(schema=added(sentiment.labels))))
    every = batches.scan(parts, max(1, -(-source.rows // batch_rows)))
    outcomes = dict(every.group_by("outcome").len().collect(engine="streaming").iter_rows())
    if _is_table(out):
        metadata = {"sentiment_engine": chosen.reason, "source": file}
        _publish_table(every, out, storage_root, source.partitions, metadata)
    else:
        batches.publish(every, Path(out))
    shutil.rmtree(parts)
    return Scored(
        rows=source.rows, resumed=resumed, seconds=seconds, engine=chosen, outcomes=outcomes
    )


@contextmanager
def shown(
    console: Console,
) -> Iterator[tuple[Callable[[int, Chosen], None], Callable[[int], None]]]:
    """A live bar with texts a second and time left: `on_start` and `on_done` of `score_file`."""
    with progress.counted("texts", console) as (start, on_done):

        def on_start(rows: int, chosen: Chosen) -> None:
            console.print(f"engine {chosen.name}: {chosen.reason}", soft_wrap=True, markup=False)
            start(rows)

        yield on_start, on_done


# --- what is scored


def _is_table(name: str) -> bool:
    return Path(name).suffix not in batches.FILES


def _open(file: str, root: str) -> _Source:
    if _is_table(file):
        if Path(file).exists() and Path(file).is_file():
            raise SentimentScoringError(f"{file}: allowed are .csv and .parquet files, and tables")
        version = storage.version(root, file)
        frame = storage.scan(root, file, version)
        identity = f"{root}/{file}@{version}"
        partitions = storage.metadata(root, file, version).get("partitions")
    else:
        frame, identity = batches.open_file(Path(file))
        partitions = "1"
    rows = batches.count(frame, file)
    return _Source(frame=frame, rows=rows, identity=identity, partitions=partitions)


def _sample(source: _Source, text_column: str) -> list[str]:
    """Cleaned texts from all over the source, the same ones each time."""
    every = max(1, source.rows // (2 * SAMPLE_TEXTS))
    taken = source.frame.select(text_column).gather_every(every).collect(engine="streaming")
    cleaned = clean(taken[text_column]).filter(pl.col("text") != "")
    # Shuffled, since the first calibrate and the others judge.
    texts = cleaned["text"].unique(maintain_order=True)
    return texts.sample(min(SAMPLE_TEXTS, len(texts)), shuffle=True, seed=0).to_list()


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
        for batch in batches.cut(rows, _STAGED_ROWS)
        for (part,), piece in batch.group_by(storage.PART, maintain_order=True)
    ] or [storage.stage(root, out, 0, rows.head(0).collect().drop(storage.PART))]
    storage.commit(root, out, staged, mode="overwrite", onto=onto, metadata=metadata)


def _digest_of(folder: Path) -> str:
    """Of a model's files by name and content."""
    made = hashlib.blake2b(digest_size=16)
    for each in sorted(folder.iterdir()):
        if each.is_file():
            made.update(each.name.encode() + each.read_bytes())
    return made.hexdigest()
