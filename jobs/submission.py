"""Pipelines as jobs of an environment: submit, list, follow, stop.

A thin layer over Ray's job submission. A job is the command line itself, run on the environment's
head in the submitter's folder: relative paths mean the same there as here, as long as it is the
same machine. Knows nothing of what a pipeline does.
"""

import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster import session
from cluster.environment import Environment

ROOT = Path(__file__).resolve().parents[1]


class JobError(ValueError):
    """A job can't be submitted or found; the message says what there is."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A submitted job.

    Attributes:
        id: Its id.
        status: `PENDING`, `RUNNING`, `SUCCEEDED`, `FAILED` or `STOPPED`.
        command: What runs.
        started: When it was submitted, UTC.
        ended: When it ended, UTC; None if it hasn't.
        message: What Ray says of it.
    """

    id: str
    status: str
    command: str
    started: datetime | None
    ended: datetime | None
    message: str


def submit(
    environment: Environment,
    pipeline: Path,
    *,
    arguments: Sequence[str] = (),
    folder: Path | None = None,
) -> str:
    """Submits `liftyard run PIPELINE --env NAME ARGUMENTS`; returns at once.

    Args:
        environment: Where to.
        pipeline: The pipeline's YAML.
        arguments: More of the command line, as `["--set", "seed=4"]`. The job looks the
            environment up by its name in the folder's own `.liftyard`: for another home, or an
            environment named by its file, add `--home` or `--env` here; the last one counts.
        folder: Working directory of the job; None is this process's.

    Returns:
        The job's id.

    Raises:
        JobError: The pipeline isn't there, or the environment takes no jobs.
        ConnectionError: The environment doesn't answer.
    """
    if not pipeline.is_file():
        raise JobError(f"no pipeline {pipeline}: give the path of its YAML file")
    client = _client(environment)
    command = [sys.executable, "-m", "jobs.cli", "run", str(pipeline.resolve())]
    where = shlex.quote(str((folder or Path.cwd()).resolve()))
    # The shell gives way to the program, so that a stop reaches it.
    run = shlex.join([*command, "--env", environment.name, *arguments])
    id: str = client.submit_job(
        entrypoint=f"cd {where} && exec {run}",
        runtime_env={"env_vars": {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}},
        metadata={"pipeline": str(pipeline)},
    )
    return id


def jobs(environment: Environment) -> list[Job]:
    """Every job the environment knows, oldest first.

    Raises:
        JobError: The environment takes no jobs.
        ConnectionError: It doesn't answer.
    """
    listed = [_job(each) for each in _client(environment).list_jobs() if each.submission_id]
    return sorted(listed, key=lambda job: (job.started or datetime.min.replace(tzinfo=UTC), job.id))


def find(environment: Environment, id: str) -> Job:
    """One job.

    Raises:
        JobError: There is none of that id; the message names those there are.
        ConnectionError: The environment doesn't answer.
    """
    listed = jobs(environment)
    for job in listed:
        if job.id == id:
            return job
    there = ", ".join(f"{job.id} ({job.status})" for job in listed[-10:]) or "none yet"
    raise JobError(f"no job {id!r} in environment {environment.name!r}: there are {there}")


def logs(
    environment: Environment, id: str, *, follow: bool = False, patience_s: float = 60
) -> Iterator[str]:
    """What a job has written, in pieces of text as they come.

    Args:
        environment: Where it runs.
        id: The job's id.
        follow: Goes on until the job has ended. A lost connection is made again, and nothing is
            given twice.
        patience_s: How long to try to get a lost connection back.

    Raises:
        JobError: There is no such job; raised at once, not at the first piece.
        ConnectionError: The environment doesn't answer, or no longer.
    """
    client = _client(environment)
    find(environment, id)
    if follow:
        return _follow(environment, client, id, patience_s)
    return iter([str(client.get_job_logs(id))])


def stop(environment: Environment, id: str, *, limit_s: float = 30) -> Job:
    """Stops a job: it gets TERM, and KILL three seconds later. One that has ended is left as is.

    Args:
        environment: Where it runs.
        id: The job's id.
        limit_s: How long to wait until it has ended.

    Returns:
        The job, ended.

    Raises:
        JobError: There is no such job, or it didn't end in time.
        ConnectionError: The environment doesn't answer.
    """
    if find(environment, id).ended is None:
        _client(environment).stop_job(id)
    deadline = time.monotonic() + limit_s
    while (job := find(environment, id)).ended is None:
        if time.monotonic() > deadline:
            raise JobError(f"job {id!r} was told to stop, and is {job.status} {limit_s:g} s later")
        time.sleep(0.2)
    return job


def _follow(environment: Environment, client: Any, id: str, patience_s: float) -> Iterator[str]:
    given = 0
    lost_at: float | None = None
    while True:
        try:
            # Asked before the log is read, so that an end seen here is the log's end too.
            ended = client.get_job_info(id).end_time is not None
            # The whole log each time: Ray's tail also starts anew at each connection, and closes
            # seconds after the job's end.
            text: str = client.get_job_logs(id)
        except (OSError, RuntimeError) as error:
            lost_at = lost_at or time.monotonic()
            if time.monotonic() > lost_at + patience_s:
                raise ConnectionError(
                    f"lost the log of {id}: environment {environment.name!r} hasn't answered "
                    f"for {patience_s:g} s ({error})"
                ) from error
        else:
            lost_at = None
            if len(text) > given:
                yield text[given:]
                given = len(text)
            if ended:
                return
        time.sleep(0.5)


def _client(environment: Environment) -> Any:
    url = environment.dashboard_url
    if url is None:
        raise JobError(
            f"environment {environment.name!r} takes no jobs: start one that stays with "
            "`liftyard up` and name it by --env local, or use `liftyard run`"
        )
    session.authenticate(make=False)
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(url)
    except (OSError, RuntimeError) as error:
        hint = "`liftyard up` starts it again" if environment.name == "local" else "is it up?"
        raise ConnectionError(
            f"environment {environment.name!r} doesn't answer at {url}: {hint} ({error})"
        ) from error


def _job(details: Any) -> Job:
    def utc(milliseconds: int | None) -> datetime | None:
        return datetime.fromtimestamp(milliseconds / 1000, UTC) if milliseconds else None

    return Job(
        id=details.submission_id,
        status=str(details.status),
        command=details.entrypoint,
        started=utc(details.start_time),
        ended=utc(details.end_time),
        message=details.message or "",
    )
