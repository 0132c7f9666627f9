"""Sweeps on a real Ray cluster: resume, lost workers, failing variants, equal scores."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest

from cluster import session
from jobs import sweep
from models.families import TrainingData

VARIANTS = [
    *({"family": "boosting", "rounds": r, "depth": d} for d in (2, 3) for r in (5, 20)),
    *({"family": "forest", "trees": t, "depth": d} for d in (3, 5) for t in (5, 10)),
]


@pytest.fixture(scope="module")
def data() -> TrainingData:
    random = np.random.default_rng(5)
    x = random.normal(size=(1_500, 6)).astype(np.float32)
    y = (x[:, 0] + 0.5 * x[:, 1] ** 2 + random.normal(size=1_500) > 0.5).astype(np.int8)
    return TrainingData(x_train=x[:1000], y_train=y[:1000], x_valid=x[1000:], y_valid=y[1000:])


@pytest.fixture(scope="module", autouse=True)
def ray_cluster() -> Iterator[None]:
    with session.connect(cpus=2):
        yield


def scores(outcomes: Sequence[sweep.Outcome]) -> list[float | None]:
    return [outcome.valid_auc for outcome in outcomes]


def test_scores_do_not_depend_on_workers(tmp_path: Path, data: TrainingData) -> None:
    one = sweep.run(VARIANTS, data, journal=tmp_path / "one", workers=1)
    two = sweep.run(VARIANTS, data, journal=tmp_path / "two", workers=2)
    assert scores(one) == scores(two)
    assert [outcome.variant for outcome in one] == VARIANTS
    assert all(score is not None and score > 0.6 for score in scores(one))


def test_resume_trains_only_what_is_missing(tmp_path: Path, data: TrainingData) -> None:
    journal = tmp_path / "journal"
    first = sweep.run(VARIANTS[:3], data, journal=journal, workers=1)
    # A killed driver can leave half a line.
    journal.write_text(journal.read_text() + '{"variant": {"fam')
    trained: list[sweep.Outcome] = []
    every = sweep.run(VARIANTS, data, journal=journal, workers=2, on_done=trained.extend)
    assert len(trained) == len(VARIANTS) - 3
    assert every[:3] == first
    assert sweep.run(VARIANTS, data, journal=journal, workers=2, on_done=trained.extend) == every
    assert len(trained) == len(VARIANTS) - 3


def test_a_killed_worker_repeats_its_pack(tmp_path: Path, data: TrainingData) -> None:
    whole = sweep.run(VARIANTS, data, journal=tmp_path / "whole", workers=2)
    killed: list[int] = []

    def kill_one(outcomes: Sequence[sweep.Outcome]) -> None:
        workers = [
            child
            for child in psutil.Process().children(recursive=True)
            if child.name().startswith("ray::_Worker")
        ]
        if workers and not killed:
            killed.append(workers[0].pid)
            os.kill(workers[0].pid, signal.SIGKILL)

    hurt = sweep.run(VARIANTS, data, journal=tmp_path / "hurt", workers=2, on_done=kill_one)
    assert len(killed) == 1
    assert scores(hurt) == scores(whole)


def test_a_failing_variant_is_told_and_stops_nothing(tmp_path: Path, data: TrainingData) -> None:
    bad = {"family": "boosting", "rounds": 0, "depth": 2}
    outcomes = sweep.run([*VARIANTS[:2], bad], data, journal=tmp_path / "journal", workers=1)
    assert outcomes[2].valid_auc is None
    assert outcomes[2].error is not None
    assert "rounds" in outcomes[2].error
    assert all(outcome.error is None for outcome in outcomes[:2])
