import dataclasses
import json
from pathlib import Path

import pytest

from jobs import runs

STEP = runs.Step(
    name="ingest", seconds=0.1, rows_in=3, rows_out=2, engine="polars-streaming", device="cpu"
)


def test_a_finished_step_is_not_redone_after_resume(tmp_path: Path) -> None:
    run = runs.start(tmp_path, pipeline="p", seed=1).do("ingest", lambda: STEP)
    # The driver is gone here; only the folder is left.
    again = runs.resume(tmp_path, run.run_id, pipeline="p", seed=1)
    done: list[str] = []

    def validate() -> runs.Step:
        done.append("validate")
        return dataclasses.replace(STEP, name="validate")

    def ingest() -> runs.Step:
        done.append("ingest")
        return STEP

    again = again.do("ingest", ingest).do("validate", validate).end("finished")
    assert done == ["validate"]
    summary = json.loads((tmp_path / run.run_id / "summary.json").read_text())
    assert [step["name"] for step in summary["steps"]] == ["ingest", "validate"]
    assert (summary["status"], summary["seed"]) == ("finished", 1)


def test_a_failing_step_leaves_the_steps_before_it(tmp_path: Path) -> None:
    run = runs.start(tmp_path, pipeline="p", seed=1).do("ingest", lambda: STEP)

    def fail() -> runs.Step:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        run.do("validate", fail)
    assert runs.resume(tmp_path, run.run_id, pipeline="p", seed=1).steps == (STEP,)
    assert [path.name for path in run.folder.iterdir()] == ["summary.json"]


def test_two_runs_at_once_have_folders_of_their_own(tmp_path: Path) -> None:
    one = runs.start(tmp_path, pipeline="p", seed=1)
    two = runs.start(tmp_path, pipeline="p", seed=1)
    assert one.folder != two.folder


def test_resume_of_an_unknown_run_names_those_there_are(tmp_path: Path) -> None:
    there = runs.start(tmp_path, pipeline="p", seed=1)
    with pytest.raises(runs.RunError, match=there.run_id):
        runs.resume(tmp_path, "nope", pipeline="p", seed=1)


def test_resume_refuses_another_seed(tmp_path: Path) -> None:
    run = runs.start(tmp_path, pipeline="p", seed=1)
    with pytest.raises(runs.RunError, match="has seed 1, and 2 was asked for"):
        runs.resume(tmp_path, run.run_id, pipeline="p", seed=2)
