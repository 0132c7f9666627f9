"""The model that is served, and our servers with it; for `benchmarks.serving`."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

NUMBERS, BATCH_ROWS, MODEL = 39, 1_000, "lapse_30d"


def make_rows(rows: int, seed: int) -> pl.DataFrame:
    """Rows of 42 features, with gaps."""
    draws = np.random.default_rng(seed)
    values = draws.gamma(2.0, 30.0, (rows, NUMBERS)).round(2)
    values[draws.random(values.shape) < 0.05] = np.nan
    numbers = pl.DataFrame(values, schema=[f"number_{at}" for at in range(NUMBERS)])
    return numbers.fill_nan(None).with_columns(
        segment=draws.choice(["gold", "silver", "bronze"], rows),
        channel=draws.choice(["web", "store", "app"], rows),
        member=draws.random(rows) < 0.5,
    )


def register(
    uri: str,
    rounds: int = 100,
    *,
    name: str = MODEL,
    frame: pl.DataFrame | None = None,
    above: float = 110,
) -> Any:
    """Trains a model, registers it and promotes its first version; gives its scorer.

    Args:
        uri: The registry.
        rounds: Trees.
        name: The model's.
        frame: What it is trained on; None for rows of 42 features.
        above: The label is whether the first two features sum to more.
    """
    from models.encoding import Encoder
    from models.families import FAMILIES, TrainingData
    from models.registry import Registry
    from models.scoring import Scorer

    frame = make_rows(4_000, 1) if frame is None else frame
    encoder = Encoder.fit(frame, frame.columns)
    x = encoder.transform(frame)
    y = (np.nan_to_num(x[:, 0]) + np.nan_to_num(x[:, 1]) > above).astype(np.int8)
    cut = len(x) * 3 // 4
    data = TrainingData(x_train=x[:cut], y_train=y[:cut], x_valid=x[cut:], y_valid=y[cut:])
    variant = {"family": "boosting", "rounds": rounds, "depth": 4}
    (fitted,) = FAMILIES["boosting"]([variant], data)
    scorer = Scorer(encoder=encoder, predict=fitted.predict)
    registry = Registry(uri)
    registry.register(
        name,
        scorer,
        example=frame[:3],
        family="boosting",
        variant=variant,
        features=[
            {"name": each.name, "kind": each.kind, "description": "", "unit": ""}
            for each in encoder.columns
        ],
        metrics={},
        data_version="benchmark@1",
        seed=0,
        git_revision="0" * 40,
    )
    registry.promote(name, 1)
    return scorer


def stream(frame: pl.DataFrame) -> bytes:
    """The rows as an Arrow stream."""
    import pyarrow as pa

    table = frame.to_arrow()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def serve_ours(uri: str, port: int, kind: str, grpc_port: int | None = None) -> None:
    """Ours, with the empty deployment beside it at /noop.

    Args:
        uri: The registry.
        port: Of HTTP.
        kind: "ours"; "guarded", with keys and an audit log; "whole", with customers too, and
            without the empty deployment; "default", as Ray Serve starts.
        grpc_port: None for no gRPC.
    """
    from cluster import session
    from models.registry import Registry
    from serving import app
    from serving.access import AccessFiles
    from serving.settings import Limits, Listener, Settings

    folder = Path(uri.removeprefix("sqlite:///")).parent
    access = AccessFiles(keys=str(folder / "keys.json"), audit=str(folder / "audit.jsonl"))
    settings = Settings(
        registry=Registry(uri).uri,
        models=None,
        limits=Limits(),
        refresh_s=10,
        access=access if kind in ("guarded", "whole") else None,
        store=str(folder / "store") if kind == "whole" else None,
    )
    if kind == "default":
        os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
    with session.connect(cpus=2):
        app.apply(settings, Listener(port=port, grpc_port=grpc_port))
        if kind != "whole":
            _deploy_noop()
        _say_ready()
        app.stop()


def _deploy_noop() -> None:
    from ray import serve as engine

    @engine.deployment(max_ongoing_requests=128, logging_config={"enable_access_log": False})
    class Noop:
        async def __call__(self, request: Any) -> str:
            return "[]"

    engine.run(
        Noop.options(ray_actor_options={"num_cpus": 0}).bind(), name="noop", route_prefix="/noop"
    )


def _say_ready() -> None:
    print("ready", flush=True)
    sys.stdin.read()


@contextmanager
def server(command: Sequence[str], port: int, folder: Path, *, says: bool = False) -> Iterator[int]:
    """A server's process, ended by its id; waits until it says ready, or takes connections."""
    log = (folder / f"{port}.log").open("wb")
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE if says else log,
        stderr=log,
        start_new_session=True,
        # MLflow starts uvicorn by its name.
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        cwd=Path(__file__).parents[1],
    )
    try:
        deadline = time.monotonic() + 120
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(Path(log.name).read_text()[-2_000:])
            if says:
                if process.stdout and b"ready" in process.stdout.readline():
                    break
            else:
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
            time.sleep(0.1)
        yield port
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(30 if says else 1)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 15)
            process.wait(20)


def own(kind: str, uri: str, *ports: int) -> list[str]:
    """The command of a server of this module, or of FastAPI's; `ports` as it takes them."""
    return [
        *(sys.executable, "-m", "benchmarks.serving", "--server", kind, uri),
        *(str(port) for port in ports),
    ]
