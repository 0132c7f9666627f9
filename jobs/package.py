"""A team's own jobs: a folder with a `pyproject.toml` that names them.

    [tool.liftyard]
    packages = ["retention"]            # folders of packages beside the file
    requirements = ["lifelines==0.30"]  # what pip adds to the packages that are here; wheels too

    [tool.liftyard.jobs.win-back]
    module = "retention.win_back"       # run as `python -m`
    cpus = 2

What is submitted is a copy, named by its content: a change to the package doesn't reach jobs that
wait, and makes another job. What is required is in the copy (`jobs/requirements.py`). Knows nothing
of what the jobs do.
"""

import hashlib
import os
import secrets
import shutil
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pydantic

from jobs import requirements
from models.naming import suggestion

FILE = "pyproject.toml"
OURS = ("benchmarks", "cluster", "jobs", "models", "serving", "tests")


class PackageError(ValueError):
    """A package's job can't be submitted; the message says what is allowed or there."""


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A job that a package names.

    Attributes:
        command: Program and arguments.
        packages: Copies of its packages, absolute; one is a wheel of all that it requires.
        cpus: CPUs that it is reckoned to take.
        gpus: GPUs, likewise.
        timeout_s: Seconds that an attempt may run; None has no limit.
        retries: Further attempts by cause; None is the queue's own.
    """

    command: tuple[str, ...]
    packages: tuple[str, ...]
    cpus: float
    gpus: float
    timeout_s: float | None
    retries: dict[str, int] | None


class _Job(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    module: str = pydantic.Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")
    cpus: float = 1.0
    gpus: float = 0.0
    timeout_s: float | None = None
    retries: dict[str, int] | None = None


class _Table(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")

    packages: list[str] = pydantic.Field(min_length=1)
    requirements: list[str] = []
    jobs: dict[str, _Job] = pydantic.Field(min_length=1)


def registered(folder: Path, name: str, *, copies: Path) -> Registered:
    """Finds a job by its name, and copies its packages.

    Args:
        folder: Where the `pyproject.toml` is.
        name: The job's.
        copies: Folder of the copies, each below a digest of its content.

    Raises:
        PackageError: There is no such file, table or job, or a package isn't there or has a name
            of ours.
        RequirementsError: What it requires can't be had, or is here in another version.
        OSError: A package can't be copied.
    """
    file = folder / FILE
    try:
        table = tomllib.loads(file.read_text(encoding="utf-8"))["tool"]["liftyard"]
        read = _Table.model_validate(table)
    except FileNotFoundError:
        raise PackageError(f"no {file}: a folder of jobs has one") from None
    except KeyError:
        raise PackageError(f"{file} has no table [tool.liftyard]: it names the jobs") from None
    except tomllib.TOMLDecodeError as error:
        raise PackageError(f"{file}: not TOML: {error}") from None
    except pydantic.ValidationError as error:
        faults = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise PackageError(f"{file}, [tool.liftyard]: {'; '.join(faults)}") from None
    job = read.jobs.get(name)
    if job is None:
        raise PackageError(
            f"{file} names no job {name!r}: there are {', '.join(read.jobs)}"
            f"{suggestion(name, read.jobs)}"
        )
    packages = [_copied(file, folder / each, copies.resolve()) for each in read.packages]
    added = requirements.bundled(read.requirements, folder, copies=copies.resolve())
    packages += [] if added is None else [added]
    return Registered(
        # -P: the copy counts, and not what the working folder has of that name.
        command=(sys.executable, "-P", "-m", job.module),
        packages=tuple(packages),
        cpus=job.cpus,
        gpus=job.gpus,
        timeout_s=job.timeout_s,
        retries=job.retries,
    )


def _copied(file: Path, package: Path, copies: Path) -> str:
    if package.name in OURS:
        raise PackageError(
            f"{file}: package {package.name!r} has a name of liftyard's own: rename it; taken are "
            f"{', '.join(OURS)}"
        )
    if not (package / "__init__.py").is_file():
        raise PackageError(
            f"{file}: package {str(package)!r} isn't a folder with an __init__.py; a wheel goes "
            "among `requirements`"
        )
    files = sorted(
        path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    )
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package.parent)} {len(content)}\n".encode() + content)
    copy = copies / digest.hexdigest()[:16] / package.name
    if not copy.exists():
        draft = copies / f"draft-{secrets.token_hex(4)}"
        for path in files:
            to = draft / path.relative_to(package.parent)
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, to)
        try:
            os.rename(draft, copy.parent)
        except OSError:
            # Another was faster: the same content.
            shutil.rmtree(draft)
            if not copy.exists():
                raise
    return str(copy)
