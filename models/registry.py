"""Models by name and version, and the sweeps they came from, in MLflow; nothing else imports it.

A version is what a `Scorer` needs (the encoder as JSON, the predict function pickled) in MLflow's
layout with signature and input example, so that MLflow's own tools load it too when they run from
the repository's root. What is known of it, its `Card`, is in its tags. Loading runs pickled code:
connect only to a registry whose writers you trust. Knows nothing of how models are trained.
"""

import fcntl
import hashlib
import json
import os
import platform
import queue
import re
import tempfile
import threading
import time
import urllib.request
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

import numpy as np
import polars as pl

from models import sweep_rows
from models.naming import suggestion
from models.scoring import Scorer

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
_FORMER = "former_champions"
# A registered model's tag holds 5,000 characters.
_FORMER_KEPT = 500
# A model version's tag holds 100,000 characters; a thousand described features take more.
_TAG_CHARACTERS = 90_000
_ERROR_CHARACTERS = 5_000
# Runs a transaction: others can't write to a SQLite database meanwhile.
_BATCH = 200
# A transaction costs about as much for one run as for twenty.
_GATHER_S = 3.0


class RegistryError(ValueError):
    """A name, version or promotion that can't be; the message names what there is."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """What is known of one registered version, read without loading it.

    Attributes:
        name: The model's name, which is its target's.
        version: From 1 upwards.
        aliases: "champion", "challenger", or neither.
        family: One of `models.families.FAMILIES`, or "ensemble".
        variant: The settings it was trained with.
        features: One a column: "name", "kind" (number, string, boolean), "description", "unit".
        metrics: On the test rows, such as auc and log_loss.
        data_version: The training table and its version, such as "training/lapse_30d@3".
        seed: Seed of the run that trained it.
        git_revision: Revision of the code that trained it.
        created: ISO 8601, UTC.
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    family: str
    variant: dict[str, Any]
    features: tuple[dict[str, str], ...]
    metrics: dict[str, float]
    data_version: str
    seed: int
    git_revision: str
    created: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One variant of a sweep, finished or failed.

    Attributes:
        variant: Its settings; JSON values.
        metrics: Such as valid_auc; empty where it failed.
        seconds: Training seconds.
        error: Why it failed, or None.
        seed: Seed of the run.
        cpu_s: CPU seconds; None where they weren't measured.
        curve: Rounds and a validation metric; MLflow shows it as `curve_valid_` and its name.
        curve_metric: Its name.
    """

    variant: dict[str, Any]
    metrics: dict[str, float]
    seconds: float
    error: str | None = None
    seed: int
    cpu_s: float | None = None
    curve: Sequence[Sequence[float]] = ()
    curve_metric: str = "auc"


def _mlflow_errors_as_oserror(
    method: Callable[Concatenate["Registry", P], R],
) -> Callable[Concatenate["Registry", P], R]:
    """The method, with what MLflow itself raises told as OSError."""

    @wraps(method)
    def told(self: "Registry", /, *args: P.args, **kwargs: P.kwargs) -> R:
        from mlflow.exceptions import MlflowException

        try:
            return method(self, *args, **kwargs)
        except MlflowException as error:
            raise OSError(f"the model registry {self.uri} failed: {error}") from error

    return told


class Registry:
    """A model registry and its sweeps, on a SQLite file or an MLflow server.

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
        self._client = self._connected()

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
            with self._alone():
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
    def _alone(self) -> Iterator[None]:
        """No other process changes the SQLite database meanwhile; a server has no such lock."""
        if self._lock_file is None:
            yield
            return
        with self._lock_file.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @_mlflow_errors_as_oserror
    def register(
        self,
        name: str,
        scorer: Scorer,
        *,
        example: pl.DataFrame,
        family: str,
        variant: Mapping[str, Any],
        features: Sequence[Mapping[str, str]],
        metrics: Mapping[str, float],
        data_version: str,
        seed: int,
        git_revision: str,
    ) -> Card:
        """Adds a version, with no alias; the first version makes the model.

        Args:
            name: Letters, digits, "_", "-", "." and spaces.
            scorer: What `load` gives back, with scores identical to the bit.
            example: Rows with the encoder's columns; the first five are kept as input example.
            family: See `Card`, as for all that follows.
            variant: JSON values.
            features: Names are those of the encoder.
            metrics: Values on the test rows.
            data_version: The training table and its version.
            seed: Seed of the run.
            git_revision: Revision of the code.

        Raises:
            RegistryError: The name has other characters, or features and encoder disagree.
            EncodingError: The example isn't what the encoder takes.
            OSError: The storage or the server fails.
        """
        _require_name("model", name)
        encoded = set(scorer.encoder.feature_names)
        listed = {feature["name"] for feature in features}
        if encoded != listed:
            raise RegistryError(
                f"features of {name!r} and its encoder disagree: only the encoder has "
                f"{sorted(encoded - listed)}, only the list has {sorted(listed - encoded)}; "
                "list each of the encoder's columns"
            )
        with tempfile.TemporaryDirectory() as folder:
            _write_model(Path(folder), scorer, example)
            return self._added(
                name,
                Path(folder),
                family=family,
                variant=variant,
                features=features,
                metrics=metrics,
                data_version=data_version,
                seed=seed,
                git_revision=git_revision,
            )

    @_mlflow_errors_as_oserror
    def register_folder(
        self,
        name: str,
        folder: Path,
        *,
        family: str,
        variant: Mapping[str, Any],
        metrics: Mapping[str, float],
        data_version: str,
        seed: int,
        git_revision: str,
        history: Sequence[Mapping[str, float]] = (),
    ) -> Card:
        """Adds a version that is a folder and not rows to a score, such as a transformer.

        `folder` gives it back; `load` doesn't. Promotion and rollback are as for others.

        Args:
            name: As for `register`.
            folder: All of it is kept.
            family: See `Card`, as for all that follows but history.
            variant: JSON values.
            metrics: Values on the test rows; names may have a slice, such as recall.language_pl.
            data_version: What it was trained on.
            seed: Seed of the run.
            git_revision: Revision of the code.
            history: Validation metrics by "step"; MLflow shows them as curves.

        Raises:
            RegistryError: The name has other characters.
            OSError: The storage or the server fails, or the folder can't be read.
        """
        _require_name("model", name)
        return self._added(
            name,
            folder,
            family=family,
            variant=variant,
            features=(),
            metrics=metrics,
            data_version=data_version,
            seed=seed,
            git_revision=git_revision,
            history=history,
        )

    def _added(
        self,
        name: str,
        folder: Path,
        *,
        family: str,
        variant: Mapping[str, Any],
        features: Sequence[Mapping[str, str]],
        metrics: Mapping[str, float],
        data_version: str,
        seed: int,
        git_revision: str,
        history: Sequence[Mapping[str, float]] = (),
    ) -> Card:
        run = self._client.create_run(
            self._experiment(name),
            tags={
                "data_version": data_version,
                "git_revision": git_revision,
                "seed": str(seed),
            },
            run_name=f"register {name}",
        )
        self._client.log_artifacts(run.info.run_id, str(folder), "model")
        self._log(
            run.info.run_id,
            params={**variant, "family": family},
            metrics={f"test_{metric}": value for metric, value in metrics.items()},
        )
        for at in history:
            for metric, value in at.items():
                if metric != "step":
                    self._client.log_metric(
                        run.info.run_id, f"valid_{metric}", value, step=int(at["step"])
                    )
        self._client.set_terminated(run.info.run_id)
        self._require_registered_model(name)
        said = json.dumps([dict(feature) for feature in features], ensure_ascii=False)
        pieces = [said[at : at + _TAG_CHARACTERS] for at in range(0, len(said), _TAG_CHARACTERS)]
        made = self._client.create_model_version(
            name,
            source=f"{run.info.artifact_uri}/model",
            run_id=run.info.run_id,
            tags={
                "family": family,
                "variant": json.dumps(dict(variant)),
                "metrics": json.dumps({metric: float(value) for metric, value in metrics.items()}),
                "data_version": data_version,
                "seed": str(seed),
                "git_revision": git_revision,
                **{f"features.{place}": piece for place, piece in enumerate(pieces)},
            },
            await_creation_for=0,
        )
        return self._card(name, int(made.version))

    @_mlflow_errors_as_oserror
    def models(self) -> list[Card]:
        """Every version that `register` made, by name, then version."""
        aliases = {
            model.name: dict(model.aliases)
            for model in _pages(self._client.search_registered_models)
        }
        cards = [
            _card(version, aliases.get(version.name, {}))
            for version in _pages(self._client.search_model_versions)
            if "features.0" in version.tags
        ]
        return sorted(cards, key=lambda card: (card.name, card.version))

    @_mlflow_errors_as_oserror
    def champion(self, name: str) -> Card | None:
        """The champion, or None where none was promoted yet or no such model is registered."""
        return self._aliased(name, "champion")

    @_mlflow_errors_as_oserror
    def challenger(self, name: str) -> Card | None:
        """The challenger, or None where there is none or no such model is registered."""
        return self._aliased(name, "challenger")

    def _aliased(self, name: str, alias: str) -> Card | None:
        model = self._found(name)
        version = None if model is None else _at(model, alias)
        return None if version is None else self._card(name, version)

    @_mlflow_errors_as_oserror
    def card(self, name: str, version: int) -> Card:
        """What is known of a version.

        Raises:
            RegistryError: There is no such model or version.
            OSError: The storage or the server fails.
        """
        return self._card(name, version)

    @_mlflow_errors_as_oserror
    def load(self, name: str, version: int | None = None) -> tuple[Card, Scorer]:
        """A version's card and scorer; runs the pickled code that `register` stored.

        Args:
            name: A registered model.
            version: Which; None for the champion.

        Raises:
            RegistryError: There is no such model or version, or no champion.
            OSError: The storage or the server fails.
        """
        card = self._chosen(name, version)
        if not card.features:
            raise RegistryError(
                f"version {card.version} of {name!r} is a folder ({card.family}) and scores no "
                "rows; use `folder`, or name another model"
            )
        made = self._client.get_model_version(name, str(card.version))
        with tempfile.TemporaryDirectory() as folder:
            stored = self._client.download_artifacts(made.run_id, "model/scorer", folder)
            return card, Scorer.load(Path(stored))

    @_mlflow_errors_as_oserror
    def folder(self, name: str, into: Path, version: int | None = None) -> tuple[Card, Path]:
        """A version's card and the folder that `register_folder` kept, copied below `into`.

        Args:
            name: A registered model.
            into: A folder that is there.
            version: Which; None for the champion.

        Raises:
            RegistryError: There is no such model or version, or no champion.
            OSError: The storage or the server fails.
        """
        card = self._chosen(name, version)
        made = self._client.get_model_version(name, str(card.version))
        return card, Path(self._client.download_artifacts(made.run_id, "model", str(into)))

    def _chosen(self, name: str, version: int | None) -> Card:
        """The version's card; the champion's for None."""
        card = self.champion(name) if version is None else self._card(name, version)
        if card is None:
            self._model(name)
            raise RegistryError(
                f"model {name!r} has no champion; promote one of its versions: "
                f"{list(self._versions(name))}"
            )
        return card

    @_mlflow_errors_as_oserror
    def promote(self, name: str, version: int) -> Card:
        """Makes the version champion; a challenger that wins is one no longer.

        Two promotions at once through a server may leave one of them out of the history that
        `rollback` uses; on SQLite they take turns.

        Raises:
            RegistryError: There is no such model or version.
            OSError: The storage or the server fails.
        """
        with self._alone():
            self._card(name, version)
            model = self._model(name)
            before = _at(model, "champion")
            former = _former(model)
            if before is not None and before != version:
                # The history first: stopped in between, rollback passes over the champion itself.
                if former[-1:] != [before]:
                    former.append(before)
                self._set_former(name, former)
            # One write, so that no moment is without a champion.
            self._client.set_registered_model_alias(name, "champion", str(version))
            if _at(model, "challenger") == version:
                self._client.delete_registered_model_alias(name, "challenger")
        return self._card(name, version)

    @_mlflow_errors_as_oserror
    def rollback(self, name: str) -> Card:
        """Makes the champion before the present one champion again; twice goes two back.

        Raises:
            RegistryError: There is no such model, or no champion before.
            OSError: The storage or the server fails.
        """
        with self._alone():
            model = self._model(name)
            champion = _at(model, "champion")
            versions = self._versions(name)
            former = _former(model)
            # Versions deleted since, and what a promotion stopped halfway left.
            while former and (former[-1] not in versions or former[-1] == champion):
                former.pop()
            if not former:
                now = "it has no champion" if champion is None else f"champion is {champion}"
                raise RegistryError(
                    f"model {name!r} has no champion to go back to ({now}); promote one of its "
                    f"versions: {list(versions)}"
                )
            version = former.pop()
            self._client.set_registered_model_alias(name, "champion", str(version))
            self._set_former(name, former)
        return self._card(name, version)

    @_mlflow_errors_as_oserror
    def challenge(self, name: str, version: int) -> Card:
        """Makes the version challenger.

        Raises:
            RegistryError: There is no such model or version, or it is the champion.
            OSError: The storage or the server fails.
        """
        if "champion" in self._card(name, version).aliases:
            raise RegistryError(
                f"version {version} of {name!r} is the champion; challenge it with another of "
                f"{list(self._versions(name))}"
            )
        self._client.set_registered_model_alias(name, "challenger", str(version))
        return self._card(name, version)

    @contextmanager
    def sweep(
        self,
        experiment: str,
        *,
        run_name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
    ) -> Iterator["SweepLog"]:
        """A parent run under which each variant of a sweep becomes a child run.

        A sweep with the same run_name in the same experiment goes on in the same parent: variants
        that are there aren't logged again, those missing or half-written are.

        Args:
            experiment: Made if absent.
            run_name: Name of the parent.
            params: The sweep's own settings, on the parent.
            tags: On the parent and on each child, such as data_version and git_revision.

        Raises:
            RegistryError: A name has characters not allowed, or the sweep was begun with other
                params.
            OSError: The storage or the server fails; one while variants are written is raised at
                the end, so that it doesn't stop the training.
        """
        log = self._sweep_log(experiment, run_name, params, tags)
        try:
            yield log
        except BaseException as error:
            status = "FAILED" if isinstance(error, Exception) else "KILLED"
            try:
                log._close(status)
            except OSError as unlogged:
                error.add_note(str(unlogged))
            raise
        log._close("FINISHED")

    @_mlflow_errors_as_oserror
    def _sweep_log(
        self, experiment: str, run_name: str, params: Mapping[str, Any], tags: Mapping[str, str]
    ) -> "SweepLog":
        _require_name("sweep", run_name)
        experiment_id = self._experiment(experiment)
        found = self._client.search_runs(
            [experiment_id],
            f"attributes.run_name = '{run_name}' and tags.sweep = 'parent'",
            max_results=1,
        )
        logged: dict[str, tuple[str, str]] = {}
        if not found:
            parent = self._client.create_run(
                experiment_id, tags={**tags, "sweep": "parent"}, run_name=run_name
            )
            self._log(parent.info.run_id, params=params)
        else:
            parent = found[0]
            before = dict(parent.data.params)
            if before and before != {name: str(value) for name, value in params.items()}:
                raise RegistryError(
                    f"sweep {run_name!r} was begun with {before}, and now has {dict(params)}; "
                    "go on with the same, or give another run_name"
                )
            self._log(parent.info.run_id, params=params)
            self._client.update_run(parent.info.run_id, status="RUNNING")
            children = _pages(
                lambda **page: self._client.search_runs(
                    [experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'", **page
                )
            )
            logged = {
                child.data.tags["variant"]: (child.info.run_id, child.info.status)
                for child in children
            }
        return SweepLog(
            registry=self,
            experiment_id=experiment_id,
            run_name=run_name,
            parent_id=parent.info.run_id,
            tags=tags,
            logged=logged,
        )

    def _log(
        self,
        run_id: str,
        *,
        params: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        from mlflow.entities import Metric, Param, RunTag

        now_ms = time.time_ns() // 1_000_000
        self._client.log_batch(
            run_id,
            metrics=[Metric(key, float(v), now_ms, 0) for key, v in (metrics or {}).items()],
            params=[Param(key, str(value)) for key, value in params.items()],
            tags=[RunTag(key, value) for key, value in (tags or {}).items()],
            synchronous=True,
        )

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        _require_name("experiment", name)
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                location = self._artifacts and f"{self._artifacts}/{quote(name)}"
                return str(self._client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            # Another process made it meanwhile.
            found = self._client.get_experiment_by_name(name)
        if found.lifecycle_stage == "deleted":
            raise RegistryError(
                f"experiment {name!r} was deleted in MLflow; restore it there, or give another name"
            )
        return str(found.experiment_id)

    def _require_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _found(self, name: str) -> Any:
        """MLflow's entry of the model, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_registered_model(name)
        except MlflowException as error:
            # The second: a name that MLflow doesn't allow.
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
        return None

    def _model(self, name: str) -> Any:
        model = self._found(name)
        if model is not None:
            return model
        names = sorted(model.name for model in _pages(self._client.search_registered_models))
        there = f"there are: {names}" if names else "none is registered yet"
        raise RegistryError(f"model {name!r} isn't registered; {there}{suggestion(name, names)}")

    def _versions(self, name: str) -> dict[int, Any]:
        """MLflow's entries of the versions that `register` made of a model, ascending."""
        found = _pages(
            lambda **page: self._client.search_model_versions(f"name = '{name}'", **page)
        )
        ours = {int(each.version): each for each in found if "features.0" in each.tags}
        return dict(sorted(ours.items()))

    def _card(self, name: str, version: int) -> Card:
        model = self._model(name)
        versions = self._versions(name)
        if version not in versions:
            raise RegistryError(
                f"version {version} of model {name!r} isn't registered; there are: {list(versions)}"
            )
        return _card(versions[version], model.aliases)

    def _set_former(self, name: str, former: Sequence[int]) -> None:
        self._client.set_registered_model_tag(
            name, _FORMER, json.dumps(list(former[-_FORMER_KEPT:]))
        )


class SweepLog:
    """Writes a sweep's variants on a thread of its own; made by `Registry.sweep`."""

    def __init__(
        self,
        *,
        registry: Registry,
        experiment_id: str,
        run_name: str,
        parent_id: str,
        tags: Mapping[str, str],
        logged: Mapping[str, tuple[str, str]],
    ) -> None:
        """Starts the thread.

        Args:
            registry: Where to write.
            experiment_id: MLflow's.
            run_name: The parent's name.
            parent_id: The parent's run.
            tags: For each child.
            logged: Run and status of the children there are, by variant.
        """
        self._registry = registry
        self._experiment_id = experiment_id
        self._run_name = run_name
        self._parent_id = parent_id
        self._tags = dict(tags)
        self._logged = dict(logged)
        self._database = sweep_rows.store(registry._client)
        self._artifacts = registry._client.get_experiment(experiment_id).artifact_location
        self._waiting: queue.SimpleQueue[Sequence[Trial] | None] = queue.SimpleQueue()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._write, name="sweep-log", daemon=True)
        self._thread.start()

    def add(self, trials: Sequence[Trial]) -> None:
        """Hands variants to the thread and returns at once; those logged already are left out."""
        self._waiting.put(list(trials))

    def _write(self) -> None:
        trials = self._waiting.get()
        while trials is not None:
            batch, ended = list(trials), False
            until = time.monotonic() + _GATHER_S
            while len(batch) < _BATCH:
                try:
                    more = self._waiting.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
                if more is None:
                    ended = True
                    break
                batch += more
            try:
                for at in range(0, len(batch), _BATCH):
                    self._write_batch(batch[at : at + _BATCH])
            except Exception as error:
                # Raised to the caller by `_close`.
                self._error = error
                return
            trials = None if ended else self._waiting.get()

    def _write_batch(self, trials: Sequence[Trial]) -> None:
        children: dict[str, sweep_rows.Child] = {}
        for trial in trials:
            settings = json.dumps(trial.variant, sort_keys=True)
            key = hashlib.sha256(settings.encode()).hexdigest()[:32]
            run_id, status = self._logged.get(key, (None, "RUNNING"))
            if status != "RUNNING" or key in children:
                continue
            child = self._child(key, trial, run_id or uuid.uuid4().hex)
            if self._database is None or run_id is not None:
                self._write_one(child, run_id)
                self._logged[key] = (child.run_id, child.status)
            else:
                children[key] = child
        if children:
            sweep_rows.insert(
                self._database, self._experiment_id, self._artifacts, list(children.values())
            )
        self._logged |= {key: (child.run_id, child.status) for key, child in children.items()}

    def _child(self, key: str, trial: Trial, run_id: str) -> sweep_rows.Child:
        ended_ms = time.time_ns() // 1_000_000
        metrics = {**trial.metrics, "training_seconds": trial.seconds}
        if trial.cpu_s is not None:
            metrics["cpu_seconds"] = trial.cpu_s
        return sweep_rows.Child(
            run_id=run_id,
            name=f"{trial.variant.get('family', 'variant')} {key[:8]}",
            status="FINISHED" if trial.error is None else "FAILED",
            started_ms=ended_ms - round(trial.seconds * 1000),
            ended_ms=ended_ms,
            params={name: str(value) for name, value in trial.variant.items()},
            metrics=[(name, float(value), 0) for name, value in metrics.items()]
            + [
                (f"curve_valid_{trial.curve_metric}", float(value), int(step))
                for step, value in trial.curve
            ],
            tags={
                **self._tags,
                "mlflow.parentRunId": self._parent_id,
                "variant": key,
                "seed": str(trial.seed),
            }
            | ({} if trial.error is None else {"error": trial.error[:_ERROR_CHARACTERS]}),
        )

    def _write_one(self, child: sweep_rows.Child, run_id: str | None) -> None:
        """By the client: on a server, or where the run is there already."""
        from mlflow.entities import Metric, Param, RunTag

        client = self._registry._client
        if run_id is None:
            run_id = client.create_run(
                self._experiment_id,
                start_time=child.started_ms,
                tags=dict(child.tags),
                run_name=child.name,
            ).info.run_id
        client.log_batch(
            run_id,
            metrics=[Metric(name, value, child.ended_ms, at) for name, value, at in child.metrics],
            params=[Param(name, value) for name, value in child.params.items()],
            tags=[RunTag(name, value) for name, value in child.tags.items()],
            synchronous=True,
        )
        client.set_terminated(run_id, child.status, child.ended_ms)

    def _close(self, status: str) -> None:
        """Waits for what was added, ends the parent, raises the thread's error as OSError."""
        self._waiting.put(None)
        self._thread.join()
        ended = status if self._error is None else "FAILED"
        try:
            self._registry._client.set_terminated(self._parent_id, ended)
        except Exception as error:
            self._error = self._error or error
        if self._error is not None:
            raise OSError(
                f"sweep {self._run_name!r} isn't logged whole in {self._registry.uri}: "
                f"{self._error}; resume the run and what is missing is logged"
            ) from self._error


def _write_model(folder: Path, scorer: Scorer, example: pl.DataFrame) -> None:
    """The scorer in MLflow's layout of a python_function model, which `_load_pyfunc` reads."""
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    columns = scorer.encoder.columns
    scorer.score(example.head(5))
    rows = example.head(5).select(scorer.encoder.feature_names)
    types = {"number": DataType.double, "string": DataType.string, "boolean": DataType.boolean}
    inputs: list[Any] = [
        ColSpec(types[column.kind], column.name, required=False) for column in columns
    ]
    model = Model(
        signature=ModelSignature(inputs=Schema(inputs), outputs=Schema([ColSpec(DataType.double)])),
        saved_input_example_info={
            "artifact_path": "input_example.json",
            "type": "dataframe",
            "pandas_orient": "split",
        },
    )
    model.add_flavor(
        "python_function",
        loader_module="models.registry",
        data="scorer",
        python_version=platform.python_version(),
    )
    model.save(str(folder / "MLmodel"))
    shown = [[None if value != value else value for value in row] for row in rows.rows()]
    # Decimals are numbers to the encoder, not to JSON.
    said = json.dumps({"columns": rows.columns, "data": shown}, ensure_ascii=False, default=float)
    (folder / "input_example.json").write_text(said, encoding="utf-8")
    scorer.save(folder / "scorer")


class _PyFunc:
    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def predict(self, frame: Any, params: Any = None) -> np.ndarray:
        return self._scorer.score(pl.from_pandas(frame))


def _load_pyfunc(path: str) -> _PyFunc:
    """What MLflow calls for a model whose loader_module is this one."""
    return _PyFunc(Scorer.load(Path(path)))


def _card(made: Any, aliases: Mapping[str, str]) -> Card:
    tags = made.tags
    # Tags come in any order.
    pieces = (name for name in tags if name.startswith("features."))
    features = "".join(tags[name] for name in sorted(pieces, key=lambda name: int(name[9:])))
    return Card(
        name=made.name,
        version=int(made.version),
        aliases=tuple(sorted(each for each, v in aliases.items() if int(v) == int(made.version))),
        family=tags["family"],
        variant=json.loads(tags["variant"]),
        features=tuple(json.loads(features)),
        metrics=json.loads(tags["metrics"]),
        data_version=tags["data_version"],
        seed=int(tags["seed"]),
        git_revision=tags["git_revision"],
        created=datetime.fromtimestamp(made.creation_timestamp / 1000, UTC).isoformat(),
    )


def _at(model: Any, alias: str) -> int | None:
    """The version that has the alias; SQLite gives an int, a server a str."""
    return int(model.aliases[alias]) if alias in model.aliases else None


def _former(model: Any) -> list[int]:
    former: list[int] = json.loads(model.tags.get(_FORMER, "[]"))
    return former


def _pages(search: Callable[..., Any]) -> Iterator[Any]:
    """All results of an MLflow search, which gives a page at a time."""
    page = search()
    yield from page
    while page.token:
        page = search(page_token=page.token)
        yield from page


def _require_name(kind: str, name: str) -> None:
    # What MLflow takes in all of names, filters and paths.
    if not re.fullmatch(r"\w[\w .-]*", name):
        raise RegistryError(
            f"{kind} name {name!r}: allowed are letters, digits, '_', '-', '.' and spaces, "
            "the first a letter, digit or '_'"
        )
