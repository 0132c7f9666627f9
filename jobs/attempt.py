"""Runs one attempt of a queued job, at most once; the program that Ray starts for the queue.

    python -I -S jobs/attempt.py DATABASE LOCKS JOB ATTEMPT

It holds a lock file for as long as the job's command lives, so that an attempt that was taken for
lost and still runs is waited for, claims the attempt in the queue's database, runs the command and
writes down how it ended. The command dies with this program. It starts in milliseconds, since it
imports nothing of the packages, and only for PostgreSQL what is not Python's own.
"""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

NOT_RUN = 0
PR_SET_PDEATHSIG = 1


def main(database: str, locks: str, job: str, attempt: int) -> int:
    """Runs the attempt.

    Args:
        database: The queue's database, `sqlite:////path` or `postgresql://…`.
        locks: Folder of the lock files; made if absent.
        job: The job's id.
        attempt: Which one.

    Returns:
        The command's exit status, or 0 where the job needs no run: it has ended, was stopped, or
        another attempt has taken its place.
    """
    os.makedirs(locks, exist_ok=True)
    with open(os.path.join(locks, job), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Finished, though this attempt hasn't run: the one before, taken for lost, did the job.
        claimed = _write(
            database,
            "UPDATE jobs SET claimed = ?, began = ? WHERE id = ? AND attempt = ?"
            " AND state = 'RUNNING' AND stop = 0 AND claimed < ? AND finished IS NULL"
            " RETURNING spec, causes",
            (attempt, time.time(), job, attempt, attempt),
        )
        if claimed is None:
            print(f"attempt {attempt} of {job} isn't wanted any more: nothing is run", flush=True)
            return NOT_RUN
        spec, causes = map(json.loads, claimed)
        # The same in all attempts since the job was queued: of each, its cause is counted.
        first = attempt - sum(causes.values())
        variables = {**spec["variables"], "LIFTYARD_JOB": f"{job}-{first}"}
        code = _run(spec["command"], spec["folder"], variables, lock.fileno())
        # One that was given up and did the job counts all the same.
        _write(
            database,
            "UPDATE jobs SET code = ?, finished = ? WHERE id = ?"
            " AND (attempt = ? OR (claimed = ? AND ? = 0)) RETURNING id",
            (code, time.time(), job, attempt, attempt, code),
        )
        return code if code >= 0 else 128 - code


def _write(database: str, statement: str, parameters: tuple[object, ...]) -> tuple[str, ...] | None:
    """One statement, its first row; tries for as long as the database doesn't answer."""
    if database.startswith("sqlite:///"):
        import sqlite3

        connection = sqlite3.connect(
            database.removeprefix("sqlite:///"), timeout=600, isolation_level=None
        )
        row: tuple[str, ...] | None = connection.execute(statement, parameters).fetchone()
        connection.close()
        return row
    import psycopg

    while True:
        try:
            with psycopg.connect(database, autocommit=True, connect_timeout=10) as remote:
                row = remote.execute(statement.replace("?", "%s"), parameters).fetchone()
                remote.execute("NOTIFY liftyard_queue")
                return row
        except psycopg.OperationalError as error:
            print(f"the queue's database doesn't answer: {error}", file=sys.stderr, flush=True)
            time.sleep(2)


def _run(command: list[str], folder: str, variables: dict[str, str], lock: int) -> int:
    import ctypes

    parent = os.getpid()
    paths = [variables.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]
    joined = {"PYTHONPATH": os.pathsep.join(filter(None, paths))} if any(paths) else {}

    def bound() -> None:
        # The command is not to outlive who writes down its end.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:
                os._exit(1)

    told: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, frame: object) -> None:
        told.append(number)
        if child is not None:
            child.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    try:
        child = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **variables, **joined},
            preexec_fn=bound,
            # What it starts holds the lock too, and may outlive it.
            pass_fds=(lock,),
        )
    except OSError as error:
        print(f"{command[0]} can't be started in {folder}: {error}", file=sys.stderr, flush=True)
        return 127
    if told:
        child.send_signal(told[-1])
    code = child.wait()
    # Told to end from outside, whatever status the command makes of that.
    return -told[-1] if told and code else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])))
