"""The commands of an environment that stays, as a user types them, on a real cluster."""

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import polars as pl
import pytest
from typer.testing import CliRunner, Result

from cluster import environment, storage
from jobs import queue
from jobs.cli import app
from tests.jobs import shop, wheels

ROOT = Path(__file__).resolve().parents[2]


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


def test_status_names_nodes_jobs_and_costs(folder: Path, job: str) -> None:
    (folder / "home" / "prices.json").write_text('{"cpu_hour": 50, "cpu_watts": 100}')
    text = said(liftyard(folder, "status"))
    (folder / "home" / "prices.json").unlink()
    assert "(head)" in text and "1 SUCCEEDED" in text
    # 2 CPUs.
    assert "cost per hour: 100.00" in text and "CO2 per hour: 96 g" in text


def test_the_same_again_is_the_same_job(folder: Path, job: str) -> None:
    runs = ("--runs", str(folder / "runs"))
    again = liftyard(folder, "submit", str(folder / "shop.yaml"), *runs)
    assert said(again).strip() == job
    assert "is SUCCEEDED; --key makes another" in re.sub(r"\s+", " ", again.stderr)


def test_the_job_is_listed_and_its_run_finished(folder: Path, job: str) -> None:
    text = said(liftyard(folder, "jobs"))
    assert job in text and "SUCCEEDED" in text
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
    # By what the job left serving, the same numbers.
    (run,) = (folder / "runs").glob("*/summary.json")
    by = ("--url", json.loads(run.read_text())["serve_url"])
    over = tmp_path / f"served{suffix}"
    asked = ("score", str(file), "--model", "lapse", "--out", str(over), *by)
    assert "20 rows by lapse version 1" in said(liftyard(folder, *asked, "--batch-rows", "7"))
    again = pl.read_csv(over) if suffix == ".csv" else pl.read_parquet(over)
    assert again.equals(scored)


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
    assert f"{id} STOPPED" in said(liftyard(folder, "stop", id))
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


def test_a_killed_attempt_is_gone_on_with(folder: Path, job: str) -> None:
    runs = folder / "killed"
    longer = ("--set", "sweep.families.boosting.packs=12", "--runs", str(runs))
    id = said(liftyard(folder, "submit", str(folder / "shop.yaml"), *longer)).strip()
    jobs = queue.of(environment.load("local", home=folder / "home"))
    while not (begun := [file for file in runs.glob("*/sweep-lapse.jsonl") if file.read_text()]):
        assert not jobs.find(id).over, jobs.find(id).message
        time.sleep(0.05)
    (attempt,) = [
        int(process.parent.name)
        for process in Path("/proc").glob("[0-9]*/cmdline")
        if process.read_bytes().endswith(f"\0{id}\0001\0".encode())
    ]
    os.kill(attempt, signal.SIGKILL)
    variants = begun[0].read_text().splitlines()
    summary = begun[0].with_name("summary.json")
    before = json.loads(summary.read_text())
    while not (found := jobs.find(id)).over:
        time.sleep(0.1)
    assert (found.state, found.attempt, found.causes) == ("SUCCEEDED", 2, {"lost": 1})
    # The same run: what was finished is as it was.
    after = json.loads(summary.read_text())
    assert list(runs.glob("*/summary.json")) == [summary]
    assert (before["status"], after["status"]) == ("running", "finished")
    done = len(before["steps"])
    assert [step["name"] for step in before["steps"]] == [
        "ingest",
        "validate",
        "features",
        "training",
    ]
    assert after["steps"][:done] == before["steps"]
    assert begun[0].read_text().splitlines()[: len(variants)] == variants


def test_unknown_jobs_are_told(folder: Path, job: str) -> None:
    for command in ("logs", "stop"):
        result = liftyard(folder, command, "nope")
        assert result.exit_code == 1
        assert "no job 'nope'" in re.sub(r"\s+", " ", result.stderr)


def test_teams_and_dependencies(folder: Path, job: str) -> None:
    assert "crm 2 none 3" in re.sub(
        r"[^\w.]+", " ", said(liftyard(folder, "team", "crm", "--quota-cpus", "2", "--share", "3"))
    )
    pipeline = str(folder / "shop.yaml")
    options = ("--team", "crm", "--priority", "7", "--after", job, "--timeout", "0.5")
    retries = ("--retries", "timeout=1", "--retries", "lost=0", "--set", "seed=4")
    id = said(liftyard(folder, "submit", pipeline, *options, *retries)).strip()
    while not (found := queue.of(environment.load("local", home=folder / "home")).find(id)).over:
        time.sleep(0.1)
    assert (found.state, found.causes, found.spec.team) == ("FAILED", {"timeout": 2}, "crm")
    text = said(liftyard(folder, "jobs"))
    assert f"{id}: took longer than its limit of 0.5 s (attempt 2" in text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--after", "job-9"), "waits for job 'job-9', which isn't in the queue"),
        (("--retries", "bad=1"), "retries 'bad=1': give CAUSE=COUNT"),
        (("--", "more"), "a pipeline takes none"),
        (("--timeout", "0"), "timeout_s are above 0"),
    ],
)
def test_what_cannot_be_submitted(
    folder: Path, job: str, words: tuple[str, ...], told: str
) -> None:
    command = ("submit", "--home", str(folder / "home"), str(folder / "shop.yaml"), *words)
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 1
    assert told in re.sub(r"\s+", " ", result.stderr)


def test_schedules(folder: Path, job: str) -> None:
    pipeline = str(folder / "shop.yaml")
    words = ("nightly", "30 2 * * 1-5", pipeline, "--zone", "Europe/Berlin", "--team", "crm")
    assert "nightly: first on" in said(liftyard(folder, "schedule", "add", *words))
    text = said(liftyard(folder, "schedule", "list"))
    assert "nightly" in text and "30 2 * * 1-5" in text and "Europe/Berlin" in text
    assert "removed" in said(liftyard(folder, "schedule", "remove", "nightly"))
    again = liftyard(folder, "schedule", "remove", "nightly")
    assert again.exit_code == 1 and "no schedule 'nightly'" in again.stderr
    wrong = liftyard(folder, "schedule", "add", "n", "61 * * * *", pipeline)
    assert wrong.exit_code == 1 and "minute '61'" in wrong.stderr


def test_a_job_of_a_package(folder: Path, job: str) -> None:
    """The example's: its tasks run on the cluster, and import the package there."""
    rows = [f"{n},{n % 3}" for n in range(30)]
    (folder / "customers.csv").write_text("\n".join(["customer,orders", *rows]))
    out = folder / "win_back.csv"
    command = [
        *("submit", "--home", str(folder / "home"), f"{ROOT / 'examples' / 'retention'}:win-back"),
        *("--", str(folder / "customers.csv"), str(out)),
    ]
    id = said(CliRunner().invoke(app, command)).strip()
    log = said(liftyard(folder, "logs", id, "-f"))
    assert "10 of 30 customers" in log
    assert pl.read_csv(out)["customer"].to_list() == list(range(0, 30, 3))
    (row,) = [j for j in queue.of(environment.load("local", home=folder / "home")).jobs()
              if j.id == id]  # fmt: skip
    assert row.spec.timeout_s == 600 and "retention.win_back" in row.spec.command
    wrong = CliRunner().invoke(app, [*command[:3], f"{ROOT / 'examples' / 'retention'}:win-bak"])
    assert "did you mean 'win-back'" in re.sub(r"\s+", " ", wrong.stderr)


def test_what_a_package_requires_is_on_the_cluster(
    folder: Path, job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the job and in its tasks, though no node has an index."""
    wheels.make(tmp_path / "index", "survival_tiny", "2", code="def curve(): return 41")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    team = tmp_path / "team"
    (team / "cohorts").mkdir(parents=True)
    (team / "cohorts" / "__init__.py").touch()
    (team / "cohorts" / "curve.py").write_text(COHORTS)
    (team / "pyproject.toml").write_text(
        '[tool.liftyard]\npackages = ["cohorts"]\nrequirements = ["survival_tiny"]\n'
        '[tool.liftyard.jobs.curve]\nmodule = "cohorts.curve"\n'
    )
    id = said(liftyard(folder, "submit", f"{team}:curve")).strip()
    assert "curve of a task: 41" in said(liftyard(folder, "logs", id, "-f"))


COHORTS = """
import ray, survival_tiny
from cluster import environment, session

def task():
    import survival_tiny
    return survival_tiny.curve()

if __name__ == "__main__":
    import os
    from pathlib import Path
    where = environment.load(os.environ["LIFTYARD_ENV"], home=Path(os.environ["LIFTYARD_HOME"]))
    with session.connect(address=where.ray_address):
        print("curve of a task:", ray.get(ray.remote(task).remote()))
"""
