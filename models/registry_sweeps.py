"""A sweep in MLflow: a parent run, and each variant a child run, written beside the training."""

import hashlib
import json
import queue
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from models import sweep_rows
from models.registry_connection import (
    Connection,
    RegistryError,
    mlflow_errors_as_oserror,
    pages,
    require_name,
)

_ERROR_CHARACTERS = 5_000
# Runs a transaction: others can't write to a SQLite database meanwhile.
_BATCH = 200
# A transaction costs about as much for one run as for twenty.
_GATHER_S = 3.0


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
        curve: Rounds or epochs and a validation metric; MLflow shows it as `curve_valid_` and its
            name.
        curve_metric: Its name.
        ran: How it was trained, by name; tags of those names with `ran_` before them.
    """

    variant: dict[str, Any]
    metrics: dict[str, float]
    seconds: float
    error: str | None = None
    seed: int
    cpu_s: float | None = None
    curve: Sequence[Sequence[float]] = ()
    curve_metric: str = "auc"
    ran: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def sweep(
    mlflow: Connection,
    experiment: str,
    run_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> Iterator["SweepLog"]:
    """See `Registry.sweep`."""
    log = _begun(mlflow, experiment, run_name, params, tags)
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


@mlflow_errors_as_oserror
def _begun(
    mlflow: Connection,
    experiment: str,
    run_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
) -> "SweepLog":
    require_name("sweep", run_name)
    experiment_id = mlflow.experiment(experiment)
    found = mlflow.client.search_runs(
        [experiment_id],
        f"attributes.run_name = '{run_name}' and tags.sweep = 'parent'",
        max_results=1,
    )
    logged: dict[str, tuple[str, str]] = {}
    if not found:
        parent = mlflow.client.create_run(
            experiment_id, tags={**tags, "sweep": "parent"}, run_name=run_name
        )
        mlflow.log(parent.info.run_id, params=params)
    else:
        parent = found[0]
        before = dict(parent.data.params)
        if before and before != {name: str(value) for name, value in params.items()}:
            raise RegistryError(
                f"sweep {run_name!r} was begun with {before}, and now has {dict(params)}; "
                "go on with the same, or give another run_name"
            )
        mlflow.log(parent.info.run_id, params=params)
        mlflow.client.update_run(parent.info.run_id, status="RUNNING")
        children = pages(
            lambda **page: mlflow.client.search_runs(
                [experiment_id], f"tags.mlflow.parentRunId = '{parent.info.run_id}'", **page
            )
        )
        logged = {
            child.data.tags["variant"]: (child.info.run_id, child.info.status) for child in children
        }
    return SweepLog(
        mlflow=mlflow,
        experiment_id=experiment_id,
        run_name=run_name,
        parent_id=parent.info.run_id,
        tags=tags,
        logged=logged,
    )


class SweepLog:
    """Writes a sweep's variants on a thread of its own; made by `sweep`."""

    def __init__(
        self,
        *,
        mlflow: Connection,
        experiment_id: str,
        run_name: str,
        parent_id: str,
        tags: Mapping[str, str],
        logged: Mapping[str, tuple[str, str]],
    ) -> None:
        """Starts the thread.

        Args:
            mlflow: Where to write.
            experiment_id: MLflow's.
            run_name: The parent's name.
            parent_id: The parent's run.
            tags: For each child.
            logged: Run and status of the children there are, by variant.
        """
        self._mlflow = mlflow
        self._experiment_id = experiment_id
        self._run_name = run_name
        self._parent_id = parent_id
        self._tags = dict(tags)
        self._logged = dict(logged)
        self._database = sweep_rows.store(mlflow.client)
        self._artifacts = mlflow.client.get_experiment(experiment_id).artifact_location
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
                **{f"ran_{name}": said for name, said in trial.ran.items()},
            }
            | ({} if trial.error is None else {"error": trial.error[:_ERROR_CHARACTERS]}),
        )

    def _write_one(self, child: sweep_rows.Child, run_id: str | None) -> None:
        """By the client: on a server, or where the run is there already."""
        from mlflow.entities import Metric, Param, RunTag

        client = self._mlflow.client
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
            self._mlflow.client.set_terminated(self._parent_id, ended)
        except Exception as error:
            self._error = self._error or error
        if self._error is not None:
            raise OSError(
                f"sweep {self._run_name!r} isn't logged whole in {self._mlflow.uri}: "
                f"{self._error}; resume the run and what is missing is logged"
            ) from self._error
