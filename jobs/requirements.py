"""What a team's package requires, as one wheel that Ray brings to every node.

pip resolves against the packages that are here, and only what they lack goes into the wheel. Ray's
own `pip` would copy the cluster's whole virtual environment on each node, and ask an index there.
Knows nothing of jobs.
"""

import base64
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

NAME = "liftyard_requirements-0"


class RequirementsError(ValueError):
    """What is required can't be had; the message is pip's, or says what is here instead."""


def bundled(required: Sequence[str], folder: Path, *, copies: Path) -> str | None:
    """Makes a wheel of what is required and isn't here, with what that requires in turn.

    Args:
        required: As pip takes them: `["lifelines==0.30"]`, or wheels, relative to `folder`.
        folder: Where wheels are found.
        copies: Folder of the wheel, below a digest of what is in it.

    Returns:
        The wheel's path; None where all is here. The wheel requires nothing, so that no node asks
        an index. It is for this Python and platform.

    Raises:
        RequirementsError: pip can't find them, or they need another version of what is here.
    """
    if not required:
        return None
    report = _pip("--dry-run", "--quiet", "--report=-", "--", *required, cwd=folder)
    found = json.loads(report)["install"]
    if not found:
        return None
    for each in found:
        _refuse_another_version(each["metadata"])
    content = json.dumps([each["download_info"] for each in found], sort_keys=True)
    wheel = copies / hashlib.sha256(content.encode()).hexdigest()[:16] / f"{NAME}-py3-none-any.whl"
    if not wheel.exists():
        draft = copies / f"draft-{secrets.token_hex(4)}"
        draft.mkdir(parents=True)
        try:
            urls = [
                f"{each['metadata']['name']} @ {each['download_info']['url']}" for each in found
            ]
            _pip("--quiet", "--no-deps", f"--target={draft / 'site'}", "--", *urls, cwd=folder)
            _pack(draft / "site", draft / "wheel")
            wheel.parent.mkdir(exist_ok=True)
            os.replace(draft / "wheel", wheel)
        finally:
            shutil.rmtree(draft)
    return str(wheel)


def _refuse_another_version(wanted: dict[str, Any]) -> None:
    try:
        here = metadata.version(wanted["name"])
    except metadata.PackageNotFoundError:
        return
    raise RequirementsError(
        f"requirements: they need {wanted['name']} {wanted['version']}, and the cluster has "
        f"{here}, which its own programs need: require what goes with {here}"
    )


def _pip(*arguments: str, cwd: Path) -> str:
    always = ("--no-input", "--disable-pip-version-check")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *always, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        raise RequirementsError(f"requirements: pip says: {' '.join(said) or done.stderr.strip()}")
    return done.stdout


def _pack(site: Path, wheel: Path) -> None:
    """Writes installed packages, their metadata too, as one wheel.

    They are its data for `purelib` (the binary distribution format of packaging.python.org), since
    a wheel has one folder of metadata at its top.
    """
    files = {
        f"{NAME}.data/purelib/{path.relative_to(site)}": path.read_bytes()
        for path in sorted(site.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    name, _, version = NAME.rpartition("-")
    files[f"{NAME}.dist-info/METADATA"] = (
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    )
    files[f"{NAME}.dist-info/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: liftyard\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = "".join(
        f"{path},sha256={_digest(content)},{len(content)}\n" for path, content in files.items()
    )
    files[f"{NAME}.dist-info/RECORD"] = f"{record}{NAME}.dist-info/RECORD,,\n".encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in files.items():
            # A fixed time, so that the same content is the same file.
            archive.writestr(zipfile.ZipInfo(path), content, zipfile.ZIP_DEFLATED)


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
