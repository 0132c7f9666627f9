"""Terraform, its AWS provider from a local mirror, and an emulated AWS on 127.0.0.1."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
PROVIDER = "registry.terraform.io/hashicorp/aws"
REGION = "eu-central-1"


def _mirror() -> Path | None:
    """The root of a provider mirror that holds the AWS provider."""
    named = os.environ.get("LIFTYARD_TERRAFORM_PLUGINS")
    if named:
        return Path(named)
    roots = [Path("/opt"), Path("/usr/local/share"), Path.home() / ".terraform.d"]
    for root in roots:
        for depth in ("", "*/", "*/*/"):
            for found in sorted(root.glob(depth + PROVIDER)):
                return found.parents[2]
    return None


@dataclass(frozen=True, kw_only=True)
class Terraform:
    """A copy of infra/terraform in which commands may run."""

    root: Path
    mirror: Path
    environment: dict[str, str]

    def run(self, folder: str, *arguments: str) -> str:
        """Runs Terraform below the root and returns what it printed; a failure fails the test."""
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                ["terraform", *arguments],
                cwd=self.root / folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                code = process.wait(500)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            output.seek(0)
            # Not every command takes -no-color.
            printed = re.sub(r"\x1b\[[0-9;]*m", "", output.read())
        if code != 0:
            pytest.fail(f"terraform {' '.join(arguments)}: {code}:\n{printed[-6000:]}")
        return printed

    def init(self, folder: str) -> None:
        """Prepares a folder, with the provider from the mirror and without a backend."""
        self.run(folder, "init", "-backend=false", f"-plugin-dir={self.mirror}")


@pytest.fixture(scope="session")
def terraform(tmp_path_factory: pytest.TempPathFactory) -> Terraform:
    """Terraform over a copy of infra/terraform, so that nothing is written beside the sources."""
    if shutil.which("terraform") is None:
        pytest.skip("terraform isn't installed")
    mirror = _mirror()
    if mirror is None:
        pytest.skip(
            f"no mirror holds {PROVIDER}: name its root in LIFTYARD_TERRAFORM_PLUGINS "
            "(`terraform providers mirror FOLDER` makes one)"
        )
    home = tmp_path_factory.mktemp("infra")
    ignored = shutil.ignore_patterns(".terraform*", "*.tfstate*", "terraform.tfvars")
    shutil.copytree(ROOT / "infra" / "terraform", home / "terraform", ignore=ignored)
    rc = home / "terraform.rc"
    rc.touch()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "AWS_"))}
    environment = {
        **kept,
        "TF_CLI_CONFIG_FILE": str(rc),
        "TF_IN_AUTOMATION": "1",
        "CHECKPOINT_DISABLE": "1",
    }
    return Terraform(root=home / "terraform", mirror=mirror, environment=environment)


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An emulated AWS; yields the variables by which clients find it."""
    log = tmp_path_factory.mktemp("emulator") / "log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "emulator.py"), str(port)],
            env={
                **os.environ,
                "MOTO_EC2_LOAD_DEFAULT_AMIS": "true",
                "MOTO_IAM_LOAD_MANAGED_POLICIES": "true",
                "MOTO_ACM_VALIDATION_WAIT": "1",
            },
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        _wait(port, server, log)
        yield {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if server.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"the emulator isn't up:\n{log.read_text()[-3000:]}")
