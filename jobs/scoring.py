"""The rows of a file scored, by a registered model here or by a served one; stopped, it goes on."""

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from jobs import batches
from models.naming import suggestion
from models.registry import Registry
from serving.client import Client

# Below what a service takes at once, unless its `limits` say less.
BATCH_ROWS = 8_192

SCORE = "score"

# In a CSV file.
_BOOLEANS = {"true": True, "false": False}


class ScoringError(ValueError):
    """Rows can't be scored; the message says why."""


@dataclass(frozen=True, kw_only=True)
class By:
    """What scores.

    Attributes:
        model: Its name.
        version: The one that scores all rows.
        kinds: Of each feature by name: number, string or boolean.
        score: A frame of the features, n rows, to (n,) float64.
        told_by: What tells it from others of that name and version.
    """

    model: str
    version: int
    kinds: Mapping[str, str]
    score: Callable[[pl.DataFrame], np.ndarray]
    told_by: str


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What was done.

    Attributes:
        rows: Of the output.
        resumed: Rows among them that an earlier run had finished.
        seconds: From the first batch to the last.
    """

    rows: int
    resumed: int
    seconds: float


def by_registry(registry: Registry, model: str, version: int | None = None) -> By:
    """A registered model, in this process.

    Raises:
        RegistryError: There is no such model or version, or, for None, no champion.
    """
    card, scorer = registry.load(model, version)
    return By(
        model=card.name,
        version=card.version,
        kinds={feature["name"]: feature["kind"] for feature in card.features},
        score=scorer.score,
        told_by=card.created,
    )


def by_service(client: Client, model: str, *, key: str) -> By:
    """A served model, over HTTP by Arrow.

    Args:
        client: Of the service.
        model: The model.
        key: While a canary runs, what decides which version scores; the same for all rows.

    Raises:
        ScoringError: It isn't served.
        ClientError: The service refuses, or can't be reached.
    """
    served = client.models()
    if model not in served:
        raise ScoringError(
            f"{client.url} serves no model {model!r}: there are {', '.join(served)}"
            f"{suggestion(model, served)}"
        )
    kinds = {feature["name"]: feature["kind"] for feature in served[model].features}
    # A row without values, to learn who answers by this key.
    blank = pa.table({name: pa.nulls(1) for name in kinds})
    version = client.score_table(model, blank, routing_key=key).version

    def score(frame: pl.DataFrame) -> np.ndarray:
        found = client.score_table(model, frame, routing_key=key)
        if found.version != version:
            raise ScoringError(
                f"{client.url} went over to version {found.version} of {model}, while the rows "
                f"before are scored by version {version}; score the file anew"
            )
        return found.scores

    return By(model=model, version=version, kinds=kinds, score=score, told_by=client.url)


def score_file(
    file: Path,
    out: Path,
    by: By,
    *,
    batch_rows: int = BATCH_ROWS,
    on_start: Callable[[int], None] = lambda rows: None,
    on_done: Callable[[int], None] = lambda rows: None,
) -> Scored:
    """Writes the file's rows, in their order, and their `score`, whole or not at all.

    Finished batches lie in `OUT.parts` until then; the same call goes on after them.

    Args:
        file: `.csv` or `.parquet` with at least the model's features; an empty CSV field is null.
        out: `.csv` or `.parquet` to write.
        by: What scores.
        batch_rows: Rows read and scored at once.
        on_start: Told the file's rows.
        on_done: Told the rows of each finished batch.

    Raises:
        ScoringError: A file is of another kind, a feature is absent, or a value isn't of its kind.
        BatchesError: A file can't be read or written, or the batches beside `out` are another
            run's.
        EncodingError: A feature is of another kind than in training.
        ClientError: The service refuses, or can't be reached.
        OSError: `out` can't be written.
    """
    for path in (file, out):
        if path.suffix not in batches.FILES:
            raise ScoringError(f"{path}: allowed are .csv and .parquet files")
    frame, identity = batches.open_file(file)
    rows = batches.count(frame, file)
    columns = frame.collect_schema().names()
    for name in by.kinds:
        if name not in columns:
            raise ScoringError(
                f"{file} has no column {name!r}, a feature of {by.model}: there are "
                f"{', '.join(columns)}{suggestion(name, columns)}"
            )
    if SCORE in columns:
        raise ScoringError(f"{file} already has a column {SCORE!r}, which is to be written")
    parts = out.with_name(f"{out.name}.parts")
    said = {
        "source": identity,
        "model": f"{by.model} version {by.version} ({by.told_by})",
        "batch_rows": batch_rows,
    }
    done = batches.begin(parts, said)
    on_start(rows)
    began = time.monotonic()
    resumed = sum(min(batch_rows, rows - number * batch_rows) for number in done)
    if resumed:
        on_done(resumed)
    try:
        # A file without a row is a batch without one.
        for number, batch in enumerate(batches.cut(frame, batch_rows) if rows else [_none(frame)]):
            if number in done:
                continue
            typed = _typed(batch, by.kinds, file, number * batch_rows) if _is_text(file) else batch
            scores_n = by.score(typed.select(list(by.kinds))) if rows else np.empty(0)
            batches.keep(parts, number, typed.with_columns(pl.Series(SCORE, scores_n)))
            on_done(batch.height)
    except pl.exceptions.PolarsError as error:
        raise ScoringError(f"{file}: can't be read: {error}") from error
    finally:
        # Nothing that a next call could go on with.
        if not any(parts.glob("*.parquet")):
            shutil.rmtree(parts)
    batches.publish(batches.scan(parts, max(1, -(-rows // batch_rows))), out)
    shutil.rmtree(parts)
    return Scored(rows=rows, resumed=resumed, seconds=time.monotonic() - began)


def _is_text(file: Path) -> bool:
    return file.suffix == ".csv"


def _none(frame: pl.LazyFrame) -> pl.DataFrame:
    return frame.head(0).collect()


def _typed(text: pl.DataFrame, kinds: Mapping[str, str], file: Path, before: int) -> pl.DataFrame:
    """A CSV file's features as what they are; the rest stays text."""
    for name, kind in kinds.items():
        if kind not in ("number", "boolean"):
            continue
        values = text[name]
        cast = (
            values.cast(pl.Float64, strict=False)
            if kind == "number"
            else values.replace_strict(
                {"true": True, "false": False}, default=None, return_dtype=pl.Boolean
            )
        )
        wrong = values.is_not_null() & cast.is_null()
        if wrong.any():
            row = wrong.arg_true()[0]
            # From 1, and the header is one.
            raise ScoringError(
                f"{file}, row {before + row + 2}, column {name!r}: {values[row]!r} is not a {kind}"
            )
        text = text.with_columns(cast.alias(name))
    return text
