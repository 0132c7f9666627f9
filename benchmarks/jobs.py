"""The durable queue under fire, and what it adds to Ray's own job submission.

    python -m benchmarks.jobs --jobs 200 --json FILE

Clients submit at once jobs of four priorities, each client for a team of its own with a quota; then
the dispatcher works on a Ray cluster of this machine and is killed five times meanwhile. Each job
appends a line to a file, so that lost and doubled ones are counted where they ran. The overhead is
measured apart, on an idle cluster, by the queue and by Ray's own submission in turns. It is the
time outside of Ray: from the call that submits to the call of Ray, and from the first command of
the shell that Ray starts to the first line of the job's program; the difference of the medians.
What Ray itself takes between the two varies by more than that, and is in `ray_ms` and `queue_ms`,
from the call that submits to the program's first line.
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
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cluster import local
from cluster.environment import Environment
from jobs import queue as queues
from jobs.dispatch import dispatch
from jobs.queue import Queue, Spec
from jobs.submission import RayJobs

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


def submit_all(url: str, folder: Path, client: int, count: int) -> None:
    """One client's jobs, priorities in turns."""
    queue = Queue(url)
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


def under_fire(where: Environment, folder: Path, jobs: int, slots: int) -> dict[str, Any]:
    """Submits, dispatches, kills, and counts."""
    queue = queues.of(where)
    clients = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.jobs", "--client", str(client)),
                *("--queue", queue.url, "--folder", str(folder)),
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
    command = [sys.executable, "-m", "jobs.dispatch", f"--queue={where.queue}"]
    command += [f"--dashboard={where.dashboard_url}", f"--slots={slots}"]
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


class Stamped(RayJobs):
    """Ray's job submission, with the time of each call, and of each shell's first command."""

    def __init__(self, url: str, folder: Path) -> None:
        super().__init__(url)
        self.folder, self.called = folder, 0.0

    def submit(self, id: str, entrypoint: str, spec: Spec) -> None:
        self.called = time.time()
        super().submit(id, f"date +%s.%N > {self.folder}/shell; {entrypoint}", spec)


def overhead(where: Environment, folder: Path, pairs: int) -> dict[str, Any]:
    """Milliseconds from the call that submits to the program's first line, by queue and by Ray."""
    engine = Stamped(where.dashboard_url or "", folder)
    queue, ended = Queue(f"sqlite:///{folder}/overhead.sqlite"), threading.Event()
    settings: dict[str, Any] = {"slots": 1, "ended": ended}
    dispatcher = threading.Thread(target=dispatch, args=(queue, engine), kwargs=settings)
    dispatcher.start()
    program = f"date +%s.%N > {folder}/program.new && mv {folder}/program.new {folder}/program"

    def measured(submit: Callable[[], object]) -> tuple[float, float]:
        """Milliseconds in all, and those outside of Ray: before its call and after its shell."""
        start = time.time()
        submit()
        while not (folder / "program").exists():
            time.sleep(0.01)
        began, shell = (float((folder / name).read_text()) for name in ("program", "shell"))
        (folder / "program").unlink()
        # The one before has left when the next comes.
        while engine.living() or queue.jobs(states=("RUNNING",)):
            time.sleep(0.1)
        return 1000 * (began - start), 1000 * (engine.called - start + began - shell)

    own, ours = [], []
    for n in range(pairs):
        job = Spec(command=("sh", "-c", program), folder=str(folder), key=str(n))
        own.append(measured(lambda: engine.submit(f"raw-{n}", program, job)))  # noqa: B023
        ours.append(measured(lambda: queue.submit(job)))  # noqa: B023
    ended.set()
    dispatcher.join()
    (own_ms, own_outside), (ours_ms, ours_outside) = (
        [statistics.median(column) for column in zip(*rows, strict=True)] for rows in (own, ours)
    )
    return {
        "queue_overhead_ms": round(ours_outside - own_outside, 1),
        "ray_ms": round(own_ms, 1),
        "queue_ms": round(ours_ms, 1),
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
    parser.add_argument("--queue", help=argparse.SUPPRESS)
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
            result |= under_fire(where, folder, given.jobs, given.slots)
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
