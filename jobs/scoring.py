"""Scores rows: those of a file with a registered model, or a few over HTTP with a served one."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import polars as pl

from models.registry import Registry

BATCH_ROWS = 500

# The variable with the key of a service that asks for one.
API_KEY = "LIFTYARD_API_KEY"


class ScoringError(ValueError):
    """Rows can't be scored; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Scored:
    """How many rows were scored, and by which version."""

    rows: int
    version: int


def score_file(
    file: Path, out: Path, registry: Registry, model: str, *, version: int | None = None
) -> Scored:
    """Writes the file's rows and their `score`, whole or not at all.

    Args:
        file: `.csv` or `.parquet` with at least the model's features; an empty CSV field is null.
        out: `.csv` or `.parquet` to write.
        registry: Where the model is.
        model: Its name.
        version: None takes the champion.

    Raises:
        ScoringError: A file isn't readable or of another kind, or a value isn't of its kind.
        EncodingError: A feature is absent or of another kind than in training.
        RegistryError: There is no such model or version.
        OSError: `out` can't be written.
    """
    for path in (file, out):
        if path.suffix not in (".csv", ".parquet"):
            raise ScoringError(f"{path}: allowed are .csv and .parquet files")
    card, scorer = registry.load(model, version)
    frame = _read(file, {feature["name"]: feature["kind"] for feature in card.features})
    scored = frame.with_columns(pl.Series("score", scorer.score(frame)))
    aside = out.with_name(f"{out.name}.{os.getpid()}")
    if out.suffix == ".csv":
        scored.write_csv(aside)
    else:
        scored.write_parquet(aside)
    aside.replace(out)
    return Scored(rows=frame.height, version=card.version)


def _read(file: Path, kinds: Mapping[str, str]) -> pl.DataFrame:
    try:
        if file.suffix == ".parquet":
            return pl.read_parquet(file)
        text = pl.read_csv(file, infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ScoringError(f"{file}: can't be read: {error}") from error
    types = {"number": pl.Float64, "boolean": pl.Boolean}
    for name, kind in kinds.items():
        if name not in text.columns or kind not in types:
            continue
        values = text[name]
        cast = (
            values.cast(pl.Float64, strict=False)
            if kind == "number"
            else values.replace_strict({"true": True, "false": False}, default=None)
        )
        wrong = values.is_not_null() & cast.is_null()
        if wrong.any():
            row = wrong.arg_true()[0]
            raise ScoringError(
                f"{file}, row {row + 2}, column {name!r}: {values[row]!r} is not a {kind}"
            )
        text = text.with_columns(cast.alias(name))
    return text


def score_rows(url: str, name: str, rows: pl.DataFrame, *, key: str | None = None) -> list[float]:
    """The model's score for each row.

    Args:
        url: The service, such as `http://127.0.0.1:8000`.
        name: The model.
        rows: n rows with the model's features; null where unknown.
        key: The API key, where the service asks for one.

    Raises:
        ScoringError: The service refused the rows or can't be reached.
    """
    return [score for batch in _batches(rows) for score in _post(url, name, batch, key)]


def _batches(rows: pl.DataFrame) -> Iterator[list[dict[str, Any]]]:
    # JSON has no NaN.
    clean = rows.with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))
    for batch in clean.iter_slices(BATCH_ROWS):
        yield batch.to_dicts()


def _post(url: str, name: str, rows: list[dict[str, Any]], key: str | None) -> list[float]:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        answer = httpx.post(
            f"{url}/v1/models/{name}/score", json={"rows": rows}, headers=headers, timeout=60
        )
    except httpx.HTTPError as error:
        raise ScoringError(
            f"{url} can't be reached ({error}); is the model served? see `liftyard status`"
        ) from error
    if answer.status_code == 401:
        raise ScoringError(
            f"{url} asks for a valid API key ({_reason(answer)}); make one with `liftyard keys "
            f"add`, and give it in {API_KEY}"
        )
    if answer.status_code != 200:
        raise ScoringError(f"{url} answered {answer.status_code}: {_reason(answer)}")
    scores: list[float] = answer.json()["scores"]
    return scores


def _reason(answer: httpx.Response) -> str:
    try:
        return json.dumps(answer.json())[:2_000]
    except json.JSONDecodeError:
        return answer.text[:2_000]
