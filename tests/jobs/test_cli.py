"""`liftyard run` from YAML to a summary, as a user meets it."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from jobs.cli import app

PIPELINE = """\
name: shop
seed: 3
tables:
  orders:
    source: {path: "orders*.csv"}
    entity: customer
    columns: {customer: int64, amount: float64}
    rules:
      ranges: {amount: {min: 0}}
    max_quarantine_share: 0.5
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.yaml").write_text(PIPELINE)
    (tmp_path / "orders1.csv").write_text("customer,amount\n1,2.5\n2,-1\n1,4\n")
    return tmp_path


def liftyard(folder: Path, *more: str) -> Result:
    return CliRunner().invoke(
        app,
        [
            *("run", str(folder / "shop.yaml"), "--home", str(folder / "state")),
            *("--runs", str(folder / "runs"), *more),
        ],
    )


def summary(folder: Path) -> dict[str, object]:
    (latest,) = sorted((folder / "runs").glob("*/summary.json"))[-1:]
    content: dict[str, object] = json.loads(latest.read_text())
    return content


def test_run_writes_what_each_step_did(shop: Path) -> None:
    result = liftyard(shop)
    assert result.exit_code == 0, result.output
    content = summary(shop)
    assert (content["status"], content["pipeline"], content["seed"]) == ("finished", "shop", 3)
    steps = content["steps"]
    assert isinstance(steps, list)
    assert [(step["name"], step["rows_in"], step["rows_out"]) for step in steps] == [
        ("ingest", 3, 3),
        ("validate", 3, 2),
        ("features", 0, 0),
    ]
    assert steps[1]["detail"]["orders"]["by_rule"] == {"range:amount": 1}


def test_broken_yaml_is_told_with_its_line_and_no_traceback(shop: Path) -> None:
    (shop / "shop.yaml").write_text(PIPELINE.replace("rules:", "rulez:"))
    result = liftyard(shop)
    assert result.exit_code == 1
    assert "shop.yaml" in result.stderr
    assert "rulez" in result.stderr
    assert "did you mean" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (shop / "runs").exists()


def test_missing_pipeline_is_told(tmp_path: Path) -> None:
    result = liftyard(tmp_path)
    assert result.exit_code == 1
    assert "shop.yaml" in result.stderr


def test_unwritable_root_is_told_and_the_run_is_failed(shop: Path) -> None:
    (shop / "state").write_text("a file where the folder should be")
    result = liftyard(shop)
    assert result.exit_code == 1
    assert "error: " in result.stderr
    assert summary(shop)["status"] == "failed"
    assert f"`--resume {summary(shop)['run_id']}` goes on" in result.stderr


def test_resume_of_an_unknown_run_is_told(shop: Path) -> None:
    result = liftyard(shop, "--resume", "nope")
    assert result.exit_code == 1
    assert "no run 'nope'" in result.stderr


def test_misspelt_aggregation_is_told_with_its_line(shop: Path) -> None:
    features = (
        "features: {f: {table: orders, entity: customer, time: amount, name: orders,\n"
        "  aggregations: [cuont]}}\n"
    )
    (shop / "shop.yaml").write_text(PIPELINE + features)
    result = liftyard(shop)
    assert result.exit_code == 1
    assert "shop.yaml:12:" in result.stderr.replace("\n", "")
    assert "did you mean 'count'?" in result.stderr.replace("\n", " ")
