"""The registry on a real SQLite database and behind a real MLflow server."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from models.encoding import Encoder
from models.families import FAMILIES, TrainingData
from models.registry import Registry
from models.registry_connection import RegistryError
from models.registry_sweeps import Trial
from models.registry_versions import Card
from models.scoring import Scorer

ROOT = Path(__file__).parents[2]
FEATURES = (
    {"name": "spend_30d", "kind": "number", "description": "Spent in 30 days", "unit": "USD"},
    {"name": "channel", "kind": "string", "description": "Most used channel", "unit": ""},
    {"name": "member", "kind": "boolean", "description": "In the loyalty scheme", "unit": ""},
)
VARIANTS: dict[str, dict[str, Any]] = {
    "boosting": {"family": "boosting", "rounds": 10, "depth": 3, "row_share": 0.7, "seed": 3},
    "forest": {"family": "forest", "trees": 10, "depth": 5, "seed": 3},
}


@pytest.fixture(scope="module")
def frame() -> pl.DataFrame:
    random = np.random.default_rng(11)
    spend = np.where(random.random(600) < 0.1, None, random.gamma(2.0, 40.0, 600))
    return pl.DataFrame(
        {
            "household": np.arange(600),
            "spend_30d": pl.Series(spend.tolist(), dtype=pl.Float64),
            "channel": random.choice(np.array(["mail", "shop", "web"]), 600),
            "member": random.random(600) < 0.4,
        }
    )


@pytest.fixture(scope="module")
def scorers(frame: pl.DataFrame) -> dict[str, Scorer]:
    encoder = Encoder.fit(frame, [feature["name"] for feature in FEATURES])
    x = encoder.transform(frame)
    y = (np.nan_to_num(x[:, 0]) + 30 * x[:, 1] > 90).astype(np.int8)
    data = TrainingData(x_train=x[:400], y_train=y[:400], x_valid=x[400:], y_valid=y[400:])
    return {
        family: Scorer(encoder=encoder, predict=FAMILIES[family]([variant], data)[0].predict)
        for family, variant in VARIANTS.items()
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    quiet = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=quiet, stdout=log, stderr=log, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            assert process.poll() is None, (folder / "log").read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield url
    finally:
        # Its own session: the workers that it started end with it.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=30)


@pytest.fixture(scope="module")
def sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('sqlite')}/with space/mlflow.db"


@pytest.fixture(params=["sqlite", "server"])
def uri(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def registry(uri: str) -> Registry:
    return Registry(uri)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """One a test, as tests share a database."""
    return "".join(c if c.isalnum() else "_" for c in request.node.name)


@pytest.fixture
def add(
    registry: Registry, name: str, scorers: dict[str, Scorer], frame: pl.DataFrame
) -> Callable[..., Card]:
    def add(family: str = "boosting", **changed: Any) -> Card:
        given: dict[str, Any] = {
            "example": frame,
            "family": family,
            "variant": VARIANTS[family],
            "features": FEATURES,
            "metrics": {"auc": 0.81234567890123456, "log_loss": 0.4},
            "data_version": "training/lapse_30d@3",
            "seed": 3,
            "git_revision": "0a1b2c3",
        }
        return registry.register(name, scorers[family], **{**given, **changed})

    return add


def in_new_process(code: str, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", code, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert err == ""
    return out


@pytest.mark.parametrize("family", VARIANTS)
def test_a_loaded_model_scores_bit_for_bit_as_registered(
    registry: Registry,
    name: str,
    add: Callable[..., Card],
    scorers: dict[str, Scorer],
    frame: pl.DataFrame,
    family: str,
) -> None:
    made = add(family)
    card, loaded = registry.load(name, 1)
    assert card == made
    assert (card.name, card.version, card.aliases) == (name, 1, ())
    assert (card.family, card.variant, card.features) == (family, VARIANTS[family], FEATURES)
    assert card.metrics == {"auc": 0.81234567890123456, "log_loss": 0.4}
    assert (card.data_version, card.seed, card.git_revision) == (
        "training/lapse_30d@3",
        3,
        "0a1b2c3",
    )
    assert card.created.endswith("+00:00")
    np.testing.assert_array_equal(loaded.score(frame), scorers[family].score(frame))


LOAD = """
import sys
import polars as pl
from models.registry import Registry
card, scorer = Registry(sys.argv[1]).load(sys.argv[2])
print(card.version, *scorer.score(pl.read_parquet("rows.parquet")).tolist())
"""


@pytest.mark.parametrize("uri", ["sqlite"], indirect=True)
def test_a_champion_loads_in_another_process_and_folder(
    registry: Registry,
    uri: str,
    name: str,
    add: Callable[..., Card],
    scorers: dict[str, Scorer],
    frame: pl.DataFrame,
    tmp_path: Path,
) -> None:
    registry.promote(name, add().version)
    frame.write_parquet(tmp_path / "rows.parquet")
    version, *scores = said(in_new_process(LOAD, uri, name, cwd=tmp_path)).split()
    assert version == "1"
    assert [float(score) for score in scores] == scorers["boosting"].score(frame).tolist()
    assert [path.name for path in tmp_path.iterdir()] == ["rows.parquet"]


MLFLOW_LOADS = """
import sys
import warnings
warnings.simplefilter("default")
import mlflow
import polars as pl
mlflow.set_tracking_uri(sys.argv[1])
model = mlflow.pyfunc.load_model(f"models:/{sys.argv[2]}@champion")
assert model.input_example.columns.to_list() == ["spend_30d", "channel", "member"]
print(*model.predict(pl.read_parquet("rows.parquet").to_pandas()).tolist())
"""


@pytest.mark.parametrize("uri", ["sqlite"], indirect=True)
def test_mlflow_itself_loads_the_champion(
    registry: Registry,
    uri: str,
    name: str,
    add: Callable[..., Card],
    scorers: dict[str, Scorer],
    frame: pl.DataFrame,
    tmp_path: Path,
) -> None:
    registry.promote(name, add().version)
    frame.write_parquet(tmp_path / "rows.parquet")
    process = in_new_process(MLFLOW_LOADS, uri, name, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    scores = scorers["boosting"].score(frame).tolist()
    assert [float(score) for score in out.split()] == scores


def test_promotion_and_rollback_move_the_champion(
    registry: Registry, name: str, add: Callable[..., Card]
) -> None:
    assert registry.champion(name) is None
    for _ in range(4):
        add()
    assert registry.champion(name) is None
    for version in (1, 3, 4, 2):
        registry.challenge(name, version)
        assert registry.promote(name, version).aliases == ("champion",)
    registry.promote(name, 2)
    assert registry.rollback(name).version == 4
    assert registry.rollback(name).version == 3
    registry.promote(name, 2)
    registry.challenge(name, 4)
    assert [registry.rollback(name).version for _ in range(2)] == [3, 1]
    champion, scorer = registry.load(name)
    assert (champion.version, champion.aliases) == (1, ("champion",))
    assert scorer.encoder.feature_names == ("spend_30d", "channel", "member")
    with pytest.raises(RegistryError, match=r"no champion to go back to \(champion is 1\)"):
        registry.rollback(name)
    assert registry.champion(name) == champion
    aliases = {card.version: card.aliases for card in registry.models() if card.name == name}
    assert aliases == {1: ("champion",), 2: (), 3: (), 4: ("challenger",)}


def test_rollback_passes_over_versions_deleted_since(
    registry: Registry, uri: str, name: str, add: Callable[..., Card]
) -> None:
    from mlflow.tracking import MlflowClient

    for _ in range(3):
        registry.promote(name, add().version)
    MlflowClient(uri, uri).delete_model_version(name, "2")
    assert registry.rollback(name).version == 1


def test_promotions_at_once_keep_the_history_and_always_a_champion(
    sqlite: str, scorers: dict[str, Scorer], frame: pl.DataFrame
) -> None:
    registry = Registry(sqlite)
    given = {"example": frame, "features": FEATURES, "variant": {}, "metrics": {}, "seed": 1}
    for _ in range(5):
        registry.register(
            "at once",
            scorers["boosting"],
            family="boosting",
            data_version="t@1",
            git_revision="1",
            **given,  # type: ignore[arg-type]
        )
    registry.promote("at once", 1)
    with ThreadPoolExecutor(5) as pool:
        moves = [pool.submit(Registry(sqlite).promote, "at once", n) for n in (2, 3, 4, 5)]
        while not all(move.done() for move in moves):
            assert registry.champion("at once") is not None
    last = registry.load("at once")[0].version
    assert {move.result().version for move in moves} == {2, 3, 4, 5}
    back = [registry.rollback("at once").version for _ in range(4)]
    assert sorted([last, *back]) == [1, 2, 3, 4, 5]
    assert back[-1] == 1


def test_unknown_names_and_versions_say_what_there_is(
    registry: Registry, name: str, add: Callable[..., Card]
) -> None:
    with pytest.raises(RegistryError, match="isn't registered"):
        registry.load(name)
    add()
    add()
    with pytest.raises(RegistryError, match=rf"there are: \[.*did you mean '{name}'\?"):
        registry.load(name + "x")
    with pytest.raises(RegistryError, match=r"'a/b' isn't registered"):
        registry.promote("a/b", 1)
    with pytest.raises(RegistryError, match=r"no champion; promote one of its versions: \[1, 2\]"):
        registry.load(name)
    with pytest.raises(RegistryError, match=r"it has no champion.*\[1, 2\]"):
        registry.rollback(name)
    for act in (registry.load, registry.promote, registry.challenge):
        with pytest.raises(RegistryError, match=r"version 9 .* there are: \[1, 2\]"):
            act(name, 9)
    registry.promote(name, 2)
    with pytest.raises(RegistryError, match=r"version 2 .* is the champion"):
        registry.challenge(name, 2)


def test_register_refuses_what_does_not_fit(
    registry: Registry, name: str, add: Callable[..., Card], scorers: dict[str, Scorer]
) -> None:
    with pytest.raises(RegistryError, match=r"only the encoder has \['member'\]"):
        add(features=FEATURES[:2])
    with pytest.raises(ValueError, match="columns not found"):
        add(example=pl.DataFrame({"channel": ["web"]}))
    with pytest.raises(RegistryError, match="model name 'a/b': allowed are"):
        registry.register(
            "a/b",
            scorers["forest"],
            example=pl.DataFrame(),
            family="forest",
            variant={},
            features=FEATURES,
            metrics={},
            data_version="",
            seed=0,
            git_revision="",
        )
    assert name not in {card.name for card in registry.models()}


def test_a_thousand_described_features_come_back(
    registry: Registry, name: str, add: Callable[..., Card]
) -> None:
    columns = [f"feature_{n}" for n in range(1_200)]
    wide = pl.DataFrame({column: [0.5, float("nan")] for column in columns})
    features = [
        {"name": c, "kind": "number", "description": "Größe " * 20, "unit": "€"} for c in columns
    ]
    scorer = Scorer(encoder=Encoder.fit(wide, columns), predict=np.nanmean)
    registry.register(
        name,
        scorer,
        example=wide,
        family="forest",
        variant={},
        features=features,
        metrics={},
        data_version="t@1",
        seed=0,
        git_revision="1",
    )
    assert registry.load(name, 1)[0].features == tuple(features)


def children(uri: str, experiment: str, run_name: str) -> tuple[Any, list[Any]]:
    """The sweep's parent and its children, as MLflow's own client finds them."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment_id = client.get_experiment_by_name(experiment).experiment_id
    runs = client.search_runs([experiment_id], max_results=5_000)
    (parent,) = [run for run in runs if run.info.run_name == run_name]
    parents = {run.data.tags.get("mlflow.parentRunId") for run in runs} - {None}
    assert parents <= {parent.info.run_id}
    return parent, [run for run in runs if "mlflow.parentRunId" in run.data.tags]


def trial(rounds: int, error: str | None = None) -> Trial:
    return Trial(
        variant={"family": "boosting", "rounds": rounds},
        metrics={} if error else {"valid_auc": 0.5 + rounds / 1000},
        seconds=2.5,
        error=error,
        seed=8,
    )


def test_a_sweep_is_a_parent_with_a_child_a_variant(
    registry: Registry, uri: str, name: str
) -> None:
    tags = {"data_version": "training/x@1", "git_revision": "0a1b2c3"}
    with registry.sweep(name, run_name="r1", params={"variants": 6}, tags=tags) as log:
        log.add([trial(n) for n in range(1, 4)])
        log.add([trial(4, "ValueError: no rows"), trial(5), trial(5)])
    parent, runs = children(uri, name, "r1")
    assert (parent.info.status, parent.data.params) == ("FINISHED", {"variants": "6"})
    assert tags.items() <= parent.data.tags.items()
    by_rounds = {int(run.data.params["rounds"]): run for run in runs}
    assert len(runs) == 5
    assert sorted(by_rounds) == [1, 2, 3, 4, 5]
    done, failed = by_rounds[2], by_rounds[4]
    assert done.data.metrics == {"valid_auc": 0.502, "training_seconds": 2.5}
    assert done.data.params == {"family": "boosting", "rounds": "2"}
    assert (tags | {"seed": "8"}).items() <= done.data.tags.items()
    assert done.info.status == "FINISHED"
    assert done.info.end_time - done.info.start_time == 2_500
    assert failed.info.status == "FAILED"
    assert failed.data.tags["error"] == "ValueError: no rows"


def test_a_learning_curve_and_the_cost_are_shown_by_mlflow(
    registry: Registry, uri: str, name: str
) -> None:
    from mlflow.tracking import MlflowClient

    curve = [[10, 0.6], [20, 0.7], [40, 0.68]]
    with registry.sweep(name, run_name="r1", params={}, tags={}) as log:
        log.add([replace(trial(40), curve=curve, cpu_s=1.25, ran={"device": "cpu"})])
    _, (run,) = children(uri, name, "r1")
    points = MlflowClient(uri).get_metric_history(run.info.run_id, "curve_valid_auc")
    assert [[point.step, point.value] for point in points] == curve
    assert run.data.metrics["curve_valid_auc"] == 0.68
    assert run.data.metrics["cpu_seconds"] == 1.25
    assert run.data.tags["ran_device"] == "cpu"
    assert run.info.artifact_uri.endswith(f"{run.info.run_id}/artifacts")


KILLED = """
import os, signal, sys, time
from models.registry import Registry
from models.registry_sweeps import Trial
registry = Registry(sys.argv[1])
def trial(rounds):
    variant = {"family": "boosting", "rounds": rounds}
    return Trial(variant=variant, metrics={"valid_auc": 0.5}, seconds=1.0, seed=8)
with registry.sweep(sys.argv[2], run_name="r1", params={"a": 1}, tags={}) as log:
    log.add([trial(1), trial(2)])
    print("added", flush=True)
    log.add([trial(n) for n in range(3, 2000)])
    time.sleep(600)
"""


def test_a_killed_sweep_goes_on_in_its_parent_and_backfills(
    registry: Registry, uri: str, name: str, tmp_path: Path
) -> None:
    process = in_new_process(KILLED, uri, name, cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    from mlflow.tracking import MlflowClient

    for _ in range(600):
        found = MlflowClient(uri).get_experiment_by_name(name)
        if len(MlflowClient(uri).search_runs([found.experiment_id])) > 3:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    before = {run.info.run_id for run in children(uri, name, "r1")[1]}
    assert len(before) >= 3

    with registry.sweep(name, run_name="r1", params={"a": 1}, tags={}) as log:
        log.add([trial(n) for n in range(1, len(before) + 6)])
    parent, runs = children(uri, name, "r1")
    assert parent.info.status == "FINISHED"
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert before <= {run.info.run_id for run in runs}
    logged = sorted(int(run.data.params["rounds"]) for run in runs)
    assert logged == list(range(1, len(before) + 6))

    with (
        pytest.raises(RegistryError, match=r"was begun with \{'a': '1'\}, and now has"),
        registry.sweep(name, run_name="r1", params={"a": 2}, tags={}),
    ):
        pass


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_sweep_that_stops_keeps_what_was_added(
    registry: Registry, uri: str, name: str, error: type[BaseException]
) -> None:
    with (
        pytest.raises(error),
        registry.sweep(name, run_name="r1", params={}, tags={}) as log,
    ):
        log.add([trial(n) for n in range(5)])
        raise error
    parent, runs = children(uri, name, "r1")
    assert parent.info.status == ("KILLED" if error is KeyboardInterrupt else "FAILED")
    assert len(runs) == 5


def test_what_cannot_be_written_is_raised_at_the_end(
    registry: Registry, uri: str, name: str
) -> None:
    bad = replace(trial(2), variant={"family": "boosting", "not allowed?": 1})
    went_on = False
    with (
        pytest.raises(OSError, match="sweep 'r1' isn't logged whole in"),
        registry.sweep(name, run_name="r1", params={}, tags={}) as log,
    ):
        log.add([trial(1), bad])
        went_on = True
    assert went_on
    assert children(uri, name, "r1")[0].info.status == "FAILED"


AT_ONCE = """
import sys
from models.registry import Registry
from models.registry_sweeps import Trial
registry = Registry("sqlite:///new/mlflow.db")
with registry.sweep("both", run_name=sys.argv[1], params={}, tags={}) as log:
    for n in range(20):
        log.add([Trial(variant={"n": n}, metrics={"valid_auc": 0.5}, seconds=0.1, seed=1)])
"""


def test_two_processes_make_and_use_one_database_at_once(tmp_path: Path) -> None:
    processes = [in_new_process(AT_ONCE, f"r{n}", cwd=tmp_path) for n in range(2)]
    assert [said(process) for process in processes] == ["", ""]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/new/mlflow.db")
    experiment = client.get_experiment_by_name("both")
    assert experiment.artifact_location == (tmp_path / "new" / "artifacts" / "both").as_uri()
    runs = client.search_runs([experiment.experiment_id])
    assert [run.info.status for run in runs] == ["FINISHED"] * 42
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_registry_that_cannot_be_reached_says_so(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with pytest.raises(OSError, match="no MLflow server answers at"):
            Registry(f"http://127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(RegistryError, match="registry 'mlruns': allowed are sqlite:///"):
        Registry("mlruns")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Registry(f"sqlite:///{tmp_path}/file/mlflow.db")
    (tmp_path / "mlflow.db").write_text("not a database, and longer than its header" * 50)
    with pytest.raises(OSError, match="can't be read"):
        Registry(f"sqlite:///{tmp_path}/mlflow.db")


def test_artifacts_that_are_gone_are_named(
    scorers: dict[str, Scorer], frame: pl.DataFrame, tmp_path: Path
) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/mlflow.db")
    registry.register(
        "lapse_30d",
        scorers["forest"],
        example=frame,
        family="forest",
        variant=VARIANTS["forest"],
        features=FEATURES,
        metrics={},
        data_version="t@1",
        seed=0,
        git_revision="1",
    )
    (tmp_path / "artifacts").rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="artifacts"):
        registry.load("lapse_30d", 1)
