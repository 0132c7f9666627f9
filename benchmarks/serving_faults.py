"""Mixed load while a version is promoted and taken back, and processes are killed.

    python -m benchmarks.serving --part faults --minutes 10 --json FILE

Single rows in JSON, batches in Arrow and explanations are asked for, with a key, from a process of
their own. Every answer is compared with the number that its version gives in process; every
answered request has to have its line in the audit log, whose chain has to hold; a request may fail
only after a process was killed, until there is another.
"""

import asyncio
import json
import multiprocessing
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import psutil

from benchmarks import serving
from cluster import ports
from models.registry import Registry
from serving import arrow, audit
from serving.access import add_key

# Clients by what they ask for.
CLIENTS = {"json": 6, "arrow": 2, "explain": 1}

# When things happen, as shares of the run.
PLAN = {"promotion": 0.15, "rollback": 0.3, "killed replica": 0.45, "killed proxy": 0.75}

# How processes are called that are killed, and looked at for their memory.
REPLICA, PROXY = "ray::ServeReplica:liftyard:Server", "haproxy"

BACK_OFF_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the clients ask for, and what they have to get.

    Attributes:
        rows: As JSON has them.
        batch: An Arrow stream of the rows.
        expected: By version, the rows' scores.
    """

    rows: Sequence[Mapping[str, Any]]
    batch: bytes
    expected: Mapping[int, Sequence[float]]


def run(minutes: float) -> dict[str, Any]:
    """The run; figures by name, of which `keys` says what is required of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uri = f"sqlite:///{folder}/mlflow.db"
        frame = serving.make_rows(serving.BATCH_ROWS, 2)
        expected = {}
        for version, rounds in ((1, 100), (2, 60)):
            expected[version] = serving.register(uri, rounds).score(frame).tolist()
        registry = Registry(uri)
        work = Work(rows=frame.to_dicts(), batch=serving._stream(frame), expected=expected)
        key = add_key(folder / "keys.json", "bench", "analyst")
        port = ports.free(1)[0]
        answers = folder / "answers.jsonl"
        context = multiprocessing.get_context("spawn")
        with serving.server(serving.own("guarded", uri, port), port, folder, says=True):
            until = time.time() + 60 * minutes
            clients = context.Process(target=_ask, args=(port, key, work, answers, until))
            clients.start()
            try:
                happened, memory = _happen(registry, until - 60 * minutes, 60 * minutes)
            finally:
                clients.join(60)
        verified = audit.verify(folder / "audit.jsonl")
        kept = {
            json.loads(line)["request"] for line in (folder / "audit.jsonl").open(encoding="utf-8")
        }
        return _found(pl.read_ndjson(answers), happened, memory, kept) | {
            "minutes": minutes,
            "audit_lines": verified.lines,
        }


def keys(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the bar is about: all but the windows is to be 0, and growth about 1."""
    return {
        "fault_wrong_numbers": found["wrong"],
        "fault_lost_audit_lines": found["lost_audit_lines"],
        "fault_failed_outside_windows": found["failed_outside_windows"],
        "fault_failed_in_windows": sum(each["failed"] for each in found["windows"].values()),
        "fault_windows_s": {name: each["seconds"] for name, each in found["windows"].items()},
        "fault_memory_growth": max((each["growth"] for each in found["memory"]), default=None),
    }


def _happen(
    registry: Registry, began: float, seconds: float
) -> tuple[dict[str, float], list[tuple[float, str, int, int]]]:
    """Does what the plan says; gives when each happened, and samples of memory.

    A sample is the time, the process's name and id, and its resident bytes.
    """
    happened: dict[str, float] = {}
    memory: list[tuple[float, str, int, int]] = []
    while (now := time.time()) < began + seconds:
        for what, share in PLAN.items():
            if what not in happened and now >= began + share * seconds:
                happened[what] = now
                _do(what, registry)
                print(f"{now - began:.1f} s: {what}", flush=True)
        for name, process in _processes():
            try:
                memory.append((now, name, process.pid, process.memory_info().rss))
            except psutil.Error:
                continue
        time.sleep(1)
    return happened, memory


def _do(what: str, registry: Registry) -> None:
    if what == "promotion":
        registry.promote(serving.MODEL, 2)
    elif what == "rollback":
        registry.rollback(serving.MODEL)
    else:
        wanted = REPLICA if what == "killed replica" else PROXY
        for name, process in _processes():
            if name == wanted:
                process.kill()


def _processes() -> list[tuple[str, psutil.Process]]:
    """The replica and HAProxy of the server that this process started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = (process.cmdline() or [""])[0]
        except psutil.Error:
            continue
        if title.startswith(REPLICA):
            found.append((REPLICA, process))
        elif Path(title).name == PROXY:
            found.append((PROXY, process))
    return found


def _found(
    answers: pl.DataFrame,
    happened: Mapping[str, float],
    memory: Sequence[tuple[float, str, int, int]],
    kept: set[str],
) -> dict[str, Any]:
    answered = answers.filter(pl.col("status") == 200)
    failed = answers.filter(pl.col("status") != 200)
    killed = {what: at for what, at in happened.items() if what.startswith("killed")}
    windows = {}
    for what, at in killed.items():
        # A request that was under way when a process ended is one of the last that did.
        next_at = min([later for later in killed.values() if later > at], default=float("inf"))
        lost = failed.filter(pl.col("ended") >= at, pl.col("ended") < next_at)
        last = lost["ended"].max()
        windows[what] = {
            "failed": lost.height,
            "seconds": round(last - at, 2) if isinstance(last, float) else 0.0,
            "statuses": dict(lost["status"].value_counts().iter_rows()),
            "answered": answered.filter(pl.col("began") > at, pl.col("ended") < next_at).height,
        }
    inside = sum(each["failed"] for each in windows.values())
    return {
        "answered": dict(answered["kind"].value_counts().iter_rows()),
        "versions": dict(answered["version"].value_counts().iter_rows()),
        "wrong": answered.filter(~pl.col("right")).height,
        "lost_audit_lines": len(set(answered["id"]) - kept),
        "failed": failed.height,
        "failed_outside_windows": failed.height - inside,
        "windows": windows,
        "memory": _growth(memory),
    }


def _growth(memory: Sequence[tuple[float, str, int, int]]) -> list[dict[str, Any]]:
    """Of each process that lived for a while: its memory after a fifth of its life, and at last."""
    found = []
    for pid in dict.fromkeys(sample[2] for sample in memory):
        mine = [sample for sample in memory if sample[2] == pid]
        if len(mine) < 20:
            continue
        first, last = mine[len(mine) // 5], mine[-1]
        found.append(
            {
                "process": first[1],
                "seconds": round(last[0] - mine[0][0]),
                "first_mib": round(first[3] / 2**20, 1),
                "last_mib": round(last[3] / 2**20, 1),
                "growth": round(last[3] / first[3], 3),
            }
        )
    return found


# --- the clients' process


def _ask(port: int, key: str, work: Work, answers: Path, until: float) -> None:
    async def main() -> None:
        with answers.open("w", encoding="utf-8") as log:
            clients = [
                _client(f"{kind}-{at}", kind, port, key, work, log, until)
                for kind, count in CLIENTS.items()
                for at in range(count)
            ]
            await asyncio.gather(*clients)

    asyncio.run(main())


async def _client(
    name: str, kind: str, port: int, key: str, work: Work, log: Any, until: float
) -> None:
    headers = {"authorization": f"Bearer {key}", "content-type": serving.CONTENT["json"]}
    path = f"/v1/models/{serving.MODEL}/{'explain' if kind == 'explain' else 'score'}"
    if kind == "arrow":
        headers["content-type"] = serving.CONTENT["arrow"]
    base = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=base, timeout=30, trust_env=False) as client:
        asked = 0
        while (began := time.time()) < until:
            row = asked * 7 % len(work.rows)
            body = work.batch
            if kind != "arrow":
                body = json.dumps({"rows": [work.rows[row]]}).encode()
            told = {"id": f"{name}-{asked}", "kind": kind, "began": began, "version": 0}
            try:
                answer = await client.post(
                    path, content=body, headers={**headers, "x-request-id": told["id"]}
                )
                status = answer.status_code
            except httpx.TransportError:
                status = 0
            right = True
            if status == 200:
                version, scores = _read(kind, answer)
                wanted = work.expected[version]
                right = scores == (list(wanted) if kind == "arrow" else [wanted[row]])
                told["version"] = version
            ended = {"ended": time.time(), "status": status, "right": right}
            log.write(json.dumps(told | ended) + "\n")
            asked += 1
            if status != 200:
                await asyncio.sleep(BACK_OFF_S)


def _read(kind: str, answer: httpx.Response) -> tuple[int, list[float]]:
    """The version that answered, and its scores."""
    if kind == "arrow":
        import pyarrow as pa

        table = pa.ipc.open_stream(answer.content).read_all()
        assert answer.headers["content-type"] == arrow.MEDIA_TYPE
        return int(table.schema.metadata[b"version"]), table["score"].to_pylist()
    body = answer.json()
    if kind == "explain":
        return body["version"], [each["score"] for each in body["explanations"]]
    return body["version"], body["scores"]
