"""A connection to MLflow: a SQLite file or a server; the names and errors of all that use it.

Knows nothing of what is kept there (`models/registry.py`, `models/registry_sweeps.py`).
"""

import fcntl
import os
import re
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar
from urllib.parse import quote

P = ParamSpec("P")
R = TypeVar("R")

_QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Its default waits about four minutes for a server that is gone.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}


class RegistryError(ValueError):
    """A name, version or promotion that can't be; the message names what there is."""


class _Connected(Protocol):
    @property
    def uri(self) -> str: ...


C = TypeVar("C", bound=_Connected)


def mlflow_errors_as_oserror(
    work: Callable[Concatenate[C, P], R],
) -> Callable[Concatenate[C, P], R]:
    """The method or function, with what MLflow itself raises told as OSError."""

    @wraps(work)
    def told(connected: C, /, *args: P.args, **kwargs: P.kwargs) -> R:
        from mlflow.exceptions import MlflowException

        try:
            return work(connected, *args, **kwargs)
        except MlflowException as error:
            raise OSError(f"the model registry {connected.uri} failed: {error}") from error

    return told


class Connection:
    """MLflow's client, on a SQLite file or a server.

    On SQLite, artifacts lie in the folder `artifacts` beside the database, whatever the working
    directory; with a server, it keeps them.
    """

    def __init__(self, uri: str) -> None:
        """Connects; a SQLite database that isn't there is made.

        Args:
            uri: sqlite:///path/mlflow.db, or the http:// or https:// address of a server.

        Raises:
            RegistryError: The URI is of another kind.
            OSError: The folder can't be written, or no server answers.
        """
        self._lock_file: Path | None = None
        self._artifacts: str | None = None
        if uri.startswith("sqlite:///") and uri != "sqlite:///":
            database = Path(uri.removeprefix("sqlite:///")).absolute()
            database.parent.mkdir(parents=True, exist_ok=True)
            self._lock_file = database.with_name(database.name + ".lock")
            self._artifacts = (database.parent / "artifacts").as_uri()
            self.uri = f"sqlite:///{database}"
        elif uri.startswith(("http://", "https://")):
            self.uri = uri.rstrip("/")
            try:
                urllib.request.urlopen(f"{self.uri}/health", timeout=10).close()
            except OSError as error:
                raise OSError(
                    f"no MLflow server answers at {uri} ({error}); start it, or correct the address"
                ) from error
        else:
            raise RegistryError(
                f"registry {uri!r}: allowed are sqlite:///path/mlflow.db and an http:// or "
                "https:// address"
            )
        self.client = self._connected()

    def _connected(self) -> Any:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        with warnings.catch_warnings():
            # MLflow's own tables use what SQLAlchemy deprecates.
            warnings.filterwarnings(
                "ignore", message="The ``noload`` loader strategy", category=DeprecationWarning
            )
            from mlflow.tracking import MlflowClient

            # Two processes that make one database's tables at once would fail.
            with self.alone():
                try:
                    client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
                    client.search_registered_models(max_results=1)
                # MLflow's, SQLAlchemy's or the driver's: none tells more than its text.
                except Exception as error:
                    raise OSError(
                        f"the model registry {self.uri} can't be read: {error}"
                    ) from error
        return client

    @contextmanager
    def alone(self) -> Iterator[None]:
        """No other process changes the SQLite database meanwhile; a server has no such lock."""
        if self._lock_file is None:
            yield
            return
        with self._lock_file.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def experiment(self, name: str) -> str:
        """The id of the experiment, which is made where it isn't there."""
        from mlflow.exceptions import MlflowException

        require_name("experiment", name)
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                location = self._artifacts and f"{self._artifacts}/{quote(name)}"
                return str(self.client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            # Another process made it meanwhile.
            found = self.client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            raise RegistryError(
                f"experiment {name!r} was deleted in MLflow; restore it there, or give another name"
            )
        return str(found.experiment_id)

    def log(
        self,
        run_id: str,
        *,
        params: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Adds to a run."""
        from mlflow.entities import Metric, Param

        now_ms = time.time_ns() // 1_000_000
        self.client.log_batch(
            run_id,
            metrics=[Metric(key, float(v), now_ms, 0) for key, v in (metrics or {}).items()],
            params=[Param(key, str(value)) for key, value in params.items()],
            synchronous=True,
        )


def pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All results of an MLflow search, which gives a page at a time."""
    page = search()
    yield from page
    while page.token:
        page = search(page_token=page.token)
        yield from page


def require_name(kind: str, name: str) -> None:
    """Refuses a name that MLflow doesn't take, as RegistryError."""
    # What MLflow takes in all of names, filters and paths.
    if not re.fullmatch(r"\w[\w .-]*", name):
        raise RegistryError(
            f"{kind} name {name!r}: allowed are letters, digits, '_', '-', '.' and spaces, "
            "the first a letter, digit or '_'"
        )
