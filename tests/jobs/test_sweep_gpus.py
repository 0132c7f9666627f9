"""Workers that share GPUs, on a Ray cluster that counts one although this machine may have none."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from cluster import device
from jobs import sweep
from models.families import TrainingData
from tests.one_gpu import connected

VARIANT = {"family": "boosting", "rounds": 5, "depth": 2}


@pytest.fixture(scope="module")
def data() -> TrainingData:
    random = np.random.default_rng(5)
    x = random.normal(size=(600, 4)).astype(np.float32)
    y = (x[:, 0] + random.normal(size=600) > 0).astype(np.int8)
    return TrainingData(x_train=x[:400], y_train=y[:400], x_valid=x[400:], y_valid=y[400:])


@pytest.fixture(scope="module", autouse=True)
def one_gpu() -> Iterator[None]:
    with connected():
        yield


@pytest.mark.parametrize(
    ("gpus", "cpus", "workers"), [(0.5, 0.5, 2), (0.3, 0.1, 3), (0.6, 0.5, 1), (1, 0.5, 1)]
)
def test_workers_share_a_gpu_and_know_which(gpus: float, cpus: float, workers: int) -> None:
    with sweep.pool(8, cpus=cpus, gpus=gpus) as shared:
        assert len(shared.actors) == workers
        places = shared.places()
    assert [(each.device, each.gpus) for each in places] == [("cuda", ("0",))] * workers


def test_a_pool_takes_what_others_leave_of_a_gpu() -> None:
    with sweep.pool(1, cpus=0.1, gpus=0.5) as half:
        half.places()
        with sweep.pool(4, cpus=0.1, gpus=0.25) as rest:
            assert [each.gpus for each in rest.places()] == [("0",), ("0",)]


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"gpus": 2}, r"CPU 1 and GPU 2 fits on no machine .*CPU 2, GPU 1"),
        ({"cpus": 3}, r"CPU 3 and GPU 0 fits on no machine .*CPU 2, GPU 1"),
        ({"gpus": 1.5}, r"gpus=1\.5: .*a share below 1, or a whole number"),
        ({"gpus": -0.5}, r"gpus=-0\.5"),
        ({"cpus": 0}, r"cpus=0"),
        ({"workers": 0}, r"workers=0"),
    ],
)
def test_what_no_machine_holds_is_refused(asked: dict[str, float], named: str) -> None:
    with pytest.raises(sweep.SweepError, match=named), sweep.pool(**{"workers": 1, **asked}):
        pass


@pytest.mark.skipif(
    device.choose("auto", rapids=False).kind == "cuda", reason="a GPU can be used here"
)
def test_a_share_of_a_gpu_that_cannot_be_used_trains_nothing(
    tmp_path: Path, data: TrainingData
) -> None:
    journal = tmp_path / "journal"
    said = r"holds a share of GPU 0 \(CUDA_VISIBLE_DEVICES=0\) .*no CUDA device was found"
    with sweep.pool(2, cpus=0.5, gpus=0.5) as shared:
        assert {each.lacks for each in shared.places()} == {"no CUDA device was found"}
        with pytest.raises(sweep.SweepError, match=said):
            sweep.run([VARIANT], data, journal=journal, on=shared)
        with pytest.raises(sweep.SweepError, match=said):
            sweep.fit([VARIANT], data, on=shared)
    assert not journal.exists()


def test_without_a_share_it_is_the_cpu_and_outcomes_say_so(
    tmp_path: Path, data: TrainingData
) -> None:
    variants = [VARIANT, {"family": "network", "epochs": 1}, {"family": "logistic"}]
    with sweep.pool(1, cpus=1) as plain:
        (place,) = plain.places()
        outcomes = sweep.run(variants, data, journal=tmp_path / "journal", on=plain)
    assert (place.device, place.gpus, place.lacks) == ("cpu", (), None)
    assert [each.ran for each in outcomes] == [
        {"device": "cpu"},
        {"device": "cpu", "precision": "32"},
        {"device": "cpu"},
    ]
