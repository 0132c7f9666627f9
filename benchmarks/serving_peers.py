"""Other servers of the same model: FastAPI as one writes it first, MLflow, BentoML, LitServe."""

import json
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.serving_load import CLIENTS, request, summary
from benchmarks.serving_servers import MODEL, own, server
from cluster import ports

PEERS_VARIABLE = "LIFTYARD_PEER_ENVIRONMENTS"


def serve_fastapi(uri: str, port: int) -> None:
    """A route as one writes it first: FastAPI, pydantic's dicts, a frame, the model."""
    import uvicorn
    from fastapi import FastAPI

    from models.registry import Registry

    _, scorer = Registry(uri).load(MODEL)
    app = FastAPI()

    @app.post("/score")
    def score(body: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
        x = scorer.encoder.transform_rows(body["rows"])
        return {"scores": scorer.predict(x).tolist()}

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)


BENTOML = """
import bentoml, numpy as np, xgboost
booster = xgboost.Booster(model_file={model!r})
@bentoml.service(workers=1, traffic={{"timeout": 60}})
class Score:
    @bentoml.api
    def score(self, rows: list[list[float | None]]) -> list[float]:
        x = np.array(rows, dtype=np.float32)
        return booster.predict(xgboost.DMatrix(x, nthread=1)).tolist()
"""
LITSERVE = """
import litserve, numpy as np, xgboost
class Score(litserve.LitAPI):
    def setup(self, device):
        self.booster = xgboost.Booster(model_file={model!r})
    def decode_request(self, request):
        return np.array(request["rows"], dtype=np.float32)
    def predict(self, x):
        return self.booster.predict(xgboost.DMatrix(x, nthread=1))
    def encode_response(self, scores):
        return {{"scores": scores.tolist()}}
if __name__ == "__main__":
    litserve.LitServer(Score(), accelerator="cpu").run(port={port}, host="127.0.0.1")
"""


def peer_command(name: str, booster: Path, port: int, folder: Path) -> list[str] | str:
    """BentoML's or LitServe's command, or why there is none."""
    root = os.environ.get(PEERS_VARIABLE)
    python = Path(root or "", name, "bin", "python")
    if root is None or not python.exists():
        return f"skipped: {PEERS_VARIABLE} names no folder with {name}/bin/python"
    text = {"bentoml": BENTOML, "litserve": LITSERVE}[name].format(model=str(booster), port=port)
    script = folder / f"peer_{name}.py"
    script.write_text(textwrap.dedent(text))
    if name == "litserve":
        return [str(python), str(script)]
    return [
        *(str(python), "-m", "bentoml", "serve", f"{script.stem}:Score"),
        *("--working-dir", str(folder), "--host", "127.0.0.1", "--port", str(port)),
    ]


def measure(
    load: Any,
    uri: str,
    scorer: Any,
    frame: pl.DataFrame,
    folder: Path,
    seconds: float,
    singles: Sequence[bytes],
    expected: Sequence[bytes],
) -> dict[str, Any]:
    """What each found, by its name; why not, of one that couldn't run.

    Args:
        load: As `serving_load.loader` gives it.
        uri: The registry with the model.
        scorer: The model.
        frame: The rows that are asked for.
        folder: For the peers' files.
        seconds: Half of what each is asked for.
        singles: Our requests, one a row.
        expected: What the answers to these hold.
    """
    from mlflow import MlflowClient

    found: dict[str, Any] = {}
    own_bodies = [json.dumps({"rows": [row]}).encode() for row in frame.to_dicts()]
    booster = folder / "booster.ubj"
    scorer.predict.args[0].save_model(booster)
    x = scorer.encoder.transform(frame)
    coded = np.where(np.isnan(x), None, x.astype(object)).tolist()
    plain = [json.dumps({"rows": [row]}).encode() for row in coded]
    records = [json.dumps({"dataframe_records": [row]}).encode() for row in frame.to_dicts()]
    scored = [request("/score", body, "json") for body in own_bodies]
    names = ("default", "fastapi", "mlflow", "bentoml", "litserve")
    port = dict(zip(names, ports.free(len(names)), strict=True))
    model = MlflowClient(registry_uri=uri).get_model_version(MODEL, "1").source
    commands: dict[str, tuple[list[str] | str, Sequence[bytes], Sequence[bytes] | None]] = {
        "default": (own("default", uri, port["default"]), singles, expected),
        # Python's json writes some numbers in other signs than our msgspec.
        "fastapi": (
            own("fastapi", uri, port["fastapi"]),
            scored,
            [json.dumps(score).encode() for score in scorer.score(frame).tolist()],
        ),
        "mlflow": (
            [
                *(sys.executable, "-m", "mlflow", "models", "serve", "-m", model),
                *("--env-manager", "local", "--host", "127.0.0.1", "-p", str(port["mlflow"])),
            ],
            [request("/invocations", body, "json") for body in records],
            None,
        ),
        **{
            name: (
                peer_command(name, booster, port[name], folder),
                [
                    request("/score" if name == "bentoml" else "/predict", body, "json")
                    for body in plain
                ],
                None,
            )
            for name in ("bentoml", "litserve")
        },
    }
    for name, (command, asked, wanted) in commands.items():
        if isinstance(command, str):
            found[name] = command
            continue
        try:
            with server(command, port[name], folder, says=name == "default"):
                found[name] = {
                    str(clients): summary(
                        [load(port[name], asked, wanted, clients, 2 * seconds) for _ in range(2)]
                    )
                    for clients in (1, CLIENTS)
                }
        except RuntimeError as error:
            found[name] = f"didn't start: {error}"
        print(name, found[name], flush=True)
    return found
