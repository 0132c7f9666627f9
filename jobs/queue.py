"""A durable queue before Ray's job submission: every job arrives once.

A job is a row of an SQLite file. Submitters write the row and are done; the dispatcher
(`jobs/dispatch.py`) hands jobs to Ray. A job's id comes from its content, so whoever was killed
while submitting submits again. Knows nothing of what jobs do, nor of Ray.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jobs import schedule

WAITING, RUNNING = "WAITING", "RUNNING"
SUCCEEDED, FAILED, STOPPED = "SUCCEEDED", "FAILED", "STOPPED"
ENDED = (SUCCEEDED, FAILED, STOPPED)
# Why an attempt didn't succeed: it exited with an error; it, its head or its machine died; it took
# longer than its limit. Each has retries of its own.
CAUSES = ("failed", "lost", "timeout")

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, number INTEGER NOT NULL, spec TEXT NOT NULL,
    team TEXT NOT NULL, priority INTEGER NOT NULL, cpus REAL NOT NULL, gpus REAL NOT NULL,
    state TEXT NOT NULL, created REAL NOT NULL, not_before REAL NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0, accepted INTEGER NOT NULL DEFAULT 0,
    dispatched REAL, claimed INTEGER NOT NULL DEFAULT 0, began REAL, finished REAL, code INTEGER,
    stop INTEGER NOT NULL DEFAULT 0, overdue INTEGER NOT NULL DEFAULT 0,
    causes TEXT NOT NULL DEFAULT '{}', message TEXT NOT NULL DEFAULT '', ended REAL,
    seconds REAL NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state);
CREATE TABLE IF NOT EXISTS teams (
    name TEXT PRIMARY KEY, quota_cpus REAL, quota_gpus REAL, share REAL NOT NULL
);
CREATE TABLE IF NOT EXISTS schedules (
    name TEXT PRIMARY KEY, cron TEXT NOT NULL, zone TEXT NOT NULL, spec TEXT NOT NULL,
    due REAL NOT NULL
);
"""


class QueueError(ValueError):
    """A job can't be queued or found; the message says what is allowed or there."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to run. All of it, the priority aside, makes the job's id.

    Attributes:
        command: Program and arguments.
        folder: Working directory, absolute.
        variables: Environment variables on top of the node's.
        team: Whose quota and share it counts on.
        priority: Higher goes first.
        cpus: CPUs that the job and its work on the cluster are reckoned to take.
        gpus: GPUs, likewise.
        after: Ids of jobs that must have succeeded.
        timeout_s: Seconds that an attempt may run; None has no limit.
        retries: Further attempts by cause: `failed`, `lost`, `timeout`.
        backoff_s: Wait before the first retry of a cause; doubled at each, 10 minutes at most.
        key: Tells jobs of the same content apart, as the tick of a schedule does.
    """

    command: tuple[str, ...]
    folder: str
    variables: Mapping[str, str] = field(default_factory=dict)
    team: str = "default"
    priority: int = 0
    cpus: float = 1.0
    gpus: float = 0.0
    after: tuple[str, ...] = ()
    timeout_s: float | None = None
    retries: Mapping[str, int] = field(default_factory=lambda: {"lost": 5})
    backoff_s: float = 5.0
    key: str = ""

    @property
    def id(self) -> str:
        """The job's id: a digest of its content, of the files it names among its arguments too."""
        content = asdict(self)
        del content["priority"]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
        for argument in self.command:
            # A pipeline that was edited is another job.
            if argument.endswith((".yaml", ".yml", ".json")):
                with suppress(OSError):
                    digest.update((Path(self.folder) / argument).read_bytes())
        return f"job-{digest.hexdigest()[:16]}"


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What resources cost and draw; `prices.json` beside the queue's file, by these names.

    Attributes:
        cpu_hour: Price of a CPU for an hour, in the team's currency.
        gpu_hour: Price of a GPU for an hour.
        cpu_watts: Power of a CPU, W.
        gpu_watts: Power of a GPU, W.
        grams_per_kwh: Carbon dioxide of the electricity, g/kWh.
    """

    cpu_hour: float = 0.0
    gpu_hour: float = 0.0
    cpu_watts: float = 0.0
    gpu_watts: float = 0.0
    grams_per_kwh: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Queued:
    """A job of the queue.

    Attributes:
        id: Its id.
        spec: What it runs.
        state: `WAITING`, `RUNNING`, `SUCCEEDED`, `FAILED` or `STOPPED`.
        attempt: The current or last attempt, from 1; 0 if none was made.
        causes: Attempts that didn't succeed, by cause.
        message: Why it is as it is, in words.
        created: When it was queued, UTC.
        dispatched: When its last attempt was handed to Ray, UTC.
        ended: When it ended, UTC.
        seconds: Seconds that its attempts ran.
        cost: CPU and GPU seconds at the table's prices; 0 without a table.
        carbon_g: Carbon dioxide by the table, g.
    """

    id: str
    spec: Spec
    state: str
    attempt: int
    causes: dict[str, int]
    message: str
    created: datetime
    dispatched: datetime | None
    ended: datetime | None
    seconds: float
    cost: float
    carbon_g: float

    @property
    def submission(self) -> str:
        """Ray's id of the last attempt, by which its log is found."""
        return f"{self.id}-{self.attempt}"


class Queue:
    """The queue of one environment.

    Args:
        file: Its SQLite file; made if absent. It must lie on a disk of the head's machine, where
            attempts claim their rows, and not on a network's.
    """

    def __init__(self, file: Path) -> None:
        self.file = file.resolve()
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.opened() as connection:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(SCHEMA)

    @contextmanager
    def opened(self) -> Iterator[sqlite3.Connection]:
        """A connection that commits each statement."""
        connection = sqlite3.connect(self.file, timeout=60, isolation_level=None)
        connection.row_factory = sqlite3.Row
        try:
            yield connection
        finally:
            connection.close()

    @contextmanager
    def changed(self) -> Iterator[sqlite3.Connection]:
        """One transaction, written to the disk when it ends; none of it where it is cut short."""
        with self.opened() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    def submit(self, spec: Spec) -> str:
        """Queues a job, unless it is there: one that waits, runs or has succeeded stays as it is.

        One that failed or was stopped is queued anew.

        Returns:
            Its id.

        Raises:
            QueueError: Something of the spec is out of range, or a job it waits for isn't there.
        """
        _check(spec)
        with self.changed() as connection:
            insert(connection, spec)
        return spec.id

    def jobs(self, *, states: Sequence[str] = ()) -> list[Queued]:
        """The jobs in the order of their coming; of some states only, where given."""
        prices = self.prices()
        marks = ", ".join("?" * len(states))
        where = f"WHERE state IN ({marks})" if states else ""
        with self.opened() as connection:
            rows = connection.execute(f"SELECT * FROM jobs {where} ORDER BY number", tuple(states))
            return [_queued(row, prices) for row in rows]

    def find(self, id: str) -> Queued:
        """One job.

        Raises:
            QueueError: There is none of that id.
        """
        with self.opened() as connection:
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise QueueError(f"no job {id!r} in {self.file}: `liftyard jobs` lists those there are")
        return _queued(row, self.prices())

    def stop(self, id: str) -> Queued:
        """Stops a job: one that waits at once, one that runs when the dispatcher sees it.

        Raises:
            QueueError: There is none of that id.
        """
        with self.changed() as connection:
            connection.execute(
                "UPDATE jobs SET state = ?, ended = ?, message = 'stopped before it ran'"
                " WHERE id = ? AND state = ?",
                (STOPPED, time.time(), id, WAITING),
            )
            connection.execute("UPDATE jobs SET stop = 1 WHERE id = ? AND state = ?", (id, RUNNING))
        return self.find(id)

    def set_team(
        self,
        name: str,
        *,
        quota_cpus: float | None = None,
        quota_gpus: float | None = None,
        share: float = 1.0,
    ) -> None:
        """Sets what a team may have at a time, and its share where others wait too.

        Args:
            name: The team.
            quota_cpus: CPUs of its running jobs at most; None has no limit.
            quota_gpus: GPUs, likewise.
            share: A team of share 2 gets twice the CPUs of one of share 1; above 0.

        Raises:
            QueueError: A number is out of range.
        """
        if share <= 0 or min(quota_cpus or 0, quota_gpus or 0) < 0:
            raise QueueError(
                f"team {name!r}: quota_cpus={quota_cpus}, quota_gpus={quota_gpus}, share={share}: "
                "quotas are at least 0, the share is above 0"
            )
        with self.changed() as connection:
            connection.execute(
                "INSERT INTO teams VALUES (?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET"
                " quota_cpus = excluded.quota_cpus, quota_gpus = excluded.quota_gpus,"
                " share = excluded.share",
                (name, quota_cpus, quota_gpus, share),
            )

    def set_schedule(self, name: str, cron: str, spec: Spec, *, zone: str = "UTC") -> datetime:
        """Queues a job whenever it is due; a schedule of that name is replaced.

        Ticks that pass while no dispatcher runs are made up for by one job, for the last of them.

        Returns:
            When it is due first, UTC.

        Raises:
            ScheduleError: The expression or the zone can't be read.
            QueueError: The spec is out of range.
        """
        _check(spec)
        due = schedule.next_after(schedule.parse(cron, zone=zone), datetime.now(UTC))
        with self.changed() as connection:
            connection.execute(
                "INSERT INTO schedules VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET"
                " cron = excluded.cron, zone = excluded.zone, spec = excluded.spec,"
                " due = excluded.due",
                (name, cron, zone, json.dumps(asdict(spec)), due.timestamp()),
            )
        return due

    def schedules(self) -> dict[str, tuple[str, str, datetime]]:
        """The schedules by name: expression, time zone, next due (UTC)."""
        with self.opened() as connection:
            rows = connection.execute("SELECT * FROM schedules ORDER BY name").fetchall()
        return {r["name"]: (r["cron"], r["zone"], utc(r["due"])) for r in rows}

    def remove_schedule(self, name: str) -> None:
        """Removes a schedule; jobs it has queued stay.

        Raises:
            QueueError: There is none of that name.
        """
        there = list(self.schedules())
        if name not in there:
            raise QueueError(f"no schedule {name!r}: there are {', '.join(there) or 'none'}")
        with self.changed() as connection:
            connection.execute("DELETE FROM schedules WHERE name = ?", (name,))

    def prices(self) -> Prices:
        """The price table beside the queue's file; all 0 where there is none.

        Raises:
            QueueError: It can't be read.
        """
        file = self.file.with_name("prices.json")
        try:
            return Prices(**json.loads(file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return Prices()
        except (ValueError, TypeError) as error:
            raise QueueError(
                f"{file}: {error}; allowed are numbers named {', '.join(asdict(Prices()))}"
            ) from None


def file_of(name: str, home: Path) -> Path:
    """The queue's file of a named environment."""
    return home / "queues" / f"{name}.sqlite"


def _check(spec: Spec) -> None:
    unknown = sorted(set(spec.retries) - set(CAUSES))
    if not spec.command or not Path(spec.folder).is_absolute():
        raise QueueError(
            f"command {list(spec.command)} in folder {spec.folder!r}: a job needs a program, and "
            "an absolute folder"
        )
    if spec.cpus <= 0 or spec.gpus < 0 or (spec.timeout_s or 1) <= 0 or spec.backoff_s < 0:
        raise QueueError(
            f"cpus={spec.cpus}, gpus={spec.gpus}, timeout_s={spec.timeout_s}, "
            f"backoff_s={spec.backoff_s}: cpus and timeout_s are above 0, the others at least 0"
        )
    if unknown or min(spec.retries.values(), default=0) < 0:
        raise QueueError(
            f"retries {dict(spec.retries)}: allowed are counts of at least 0 for "
            f"{', '.join(CAUSES)}"
        )


def insert(connection: sqlite3.Connection, spec: Spec) -> None:
    for other in spec.after:
        if connection.execute("SELECT 1 FROM jobs WHERE id = ?", (other,)).fetchone() is None:
            raise QueueError(
                f"it waits for job {other!r}, which isn't in the queue: submit it first"
            )
    connection.execute(
        "INSERT INTO jobs (id, number, spec, team, priority, cpus, gpus, state, created)"
        " VALUES (?, (SELECT COALESCE(MAX(number), 0) + 1 FROM jobs), ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (id) DO UPDATE SET state = excluded.state, causes = '{}', stop = 0,"
        " not_before = 0, ended = NULL, message = '', spec = excluded.spec,"
        " priority = excluded.priority WHERE jobs.state IN (?, ?)",
        (
            *(spec.id, json.dumps(asdict(spec)), spec.team, spec.priority, spec.cpus, spec.gpus),
            *(WAITING, time.time(), FAILED, STOPPED),
        ),
    )


def restored(kept: Mapping[str, Any]) -> Spec:
    return Spec(
        **{**kept, "command": tuple(kept["command"]), "after": tuple(kept["after"])},
    )


def _queued(row: sqlite3.Row, prices: Prices) -> Queued:
    cpu_hours, gpu_hours = (row[name] * row["seconds"] / 3600 for name in ("cpus", "gpus"))
    kwh = (cpu_hours * prices.cpu_watts + gpu_hours * prices.gpu_watts) / 1000
    return Queued(
        id=row["id"],
        spec=restored(json.loads(row["spec"])),
        state=row["state"],
        attempt=row["attempt"],
        causes=json.loads(row["causes"]),
        message=row["message"],
        created=utc(row["created"]),
        dispatched=utc(row["dispatched"]) if row["dispatched"] else None,
        ended=utc(row["ended"]) if row["ended"] else None,
        seconds=row["seconds"],
        cost=cpu_hours * prices.cpu_hour + gpu_hours * prices.gpu_hour,
        carbon_g=kwh * prices.grams_per_kwh,
    )


def utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
