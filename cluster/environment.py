"""Named environments: where Ray, Dask, MLflow, the tables and Serve are.

An environment is a name and addresses; nothing is started here. `embedded` has no addresses: all
runs in the calling process's own cluster. `local` is what `liftyard up` starts. Any other is a
JSON file `environments/NAME.json` below the home folder, as Terraform's output writes it.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path

import pydantic

from cluster import supervisor

HOME = Path(".liftyard")


class EnvironmentFileError(ValueError):
    """There is no such environment, or its file can't be used; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Where things run.

    Attributes:
        name: Its name.
        ray_address: The Ray head, `host:port`; None starts Ray in the process that needs it.
        dask_address: The scheduler of a standing Dask lease, `tcp://host:port`; None if there is
            none, and work leases its own.
        dashboard_url: Ray's dashboard, which takes jobs; None if there is none.
        tracking_uri: MLflow, `sqlite:////path/mlflow.db` or `http://host:port`.
        storage_root: Root of the tables, an absolute path or `s3://bucket/prefix`.
        serve_url: Where scores are served; None if not yet known.
    """

    name: str
    ray_address: str | None
    dask_address: str | None
    dashboard_url: str | None
    tracking_uri: str
    storage_root: str
    serve_url: str | None


class _File(pydantic.BaseModel):
    """What an environment's file holds; its name is the file's."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    ray_address: str = pydantic.Field(pattern=r"^[^/\s]+:\d+$")
    dask_address: str | None = pydantic.Field(default=None, pattern=r"^(tcp|tls)://\S+:\d+$")
    dashboard_url: str | None = pydantic.Field(default=None, pattern=r"^https?://")
    tracking_uri: str = pydantic.Field(pattern=r"^(sqlite:////|https?://|postgresql)")
    storage_root: str = pydantic.Field(pattern=r"^(/|[a-z0-9]+://)")
    serve_url: str | None = pydantic.Field(default=None, pattern=r"^https?://")


def embedded(home: Path = HOME) -> Environment:
    """The environment of a single process: everything below `home`."""
    home = home.resolve()
    return Environment(
        name="embedded",
        ray_address=None,
        dask_address=None,
        dashboard_url=None,
        tracking_uri=f"sqlite:///{home / 'mlflow.db'}",
        storage_root=str(home / "tables"),
        serve_url=None,
    )


def load(name: str | None, *, home: Path = HOME) -> Environment:
    """Finds an environment.

    Args:
        name: None or `embedded`, `local`, the name of a file in `home/environments`, or the path
            of such a file (it ends in .json).
        home: Liftyard's folder.

    Raises:
        EnvironmentFileError: There is none of that name, it isn't up, or its file is faulty.
    """
    if name is None or name == "embedded":
        return embedded(home)
    if name.endswith(".json"):
        return _read(Path(name))
    file = file_of(name, home)
    if name == "local":
        head = supervisor.read(services_of(home), "ray-head")
        if head is None or not file.exists():
            raise EnvironmentFileError(f"environment 'local' of {home} isn't up: run `liftyard up`")
        if not supervisor.alive(head):
            raise EnvironmentFileError(
                f"environment 'local' of {home} has died (see {head.log}): run `liftyard up`, "
                "which starts it again"
            )
    elif not file.exists():
        known = ["embedded", "local", *sorted(path.stem for path in file.parent.glob("*.json"))]
        known = list(dict.fromkeys(known))
        raise EnvironmentFileError(
            f"no environment {name!r}: there are {', '.join(known)}"
            f"{_suggestion(name, known)}. Others are files {file.parent / 'NAME.json'}"
        )
    return _read(file)


def file_of(name: str, home: Path) -> Path:
    """The file of a named environment."""
    return home / "environments" / f"{name}.json"


def services_of(home: Path) -> Path:
    """The folder of the states and logs of what `liftyard up` started."""
    return home / "services"


def _read(file: Path) -> Environment:
    try:
        read = _File.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise EnvironmentFileError(f"no environment file {file}") from None
    except json.JSONDecodeError as error:
        raise EnvironmentFileError(
            f"{file}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from None
    except pydantic.ValidationError as error:
        faults = "; ".join(_fault(each["loc"], each) for each in error.errors())
        raise EnvironmentFileError(f"{file}: {faults}") from None
    return Environment(name=file.stem, **read.model_dump())


def _fault(where: tuple[int | str, ...], error: object) -> str:
    allowed = list(_File.model_fields)
    said = dict(error)  # type: ignore[call-overload]
    if not where:
        return f"holds {type(said['input']).__name__}, allowed is an object of {allowed}"
    key = str(where[0])
    if said["type"] == "extra_forbidden":
        return f"unknown key {key!r}: allowed are {', '.join(allowed)}{_suggestion(key, allowed)}"
    if said["type"] == "missing":
        return f"key {key!r} is missing"
    return f"key {key!r} is {said['input']!r}: {said['msg']}"


def _suggestion(given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
