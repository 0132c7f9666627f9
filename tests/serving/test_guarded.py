"""Keys and audit log on a real Ray Serve."""

import json
import socket
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest

from cluster import session
from models.encoding import Encoder
from models.families import FAMILIES, TrainingData
from models.registry import Registry
from models.scoring import Scorer
from serving import app, audit
from serving.access import AccessError, AccessFiles, add_key

FRAME = pl.DataFrame({"spend": [1.5, None, -3.0, 8.0] * 20})


def test_only_keys_get_in_and_the_log_tells_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = Encoder.fit(FRAME, FRAME.columns)
    x = encoder.transform(FRAME)
    y = (np.arange(len(x)) % 4 == 3).astype(np.int8)
    data = TrainingData(x_train=x, y_train=y, x_valid=x, y_valid=y)
    (fitted,) = FAMILIES["boosting"]([{"family": "boosting", "rounds": 3}], data)
    registry = Registry(f"sqlite:///{tmp_path}/mlflow.db")
    registry.register(
        "lapse",
        Scorer(encoder=encoder, predict=fitted.predict),
        example=FRAME[:2],
        family="boosting",
        variant={},
        features=[{"name": "spend", "kind": "number", "description": "", "unit": ""}],
        metrics={},
        data_version="training/test@1",
        seed=1,
        git_revision="0" * 40,
    )
    registry.promote("lapse", 1)
    # Paths are those of the process that starts serving.
    monkeypatch.chdir(tmp_path)
    files = AccessFiles(keys="keys.json", audit="audit.jsonl")
    key = add_key(Path("keys.json"), "crm", "service")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with session.connect(cpus=2):
        Path("broken.json").write_text("[]")
        with pytest.raises(AccessError, match=r"broken\.json isn't a keys file"):
            app.serve(registry.uri, port=port, access=AccessFiles(keys="broken.json"))
        url = app.serve(registry.uri, port=port, access=files)
        body = {"rows": [{"spend": 8.0}]}
        statuses = [
            httpx.post(f"{url}/v1/models/lapse/score", json=body, headers=headers).status_code
            for headers in ({}, {"authorization": f"Bearer {key}"}, {"authorization": "Bearer ly"})
        ]
        app.stop()
    assert statuses == [401, 200, 401]
    assert audit.verify(tmp_path / "audit.jsonl").lines == 3
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["who"] for line in lines] == [None, "crm", None]
