"""A durable queue before Ray's job submission: every job arrives once.

A job is a row of a database (`jobs/database.py`). Submitters write the row and are done; the
dispatcher (`jobs/dispatch.py`) hands jobs to Ray. A job's id comes from its content, so whoever was
killed while submitting submits again. Knows nothing of what jobs do, nor of Ray.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.environment import Environment, Prices
from jobs import schedule
from jobs.database import Connection, Row, connect

WAITING, RUNNING = "WAITING", "RUNNING"
SUCCEEDED, FAILED, STOPPED = "SUCCEEDED", "FAILED", "STOPPED"
# Why an attempt didn't succeed: it exited with an error; it, its head or its machine died; it took
# longer than its limit. Each has retries of its own.
CAUSES = ("failed", "lost", "timeout")

SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, number INTEGER NOT NULL, spec TEXT NOT NULL,
    team TEXT NOT NULL, priority INTEGER NOT NULL,
    cpus DOUBLE PRECISION NOT NULL, gpus DOUBLE PRECISION NOT NULL,
    state TEXT NOT NULL, created DOUBLE PRECISION NOT NULL,
    not_before DOUBLE PRECISION NOT NULL DEFAULT 0,
    attempt INTEGER NOT NULL DEFAULT 0, accepted INTEGER NOT NULL DEFAULT 0,
    dispatched DOUBLE PRECISION, claimed INTEGER NOT NULL DEFAULT 0, began DOUBLE PRECISION,
    finished DOUBLE PRECISION, code INTEGER,
    stop INTEGER NOT NULL DEFAULT 0, overdue INTEGER NOT NULL DEFAULT 0,
    causes TEXT NOT NULL DEFAULT '{}', message TEXT NOT NULL DEFAULT '', ended DOUBLE PRECISION,
    seconds DOUBLE PRECISION NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS jobs_by_state ON jobs (state);
CREATE TABLE IF NOT EXISTS teams (
    name TEXT PRIMARY KEY, quota_cpus DOUBLE PRECISION, quota_gpus DOUBLE PRECISION,
    share DOUBLE PRECISION NOT NULL
);
CREATE TABLE IF NOT EXISTS schedules (
    name TEXT PRIMARY KEY, cron TEXT NOT NULL, zone TEXT NOT NULL, spec TEXT NOT NULL,
    due DOUBLE PRECISION NOT NULL
)"""


class QueueError(ValueError):
    """A job can't be queued or found; the message says what is allowed or there."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to run. All of it, the priority aside, makes the job's id.

    Attributes:
        command: Program and arguments.
        folder: Working directory, absolute.
        variables: Environment variables on top of the node's; `PYTHONPATH` goes before the node's.
        packages: Folders of Python packages, or wheels without requirements, that the job and its
            tasks on the cluster import; absolute.
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
    packages: tuple[str, ...] = ()
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
        cost: What it asked for of CPUs and GPUs, times its seconds, at the environment's prices.
        carbon_g: Carbon dioxide, likewise, g.
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

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.state not in (WAITING, RUNNING)

    @property
    def waited_s(self) -> float:
        """Seconds from its coming to its last attempt; to now, or its end, if there was none."""
        until = self.dispatched or self.ended or datetime.now(UTC)
        return max(0.0, (until - self.created).total_seconds())


class Queue:
    """The queue of one environment.

    Args:
        url: Its database, as `jobs.database.connect` takes it; tables are made if absent.
        prices: What jobs are reckoned at.

    Raises:
        ValueError: The address can't be used.
        OSError: The database doesn't answer.
    """

    def __init__(self, url: str, *, prices: Prices | None = None) -> None:
        self.url = url
        self.database = connect(url)
        self.prices = prices or Prices()
        with self.database.changed() as connection:
            for statement in SCHEMA.split(";"):
                connection.execute(statement)

    def submit(self, spec: Spec) -> str:
        """Queues a job, unless it is there: one that waits, runs or has succeeded stays as it is.

        One that failed or was stopped is queued anew.

        Returns:
            Its id.

        Raises:
            QueueError: Something of the spec is out of range, or a job it waits for isn't there.
        """
        _check(spec)
        with self.database.changed() as connection:
            insert(connection, spec)
        return spec.id

    def jobs(self, *, states: Sequence[str] = ()) -> list[Queued]:
        """The jobs in the order of their coming; of some states only, where given."""
        marks = ", ".join("?" * len(states))
        where = f"WHERE state IN ({marks})" if states else ""
        with self.database.opened() as connection:
            rows = connection.execute(f"SELECT * FROM jobs {where} ORDER BY number", tuple(states))
            return [_queued(row, self.prices) for row in rows]

    def find(self, id: str) -> Queued:
        """One job.

        Raises:
            QueueError: There is none of that id.
        """
        with self.database.opened() as connection:
            row = connection.execute("SELECT * FROM jobs WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise QueueError(
                f"no job {id!r} in {self.database.url}: `liftyard jobs` lists those there are"
            )
        return _queued(row, self.prices)

    def stop(self, id: str) -> Queued:
        """Stops a job: one that waits at once, one that runs when the dispatcher sees it.

        Raises:
            QueueError: There is none of that id.
        """
        with self.database.changed() as connection:
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
        with self.database.changed() as connection:
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
        with self.database.changed() as connection:
            connection.execute(
                "INSERT INTO schedules VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET"
                " cron = excluded.cron, zone = excluded.zone, spec = excluded.spec,"
                " due = excluded.due",
                (name, cron, zone, json.dumps(asdict(spec)), due.timestamp()),
            )
        return due

    def schedules(self) -> dict[str, tuple[str, str, datetime]]:
        """The schedules by name: expression, time zone, next due (UTC)."""
        with self.database.opened() as connection:
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
        with self.database.changed() as connection:
            connection.execute("DELETE FROM schedules WHERE name = ?", (name,))

    def teams(self) -> dict[str, tuple[float | None, float | None, float]]:
        """The teams by name that were set: quota of CPUs, of GPUs, share."""
        with self.database.opened() as connection:
            rows = connection.execute("SELECT * FROM teams ORDER BY name").fetchall()
        return {r["name"]: (r["quota_cpus"], r["quota_gpus"], r["share"]) for r in rows}


def of(where: Environment) -> Queue:
    """The queue of an environment.

    Raises:
        QueueError: It has none.
        OSError: Its database doesn't answer.
    """
    if where.queue is None:
        raise QueueError(
            f"environment {where.name!r} takes no jobs: start one that stays with `liftyard up` "
            "and name it by --env local, name `queue` in the environment's file, or use "
            "`liftyard run`"
        )
    return Queue(where.queue, prices=where.prices)


def _check(spec: Spec) -> None:
    unknown = sorted(set(spec.retries) - set(CAUSES))
    if not spec.command or not Path(spec.folder).is_absolute():
        raise QueueError(
            f"command {list(spec.command)} in folder {spec.folder!r}: a job needs a program, and "
            "an absolute folder"
        )
    if (
        spec.cpus <= 0
        or spec.gpus < 0
        or (1 if spec.timeout_s is None else spec.timeout_s) <= 0
        or spec.backoff_s < 0
    ):
        raise QueueError(
            f"cpus={spec.cpus}, gpus={spec.gpus}, timeout_s={spec.timeout_s}, "
            f"backoff_s={spec.backoff_s}: cpus and timeout_s are above 0, the others at least 0"
        )
    if unknown or min(spec.retries.values(), default=0) < 0:
        raise QueueError(
            f"retries {dict(spec.retries)}: allowed are counts of at least 0 for "
            f"{', '.join(CAUSES)}"
        )


def insert(connection: Connection, spec: Spec) -> None:
    for other in spec.after:
        if connection.execute("SELECT 1 FROM jobs WHERE id = ?", (other,)).fetchone() is None:
            raise QueueError(
                f"it waits for job {other!r}, which isn't in the queue: submit it first"
            )
    connection.execute(
        "INSERT INTO jobs (id, number, spec, team, priority, cpus, gpus, state, created)"
        " VALUES (?, (SELECT COALESCE(MAX(number), 0) + 1 FROM jobs), ?, ?, ?, ?, ?, ?, ?)"
        " ON CONFLICT (id) DO UPDATE SET state = excluded.state, causes = '{}', stop = 0,"
        " not_before = 0, ended = NULL, message = '', spec = excluded.spec, dispatched = NULL,"
        " created = excluded.created, priority = excluded.priority WHERE jobs.state IN (?, ?)",
        (
            *(spec.id, json.dumps(asdict(spec)), spec.team, spec.priority, spec.cpus, spec.gpus),
            *(WAITING, time.time(), FAILED, STOPPED),
        ),
    )


def restored(kept: Mapping[str, Any]) -> Spec:
    """A spec that was kept as JSON."""
    made: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in kept.items()}
    return Spec(**made)


def _queued(row: Row, prices: Prices) -> Queued:
    used = {"cpus": row["cpus"], "gpus": row["gpus"], "hours": row["seconds"] / 3600}
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
        cost=prices.cost(**used),
        carbon_g=prices.carbon_g(**used),
    )


def utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
