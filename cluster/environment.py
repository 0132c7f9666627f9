"""Named environments: where Ray, Dask, MLflow, the tables and Serve are.

An environment is a name and addresses; nothing is started here. `embedded` has no addresses: all
runs in the calling process's own cluster. `local` is what `liftyard up` starts. Any other is a
JSON file `environments/NAME.json` below the home folder, as Terraform's output writes it. A file
that has no `prices` takes those of `prices.json` below the home folder.
"""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pydantic

from cluster import supervisor

HOME = Path(".liftyard")


class EnvironmentFileError(ValueError):
    """There is no such environment, or its file can't be used; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What CPUs and GPUs cost and draw; `prices` of an environment's file, by these names.

    Money is US dollars unless the file means another currency by its numbers. The defaults:
    `cpu_hour` is half of an m7g.large (2 vCPUs, 0.0816 an hour on demand) and `gpu_hour` a
    g5.xlarge (1.006) less its 4 vCPUs, EC2 in us-east-1, June 2026. `cpu_watts` is a vCPU at half
    load, 2.12 W, and `gpu_watts` an A10G's board power, 150 W, both times the data centre's own
    share of 1.135; these, but for the board's, are Cloud Carbon Footprint's constants for AWS.
    `grams_per_kwh` is the world's electricity of 2023 (Ember).

    Attributes:
        cpu_hour: Price of a CPU for an hour.
        gpu_hour: Price of a GPU for an hour.
        cpu_watts: Power of a CPU, W.
        gpu_watts: Power of a GPU, W.
        grams_per_kwh: Carbon dioxide of the electricity, g/kWh.
    """

    cpu_hour: float = 0.0408
    gpu_hour: float = 0.843
    cpu_watts: float = 2.4
    gpu_watts: float = 170.0
    grams_per_kwh: float = 481.0

    def cost(self, *, cpus: float, gpus: float, hours: float = 1.0) -> float:
        """The price of so many CPUs and GPUs for so many hours."""
        return (cpus * self.cpu_hour + gpus * self.gpu_hour) * hours

    def carbon_g(self, *, cpus: float, gpus: float, hours: float = 1.0) -> float:
        """Carbon dioxide of so many CPUs and GPUs for so many hours, g."""
        return (cpus * self.cpu_watts + gpus * self.gpu_watts) / 1000 * hours * self.grams_per_kwh


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
        queue: The queue of its jobs, `sqlite:////path/queue.sqlite` or `postgresql://…`; None if it
            takes no jobs.
        prices: What its CPUs and GPUs cost and draw.
    """

    name: str
    ray_address: str | None
    dask_address: str | None
    dashboard_url: str | None
    tracking_uri: str
    storage_root: str
    serve_url: str | None
    queue: str | None = None
    prices: Prices = Prices()


class _Prices(pydantic.BaseModel):
    """A price table in an environment's file; what it leaves out has its default."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    cpu_hour: float = pydantic.Field(default=Prices.cpu_hour, ge=0)
    gpu_hour: float = pydantic.Field(default=Prices.gpu_hour, ge=0)
    cpu_watts: float = pydantic.Field(default=Prices.cpu_watts, ge=0)
    gpu_watts: float = pydantic.Field(default=Prices.gpu_watts, ge=0)
    grams_per_kwh: float = pydantic.Field(default=Prices.grams_per_kwh, ge=0)


class _File(pydantic.BaseModel):
    """What an environment's file holds; its name is the file's."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    ray_address: str = pydantic.Field(pattern=r"^[^/\s]+:\d+$")
    dask_address: str | None = pydantic.Field(default=None, pattern=r"^(tcp|tls)://\S+:\d+$")
    dashboard_url: str | None = pydantic.Field(default=None, pattern=r"^https?://")
    tracking_uri: str = pydantic.Field(pattern=r"^(sqlite:////|https?://|postgresql)")
    storage_root: str = pydantic.Field(pattern=r"^(/|[a-z0-9]+://)")
    serve_url: str | None = pydantic.Field(default=None, pattern=r"^https?://")
    queue: str | None = pydantic.Field(default=None, pattern=r"^(sqlite:////|postgresql://)")
    prices: _Prices | None = None


_Model = TypeVar("_Model", bound=pydantic.BaseModel)


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
        return _read(Path(name), home)
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
    return _read(file, home)


def file_of(name: str, home: Path) -> Path:
    """The file of a named environment."""
    return home / "environments" / f"{name}.json"


def services_of(home: Path) -> Path:
    """The folder of the states and logs of what `liftyard up` started."""
    return home / "services"


def _read(file: Path, home: Path) -> Environment:
    read = _validated(_File, file)
    if read is None:
        raise EnvironmentFileError(f"no environment file {file}")
    prices = read.prices or _validated(_Prices, home / "prices.json") or _Prices()
    return Environment(
        name=file.stem, **{**read.model_dump(), "prices": Prices(**prices.model_dump())}
    )


def _validated(model: type[_Model], file: Path) -> _Model | None:
    """What a JSON file holds; None where there is none."""
    try:
        return model.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise EnvironmentFileError(
            f"{file}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        ) from None
    except pydantic.ValidationError as error:
        faults = "; ".join(_fault(model, each["loc"], each) for each in error.errors())
        raise EnvironmentFileError(f"{file}: {faults}") from None


def _fault(model: type[pydantic.BaseModel], where: tuple[int | str, ...], error: object) -> str:
    allowed = list((_Prices if len(where) > 1 else model).model_fields)
    said = dict(error)  # type: ignore[call-overload]
    if not where:
        return f"holds {type(said['input']).__name__}, allowed is an object of {allowed}"
    key = str(where[-1])
    if said["type"] == "extra_forbidden":
        return f"unknown key {key!r}: allowed are {', '.join(allowed)}{_suggestion(key, allowed)}"
    if said["type"] == "missing":
        return f"key {key!r} is missing"
    return f"key {key!r} is {said['input']!r}: {said['msg']}"


def _suggestion(given: str, known: list[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
