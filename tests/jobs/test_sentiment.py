"""Sentiment trained on a real Ray cluster, with a tiny random encoder: small, but each path."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest
import torch

from cluster import session
from jobs import sentiment as job
from jobs import sentiment_training as training
from jobs.pipeline_file import ConfigError, read
from jobs.sentiment_config import SentimentTraining
from jobs.sentiment_texts import SentimentJobError, rows
from models import sentiment
from models.registry import Registry
from models.sentiment_training import Trained, fit
from tests import tiny_encoder

# As many as a Ray worker of one CPU, so that sums are the same to the bit.
torch.set_num_threads(1)

# Ray's own, when its Train starts.
pytestmark = pytest.mark.filterwarnings("ignore:.use_.* is deprecated:DeprecationWarning")

ROOT = Path(__file__).parents[2]
COMMENTS = ROOT / "pipelines/comments.csv"


@pytest.fixture(scope="module", autouse=True)
def ray_session() -> Iterator[None]:
    with session.connect(cpus=2):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sentiment")
    tiny_encoder.write(folder / "encoder")
    tiny_encoder.labelled(400).select("text", "label").write_csv(folder / "texts.csv")
    return folder


def config(root: Path, **how: Any) -> SentimentTraining:
    return SentimentTraining.model_validate(
        {
            "texts": [{"path": "texts.csv", "language": "en"}],
            "encoder": str(root / "encoder"),
            "max_tokens": 16,
            "epochs": 4.0,
            "batch": 16,
            "learning_rate": 5e-3,
            "precision": "fp32",
            "freeze_words": False,
            "checkpoint_steps": 5,
            "topics": {"groups": 3},
            **how,
        }
    )


def test_the_head_is_trained_tested_registered_and_described(root: Path, tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/mlflow.db")
    run = tmp_path / "run"
    run.mkdir()
    quick = config(root, mode="head")
    found = job.run(quick, run, registry, root=root, git_revision="abc")
    assert json.loads((run / "sentiment.json").read_text()) == found
    assert (found["name"], found["version"], found["aliases"]) == ("sentiment", 1, ["champion"])
    assert found["metrics"]["macro_f1"] > 0.8
    assert found["metrics"]["rows.language_en"] == found["rows"]["test"]
    assert len(found["topics"]) == 3
    assert found["topics_engine"] == "kmeans of scikit-learn on cpu (gpus: 0)"
    assert {each["label"] for each in found["examples"]} == set(sentiment.LABELS)
    # A finished run isn't done again; another registers a challenger or a champion.
    assert job.run(quick, run, registry, root=root) == found
    (tmp_path / "again").mkdir()
    again = job.run(quick, tmp_path / "again", registry, root=root)
    assert (again["version"], again["aliases"]) == (2, ["champion"])
    assert again["champion_macro_f1"] == found["metrics"]["macro_f1"]

    (tmp_path / "served").mkdir()
    card, folder = registry.folder("sentiment", tmp_path / "served", 1)
    assert card.metrics == found["metrics"]
    texts = ["the parcel is broken", "great coffee"]
    said = sentiment.load(folder).logits(texts).argmax(axis=1)
    assert [sentiment.LABELS[at] for at in said] == ["negative", "positive"]
    with pytest.raises(ValueError, match="is a folder"):
        registry.load("sentiment", 1)


@pytest.fixture(scope="module")
def asked(root: Path) -> SentimentTraining:
    """A training long enough to be killed in its midst."""
    return config(root, epochs=12.0, checks=1)


@pytest.fixture(scope="module")
def alone(asked: SentimentTraining, root: Path) -> Trained:
    """The same, never killed."""
    frame = rows(asked, root)
    return fit(
        sentiment.new(str(root / "encoder"), max_tokens=16),
        frame.filter(pl.col("part") == "train"),
        frame.filter(pl.col("part") == "valid"),
        asked.settings(),
        folder=root / "alone",
    )


def assert_equal(work: Path, alone: Trained) -> None:
    """The same bits, by way of a checkpoint."""
    trained = json.loads((work / "trained.json").read_text())
    assert 0 < trained["resumed_at"] < alone.steps
    assert trained["history"] == alone.history
    ours = sentiment.load(work / "model").module.state_dict()
    for name, weights in alone.model.module.state_dict().items():
        assert torch.equal(weights, ours[name]), name
    assert not (work / "checkpoint").exists()


def test_a_killed_worker_goes_on_to_the_same_weights(
    root: Path, tmp_path: Path, asked: SentimentTraining, alone: Trained
) -> None:
    frame = rows(asked, root)
    killed: list[int] = []

    def kill() -> None:
        # Once its first checkpoint is there, the process that trains is ended.
        while not killed:
            for checkpoint in tmp_path.glob("*/checkpoint/last.ckpt"):
                if checkpoint.exists():
                    for process in psutil.Process().children(recursive=True):
                        if "ray::_train_worker" in " ".join(process.cmdline()):
                            killed.append(process.pid)
                            os.kill(process.pid, signal.SIGKILL)
                            return
            time.sleep(0.005)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    work = training.train(asked, frame, tmp_path)
    thread.join(10)
    assert len(killed) == 1
    assert_equal(work, alone)


DRIVER = """
import os, signal, sys, threading, time
from pathlib import Path
import psutil
from cluster import session
from jobs import sentiment_training as training
from jobs.sentiment_config import SentimentTraining
from jobs.sentiment_texts import rows

root, folder, said = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]

def die():
    # As a machine that goes: a worker that is left would train on until Ray misses the driver.
    while not list(folder.glob("*/checkpoint/last.ckpt")):
        time.sleep(0.005)
    for process in psutil.Process().children(recursive=True):
        if "ray::_train_worker" in " ".join(process.cmdline()):
            process.kill()
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=die, daemon=True).start()
with session.connect(cpus=1):
    asked = SentimentTraining.model_validate_json(said)
    training.train(asked, rows(asked, root), folder)
"""


def test_a_killed_driver_goes_on_to_the_same_weights(
    root: Path, tmp_path: Path, asked: SentimentTraining, alone: Trained
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, str(root), str(tmp_path), asked.model_dump_json()],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    (checkpoint,) = tmp_path.glob("*/checkpoint/last.ckpt")
    step = torch.load(checkpoint, weights_only=False)["global_step"]
    work = training.train(asked, rows(asked, root), tmp_path)
    assert_equal(work, alone)
    assert json.loads((work / "trained.json").read_text())["resumed_at"] == step > 0


def test_two_workers_average_their_gradients(root: Path, tmp_path: Path) -> None:
    asked = config(root, workers=2, class_weights=False, epochs=2.0)
    frame = rows(asked, root)
    work = training.train(asked, frame, tmp_path)
    trained = json.loads((work / "trained.json").read_text())
    assert trained["history"][-1]["macro_f1"] > 0.5
    assert sentiment.load(work / "model").labels == sentiment.LABELS


def test_a_sweep_chooses_the_settings(root: Path, tmp_path: Path) -> None:
    asked = config(root, sweep={"learning_rate": [1e-9, 5e-3]}, epochs=2.0)
    registry = Registry(f"sqlite:///{tmp_path}/mlflow.db")
    work = training.train(asked, rows(asked, root), tmp_path, registry=registry)
    trained = json.loads((work / "trained.json").read_text())
    assert trained["variant"] == {"learning_rate": 5e-3}
    lines = [json.loads(line) for line in (work / "sweep.jsonl").read_text().splitlines()]
    assert sorted(line["variant"]["learning_rate"] for line in lines) == [1e-9, 5e-3]
    chosen = next(line for line in lines if line["variant"]["learning_rate"] == 5e-3)
    best = max(trained["history"], key=lambda each: each["macro_f1"])
    assert chosen["metrics"]["macro_f1"] == best["macro_f1"]


def test_equal_texts_are_in_one_part_and_odd_ones_left_out(tmp_path: Path) -> None:
    texts = [f"comment {at} of @someone" for at in range(60)]
    frame = pl.DataFrame({"body": [*texts, texts[0], "", "123"], "stars": ["5"] * 30 + ["1"] * 33})
    frame.write_csv(tmp_path / "a.tsv", separator="\t")
    asked = SentimentTraining.model_validate(
        {
            "labels": ["negative", "positive"],
            "texts": [
                {
                    "path": "a.tsv",
                    "separator": "\t",
                    "text": "body",
                    "label": "stars",
                    "labels": {"5": "positive", "1": "negative"},
                }
            ],
        }
    )
    found = rows(asked, tmp_path)
    assert len(found) == 60
    assert set(found["label"]) == {"negative", "positive"}
    assert found["text"].str.ends_with("of @user").all()
    with pytest.raises(SentimentJobError, match=r"labels \['5'\] aren't among"):
        wrong = asked.texts[0].model_copy(update={"labels": {"1": "negative"}})
        rows(asked.model_copy(update={"texts": [wrong]}), tmp_path)
    with pytest.raises(SentimentJobError, match=r"no columns \['text', 'label'\]"):
        named = asked.texts[0].model_copy(update={"text": "text", "label": "label"})
        rows(asked.model_copy(update={"texts": [named]}), tmp_path)


def test_a_file_that_says_what_is_not_allowed(tmp_path: Path) -> None:
    path = tmp_path / "sentiment.yaml"
    path.write_text("texts: [{path: a.csv}]\nepoch: 2\nworkers: 0\n")
    with pytest.raises(ConfigError, match=r"epoch: .*allowed: name, texts"):
        read(path, SentimentTraining)
    path.write_text("texts: [{path: a.csv}]\nmode: head\nworkers: 2\n")
    with pytest.raises(ConfigError, match="mode head takes one"):
        read(path, SentimentTraining)
    dense = "texts: [{path: a.csv}]\ntopics: {method: hdbscan, least: 2000}\n"
    path.write_text(dense + "gpus: 1\n")
    with pytest.raises(ConfigError, match=r"least 2000: HDBSCAN on a GPU takes at most 1024"):
        read(path, SentimentTraining)
    path.write_text(dense)
    assert read(path, SentimentTraining).topics.least == 2000
    path.write_text("texts: [{path: a.csv}]\nepochs: 2\n")
    assert read(path, SentimentTraining).settings(smoothing=0.1).epochs == 2.0
    assert read(path, SentimentTraining).settings(smoothing=0.1).smoothing == 0.1


def test_the_packaged_comments_are_what_they_say() -> None:
    asked = SentimentTraining.model_validate({"texts": [{"path": str(COMMENTS)}]})
    frame = rows(asked, COMMENTS.parent)
    raw = pl.read_csv(COMMENTS)
    assert len(frame) == len(raw) == 252
    assert set(frame["label"].value_counts()["count"]) == {84}
    assert frame["language"].to_list() == raw["language"].to_list()
