"""Hands queued jobs to Ray: by priority and fair share, within each team's quota.

    python -m jobs.dispatch --queue URL --dashboard URL [--slots CPUS]

What is decided is in the queue's database before it is acted on, so that the dispatcher, a
submitter or the head can be killed at any moment: Ray takes an attempt's id once, and the attempt
itself claims its row before it runs anything (`jobs/attempt.py`), and writes down how it ended.
"""

import argparse
import json
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Protocol

from cluster import keeper, supervisor
from cluster.environment import Environment, services_of
from cluster.supervisor import LogLine
from jobs import schedule
from jobs.database import Row
from jobs.dispatch_choice import choose
from jobs.queue import (
    FAILED,
    RUNNING,
    STOPPED,
    SUCCEEDED,
    WAITING,
    Queue,
    Spec,
    insert,
    restored,
    utc,
)
from jobs.submission import RayJobs

ATTEMPT = Path(__file__).with_name("attempt.py")
SERVICE = "dispatcher"
# Without a write to the queue, pauses, limits and schedules are looked at this often.
IDLE_S = 0.25
# A cluster's CPUs are asked for anew this often.
SLOTS_S = 10.0


class Engine(Protocol):
    """What runs attempts; `RayJobs` in an environment."""

    def submit(self, id: str, entrypoint: str, spec: Spec) -> None:
        """Runs a shell command under an id, once: an id it has is left as it is.

        Args:
            id: The attempt's.
            entrypoint: The shell command.
            spec: The job, for what it needs of packages.

        Raises:
            OSError: It doesn't answer, or may not have taken it.
            ValueError: It can't take it, however often it is asked.
        """

    def living(self) -> set[str]:
        """Ids that run or are about to.

        Raises:
            OSError: It doesn't answer.
        """

    def stop(self, id: str) -> None:
        """Ends an attempt; one that has ended is left as it is.

        Raises:
            OSError: It doesn't answer.
        """

    def refusal(self, id: str) -> str:
        """Why an attempt that is gone couldn't be begun; empty where it isn't known.

        Raises:
            OSError: It doesn't answer.
        """

    def cpus(self) -> float:
        """CPUs that it has.

        Raises:
            OSError: It doesn't answer.
        """


def up(where: Environment, home: Path) -> None:
    """Starts the dispatcher of an environment on this machine, and keeps it running.

    Args:
        where: The environment; it has a queue and a dashboard.
        home: Liftyard's folder; the dispatcher's state and log go below it.

    Raises:
        ServiceError: It didn't start.
    """
    states = services_of(home.resolve())
    command = [sys.executable, "-m", "jobs.dispatch", f"--queue={where.queue}"]
    command.append(f"--dashboard={where.dashboard_url}")
    running = supervisor.read(states, SERVICE)
    if running is not None and list(running.command[-len(command) :]) != command:
        # Of a head before this one.
        keeper.down(states, SERVICE)
    keeper.up(states, SERVICE, command, ready=[LogLine(pattern=_READY)])


def down(home: Path) -> list[str]:
    """Ends the dispatcher that `up` started; jobs go on. Its name, if there was one."""
    return [SERVICE] if keeper.down(services_of(home.resolve()), SERVICE) else []


def dispatch(
    queue: Queue,
    engine: Engine,
    *,
    slots: float | None,
    ended: threading.Event,
    interval_s: float = 0.005,
    look_s: float = 2.0,
) -> None:
    """Hands jobs over until told to end; waits first for another dispatcher to end.

    Args:
        queue: The queue.
        engine: What runs attempts.
        slots: CPUs that running jobs may take together; None is all that the engine has.
        ended: Set to end it; jobs go on, and the next dispatcher finds them.
        interval_s: Time between two looks whether the queue was written to.
        look_s: Time between two questions what still runs.
    """
    pause_s, said = IDLE_S, ""
    while not ended.is_set():
        try:
            with queue.database.dispatching(), queue.database.watched() as written:
                look_at, slots_at, free = 0.0, 0.0, slots or 0.0
                while not ended.is_set():
                    if slots is None and time.monotonic() >= slots_at:
                        free, slots_at = engine.cpus(), time.monotonic() + SLOTS_S
                    look = time.monotonic() >= look_at
                    if look:
                        look_at = time.monotonic() + look_s
                    written()
                    step(queue, engine, slots=free, look=look)
                    pause_s, said = IDLE_S, ""
                    until = time.monotonic() + IDLE_S
                    while not written() and time.monotonic() < until:
                        if ended.wait(interval_s):
                            break
        except OSError as error:
            # A head or a database that restarts; nothing is lost, and once is enough to say so.
            if str(error) != said:
                print(f"queue: {error}", file=sys.stderr, flush=True)
            ended.wait(pause_s)
            pause_s, said = min(2 * pause_s, 5.0), str(error)


def step(queue: Queue, engine: Engine, *, slots: float, look: bool = True) -> int:
    """Does what there is to do now; called again and again by the dispatcher.

    Args:
        queue: The queue.
        engine: What runs attempts.
        slots: CPUs that running jobs may take together.
        look: Whether to ask the engine what still runs; what ended well or badly by itself
            is seen without.

    Returns:
        Jobs that it handed over.

    Raises:
        OSError: The engine doesn't answer; what was decided is acted on at the next call.
    """
    _tick(queue)
    _settle(queue)
    _hand_over_again(queue, engine)
    if look:
        _look(queue, engine)
    _end_overdue(queue, engine)
    done = 0
    while (row := choose(queue, slots)) is not None:
        _hand_over(queue, engine, row)
        done += 1
    return done


def _tick(queue: Queue) -> None:
    """Queues what schedules are due."""
    now = time.time()
    with queue.database.opened() as connection:
        due = connection.execute("SELECT * FROM schedules WHERE due <= ?", (now,)).fetchall()
    for row in due:
        cron = schedule.parse(row["cron"], zone=row["zone"])
        tick, following = utc(row["due"]), schedule.next_after(cron, utc(row["due"]))
        while following.timestamp() <= now:
            tick, following = following, schedule.next_after(cron, following)
        key = f"{row['name']} {tick.isoformat()}"
        spec = restored({**json.loads(row["spec"]), "key": key})
        with queue.database.changed() as connection:
            moved = connection.execute(
                "UPDATE schedules SET due = ? WHERE name = ? AND due = ?",
                (following.timestamp(), row["name"], row["due"]),
            )
            if moved.rowcount:
                insert(connection, spec)


def _settle(queue: Queue) -> None:
    """Ends attempts that wrote down how they ended."""
    with queue.database.opened() as connection:
        finished = connection.execute(
            "SELECT * FROM jobs WHERE finished IS NOT NULL"
            # One that waits has done its job in an attempt that was taken for lost.
            " AND (state = ? OR (state = ? AND code = 0))",
            (RUNNING, WAITING),
        ).fetchall()
    for row in finished:
        if row["code"] == 0:
            _end(queue, row, SUCCEEDED, "")
        elif row["stop"]:
            _end(queue, row, STOPPED, "stopped while it ran")
        elif row["overdue"]:
            limit = json.loads(row["spec"])["timeout_s"]
            _again(queue, row, "timeout", f"took longer than its limit of {limit:g} s")
        elif row["code"] < 0:
            _again(queue, row, "lost", f"killed by signal {-row['code']}")
        else:
            _again(queue, row, "failed", f"exit status {row['code']}")


def _hand_over_again(queue: Queue, engine: Engine) -> None:
    """Of a dispatcher that died between deciding and acting: the engine takes an id once."""
    with queue.database.opened() as connection:
        rows = connection.execute(
            "SELECT id, attempt, spec FROM jobs WHERE state = ? AND accepted = 0", (RUNNING,)
        ).fetchall()
    for row in rows:
        _hand_over(queue, engine, row)


def _look(queue: Queue, engine: Engine) -> None:
    """Finds attempts that are gone without a word, with their head or their machine."""
    with queue.database.opened() as connection:
        # Before the engine is asked: what it has taken since is then in its list.
        rows = connection.execute(
            "SELECT * FROM jobs WHERE state = ? AND accepted = 1", (RUNNING,)
        ).fetchall()
    if not rows:
        return
    living = engine.living()
    for row in rows:
        if f"{row['id']}-{row['attempt']}" in living:
            continue
        with queue.database.opened() as connection:
            now = connection.execute(
                "SELECT * FROM jobs WHERE id = ? AND attempt = ? AND finished IS NULL",
                (row["id"], row["attempt"]),
            ).fetchone()
        # It may have written down its end meanwhile.
        if now is None:
            continue
        if now["stop"]:
            _end(queue, now, STOPPED, "stopped")
        elif now["overdue"]:
            _again(queue, now, "timeout", "took longer than its limit")
        elif now["began"] is None and (why := engine.refusal(f"{row['id']}-{row['attempt']}")):
            _end(queue, now, FAILED, why)
        else:
            _again(queue, now, "lost", "the attempt, its head or its machine died")


def _end_overdue(queue: Queue, engine: Engine) -> None:
    with queue.database.opened() as connection:
        rows = connection.execute(
            "SELECT id, attempt, stop, began, spec FROM jobs"
            " WHERE state = ? AND accepted = 1 AND finished IS NULL",
            (RUNNING,),
        ).fetchall()
    for row in rows:
        limit = json.loads(row["spec"])["timeout_s"]
        late = limit is not None and row["began"] and time.time() > row["began"] + limit
        if late and not row["stop"]:
            with queue.database.changed() as connection:
                connection.execute("UPDATE jobs SET overdue = 1 WHERE id = ?", (row["id"],))
        if late or row["stop"]:
            engine.stop(f"{row['id']}-{row['attempt']}")


def _hand_over(queue: Queue, engine: Engine, row: Row) -> None:
    id, attempt = row["id"], row["attempt"]
    # Isolated, since site costs milliseconds; PostgreSQL's driver has to be found.
    isolated = ["-I", "-S"] if queue.database.url.startswith("sqlite:") else ["-P"]
    command = [sys.executable, *isolated, str(ATTEMPT), queue.url, str(queue.database.locks)]
    entrypoint = f"exec {shlex.join([*command, id, str(attempt)])}"
    refused = None
    try:
        engine.submit(f"{id}-{attempt}", entrypoint, restored(json.loads(row["spec"])))
    except ValueError as error:
        refused = str(error)
    with queue.database.changed() as connection:
        if refused is None:
            connection.execute(
                "UPDATE jobs SET accepted = 1 WHERE id = ? AND attempt = ?", (id, attempt)
            )
        else:
            connection.execute(
                "UPDATE jobs SET state = ?, ended = ?, message = ? WHERE id = ? AND attempt = ?",
                (FAILED, time.time(), refused, id, attempt),
            )


def _end(queue: Queue, row: Row, state: str, message: str, causes: str | None = None) -> None:
    ended = row["finished"] or time.time()
    with queue.database.changed() as connection:
        connection.execute(
            "UPDATE jobs SET state = ?, message = ?, ended = ?, seconds = seconds + ?,"
            " causes = COALESCE(?, causes) WHERE id = ? AND attempt = ? AND state = ?",
            (state, message, ended, _ran(row), causes, row["id"], row["attempt"], row["state"]),
        )


def _again(queue: Queue, row: Row, cause: str, why: str) -> None:
    """Another attempt after a pause, or the end, by what the job allows for the cause."""
    spec, causes = restored(json.loads(row["spec"])), json.loads(row["causes"])
    causes[cause] = causes.get(cause, 0) + 1
    allowed = spec.retries.get(cause, 0)
    if row["stop"] or causes[cause] > allowed:
        said = f"{why} (attempt {row['attempt']}; retries allowed for {cause!r}: {allowed})"
        _end(queue, row, STOPPED if row["stop"] else FAILED, said, json.dumps(causes))
        return
    pause_s = min(spec.backoff_s * 2 ** (causes[cause] - 1), 600)
    with queue.database.changed() as connection:
        # The attempt is given up here: should it live on somewhere, it can't claim its row.
        connection.execute(
            "UPDATE jobs SET state = ?, not_before = ?, causes = ?, message = ?,"
            " seconds = seconds + ? WHERE id = ? AND attempt = ? AND state = ?"
            " AND (finished IS NOT NULL OR ? = 'lost' OR ? = 'timeout')",
            (
                *(WAITING, time.time() + pause_s, json.dumps(causes)),
                f"{why}; again in {pause_s:g} s",
                *(_ran(row), row["id"], row["attempt"], RUNNING, cause, cause),
            ),
        )


def _ran(row: Row) -> float:
    return (row["finished"] or time.time()) - row["began"] if row["began"] else 0.0


_READY = "dispatcher: hands over jobs of"


def main() -> None:
    """The dispatcher's command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Hand queued jobs to a cluster's Ray.")
    parser.add_argument("--queue", required=True, help="sqlite:////path or postgresql://…")
    parser.add_argument("--dashboard", required=True, help="Ray's dashboard, http://host:port")
    parser.add_argument("--slots", type=float, help="CPUs for running jobs; default: all")
    given = parser.parse_args()
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    try:
        queue = Queue(given.queue)
        print(f"{_READY} {queue.database.url} to {given.dashboard}", flush=True)
        dispatch(queue, RayJobs(given.dashboard), slots=given.slots, ended=ended)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
