"""Asks a served model for scores over HTTP.

Knows nothing of how the model is served.
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import polars as pl

BATCH_ROWS = 500


class ScoringError(ValueError):
    """The service refused rows or can't be reached; the message says why."""


def score_rows(url: str, name: str, rows: pl.DataFrame) -> list[float]:
    """The model's score for each row.

    Args:
        url: The service, such as `http://127.0.0.1:8000`.
        name: The model.
        rows: n rows with the model's features; null where unknown.

    Raises:
        ScoringError: The service refused the rows or can't be reached.
    """
    return [score for batch in _batches(rows) for score in _post(url, name, batch)]


def _batches(rows: pl.DataFrame) -> Iterator[list[dict[str, Any]]]:
    # JSON has no NaN.
    clean = rows.with_columns(pl.col(pl.Float32, pl.Float64).fill_nan(None))
    for batch in clean.iter_slices(BATCH_ROWS):
        yield batch.to_dicts()


def _post(url: str, name: str, rows: list[dict[str, Any]]) -> list[float]:
    try:
        answer = httpx.post(f"{url}/v1/models/{name}/score", json={"rows": rows}, timeout=60)
    except httpx.HTTPError as error:
        raise ScoringError(
            f"{url} can't be reached ({error}); is the model served? see `liftyard status`"
        ) from error
    if answer.status_code != 200:
        raise ScoringError(f"{url} answered {answer.status_code}: {_reason(answer)}")
    scores: list[float] = answer.json()["scores"]
    return scores


def _reason(answer: httpx.Response) -> str:
    try:
        return json.dumps(answer.json())[:2_000]
    except json.JSONDecodeError:
        return answer.text[:2_000]
