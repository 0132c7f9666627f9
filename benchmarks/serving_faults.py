"""Mixed load while versions are promoted and taken back, and processes are killed.

    python -m benchmarks.serving --part faults --minutes 10 --json FILE

Rows are asked for in JSON, Arrow, gRPC and GraphQL, explanations, and customers with new events and
without, with a key, from a process of their own (`serving_clients.py`). Every answer is compared
with the number that its version gives in process; every answered request has to have its line in
the audit log, whose chain has to hold; a request may fail only after a process was killed, until
there is another.
"""

import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import psutil

from benchmarks import serving_clients, serving_work
from benchmarks.serving_servers import MODEL, own, server
from cluster import ports
from models.registry import Registry
from serving import audit
from serving.access import add_key

# When things happen, as shares of the run.
PLAN = {"promotion": 0.15, "rollback": 0.3, "killed replica": 0.45, "killed proxy": 0.75}

# How processes are called that are killed, and looked at for their memory.
REPLICA, PROXY = "ray::ServeReplica:liftyard:Server", "haproxy"


def run(minutes: float) -> dict[str, Any]:
    """The run; figures by name, of which `keys` says what is required of them.

    Raises:
        RuntimeError: The server doesn't start, or the clients ended before their time.
        AuditError: The audit log's chain doesn't hold.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        uri = f"sqlite:///{folder}/mlflow.db"
        work = serving_work.make(folder, uri)
        key = add_key(folder / "keys.json", "bench", "analyst")
        port, rpc = ports.free(2)
        answers = folder / "answers.jsonl"
        context = multiprocessing.get_context("spawn")
        with server(own("whole", uri, port, rpc), port, folder, says=True):
            began = time.time()
            until = began + 60 * minutes
            clients = context.Process(
                target=serving_clients.ask,
                args=(f"http://127.0.0.1:{port}", f"127.0.0.1:{rpc}", key, work, answers, until),
            )
            clients.start()
            try:
                happened, memory = _happen(Registry(uri), began, 60 * minutes)
            finally:
                clients.join(60)
        if clients.exitcode != 0:
            raise RuntimeError(f"the clients ended with {clients.exitcode}; see above")
        verified = audit.verify(folder / "audit.jsonl")
        lines = pl.read_ndjson(
            folder / "audit.jsonl", schema={"request": pl.String, "status": pl.Int64}
        )
        told = pl.read_ndjson(answers, schema=serving_clients.ANSWERS)
        return _found(told, happened, memory, lines) | {
            "minutes": minutes,
            "audit_lines": verified.lines,
        }


def keys(found: Mapping[str, Any]) -> dict[str, Any]:
    """What the bar is about: wrong, lost and outside are to be 0, and growth about 1."""
    return {
        "fault_wrong_numbers": found["wrong"],
        "fault_lost_audit_lines": found["lost_audit_lines"],
        "fault_repeated_audit_lines": found["repeated_audit_lines"],
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
        for model in (MODEL, serving_work.REORDER):
            registry.promote(model, 2)
    elif what == "rollback":
        for model in (MODEL, serving_work.REORDER):
            registry.rollback(model)
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
    lines: pl.DataFrame,
) -> dict[str, Any]:
    answered = answers.filter(pl.col("failure").is_null())
    failed = answers.filter(pl.col("failure").is_not_null())
    killed = {what: at for what, at in happened.items() if what.startswith("killed")}
    outside = failed.filter(pl.col("ended") < min(killed.values(), default=float("inf")))
    windows = {}
    for what, at in killed.items():
        # A request that was under way when a process ended is one of the last that did.
        next_at = min([later for later in killed.values() if later > at], default=float("inf"))
        lost = failed.filter(pl.col("ended") >= at, pl.col("ended") < next_at)
        last = lost["ended"].max()
        windows[what] = {
            "failed": lost.height,
            "seconds": round(last - at, 2) if isinstance(last, float) else 0.0,
            "failures": _counts(lost, "kind", "failure"),
            "answered": answered.filter(pl.col("began") > at, pl.col("ended") < next_at).height,
        }
    kept = set(lines.filter(pl.col("status") == 200)["request"])
    return {
        "answered": _counts(answered, "kind"),
        "versions": _counts(answered, "version"),
        "wrong": answered.filter(~pl.col("right")).height,
        "lost_audit_lines": len(set(answered["lines"].explode()) - kept),
        "repeated_audit_lines": lines.height - lines["request"].n_unique(),
        "failed": failed.height,
        "failed_outside_windows": outside.height,
        "failures_outside_windows": _counts(outside, "kind", "failure"),
        "windows": windows,
        "memory": _growth(memory),
    }


def _counts(answers: pl.DataFrame, *columns: str) -> dict[str, int]:
    found = Counter(answers.select(columns).iter_rows())
    return {" ".join(str(each) for each in row): count for row, count in sorted(found.items())}


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
