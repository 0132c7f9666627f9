"""Sweeps on a GPU: networks in both precisions against the CPU's, and two workers on one card."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster import session
from cluster.device import choose
from jobs import sweep
from models import metrics, network
from models.families import TrainingData

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        choose("auto", rapids=False).kind != "cuda", reason="no CUDA device was found"
    ),
]
SHAPE = {"width": 32, "depth": 2, "epochs": 4, "category_size": 3}


@pytest.fixture(scope="module")
def data() -> TrainingData:
    draws = np.random.default_rng(3)
    x = draws.standard_normal((12_000, 8)).astype(np.float32)
    x[:, 7] = draws.integers(0, 5, 12_000)
    logit = x[:, 0] + x[:, 1] * x[:, 2] + (x[:, 7] == 2)
    y = (draws.random(12_000) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    return TrainingData(
        x_train=x[:8000],
        y_train=y[:8000],
        x_valid=x[8000:],
        y_valid=y[8000:],
        categories=(0, 0, 0, 0, 0, 0, 0, 5),
    )


def aucs(fitted: list[network.Fitted], data: TrainingData) -> list[float]:
    return [metrics.auc(data.y_valid, each.valid_scores) for each in fitted]


@pytest.mark.parametrize("patience", [0, 1])
def test_networks_score_nearly_as_on_a_cpu(data: TrainingData, patience: int) -> None:
    variants = [{**SHAPE, "patience": patience, "seed": seed} for seed in range(4)]
    whole = [{**each, "precision": "32"} for each in variants]
    cpu = aucs(network.fit_pack(whole, data), data)
    gpu = network.fit_pack(whole, data, accelerator="gpu")
    halves = network.fit_pack(variants, data, accelerator="gpu")
    assert min(cpu) > 0.7
    # With patience a last bit may choose another epoch.
    np.testing.assert_allclose(aucs(gpu, data), cpu, atol=1e-2 if patience else 1e-3)
    np.testing.assert_allclose(aucs(halves, data), cpu, atol=1e-2)
    assert {each.ran["precision"] for each in gpu} == {"32"}
    has = torch.cuda.is_bf16_supported(including_emulation=False)
    assert {each.ran["precision"] for each in halves} == {"bf16-mixed" if has else "32"}


def test_two_workers_train_on_one_card(data: TrainingData, tmp_path: Path) -> None:
    variants = [
        *({"family": "network", **SHAPE, "width": width} for width in (16, 32)),
        *({"family": "boosting", "rounds": 20, "depth": depth} for depth in (2, 3)),
    ]
    alone = [outcome for each in variants for outcome in sweep.train_pack([each], data)]
    with session.connect(), sweep.pool(2, cpus=0.5, gpus=0.5) as shared:
        places = shared.places()
        outcomes = sweep.run(variants, data, journal=tmp_path / "journal", on=shared)
    assert len(places) == 2
    assert {each.lacks for each in places} == {None}
    assert {each.gpus for each in places} == {("0",)}
    assert {each.ran["device"] for each in outcomes} == {"cuda"}
    found, wanted = ([each.score for each in side] for side in (outcomes, alone))
    np.testing.assert_allclose(found, wanted, atol=1e-2)
