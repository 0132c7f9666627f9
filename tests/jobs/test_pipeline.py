"""The whole line on a small shop: served scores, tracking, a killed driver, a full disk."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import mlflow
import polars as pl
import psutil
import pytest
from typer.testing import CliRunner, Result

from cluster import session, storage
from jobs.cli import app
from models.registry import Registry
from serving import audit
from tests.jobs import shop

ROOT = Path(__file__).parents[2]


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        *("run", str(folder / "shop.yaml"), "--home", str(folder / "home")),
        *("--runs", str(folder / "runs"), *more),
    ]


def summary(folder: Path) -> dict[str, Any]:
    (latest,) = sorted((folder / "runs").glob("*/summary.json"))[-1:]
    content: dict[str, Any] = json.loads(latest.read_text())
    return content


def variants_tracked(folder: Path) -> list[str]:
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'home' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("shop")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    return [run.info.run_name for run in runs if "mlflow.parentRunId" in run.data.tags]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    folder = tmp_path_factory.mktemp("shop")
    shop.make(folder)
    with session.connect(cpus=2):
        return folder, CliRunner().invoke(app, arguments(folder))


def test_the_run_finishes_and_says_all_that_the_summary_promises(ran: tuple[Path, Result]) -> None:
    folder, result = ran
    assert result.exit_code == 0, result.output
    content = summary(folder)
    assert content["status"] == "finished"
    assert [step["name"] for step in content["steps"]] == [
        *("ingest", "validate", "features", "training", "sweep", "register", "serve")
    ]
    for name in ("lapse", "answers"):
        target = content["targets"][name]
        assert (target["variants"], target["failed"]) == (8, 0)
        assert target["family"] in ("boosting", "forest", "network", "ensemble")
        assert 0.5 < target["test_auc"] <= 1
        assert 0 < target["test_average_precision"] <= 1
        assert target["top_decile_lift"] > 0
        assert target["model_version"] == 1 and target["promoted"]
        assert target["data_version"] == f"training/{name}@0"
    assert content["targets"]["lapse"]["baseline"]["auc"] > 0.5
    assert content["targets"]["answers"]["baseline"] is None
    assert content["serve_url"].startswith("http://127.0.0.1:")
    assert "lapse score" in result.output and "report" in result.output
    page = (folder / "runs" / content["run_id"] / "report.html").read_text()
    assert f"{content['targets']['lapse']['test_auc']:.4f}" in page


def test_the_champion_scores_the_rows_as_they_were_served(ran: tuple[Path, Result]) -> None:
    folder, result = ran
    registry = Registry(f"sqlite:///{folder / 'home' / 'mlflow.db'}")
    steps = {step["name"]: step["detail"] for step in summary(folder)["steps"]}
    for name in ("lapse", "answers"):
        _, scorer = registry.load(name)
        table = storage.scan(folder / "home" / "tables", f"training/{name}").collect()
        for served in steps["serve"]["scored"][name]:
            keys = {key: value for key, value in served.items() if key != "score"}
            rows = table.filter([pl.col(key) == value for key, value in keys.items()])
            assert served["score"] in scorer.score(rows).tolist()
        why = dict(steps["serve"]["explained"][name])
        assert 1 <= len(why["reasons"]) <= 3
        assert why["reasons"][0] in result.output
        assert {key: why[key] for key in why if key != "reasons"} in steps["serve"]["scored"][name]


def test_the_run_asked_with_a_key_and_its_audit_log_tells_so(ran: tuple[Path, Result]) -> None:
    log = ran[0] / "runs" / summary(ran[0])["run_id"] / "audit.jsonl"
    assert audit.verify(log).lines == 4
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {(line["who"], line["action"]) for line in lines} == {
        ("run", "score"),
        ("run", "explain"),
    }
    assert all(line["status"] == 200 for line in lines)


def test_every_variant_is_tracked_once(ran: tuple[Path, Result]) -> None:
    assert len(variants_tracked(ran[0])) == 16


def test_serve_ended_with_the_run(ran: tuple[Path, Result]) -> None:
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{summary(ran[0])['serve_url']}/healthz")


def test_a_second_run_promotes_only_what_is_better(ran: tuple[Path, Result]) -> None:
    folder, _ = ran
    before = summary(folder)["targets"]
    with session.connect(cpus=2):
        result = CliRunner().invoke(app, arguments(folder))
    assert result.exit_code == 0, result.output
    for name, target in summary(folder)["targets"].items():
        # Same data, seed and code: the same model, which doesn't beat itself.
        assert target["test_auc"] == before[name]["test_auc"]
        assert (target["model_version"], target["promoted"]) == (2, False)
        assert "does not beat champion 1's" in target["reason"]
    cards = Registry(f"sqlite:///{folder / 'home' / 'mlflow.db'}").models()
    assert {(card.version, card.aliases) for card in cards} == {
        (1, ("champion",)),
        (2, ("challenger",)),
    }


def test_from_does_later_steps_again_and_set_overrides(ran: tuple[Path, Result]) -> None:
    folder, _ = ran
    before = summary(folder)
    with session.connect(cpus=2):
        result = CliRunner().invoke(
            app,
            arguments(
                *(folder, "--from", "sweep", "--set", "sweep.families.network.pack_size=1"),
                # The rows to answer that train are of one cutoff, so their folds must be drawn.
                *("--set", "sweep.folds=2"),
                *("--set", "targets.answers.split={validate_share: 0.25, test_share: 0.25}"),
            ),
        )
    assert result.exit_code == 0, result.output
    after = summary(folder)
    assert after["run_id"] == before["run_id"] and after["attempt"] == 2
    assert after["steps"][:4] == before["steps"][:4]
    assert after["targets"]["lapse"]["variants"] == 7
    for name in ("lapse", "answers"):
        journal = folder / "runs" / after["run_id"] / f"sweep-{name}.jsonl"
        for line in journal.read_text().splitlines():
            assert json.loads(line)["metrics"]["fold_spread"] >= 0


def test_a_killed_driver_resumes_without_training_again(tmp_path: Path) -> None:
    shop.make(tmp_path)
    # More variants than finish at once, so that the kill finds the sweep half done.
    slower = (
        "--set",
        "sweep.families.boosting.packs=12",
        "--set",
        "sweep.families.boosting.settings.rounds=[400, 800]",
    )
    command = [sys.executable, "-m", "jobs.cli", *arguments(tmp_path, *slower)]
    driver = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    journal = None
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and driver.poll() is None:
        journal = next((tmp_path / "runs").glob("*/sweep-lapse.jsonl"), None)
        if journal is not None and len(journal.read_text().splitlines()) >= 4:
            break
        time.sleep(0.05)
    children = psutil.Process(driver.pid).children(recursive=True)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    # Ray's agents would find out by themselves, and take a minute for it.
    for child in children:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    assert journal is not None
    done_before = journal.read_text().splitlines()
    content = summary(tmp_path)
    assert content["status"] == "running"
    assert [step["name"] for step in content["steps"]][-1] == "training"

    resumed = subprocess.run(
        [*command, "--resume", content["run_id"]], cwd=ROOT, capture_output=True, text=True
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    after = summary(tmp_path)
    assert after["status"] == "finished"
    assert after["steps"][:4] == content["steps"]
    lines = journal.read_text().splitlines()
    assert lines[: len(done_before)] == done_before
    assert len(lines) == after["targets"]["lapse"]["variants"] == 28
    names = variants_tracked(tmp_path)
    assert len(names) == 56


def test_a_full_disk_is_told_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    shop.make(tmp_path)
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from jobs.cli import app; app(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, *arguments(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "error: table 'orders'" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert not storage.exists(tmp_path / "home" / "tables", "orders")
    # With room again the run goes on.
    with session.connect(cpus=2):
        again = CliRunner().invoke(
            app,
            arguments(tmp_path, "--resume", summary(tmp_path)["run_id"], "--dask-workers", "2"),
        )
    assert again.exit_code == 0, again.output
    engines = {step["name"]: step["engine"] for step in summary(tmp_path)["steps"]}
    assert engines["features"].endswith("on 2 Dask workers")
    # The Dask workers have given the CPUs back.
    assert engines["sweep"] == "packs on 2 Ray actors"


def test_two_runs_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    shop.make(tmp_path)
    command = [sys.executable, "-m", "jobs.cli", *arguments(tmp_path)]
    both = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [each.communicate()[0] for each in both]
    assert [each.returncode for each in both] == [0, 0], said
    finished = [json.loads(file.read_text()) for file in (tmp_path / "runs").glob("*/summary.json")]
    assert [each["status"] for each in finished] == ["finished", "finished"]
    first, second = (each["targets"] for each in finished)
    assert {n: t["test_auc"] for n, t in first.items()} == {
        n: t["test_auc"] for n, t in second.items()
    }
