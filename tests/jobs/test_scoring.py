"""Files scored by a model here or over HTTP: the same numbers, in bounded memory, resumably."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from jobs import scoring
from jobs.batches import BatchesError
from jobs.scoring import By, ScoringError, score_file
from models.registry import Registry
from serving.client import Client, Refused
from serving.settings import Limits, Rollout, Settings
from tests.serving.listening import listening
from tests.serving.test_app import make_frame, register, trained

ROWS = make_frame(230, 3).with_row_index("id")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    registry = Registry(f"sqlite:///{tmp_path_factory.mktemp('scoring')}/mlflow.db")
    for rounds in (20, 5):
        register(registry, "visits", trained("boosting", rounds=rounds), "boosting")
    registry.promote("visits", 1)
    return registry


@pytest.fixture(scope="module")
def here(registry: Registry) -> By:
    return scoring.by_registry(registry, "visits")


@pytest.fixture(scope="module")
def client(registry: Registry) -> Iterator[Client]:
    settings = Settings(
        registry=registry.uri, models=None, limits=Limits(rows=100), refresh_s=3_600
    )
    with listening(settings) as (url, _), Client(url) as client:
        yield client


@pytest.fixture(scope="module")
def expected(registry: Registry) -> np.ndarray:
    return registry.load("visits")[1].score(ROWS)


def write(rows: pl.DataFrame, file: Path) -> Path:
    if file.suffix == ".csv":
        rows.write_csv(file, float_scientific=False)
    else:
        rows.write_parquet(file)
    return file


@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("way", ["here", "service"])
def test_a_file_gets_the_numbers_of_the_model(
    tmp_path: Path, here: By, client: Client, expected: np.ndarray, kind: str, way: str
) -> None:
    by = here if way == "here" else scoring.by_service(client, "visits", key="out")
    assert (by.model, by.version) == ("visits", 1)
    file, out = write(ROWS, tmp_path / f"in.{kind}"), tmp_path / f"out.{kind}"
    started: list[int] = []
    counted: list[int] = []
    done = score_file(file, out, by, batch_rows=50, on_start=started.append, on_done=counted.append)
    assert (done.rows, done.resumed, started, counted) == (230, 0, [230], [50] * 4 + [30])
    found = pl.read_csv(out) if kind == "csv" else pl.read_parquet(out)
    assert found.columns == [*ROWS.columns, "score"]
    assert found["id"].to_list() == ROWS["id"].to_list()
    np.testing.assert_array_equal(found["score"].to_numpy(), expected)
    assert [each.name for each in tmp_path.iterdir() if each != file] == [out.name]


def test_a_stopped_run_goes_on_after_what_it_had(
    tmp_path: Path, here: By, registry: Registry, expected: np.ndarray
) -> None:
    file, out = write(ROWS, tmp_path / "in.parquet"), tmp_path / "out.parquet"
    scored: list[int] = []

    def until(most: int) -> By:
        def score(frame: pl.DataFrame) -> np.ndarray:
            if len(scored) == most:
                raise KeyboardInterrupt
            scored.append(frame.height)
            return here.score(frame)

        return replace(here, score=score)

    # Stopped before anything is done, nothing is left behind.
    with pytest.raises(KeyboardInterrupt):
        score_file(file, out, until(0), batch_rows=50)
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(KeyboardInterrupt):
        score_file(file, out, until(3), batch_rows=50)
    assert not out.exists()
    # By another version, or of another file, the rows would be of two minds.
    other = scoring.by_registry(registry, "visits", 2)
    with pytest.raises(BatchesError, match="visits version 1"):
        score_file(file, out, other, batch_rows=50)
    counted: list[int] = []
    done = score_file(file, out, until(99), batch_rows=50, on_done=counted.append)
    assert (done.rows, done.resumed, counted) == (230, 150, [150, 50, 30])
    assert scored == [50] * 4 + [30]
    np.testing.assert_array_equal(pl.read_parquet(out)["score"].to_numpy(), expected)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.parquet", "out.parquet"]


def test_one_version_scores_a_file(tmp_path: Path, registry: Registry) -> None:
    file, out = write(ROWS, tmp_path / "in.parquet"), tmp_path / "out.parquet"
    pinned = Settings(
        registry=registry.uri,
        models={"visits": Rollout(version=1)},
        limits=Limits(),
        refresh_s=3_600,
    )
    with listening(pinned) as (url, models), Client(url) as client:
        by = scoring.by_service(client, "visits", key="out")

        def change(rows: int) -> None:
            models.adapt(replace(pinned, models={"visits": Rollout(version=2)}))

        with pytest.raises(ScoringError, match="went over to version 2 of visits"):
            score_file(file, out, by, batch_rows=50, on_done=change)
    assert not out.exists()


def test_a_service_says_what_it_does_not_take(tmp_path: Path, client: Client) -> None:
    file = write(ROWS, tmp_path / "in.parquet")
    by = scoring.by_service(client, "visits", key="out")
    with pytest.raises(Refused, match="over 100 rows"):
        score_file(file, tmp_path / "out.parquet", by)
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(ScoringError, match=r"no model 'visit': .* did you mean 'visits'"):
        scoring.by_service(client, "visit", key="out")


def test_a_file_without_rows_has_none_after(tmp_path: Path, here: By) -> None:
    for kind in ("csv", "parquet"):
        file, out = write(ROWS[:0], tmp_path / f"in.{kind}"), tmp_path / f"out.{kind}"
        assert score_file(file, out, here).rows == 0
        found = pl.read_csv(out) if kind == "csv" else pl.read_parquet(out)
        assert (found.columns, found.height) == ([*ROWS.columns, "score"], 0)


def test_files_that_do_not_fit_are_refused(tmp_path: Path, here: By) -> None:
    def refused(rows: pl.DataFrame, reason: str, kind: str = "csv", **how: int) -> None:
        file = write(rows, tmp_path / f"in.{kind}")
        with pytest.raises((ScoringError, BatchesError), match=reason):
            score_file(file, tmp_path / f"out.{kind}", here, **how)
        assert list(tmp_path.iterdir()) == [file]
        file.unlink()

    refused(ROWS.rename({"visits": "visit"}), "no column 'visits', .* did you mean 'visit'")
    refused(ROWS.with_columns(score=0.5), "already has a column 'score'", "parquet")
    wrong = ROWS.with_columns(has_coupon=pl.Series(["true"] * 60 + ["ja"] * 170))
    refused(wrong, "row 62, column 'has_coupon': 'ja' is not a boolean", batch_rows=100)
    with pytest.raises(ScoringError, match="allowed are"):
        score_file(tmp_path / "in.txt", tmp_path / "out.csv", here)
    with pytest.raises(BatchesError, match="no file"):
        score_file(tmp_path / "in.csv", tmp_path / "out.csv", here)
    (tmp_path / "in.csv").write_text("")
    with pytest.raises((ScoringError, BatchesError), match="empty"):
        score_file(tmp_path / "in.csv", tmp_path / "out.csv", here)
    (tmp_path / "in.parquet").write_bytes(b"PAR1 it is not")
    with pytest.raises(BatchesError, match="can't be read"):
        score_file(tmp_path / "in.parquet", tmp_path / "out.csv", here)
