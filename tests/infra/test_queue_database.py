"""The queue's database and user, made on a real PostgreSQL by one who is no superuser."""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from infra.image import queue_database
from jobs.queue import Queue, Spec
from tests.jobs.postgres import serving


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of MLflow's database, as the user that owns it; `queue` has to give a password."""
    with serving() as url, psycopg.connect(url, autocommit=True) as connection:
        connection.execute("CREATE ROLE mlflow LOGIN CREATEDB CREATEROLE")
        connection.execute("CREATE DATABASE mlflow OWNER mlflow")
        (rules,) = connection.execute("SHOW hba_file").fetchone() or ("",)
        Path(rules).write_text("host all queue all scram-sha-256\nhost all all all trust\n")
        connection.execute("SELECT pg_reload_conf()")
        yield url.replace("liftyard@", "mlflow@").replace("/postgres", "/mlflow")


def test_the_queues_user_reaches_the_queue_alone(server: str) -> None:
    address = urlsplit(server).netloc.partition("@")[2]

    def url(password: str, database: str) -> str:
        return f"postgresql://queue:{password}@{address}/{database}"

    queue_database.make(server, "b" * 64)
    there = Queue(url("b" * 64, "queue"))
    id = there.submit(Spec(command=("true",), folder="/"))
    with pytest.raises(psycopg.OperationalError, match='permission denied for database "mlflow"'):
        psycopg.connect(url("b" * 64, "mlflow"))

    # Again, with another password: the one before is refused, and what is queued stays.
    queue_database.make(server, "a" * 64)
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(url("b" * 64, "queue"))
    assert [job.id for job in Queue(url("a" * 64, "queue")).jobs()] == [id]
