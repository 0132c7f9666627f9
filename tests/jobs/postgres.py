"""A PostgreSQL server of the tests' own."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import ports


@contextmanager
def serving() -> Iterator[str]:
    """Runs a server; yields the address of an empty database. Skips where there is none to run."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = shutil.which("initdb") or (str(versions[-1]) if versions else None)
    if found is None:
        pytest.skip("PostgreSQL's initdb is nowhere")
    programs = Path(found).resolve().parent
    # Not below pytest's folder, which only its owner may enter: a server refuses to run as root.
    folder = Path(tempfile.mkdtemp(prefix="liftyard-postgres-"))
    as_user: list[str] = []
    if os.getuid() == 0:
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(folder, "postgres")
    data, port = folder / "data", ports.free(1)[0]

    def run(program: str, *options: object) -> None:
        command = [*as_user, programs / program, "-D", data, *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=folder)

    try:
        run("initdb", "-U", "liftyard", "-A", "trust", "--no-sync")
        options = f"-p {port} -h 127.0.0.1 -k {folder} -F"
        run("pg_ctl", "-w", "-l", folder / "log", "-o", options, "start")
        try:
            yield f"postgresql://liftyard@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder)
