"""Which queued job runs next: by priority and fair share, within each team's quota."""

import json
import time
from collections.abc import Sequence

from jobs.database import Connection, Row
from jobs.queue import FAILED, RUNNING, STOPPED, SUCCEEDED, WAITING, Queue


def choose(queue: Queue, slots: float) -> Row | None:
    """Decides the next attempt and writes the decision down; None if nothing may run.

    By priority, then the team that has least of its share now, then least of it before, then
    the order of coming. A job whose team has no quota left is passed over; for one that only
    waits for CPUs, those behind it wait too, else large jobs would never run.
    """
    with queue.database.changed() as connection:
        _drop_orphans(connection)
        running = connection.execute(
            "SELECT team, SUM(cpus) AS cpus, SUM(gpus) AS gpus FROM jobs WHERE state = ?"
            " GROUP BY team",
            (RUNNING,),
        ).fetchall()
        taken = {row["team"]: (row["cpus"], row["gpus"]) for row in running}
        free = slots - sum(cpus for cpus, _ in taken.values())
        if free <= 0:
            return None
        teams = {row["name"]: row for row in connection.execute("SELECT * FROM teams")}
        waiting = connection.execute(
            "SELECT id, number, team, priority, cpus, gpus, spec FROM jobs"
            " WHERE state = ? AND not_before <= ?",
            (WAITING, time.time()),
        ).fetchall()
        if not waiting:
            return None
        before = {
            row["team"]: row["used"]
            for row in connection.execute(
                "SELECT team, SUM(cpus * seconds) AS used FROM jobs GROUP BY team"
            )
        }

        def rank(row: Row) -> tuple[float, float, float, int]:
            team = row["team"]
            share = teams[team]["share"] if team in teams else 1.0
            now = taken.get(team, (0.0, 0.0))[0]
            return (-row["priority"], now / share, before[team] / share, row["number"])

        for row in sorted(waiting, key=rank):
            quota = teams.get(row["team"])
            cpus, gpus = taken.get(row["team"], (0.0, 0.0))
            if quota is not None and (
                _over(cpus + row["cpus"], quota["quota_cpus"])
                or _over(gpus + row["gpus"], quota["quota_gpus"])
            ):
                continue
            if not _ready(connection, json.loads(row["spec"])["after"]):
                continue
            if row["cpus"] > free and taken:
                return None
            chosen: Row = connection.execute(
                "UPDATE jobs SET state = ?, attempt = attempt + 1, accepted = 0,"
                " dispatched = ?, began = NULL, finished = NULL, code = NULL, overdue = 0,"
                " message = '' WHERE id = ? RETURNING id, attempt, spec",
                (RUNNING, time.time(), row["id"]),
            ).fetchone()
            return chosen
    return None


def _drop_orphans(connection: Connection) -> None:
    """Ends jobs that wait for one that won't succeed."""
    waiting = connection.execute(
        "SELECT id, spec FROM jobs WHERE state = ? AND spec NOT LIKE '%\"after\": []%'", (WAITING,)
    ).fetchall()
    for row in waiting:
        for other in json.loads(row["spec"])["after"]:
            found = connection.execute("SELECT state FROM jobs WHERE id = ?", (other,)).fetchone()
            state = found["state"]
            if state in (FAILED, STOPPED):
                connection.execute(
                    "UPDATE jobs SET state = ?, ended = ?, message = ? WHERE id = ?",
                    (FAILED, time.time(), f"{other}, which it waits for, is {state}", row["id"]),
                )


def _ready(connection: Connection, after: Sequence[str]) -> bool:
    if not after:
        return True
    marks = ", ".join("?" * len(after))
    found = connection.execute(
        f"SELECT COUNT(*) AS done FROM jobs WHERE id IN ({marks}) AND state = ?",
        (*after, SUCCEEDED),
    ).fetchone()
    return bool(found["done"] == len(set(after)))


def _over(wanted: float, quota: float | None) -> bool:
    return quota is not None and wanted > quota
