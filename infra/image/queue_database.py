"""Makes the queue's database, and a user that reaches it and no other; run before MLflow starts.

Told by `LIFTYARD_DATABASE_URL`, MLflow's database, and `LIFTYARD_QUEUE_PASSWORD`, the file of the
new user's password. Done again, it sets the password to the file's, and leaves the rest as it is.
"""

import os
import sys
from pathlib import Path


def make(url: str, password: str) -> None:
    """Makes the user `queue` and its database `queue`, where they are absent.

    Args:
        url: Another database of the server, as a user that may make databases and roles.
        password: The new user's.

    Raises:
        psycopg.Error: The server doesn't answer, or refuses.
    """
    import psycopg
    from psycopg import sql

    with psycopg.connect(url, autocommit=True) as connection:
        if not connection.execute("SELECT 1 FROM pg_roles WHERE rolname = 'queue'").fetchone():
            connection.execute("CREATE ROLE queue LOGIN")
        # As the server keeps it: the statement goes to its log.
        kept = connection.pgconn.encrypt_password(password.encode(), b"queue", b"scram-sha-256")
        connection.execute(
            sql.SQL("ALTER ROLE queue PASSWORD {}").format(sql.Literal(kept.decode()))
        )
        connection.execute("GRANT queue TO CURRENT_USER")
        found = connection.execute("SELECT 1 FROM pg_database WHERE datname = 'queue'")
        if not found.fetchone():
            connection.execute("CREATE DATABASE queue OWNER queue")
        # Left to PUBLIC by PostgreSQL: whoever has an account may enter.
        for name in (connection.info.dbname, "queue"):
            connection.execute(
                sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(name))
            )


def main() -> None:
    """The program; see the module's docstring."""
    import psycopg

    try:
        make(
            os.environ["LIFTYARD_DATABASE_URL"],
            Path(os.environ["LIFTYARD_QUEUE_PASSWORD"]).read_text(encoding="utf-8"),
        )
    except (psycopg.Error, OSError, KeyError) as error:
        sys.exit(f"error: the queue's database: {error}")


if __name__ == "__main__":
    main()
