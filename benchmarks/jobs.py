"""The durable queue under fire, and what it adds to Ray's own job submission.

    python -m benchmarks.jobs --jobs 200 --json FILE

Clients submit at once jobs of four priorities, each client for a team of its own with a quota; then
the dispatcher works on a Ray cluster of this machine and is killed five times meanwhile. Each job
appends a line to a file, so that lost and doubled ones are counted where they ran. The overhead is
measured apart, on an idle cluster: from the call that submits to the first line of the job's
program, by the queue and by Ray's own submission in turns; the difference of the medians counts.
"""

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster import environment, local
from jobs.dispatch import RayJobs, dispatch
from jobs.queue import Queue, Spec, file_of

ROOT = Path(__file__).resolve().parents[1]
CLIENTS = 4
PRIORITIES = 4
KILLS = 5


def spec(folder: Path, name: str, *, team: str, priority: int) -> Spec:
    """A job that appends its name to a file: one write, whole."""
    return Spec(
        command=("sh", "-c", f"echo {name} >> {folder / 'ran'}"),
        folder=str(folder),
        team=team,
        priority=priority,
        backoff_s=0.1,
    )


def submit_all(file: Path, folder: Path, client: int, count: int) -> None:
    """One client's jobs, priorities in turns."""
    queue = Queue(file)
    for n in range(count):
        queue.submit(spec(folder, f"{client}-{n}", team=f"team-{client}", priority=n % PRIORITIES))


def inversions(queue: Queue) -> int:
    """Jobs handed over before one of their team that came with a higher priority."""
    found = 0
    for client in range(CLIENTS):
        team = [job for job in queue.jobs() if job.spec.team == f"team-{client}" and job.dispatched]
        team.sort(key=lambda job: job.dispatched or job.created)
        given = [job.spec.priority for job in team]
        found += sum(late > soon for soon, late in itertools.pairwise(given))
    return found


def under_fire(queue: Queue, home: Path, folder: Path, jobs: int, slots: int) -> dict[str, Any]:
    """Submits, dispatches, kills, and counts."""
    clients = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.jobs", "--client", str(client)),
                *("--queue", str(queue.file), "--folder", str(folder)),
                *("--jobs", str(jobs // CLIENTS)),
            ],
            cwd=ROOT,
        )
        for client in range(CLIENTS)
    ]
    for process in clients:
        if process.wait() != 0:
            raise RuntimeError("a client failed")
    for client in range(CLIENTS):
        queue.set_team(f"team-{client}", quota_cpus=max(1, slots // 2))
    start, kills = time.monotonic(), 0
    command = [sys.executable, "-m", "jobs.dispatch", f"--home={home}", f"--slots={slots}"]
    dispatcher = subprocess.Popen(command, cwd=ROOT)
    try:
        while left := len(queue.jobs(states=("WAITING", "RUNNING"))):
            if kills < KILLS and jobs - left >= (kills + 1) * jobs // (KILLS + 1):
                dispatcher.kill()
                dispatcher.wait()
                kills += 1
                dispatcher = subprocess.Popen(command, cwd=ROOT)
            time.sleep(0.1)
    finally:
        dispatcher.terminate()
        dispatcher.wait()
    ran = Counter((folder / "ran").read_text(encoding="utf-8").split())
    names = [f"{client}-{n}" for client in range(CLIENTS) for n in range(jobs // CLIENTS)]
    return {
        "submitted": len(queue.jobs()),
        "ran_once": sum(ran[name] == 1 for name in names),
        "lost": sum(ran[name] == 0 for name in names),
        "doubled": sum(ran[name] > 1 for name in names),
        "succeeded": len(queue.jobs(states=("SUCCEEDED",))),
        "out_of_order": inversions(queue),
        "queue_kills": kills,
        "seconds": round(time.monotonic() - start, 1),
    }


def overhead(where: environment.Environment, folder: Path, pairs: int) -> dict[str, Any]:
    """Milliseconds from the call that submits to the program's first line."""
    file = folder / "began"
    queue, engine = Queue(folder / "overhead.sqlite"), RayJobs(where)
    ended = threading.Event()
    settings: dict[str, Any] = {"slots": 1, "ended": ended}
    dispatcher = threading.Thread(target=dispatch, args=(queue, engine), kwargs=settings)
    dispatcher.start()

    def began(name: str) -> float:
        while True:
            lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
            for line in lines:
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
            time.sleep(0.02)

    def program(name: str) -> str:
        return f"echo {name} $(date +%s.%N) >> {file}"

    own, ours = [], []
    raw = RayJobs(where)
    for n in range(pairs):
        start = time.time()
        raw.submit(f"raw-{n}", program(f"raw-{n}"))
        own.append(1000 * (began(f"raw-{n}") - start))
        # The one before has left when the next comes.
        while raw.living():
            time.sleep(0.1)
        start = time.time()
        queue.submit(Spec(command=("sh", "-c", program(f"queue-{n}")), folder=str(folder)))
        ours.append(1000 * (began(f"queue-{n}") - start))
        while raw.living():
            time.sleep(0.1)
    ended.set()
    dispatcher.join()
    return {
        "queue_overhead_ms": round(statistics.median(ours) - statistics.median(own), 1),
        "ray_ms": round(statistics.median(own), 1),
        "queue_ms": round(statistics.median(ours), 1),
        "pairs": pairs,
    }


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--slots", type=int, default=4, help="CPUs that Ray is told it has")
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--queue", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.client is not None:
        return submit_all(given.queue, given.folder, given.client, given.jobs)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        home = folder / "home"
        # A token of its own, and not the user's.
        os.environ.pop("RAY_AUTH_TOKEN", None)
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}
        try:
            where = local.up(home, cpus=given.slots)
            result = overhead(where, folder, given.pairs)
            queue = Queue(file_of("local", home))
            result |= under_fire(queue, home, folder, given.jobs, given.slots)
        finally:
            local.down(home)
    result |= {
        "clients": CLIENTS,
        "priorities": PRIORITIES,
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "ray": version("ray"),
        "cores": os.cpu_count(),
        "load": [round(each, 1) for each in os.getloadavg()],
    }
    text = json.dumps(result, indent=2)
    print(text)
    if given.json:
        draft = given.json.with_suffix(".new")
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(given.json)


if __name__ == "__main__":
    main()
