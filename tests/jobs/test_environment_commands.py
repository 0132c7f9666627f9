"""The commands of an environment that stays, as a user types them, on a real cluster."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import polars as pl
import pytest
from typer.testing import CliRunner, Result

from cluster import storage
from jobs.cli import app
from tests.jobs import shop


def liftyard(folder: Path, *words: str) -> Result:
    return CliRunner().invoke(app, [*words, "--home", str(folder / "home")])


def said(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("local")
    shop.make(folder)
    try:
        result = liftyard(folder, "up", "--cpus", "2")
        assert "ray_address" in said(result)
        yield folder
    finally:
        liftyard(folder, "down")


@pytest.fixture(scope="module")
def job(folder: Path) -> str:
    """A submitted run of the shop, followed to its end."""
    runs = ("--runs", str(folder / "runs"))
    id = said(liftyard(folder, "submit", str(folder / "shop.yaml"), *runs)).strip()
    log = liftyard(folder, "logs", id, "-f")
    assert "scored over HTTP at" in said(log), log.output
    return id


def test_status_names_nodes_and_jobs(folder: Path, job: str) -> None:
    text = said(liftyard(folder, "status"))
    assert "(head)" in text and "1 SUCCEEDED" in text


def test_the_job_is_listed_and_its_run_finished(folder: Path, job: str) -> None:
    text = said(liftyard(folder, "jobs"))
    assert job[:12] in text and "SUCCEEDED" in text
    (file,) = (folder / "runs").glob("*/summary.json")
    assert json.loads(file.read_text())["status"] == "finished"


def test_what_it_served_stays_after_it(folder: Path, job: str) -> None:
    (file,) = (folder / "runs").glob("*/summary.json")
    url = json.loads(file.read_text())["serve_url"]
    answer = httpx.get(f"{url}/healthz")
    assert answer.status_code == 200
    assert "serve_url" in said(liftyard(folder, "status"))


def test_models_promote_and_rollback(folder: Path, job: str) -> None:
    text = said(liftyard(folder, "models"))
    assert "answers" in text and "lapse" in text and "champion" in text
    again = liftyard(folder, "rollback", "lapse")
    assert again.exit_code == 1 and "Traceback" not in again.stderr
    assert "version 1" in said(liftyard(folder, "promote", "lapse", "1"))
    unknown = liftyard(folder, "promote", "laps", "1")
    assert unknown.exit_code == 1
    assert "did you mean 'lapse'" in re.sub(r"\s+", " ", unknown.stderr)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_score_a_file(folder: Path, job: str, tmp_path: Path, suffix: str) -> None:
    rows = storage.scan(folder / "home" / "tables", "training/lapse").head(20).collect()
    file, out = tmp_path / f"rows{suffix}", tmp_path / f"scored{suffix}"
    if suffix == ".csv":
        rows.write_csv(file, float_scientific=False)
    else:
        rows.write_parquet(file)
    text = said(liftyard(folder, "score", str(file), "--model", "lapse", "--out", str(out)))
    assert "20 rows by lapse version 1" in text
    scored = pl.read_csv(out) if suffix == ".csv" else pl.read_parquet(out)
    assert scored.columns == [*rows.columns, "score"]
    assert scored["score"].is_between(0, 1).all() and scored["score"].n_unique() > 1


def test_a_value_of_another_kind_is_told_with_row_and_column(
    folder: Path, job: str, tmp_path: Path
) -> None:
    file, out = tmp_path / "rows.csv", tmp_path / "out.csv"
    rows = storage.scan(folder / "home" / "tables", "training/lapse").head(3).collect()
    wrong = rows.with_columns(buys_count_7d=pl.Series(["1", "many", "2"], dtype=pl.String))
    wrong.write_csv(file)
    result = liftyard(folder, "score", str(file), "--model", "lapse", "--out", str(out))
    assert result.exit_code == 1
    told = re.sub(r"\s+", " ", result.stderr)
    assert "row 3, column 'buys_count_7d': 'many' is not a number" in told
    assert not out.exists()


def test_a_stopped_job_leaves_an_interrupted_run_that_resumes(folder: Path, job: str) -> None:
    runs = folder / "stopped"
    slow = ("--set", "sweep.families.boosting.packs=400", "--runs", str(runs))
    id = said(liftyard(folder, "submit", str(folder / "shop.yaml"), *slow)).strip()
    for piece in iter(lambda: liftyard(folder, "logs", id).stdout, None):
        if "lapse" in piece or list(runs.glob("*/sweep-lapse.jsonl")):
            break
    assert "STOPPED" in said(liftyard(folder, "stop", id))
    (file,) = runs.glob("*/summary.json")
    content = json.loads(file.read_text())
    assert content["status"] == "interrupted"
    assert (file.parent / "report.html").exists()
    result = CliRunner().invoke(
        app,
        [
            *("run", str(folder / "shop.yaml"), "--runs", str(runs), "--resume"),
            *(content["run_id"], "--env", "local", "--home", str(folder / "home")),
        ],
    )
    # Without the override the sweep is another, and that is told.
    assert result.exit_code == 1 and "was begun with" in re.sub(r"\s+", " ", result.stderr)


def test_unknown_jobs_are_told(folder: Path, job: str) -> None:
    for command in ("logs", "stop"):
        result = liftyard(folder, command, "nope")
        assert result.exit_code == 1
        assert "no job 'nope'" in re.sub(r"\s+", " ", result.stderr)
