"""Requests a second and their times: ours against an empty deployment and other servers.

    python -m benchmarks.serving --json FILE [--seconds 2] [--rounds 5]
    python -m benchmarks.serving --json FILE --part faults --minutes 10     # serving_faults.py

Every server runs in processes of its own on loopback and answers for the same registered model
(xgboost, 100 trees over 42 features). The load comes from another process, over connections that
are kept open. Ours and the empty deployment stand on one Ray cluster and take turns, so that what
else the machine does meets both. Every answer of ours is compared with the model's own number to
the bit; an answer that isn't 200 counts as an error, and errors are told.

The empty deployment answers a constant to each request, with the body unread. "default" is the same
code as ours with neither of the two variables of serving/haproxy.py. BentoML and LitServe need
environments of their own: LIFTYARD_PEER_ENVIRONMENTS names a folder with `bentoml/` and
`litserve/`, virtual environments that hold them and xgboost; else they are skipped, with the reason
in the JSON.
"""

import argparse
import asyncio
import json
import math
import multiprocessing
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cluster import ports

NUMBERS, BATCH_ROWS, MODEL = 39, 1_000, "lapse_30d"
CLIENTS = 64
PEERS_VARIABLE = "LIFTYARD_PEER_ENVIRONMENTS"
CONTENT = {
    "json": "application/json",
    "arrow": "application/vnd.apache.arrow.stream",
}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one client process found in one go."""

    per_s: float
    p50_ms: float
    p99_ms: float
    answers: int
    errors: int
    wrong: int


# --- the load


class _Client(asyncio.Protocol):
    """One connection that asks again as soon as it has its answer."""

    def __init__(
        self, requests: Sequence[bytes], expected: Sequence[bytes] | None, at: int
    ) -> None:
        self.requests, self.expected, self.at = requests, expected, at
        self.seconds: list[float] = []
        self.ended: list[float] = []
        self.errors = self.wrong = 0
        self.stopped = False
        self._buffer = bytearray()
        self._transport: Any = None
        self._began = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self.at = (self.at + 1) % len(self.requests)
        self._buffer.clear()
        self._began = time.perf_counter()
        self._transport.write(self.requests[self.at])

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end]).lower()
        if b"transfer-encoding: chunked" in head:
            if not self._buffer.endswith(b"0\r\n\r\n"):
                return
            body = b""
        else:
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
            if len(self._buffer) < end + 4 + length:
                return
            body = bytes(self._buffer[end + 4 :])
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self.ended.append(now)
        if head.split(b" ", 2)[1] != b"200":
            self.errors += 1
        elif self.expected is not None and self.expected[self.at] not in body:
            self.wrong += 1
        if not self.stopped:
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.stopped:
            self.errors += 1


def _load(
    port: int,
    requests: Sequence[bytes],
    expected: Sequence[bytes] | None,
    clients: int,
    seconds: float,
) -> Load:
    import uvloop

    async def run() -> Load:
        loop = asyncio.get_running_loop()
        made = [_Client(requests, expected, at * 7) for at in range(clients)]
        for client in made:
            await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
        # A tenth to warm up, then what ends within the time counts.
        await asyncio.sleep(seconds / 10)
        began = time.perf_counter()
        await asyncio.sleep(seconds)
        until = time.perf_counter()
        for client in made:
            client.stopped = True
        taken = [
            second
            for client in made
            for second, end in zip(client.seconds, client.ended, strict=True)
            if began <= end <= until
        ]
        times = sorted(taken) or [math.nan]
        return Load(
            per_s=len(taken) / (until - began),
            p50_ms=1e3 * times[len(times) // 2],
            p99_ms=1e3 * times[int(len(times) * 0.99)],
            answers=sum(len(client.seconds) for client in made),
            errors=sum(client.errors for client in made),
            wrong=sum(client.wrong for client in made),
        )

    return uvloop.run(run())


def _loader(pipe: Any) -> None:
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        pipe.send(_load(*asked))


@contextmanager
def loader() -> Iterator[Any]:
    """The process that the load comes from; called like `_load`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_loader, args=(theirs,))
    process.start()
    theirs.close()

    def ask(*arguments: Any) -> Load:
        ours.send(arguments)
        found: Load = ours.recv()
        return found

    try:
        yield ask
    finally:
        ours.close()
        process.join(10)


def request(path: str, body: bytes, kind: str, key: str | None = None) -> bytes:
    """An HTTP request, whole."""
    shown = "" if key is None else f"Authorization: Bearer {key}\r\n"
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {CONTENT[kind]}\r\n"
        f"{shown}Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


# --- the model


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


def register(uri: str, rounds: int = 100) -> Any:
    """Trains the model, registers it and promotes its first version; gives its scorer."""
    from models.encoding import Encoder
    from models.families import FAMILIES, TrainingData
    from models.registry import Registry
    from models.scoring import Scorer

    frame = make_rows(4_000, 1)
    encoder = Encoder.fit(frame, frame.columns)
    x = encoder.transform(frame)
    y = (np.nan_to_num(x[:, 0]) + np.nan_to_num(x[:, 1]) > 110).astype(np.int8)
    data = TrainingData(x_train=x[:3_000], y_train=y[:3_000], x_valid=x[3_000:], y_valid=y[3_000:])
    variant = {"family": "boosting", "rounds": rounds, "depth": 4}
    (fitted,) = FAMILIES["boosting"]([variant], data)
    scorer = Scorer(encoder=encoder, predict=fitted.predict)
    registry = Registry(uri)
    registry.register(
        MODEL,
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
    registry.promote(MODEL, 1)
    return scorer


# --- the servers: each is this module, run with --server


def _serve_ours(uri: str, port: int, kind: str) -> None:
    """Ours, with the empty deployment beside it at /noop."""
    from cluster import session
    from serving import app
    from serving.access import AccessFiles

    access = None
    if kind == "guarded":
        folder = Path(uri.removeprefix("sqlite:///")).parent
        access = AccessFiles(keys=str(folder / "keys.json"), audit=str(folder / "audit.jsonl"))
    if kind == "default":
        os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0"}
    with session.connect(cpus=2):
        app.serve(uri, port=port, refresh_s=10, access=access)
        from ray import serve as engine

        @engine.deployment(max_ongoing_requests=128, logging_config={"enable_access_log": False})
        class Noop:
            async def __call__(self, request: Any) -> str:
                return "[]"

        engine.run(
            Noop.options(ray_actor_options={"num_cpus": 0}).bind(),
            name="noop",
            route_prefix="/noop",
        )
        _say_ready()
        app.stop()


def _serve_fastapi(uri: str, port: int) -> None:
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


def own(kind: str, uri: str, port: int) -> list[str]:
    """The command of a server of this module."""
    return [sys.executable, "-m", "benchmarks.serving", "--server", kind, uri, str(port)]


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


# --- the run


def _median(loads: Sequence[Load], name: str) -> float:
    return statistics.median(getattr(load, name) for load in loads)


def _told(loads: Sequence[Load]) -> dict[str, Any]:
    return {
        "per_s": round(_median(loads, "per_s"), 1),
        "per_s_rounds": [round(load.per_s, 1) for load in loads],
        "p50_ms": round(_median(loads, "p50_ms"), 2),
        "p99_ms": round(_median(loads, "p99_ms"), 2),
        "answers": sum(load.answers for load in loads),
        "errors": sum(load.errors for load in loads),
        "wrong": sum(load.wrong for load in loads),
    }


def in_process(scorer: Any, batches: Sequence[bytes], seconds: float) -> float:
    """Rows a second of the model on the same Arrow batches, without a server."""
    import pyarrow as pa

    def once(body: bytes) -> int:
        frame: Any = pl.from_arrow(pa.ipc.open_stream(body).read_all())
        return len(scorer.score(frame))

    once(batches[0])
    rows, began, at = 0, time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        rows += once(batches[at % len(batches)])
        at += 1
    return rows / (time.perf_counter() - began)


def run(seconds: float, rounds: int, peers: bool) -> dict[str, Any]:
    """All contenders, one after the other; ours and the empty one by turns."""
    from serving import arrow

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        uri = f"sqlite:///{folder}/mlflow.db"
        scorer = register(uri)
        frame = make_rows(2_000, 2)
        scores = scorer.score(frame).tolist()
        rows = frame.to_dicts()
        path = f"/v1/models/{MODEL}/score"
        bodies = [json.dumps({"rows": [row]}).encode() for row in rows]
        singles = [request(path, body, "json") for body in bodies]
        expected = [json.dumps([score])[1:-1].encode() for score in scores]
        noops = [request("/noop", body, "json") for body in bodies]
        parts = [_stream(frame[at : at + BATCH_ROWS]) for at in range(0, 2_000, BATCH_ROWS)]
        batches = [request(path, part, "arrow") for part in parts]
        answers = [
            arrow.answer(scorer.score(part), model=MODEL, version=1)
            for part in frame.iter_slices(BATCH_ROWS)
        ]
        load = stack.enter_context(loader())

        turns: dict[str, list[Any]] = {}
        port = ports.free(1)[0]
        with server(own("ours", uri, port), port, folder, says=True):
            plans = {
                f"ours_{CLIENTS}": (singles, expected, CLIENTS),
                f"noop_{CLIENTS}": (noops, None, CLIENTS),
                "ours_1": (singles, expected, 1),
                "noop_1": (noops, None, 1),
                "arrow_1": (batches, answers, 1),
                "arrow_8": (batches, answers, 8),
            }
            for _ in range(rounds):
                for plan, (asked, wanted, clients) in plans.items():
                    turns.setdefault(plan, []).append(load(port, asked, wanted, clients, seconds))
                turns.setdefault("in_process", []).append(in_process(scorer, parts, seconds / 2))
        found["guarded"] = _guarded(
            load, uri, folder, seconds, rounds, path, bodies, expected, noops
        )
        found |= {plan: _told(loads) for plan, loads in turns.items() if plan != "in_process"}
        found["in_process_rows_per_s"] = round(statistics.median(turns["in_process"]))
        for plan, told in found.items():
            print(plan, told, flush=True)
        if peers:
            found |= _peers(load, uri, scorer, frame, folder, seconds, singles, expected)
    return found


def _guarded(
    load: Any,
    uri: str,
    folder: Path,
    seconds: float,
    rounds: int,
    path: str,
    bodies: Sequence[bytes],
    expected: Sequence[bytes],
    noops: Sequence[bytes],
) -> dict[str, Any]:
    """Ours with a key, a role and an audit log, beside an empty deployment with none."""
    from serving.access import add_key
    from serving.audit import verify

    key = add_key(folder / "keys.json", "bench", "service")
    asked = [request(path, body, "json", key) for body in bodies]
    port = ports.free(1)[0]
    turns: tuple[list[Load], list[Load]] = ([], [])
    with server(own("guarded", uri, port), port, folder, says=True):
        for _ in range(rounds):
            turns[0].append(load(port, asked, expected, CLIENTS, seconds))
            turns[1].append(load(port, noops, None, CLIENTS, seconds))
    lines = verify(folder / "audit.jsonl").lines
    told = {"ours": _told(turns[0]), "noop": _told(turns[1]), "audit_lines": lines}
    if lines < told["ours"]["answers"]:
        raise RuntimeError(f"{told['ours']['answers']} answers, but {lines} lines in the audit log")
    return told


def _peers(
    load: Any,
    uri: str,
    scorer: Any,
    frame: pl.DataFrame,
    folder: Path,
    seconds: float,
    singles: Sequence[bytes],
    expected: Sequence[bytes],
) -> dict[str, Any]:
    from models.registry import Registry

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
    client = Registry(uri)._client
    model = client.get_model_version(MODEL, "1").source
    commands: dict[str, tuple[list[str] | str, Sequence[bytes], Sequence[bytes] | None]] = {
        "default": (own("default", uri, port["default"]), singles, expected),
        "fastapi": (own("fastapi", uri, port["fastapi"]), scored, expected),
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
                    str(clients): _told(
                        [load(port[name], asked, wanted, clients, 2 * seconds) for _ in range(2)]
                    )
                    for clients in (1, CLIENTS)
                }
        except RuntimeError as error:
            found[name] = f"didn't start: {error}"
        print(name, found[name], flush=True)
    return found


def _stream(frame: pl.DataFrame) -> bytes:
    import pyarrow as pa

    table = frame.to_arrow()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    written: bytes = sink.getvalue().to_pybytes()
    return written


def _ratio(ours: dict[str, Any], noop: dict[str, Any]) -> float:
    # By round, since the two took turns.
    ratios = [a / b for a, b in zip(ours["per_s_rounds"], noop["per_s_rounds"], strict=True)]
    return round(statistics.median(ratios), 3)


def keys(found: dict[str, Any]) -> dict[str, Any]:
    """The figures that the bars are about; null where a peer didn't run."""
    ours, noop = found[f"ours_{CLIENTS}"], found[f"noop_{CLIENTS}"]
    best = max(found["arrow_1"]["per_s"], found["arrow_8"]["per_s"]) * BATCH_ROWS

    def times(name: str) -> float | None:
        peer = found.get(name)
        if not isinstance(peer, dict) or not peer[str(CLIENTS)]["per_s"]:
            return None
        return round(ours["per_s"] / float(peer[str(CLIENTS)]["per_s"]), 2)

    return {
        "rows_per_s": ours["per_s"],
        "p50_ms": ours["p50_ms"],
        "p99_ms": ours["p99_ms"],
        "ratio_noop_throughput": _ratio(ours, noop),
        "p50_over_noop_ms": round(found["ours_1"]["p50_ms"] - found["noop_1"]["p50_ms"], 2),
        "p50_over_noop_64_ms": round(ours["p50_ms"] - noop["p50_ms"], 2),
        **{f"ratio_{name}": times(name) for name in ("mlflow", "bentoml", "litserve", "fastapi")},
        "ratio_noop_throughput_guarded": _ratio(found["guarded"]["ours"], found["guarded"]["noop"]),
        "ratio_serve_default": times("default"),
        "arrow_rows_per_s": round(best),
        "ratio_arrow_rows": round(best / ours["per_s"], 1),
        "ratio_arrow_in_process": round(best / found["in_process_rows_per_s"], 3),
    }


def main() -> None:
    """Reads the arguments, runs, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--part", choices=("speed", "faults"), default="speed")
    parser.add_argument("--minutes", type=float, default=10.0, help="of the part faults")
    parser.add_argument("--server", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.server:
        kind, uri, port = given.server
        if kind == "fastapi":
            _serve_fastapi(uri, int(port))
        else:
            _serve_ours(uri, int(port), kind)
        return
    if given.part == "faults":
        from benchmarks import serving_faults

        found = serving_faults.run(given.minutes)
        figures = serving_faults.keys(found)
    else:
        found = run(given.seconds, given.rounds, not given.no_peers)
        figures = keys(found)
    result = {
        **figures,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "machine": {"cpus": os.cpu_count(), "cpu": _cpu(), "load_average": os.getloadavg()},
        "versions": {
            name: version(name) for name in ("ray", "xgboost", "mlflow", "polars", "pyarrow")
        }
        | {"python": platform.python_version()},
        "found": found,
    }
    print(json.dumps({name: v for name, v in result.items() if name != "found"}, indent=2))
    if given.json:
        given.json.write_text(json.dumps(result, indent=2) + "\n")


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
