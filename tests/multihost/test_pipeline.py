"""One pipeline, with texts and serving: by the queue over hosts, on `local` and in one process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from cluster import environment
from jobs import queue
from jobs.cli import app
from tests import tiny_encoder
from tests.jobs import shop
from tests.multihost.hosts import ROOT, Cluster, Network, impossible, until

REASON = impossible()
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

COMMENTS = """\
  comments:
    source: {path: comments.parquet}
    entity: customer
    columns: {customer: int64, product: string, at: datetime, text: string}
sentiment:
  texts: [{path: labelled.csv}]
  encoder: ENCODER
  mode: head
  topics: {groups: 2}
  scores:
    comments: {text: text, time: at, by: [product]}
features:
  mood:
    table: comments_sentiment
    entity: customer
    time: at
    name: mood
    measures: {mood: sentiment}
    windows: [30d]
    aggregations: [count, mean]
    cutoffs: {every: 10d, start: 2024-02-01, end: 2024-05-01}
"""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop, whose customers write too; what they say is among the features of `lapse`."""
    folder = tmp_path_factory.mktemp("shop")
    file = shop.make(folder)
    encoder = tiny_encoder.write(folder / "encoder")
    tiny_encoder.labelled(100).write_csv(folder / "labelled.csv")
    rows = 480
    pl.DataFrame(
        {
            "customer": [i % 120 for i in range(rows)],
            "product": ["lamp", "kettle"] * (rows // 2),
            "at": [datetime(2024, 1, 1) + timedelta(hours=6 * i) for i in range(rows)],
            "text": tiny_encoder.labelled(rows, seed=9)["text"],
        }
    ).write_parquet(folder / "comments.parquet")
    text = file.read_text(encoding="utf-8")
    text = text.replace("features:\n", COMMENTS.replace("ENCODER", str(encoder)), 1)
    text = text.replace("features: [buys]\n", "features: [buys, mood]\n", 1)
    # One target is enough here.
    head, _, rest = text.partition("  answers:\n    rows:")
    file.write_text(f"{head}sweep:{rest.partition('sweep:')[2]}")
    return file


@pytest.fixture(scope="module")
def embedded(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the pipeline finds in one process."""
    folder = tmp_path_factory.mktemp("embedded")
    return alone(pipeline, folder)


def alone(pipeline: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Runs the pipeline by the command line, on this machine; gives its targets."""
    liftyard(folder, "run", str(pipeline), "--runs", str(folder / "runs"), *options)
    return targets(folder / "runs")


def liftyard(folder: Path, *words: str) -> None:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "LIFTYARD_"))}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", *words, "--home", str(folder / "home")],
        env={**inherited, "RAY_AUTH_TOKEN_PATH": str(folder / "token")},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def targets(runs: Path) -> dict[str, Any]:
    """Champions' settings and every metric of the one run there is."""
    (summary,) = runs.glob("*/summary.json")
    content = json.loads(summary.read_text(encoding="utf-8"))
    assert content["status"] == "finished"
    return dict(content["targets"])


@pytest.mark.timeout(600)
def test_local_gives_what_one_process_gives(
    pipeline: Path, embedded: dict[str, Any], tmp_path: Path
) -> None:
    try:
        liftyard(tmp_path, "up", "--cpus", "3", "--dask-workers", "1")
        assert alone(pipeline, tmp_path, "--env", "local") == embedded
    finally:
        liftyard(tmp_path, "down")


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Network(tmp_path) as network:
        yield Cluster(network, tmp_path)


@pytest.mark.timeout(600)
def test_hosts_give_what_one_process_gives(
    cluster: Cluster, pipeline: Path, embedded: dict[str, Any], tmp_path: Path
) -> None:
    head = cluster.head
    cluster.ready(head, cluster.worker(), cluster.worker())
    home = tmp_path / "home"
    file = home / "environments" / "hosts.json"
    file.parent.mkdir(parents=True)
    where = {
        "ray_address": f"{head.address}:6379",
        "dask_address": f"tls://{head.address}:8786",
        "dashboard_url": f"http://{head.address}:8265",
        "tracking_uri": f"sqlite:///{home}/mlflow.db",
        "storage_root": str(home / "tables"),
        "queue": f"sqlite:///{home}/queue.sqlite",
    }
    file.write_text(json.dumps(where), encoding="utf-8")
    log = head.folder / "dispatcher.log"
    addresses = (f"--queue={where['queue']}", f"--dashboard={where['dashboard_url']}")
    words = ("submit", str(pipeline), "--env", "hosts", "--home", str(home))
    submitted = CliRunner().invoke(app, [*words, "--runs", str(tmp_path / "runs")])
    assert submitted.exit_code == 0, submitted.output
    jobs = queue.of(environment.load("hosts", home=home))
    id = submitted.stdout.strip()

    def said() -> str:
        logs = [log, *Path("/tmp").glob(f"{head.name}/session_latest/logs/job-driver-{id}*.log")]
        return "\n".join(each.read_text(encoding="utf-8") for each in logs)

    dispatcher = head.popen(sys.executable, "-m", "jobs.dispatch", *addresses, log=log)
    try:
        until(lambda: jobs.find(id).over, 400, said)
    finally:
        dispatcher.kill()
        dispatcher.wait()
    found = jobs.find(id)
    assert (found.state, found.attempt) == ("SUCCEEDED", 1), said()
    assert targets(tmp_path / "runs") == embedded
