"""Where the queue is kept: an SQLite file, or PostgreSQL; the same statements in both.

Statements mark their parameters by `?`, and rows are read by the names of their columns.
"""

import hashlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast
from urllib.parse import urlsplit

from cluster import supervisor

Row = Mapping[str, Any]

SQLITE, POSTGRES = "sqlite:///", "postgresql://"
# What a waiting dispatcher listens to, and the key of the one dispatcher's lock.
CHANNEL, DISPATCHER = "liftyard_queue", 0x6C696674


class Rows(Protocol):
    """What a statement gave."""

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...

    def __iter__(self) -> Iterator[Any]: ...


class Connection(Protocol):
    """Takes statements; outside of a transaction each is committed at once."""

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Rows: ...


class Database(Protocol):
    """A queue's database.

    Attributes:
        url: Its address, without a password.
        locks: Folder of the head's machine where attempts hold their lock files.
    """

    url: str
    locks: Path

    def opened(self) -> Any:
        """A context that gives a `Connection`.

        Raises:
            OSError: The database doesn't answer.
        """

    def changed(self) -> Any:
        """One transaction that excludes every other writer; none of it where it is cut short."""

    def dispatching(self) -> Any:
        """Held by the one dispatcher there may be; another waits, and takes over when it dies."""

    def watched(self) -> Any:
        """A context that gives a function: whether anything was written since the last call."""


def connect(url: str) -> Database:
    """The database at an address; its tables are the queue's to make.

    Args:
        url: `sqlite:////path/queue.sqlite`, a file on a disk of the head's machine, or
            `postgresql://…` as libpq takes it.

    Raises:
        ValueError: It is neither.
    """
    if url.startswith(SQLITE + "/"):
        return Sqlite(Path(url.removeprefix(SQLITE)))
    if url.startswith(POSTGRES):
        return Postgres(url)
    raise ValueError(
        f"queue {url!r}: allowed are sqlite:////path/queue.sqlite and postgresql://host/name"
    )


class Sqlite:
    """An SQLite file; its folder is made if absent."""

    def __init__(self, file: Path) -> None:
        self.file, self.url = file, f"{SQLITE}{file}"
        self.locks = file.with_name(f"{file.name}.locks")
        file.parent.mkdir(parents=True, exist_ok=True)
        with self.opened() as connection:
            connection.execute("PRAGMA journal_mode = WAL")

    @contextmanager
    def opened(self) -> Iterator[Connection]:
        connection = sqlite3.connect(self.file, timeout=60, isolation_level=None)
        connection.row_factory = sqlite3.Row
        try:
            yield connection
        finally:
            connection.close()

    @contextmanager
    def changed(self) -> Iterator[Connection]:
        with self.opened() as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")

    @contextmanager
    def dispatching(self) -> Iterator[None]:
        with supervisor.locked(self.file.with_suffix(".dispatcher")):
            yield

    @contextmanager
    def watched(self) -> Iterator[Callable[[], bool]]:
        with self.opened() as connection:
            seen = -1

            def changed() -> bool:
                nonlocal seen
                before = seen
                seen = int(connection.execute("PRAGMA data_version").fetchone()[0])
                return seen != before

            yield changed


class Postgres:
    """A PostgreSQL database."""

    def __init__(self, url: str) -> None:
        import psycopg

        self._psycopg: Any = psycopg
        self._url = url
        parts = urlsplit(url)
        self.url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        digest = hashlib.sha256(self.url.encode()).hexdigest()[:16]
        self.locks = Path("/tmp") / f"liftyard-queue-{digest}"
        self._kept = threading.local()

    @contextmanager
    def opened(self) -> Iterator[Connection]:
        held = getattr(self._kept, "connection", None)
        with self._told():
            if held is not None:
                yield _Marked(held)
                return
            with self._connect() as connection:
                yield _Marked(connection)

    @contextmanager
    def changed(self) -> Iterator[Connection]:
        with self.opened() as connection, cast(_Marked, connection).inner.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(?)", (DISPATCHER + 1,))
            yield connection
            connection.execute(f"NOTIFY {CHANNEL}")

    @contextmanager
    def dispatching(self) -> Iterator[None]:
        # This thread works over the connection that holds the lock: with it, it loses both.
        with self._told(), self._connect() as connection:
            connection.execute("SELECT pg_advisory_lock(%s)", (DISPATCHER,))
            self._kept.connection = connection
            try:
                yield
            finally:
                self._kept.connection = None

    @contextmanager
    def watched(self) -> Iterator[Callable[[], bool]]:
        with self._told(), self._connect() as connection:
            connection.execute(f"LISTEN {CHANNEL}")

            def changed() -> bool:
                return any(True for _ in connection.notifies(timeout=0))

            yield changed

    def _connect(self) -> Any:
        return self._psycopg.connect(
            self._url, autocommit=True, row_factory=self._psycopg.rows.dict_row, connect_timeout=10
        )

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except self._psycopg.OperationalError as error:
            raise ConnectionError(f"the queue's database {self.url}: {error}") from error


class _Marked:
    """A connection of psycopg's that takes `?`."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def execute(self, statement: str, parameters: Sequence[Any] = (), /) -> Rows:
        marked = statement.replace("%", "%%").replace("?", "%s")
        return cast(Rows, self.inner.execute(marked, parameters))
