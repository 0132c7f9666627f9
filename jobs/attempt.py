"""Runs one attempt of a queued job, at most once; the program that Ray starts for the queue.

    python -I -S jobs/attempt.py DATABASE JOB ATTEMPT

It holds a lock file for as long as the job's command lives, so that an attempt that was taken for
lost and still runs is waited for, claims the attempt in the queue's database, runs the command and
writes down how it ended. The command dies with this program. Standard library only: it starts in
milliseconds, and needs nothing of the packages.
"""

import ctypes
import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

NOT_RUN = 0
PR_SET_PDEATHSIG = 1


def main(database: str, job: str, attempt: int) -> int:
    """Runs the attempt.

    Args:
        database: The queue's SQLite file, absolute.
        job: The job's id.
        attempt: Which one.

    Returns:
        The command's exit status, or 0 where the job needs no run: it has ended, was stopped, or
        another attempt has taken its place.
    """
    locks = f"{database}.locks"
    os.makedirs(locks, exist_ok=True)
    with open(os.path.join(locks, job), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        connection = sqlite3.connect(database, timeout=60, isolation_level=None)
        claimed = connection.execute(
            "UPDATE jobs SET claimed = ?, began = ? WHERE id = ? AND attempt = ?"
            " AND state = 'RUNNING' AND stop = 0 AND claimed < ? RETURNING spec",
            (attempt, time.time(), job, attempt, attempt),
        ).fetchone()
        if claimed is None:
            print(f"attempt {attempt} of {job} isn't wanted any more: nothing is run", flush=True)
            return NOT_RUN
        spec = json.loads(claimed[0])
        code = _run(spec["command"], spec["folder"], spec["variables"], lock.fileno())
        connection.execute(
            "UPDATE jobs SET code = ?, finished = ? WHERE id = ? AND attempt = ?",
            (code, time.time(), job, attempt),
        )
        connection.close()
        return code if code >= 0 else 128 - code


def _run(command: list[str], folder: str, variables: dict[str, str], lock: int) -> int:
    parent = os.getpid()

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
            env={**os.environ, **variables},
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
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
