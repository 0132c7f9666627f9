"""Ray's job submission: attempts handed to it, and what they write.

A thin layer over `JobSubmissionClient`, by a dashboard's address. Knows nothing of why an attempt
is made.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

from cluster import local, session
from cluster.environment import Environment
from jobs.queue import Queue, QueueError, Spec

# From TERM to KILL of a job that is stopped: an interrupted run writes its report meanwhile.
STOP_WAIT_S = 20


class RayJobs:
    """Ray's job submission as the dispatcher's engine.

    Args:
        dashboard_url: The dashboard that takes the jobs.
    """

    def __init__(self, dashboard_url: str) -> None:
        self._url = dashboard_url
        self._client: Any = None

    def submit(self, id: str, entrypoint: str, spec: Spec) -> None:
        needs: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)}}
        if spec.packages:
            needs["py_modules"] = list(spec.packages)
        try:
            self._connected().submit_job(entrypoint=entrypoint, submission_id=id, runtime_env=needs)
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise ConnectionError(f"Ray didn't take {id}: {error}") from error

    def living(self) -> set[str]:
        try:
            listed = self._connected().list_jobs()
        except RuntimeError as error:
            raise ConnectionError(f"Ray doesn't list its jobs: {error}") from error
        return {each.submission_id for each in listed if str(each.status) in ("PENDING", "RUNNING")}

    def stop(self, id: str) -> None:
        try:
            self._connected().stop_job(id)
        except RuntimeError as error:
            if "does not exist" not in str(error):
                raise ConnectionError(f"Ray didn't stop {id}: {error}") from error

    def refusal(self, id: str) -> str:
        try:
            details = self._connected().get_job_info(id)
        except RuntimeError:
            return ""
        refused = "RUNTIME_ENV" in str(details.error_type)
        return f"its packages can't be had: {details.message}" if refused else ""

    def cpus(self) -> float:
        return sum(node.cpus for node in local.nodes(self._url))

    def log(self, id: str) -> str | None:
        """What an attempt has written so far; None where Ray doesn't know it.

        Raises:
            OSError: Ray doesn't answer.
        """
        try:
            # The whole of it: Ray's tail starts anew at each connection too, and closes seconds
            # after the job's end.
            return str(self._connected().get_job_logs(id))
        except RuntimeError as error:
            if "status code 404" in str(error) or "does not exist" in str(error):
                return None
            raise ConnectionError(f"Ray doesn't give the log of {id}: {error}") from error

    def _connected(self) -> Any:
        if self._client is None:
            session.authenticate(make=False)
            from ray.job_submission import JobSubmissionClient

            try:
                self._client = JobSubmissionClient(self._url)
            except RuntimeError as error:
                raise ConnectionError(f"no Ray answers at {self._url}: {error}") from error
        return self._client


def logs(
    queue: Queue,
    id: str,
    where: Callable[[], Environment],
    *,
    follow: bool = False,
    patience_s: float = 60,
) -> Iterator[str]:
    """What a job's last attempt has written, in pieces of text as they come.

    Args:
        queue: The queue.
        id: The job's id.
        where: Finds its environment; asked again after a lost connection, since a head that was
            started again can have another address.
        follow: Goes on until the job has ended, over its attempts, those to come too. A lost
            connection is made again, and nothing is given twice.
        patience_s: How long to try to get a lost connection back.

    Raises:
        QueueError: There is no such job; raised at once, not at the first piece.
        ConnectionError: The environment doesn't answer, or no longer.
    """
    job = queue.find(id)
    if follow:
        return _follow(queue, id, where, patience_s)
    text = RayJobs(_dashboard(where())).log(job.submission) if job.attempt else None
    return iter([] if text is None else [text])


def _follow(
    queue: Queue, id: str, where: Callable[[], Environment], patience_s: float
) -> Iterator[str]:
    engine: RayJobs | None = None
    attempt, given = 0, 0
    lost_at: float | None = None
    while True:
        # Asked before the log is read, so that an end seen here is the log's end too.
        job = queue.find(id)
        attempt = attempt or job.attempt
        try:
            engine = engine or RayJobs(_dashboard(where()))
            text = engine.log(f"{id}-{attempt}") if attempt else None
        except (OSError, ValueError) as error:
            engine, lost_at = None, lost_at or time.monotonic()
            if time.monotonic() > lost_at + patience_s:
                raise ConnectionError(
                    f"lost the log of {id}: its environment hasn't answered for "
                    f"{patience_s:g} s ({error})"
                ) from error
        else:
            lost_at = None
            if text is not None and len(text) > given:
                yield text[given:]
                given = len(text)
            if job.attempt > attempt:
                attempt, given = attempt + 1, 0
                continue
            if job.over:
                return
        time.sleep(0.5)


def _dashboard(where: Environment) -> str:
    if where.dashboard_url is None:
        raise QueueError(
            f"environment {where.name!r} has no dashboard to ask for logs: name `dashboard_url` "
            "in its file"
        )
    return where.dashboard_url
