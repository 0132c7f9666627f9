"""Replicas that take a share of a GPU, on a cluster that counts one though there may be none."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from cluster import ports
from cluster.device import choose
from models.on_gpu import on_gpu
from models.scoring import Scorer
from serving import app, device
from serving.settings import Limits, Listener, Rollout, Settings
from tests.one_gpu import connected
from tests.serving import lapse
from tests.serving.test_app import ROWS, TRAINING, trained


@pytest.fixture
def one_gpu() -> Iterator[None]:
    with connected():
        yield
        app.stop()


def test_replicas_share_a_gpu_and_tell_what_they_score_on(one_gpu: None, tmp_path: Path) -> None:
    registry = lapse.champion(tmp_path)
    settings = Settings(registry=registry.uri, models=None, limits=Limits(), refresh_s=1.0)
    listener = Listener(port=ports.free(1)[0])
    with pytest.raises(app.ServingError, match=r"gpus: 2 is .* nodes with 1 at most"):
        app.apply(settings, listener, cpus=0.25, gpus=2.0)
    with pytest.raises(app.ServingError, match=r"gpus: the replicas take 1\.25 GPUs in all"):
        app.apply(settings, listener, replicas=5, cpus=0.25, gpus=0.25)
    assert app.running() is None

    alone = replace(settings, models={"lapse": Rollout(replicas=2, gpus=0.25)})
    url = app.apply(alone, listener, cpus=0.25).url
    told = httpx.get(f"{url}/v1/models").json()
    here = choose("auto", rapids=False)
    devices = sorted((each["alone"] or "", each["device"]) for each in told["replicas"])
    assert devices == [
        ("", "cpu: no `gpus` are asked for"),
        *[("lapse", f"{here.kind}: {here.reason}")] * 2,
    ]
    (card,) = told["models"]
    assert card["device"] == {"kind": here.kind, "reason": here.reason}
    body = {"rows": [{"spend": 8.0}, {"spend": None}]}
    scored = httpx.post(f"{url}/v1/models/lapse/score", json=body).json()["scores"]
    _, scorer = registry.load("lapse")
    x = scorer.encoder.transform_rows(body["rows"])
    np.testing.assert_allclose(scored, scorer.predict(x), atol=device.APART)


def test_what_takes_no_gpu_scores_on_the_cpu_and_says_why() -> None:
    forest = trained("forest", trees=5, depth=3)
    assert on_gpu(forest.predict) is None
    scorer, where = device.placed(forest, replace(device.CPU, kind="cuda"))
    assert (scorer, where.kind) == (forest, "cpu")
    assert "boosting takes the GPU" in where.reason


@pytest.mark.gpu
def test_boosting_scores_the_same_on_a_gpu() -> None:
    cuda = choose("auto", rapids=False)
    if cuda.kind != "cuda":
        pytest.skip(cuda.reason)
    scorer = trained("boosting", rounds=30)
    expected_n = scorer.score(ROWS)
    moved, where = device.placed(Scorer(encoder=scorer.encoder, predict=scorer.predict), cuda)
    assert where == cuda
    for frame in (ROWS, TRAINING):
        assert moved.score(frame).shape == (len(frame),)
    np.testing.assert_allclose(moved.score(ROWS), expected_n, atol=device.APART)
