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
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from benchmarks import serving_peers
from benchmarks.serving_load import CLIENTS, Load, loader, request, summary
from benchmarks.serving_servers import (
    BATCH_ROWS,
    MODEL,
    make_rows,
    own,
    register,
    serve_ours,
    server,
    stream,
)
from cluster import ports


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
        expected = [msgspec.json.encode(score) for score in scores]
        noops = [request("/noop", body, "json") for body in bodies]
        parts = [stream(frame[at : at + BATCH_ROWS]) for at in range(0, 2_000, BATCH_ROWS)]
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
        found |= {plan: summary(loads) for plan, loads in turns.items() if plan != "in_process"}
        found["in_process_rows_per_s"] = round(statistics.median(turns["in_process"]))
        for plan, told in found.items():
            print(plan, told, flush=True)
        if peers:
            found |= serving_peers.measure(
                load, uri, scorer, frame, folder, seconds, singles, expected
            )
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
    told = {"ours": summary(turns[0]), "noop": summary(turns[1]), "audit_lines": lines}
    if lines < told["ours"]["answers"]:
        raise RuntimeError(f"{told['ours']['answers']} answers, but {lines} lines in the audit log")
    return told


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
    parser.add_argument("--server", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.server:
        kind, uri, port, *others = given.server
        if kind == "fastapi":
            serving_peers.serve_fastapi(uri, int(port))
        else:
            serve_ours(uri, int(port), kind, *(int(other) for other in others))
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
