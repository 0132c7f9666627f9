"""The line from raw events to served scores, top to bottom.

    source → ingest → validate → sentiment → features → training → sweep → register → serve → report

Each step leaves versioned tables or models behind and writes down what it did; a resumed run skips
what it finished before.
"""

import os
import time
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar
from urllib.parse import urlsplit

import polars as pl
from rich.console import Console

from cluster import dask_lease, ports, session, storage
from cluster.device import Device
from cluster.environment import Environment
from jobs import progress, report, sweep, training_set
from jobs.config import Pipeline, Scores, Sweep
from jobs.features import build
from jobs.ingest import ingest
from jobs.register import register
from jobs.runs import Run, Step
from jobs.search import most, variants
from jobs.sweep_folds import train_folds
from jobs.validate import validate
from models import shift
from models.families import TrainingData
from models.folds import Folds
from models.metrics import METRICS
from models.registry import Registry, Trial

# From so many events on, features are spread over Dask workers unasked: one process would hold
# tens of gigabytes.
DASK_EVENTS = 100_000_000

LentT = TypeVar("LentT", bound=dask_lease.Workers)


def execute(
    pipeline: Pipeline,
    run: Run,
    *,
    environment: Environment,
    base: Path,
    console: Console,
    device: Device,
    dask_workers: int | None = None,
) -> Run:
    """Do the steps that `run` hasn't finished.

    Args:
        pipeline: The declaration.
        run: From `jobs.runs.start` or `resume`.
        environment: Where it runs.
        base: Folder that relative source paths start from.
        console: Where progress is shown.
        device: From `cluster.device.choose`.
        dask_workers: Workers of a Dask cluster leased from Ray that features are spread over; 0
            computes them in this process; None takes the environment's standing lease, and where
            there is none decides by the number of events.

    Returns:
        The run, `finished`. On an error it is written as `failed` or `interrupted`, and the error
        goes on.
    """
    with ExitStack() as stack:
        work = _Work(
            pipeline=pipeline,
            run=run,
            environment=environment,
            base=base,
            console=console,
            device=device,
            dask_workers=dask_workers,
            stack=stack,
        )
        try:
            run = run.do("ingest", work.ingest)
            run = work.run = run.do("validate", work.validate)
            if pipeline.sentiment is not None:
                run = work.run = run.do("sentiment", work.sentiment)
            run = run.do("features", work.features)
            if pipeline.targets:
                run = work.run = run.do("training", work.training)
                run = work.run = run.do("sweep", work.sweep)
                run = work.run = run.do("register", work.register)
                run = run.do("serve", work.serve)
        except BaseException as error:
            run = run.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            try:
                report.write(run.folder)
            except (report.ReportError, OSError) as unwritten:
                # The run's own error is the one to tell.
                error.add_note(f"and its report can't be written: {unwritten}")
            raise
        run = run.end("finished")
        report.write(run.folder)
        return run


@dataclass(kw_only=True)
class _Work:
    """The steps, and the cluster and registry that they share."""

    pipeline: Pipeline
    run: Run
    environment: Environment
    base: Path
    console: Console
    device: Device
    dask_workers: int | None
    stack: ExitStack
    _leased: ExitStack = field(default_factory=ExitStack)
    _warm: ExitStack = field(default_factory=ExitStack)

    @property
    def tables(self) -> str:
        return self.environment.storage_root

    @cached_property
    def cluster(self) -> session.Session:
        """The Ray cluster, connected to until the run's end."""
        with self.console.status("connecting to Ray"):
            return self.stack.enter_context(session.connect(address=self.environment.ray_address))

    @cached_property
    def lease(self) -> dask_lease.Workers | None:
        """Dask workers for the features, if any are wanted; the sweep ends them."""
        standing = self.environment.dask_address
        workers = self.dask_workers
        if standing is not None and workers is None:
            return self._until_sweep(dask_lease.attach(standing))
        if workers is None:
            validated = self.run.step("validate").detail
            read = {each.table for each in self.pipeline.features.values()}
            events = sum(told["rows"] for table, told in validated.items() if table in read)
            workers = int(self.cluster.cpus) if events >= DASK_EVENTS else 0
        if not workers or not self.pipeline.features:
            return None
        # The cluster before the lease, so that it ends after it.
        _ = self.cluster
        return self._until_sweep(dask_lease.lease(workers=workers))

    def _until_sweep(self, lent: AbstractContextManager[LentT]) -> LentT:
        self.stack.callback(self._leased.close)
        return self._leased.enter_context(lent)

    @cached_property
    def warm(self) -> sweep.Pool:
        """Actors that train, one a GPU or CPU; the sweep starts them and `register` ends them."""
        # A lease's workers hold CPUs that the actors would wait for.
        self._leased.close()
        gpus = int(self.cluster.gpus) if self.device.kind == "cuda" else 0
        self.stack.callback(self._warm.close)
        with self.console.status("waiting for room on the cluster"):
            actors = sweep.pool(gpus or max(1, int(self.cluster.cpus)), gpus=1 if gpus else 0)
            return self._warm.enter_context(actors)

    @cached_property
    def registry(self) -> Registry:
        return Registry(self.environment.tracking_uri)

    def ingest(self) -> Step:
        start = time.perf_counter()
        detail: dict[str, dict[str, Any]] = {}
        for name, table in self.pipeline.tables.items():
            with self.console.status(f"ingest: {name}"):
                done = ingest(name, table, self.tables, base=self.base, device=self.device)
            detail[name] = asdict(done) | {"alarms": [str(alarm) for alarm in done.alarms]}
        rows = sum(table["rows"] for table in detail.values())
        ran = [table["ran"] for table in detail.values() if table["ran"]]
        engines = ", ".join(sorted({each["engine"] for each in ran})) or "nothing had changed"
        devices = ", ".join(sorted({each["device"] for each in ran})) or "cpu"
        return _step("ingest", start, rows, rows, detail, engines, devices)

    def validate(self) -> Step:
        start = time.perf_counter()
        detail: dict[str, dict[str, Any]] = {}
        for name, table in self.pipeline.tables.items():
            with self.console.status(f"validate: {name}"):
                done = validate(name, table, self.tables, tables=self.pipeline.tables)
            detail[name] = asdict(done)
        rows_out = sum(table["rows"] for table in detail.values())
        rows_in = rows_out + sum(table["quarantined"] for table in detail.values())
        return _step("validate", start, rows_in, rows_out, detail, "pandera on polars")

    def sentiment(self) -> Step:
        from jobs import sentiment

        declared = self.pipeline.sentiment
        assert declared is not None
        start = time.perf_counter()
        _ = self.cluster
        done = sentiment.run(
            declared.training,
            self.run.folder,
            self.registry,
            root=self.base,
            git_revision=self.run.git_revision,
            console=self.console,
        )
        told = ("name", "version", "aliases", "encoder", "mode", "metrics", "tfidf_macro_f1")
        detail = {key: done[key] for key in told}
        detail["scored"] = {table: self._scored(table) for table in declared.scores}
        rows = sum(each["rows"] for each in detail["scored"].values())
        return _step("sentiment", start, sum(done["rows"].values()), rows, detail, "torch on Ray")

    def _scored(self, table: str) -> dict[str, Any]:
        """The table's texts scored by the champion, as `TABLE_sentiment`."""
        from jobs import sentiment_scoring

        declared = self.pipeline.sentiment
        assert declared is not None
        scores = declared.scores[table]
        work = self.run.folder / "sentiment" / table
        work.mkdir(parents=True, exist_ok=True)
        _, model = self.registry.folder(declared.name, work)
        with sentiment_scoring.shown(self.console) as (on_start, on_done):
            done = sentiment_scoring.score_file(
                table,
                f"{table}_sentiment",
                text_column=scores.text,
                model=model,
                storage_root=self.tables,
                work=work,
                device=self.device.kind,
                on_start=on_start,
                on_done=on_done,
            )
        return {
            "rows": done.rows,
            "engine": done.engine.reason,
            "outcomes": dict(done.outcomes),
            "alarms": _shifts(storage.scan(self.tables, f"{table}_sentiment"), scores),
        }

    def features(self) -> Step:
        start = time.perf_counter()
        detail: dict[str, dict[str, Any]] = {}
        engine = "polars"
        for name, declared in self.pipeline.features.items():
            # Groups without cutoffs are computed where a target's rows ask for them.
            if declared.cutoffs == []:
                continue
            with self.console.status(f"features: {name}"):
                done = build(name, declared, self.tables, lease=self.lease)
            engine = done.engine
            detail[name] = asdict(done)
        rows_in = sum(features["events"] for features in detail.values())
        rows_out = sum(features["rows"] for features in detail.values())
        return _step("features", start, rows_in, rows_out, detail, engine)

    def training(self) -> Step:
        start = time.perf_counter()
        detail: dict[str, dict[str, Any]] = {}
        engine = "polars"
        for name in self.pipeline.targets:
            with self.console.status(f"training set: {name}"):
                done = training_set.assemble(name, self.pipeline, self.tables, lease=self.lease)
            engine = done.engine
            detail[name] = asdict(done)
        rows = sum(target["rows"] for target in detail.values())
        used = sum(rows for target in detail.values() for rows in _used(target["split"]))
        return _step("training", start, rows, used, detail, engine)

    def sweep(self) -> Step:
        start = time.perf_counter()
        declared = self.pipeline.sweep
        families = most(declared.families, self.pipeline.seed, declared.sampler)
        detail: dict[str, dict[str, Any]] = {}
        rows = 0
        for name in self.pipeline.targets:
            frame, matrices = self._matrices(name)
            rows += sum(y.size for part, y in matrices.y.items() if part != "test")
            with (
                self.registry.sweep(
                    self.pipeline.name,
                    run_name=f"{self.run.run_id} {self.run.attempt} {name}",
                    params={
                        "target": name,
                        "variants": len(families),
                        "seed": self.pipeline.seed,
                        "data_version": self._data_version(name),
                    },
                    tags={"run_id": self.run.run_id, "git_revision": self.run.git_revision},
                ) as log,
                progress.sweep(name, families, self.console) as show,
            ):

                def on_done(outcomes: Any, log: Any = log, show: progress.SweepView = show) -> None:
                    log.add(
                        [
                            _trial(outcome, declared.metric, self.pipeline.seed)
                            for outcome in outcomes
                        ]
                    )
                    show.add(outcomes)

                data: TrainingData | Folds = matrices.training_data
                if declared.folds:
                    data = training_set.folds(
                        self.pipeline.targets[name],
                        frame,
                        matrices,
                        count=declared.folds,
                        seed=self.pipeline.seed,
                    )
                outcomes = sweep.run(
                    variants(declared, self.pipeline.seed),
                    data,
                    journal=self._journal(name),
                    on=self.warm,
                    halving=_halving(declared),
                    train=partial(
                        train_folds if declared.folds else sweep.train_pack,
                        metric=declared.metric,
                        latency=declared.latency,
                    ),
                    on_done=on_done,
                )
            trained = [each for each in outcomes if each.score is not None]
            detail[name] = {
                "variants": len(outcomes),
                "failed": len(outcomes) - len(trained),
                "pruned": sum(each.pruned_at is not None for each in outcomes),
                "metric": declared.metric,
                "best_score": max(
                    (each.score for each in trained if each.score is not None), default=None
                ),
                "training_s": round(sum(each.seconds for each in outcomes), 3),
                "cpu_s": round(sum(each.cpu_s for each in outcomes), 3),
            }
        engine = f"packs on {len(self.warm.actors)} Ray actors"
        device = self.warm.device
        tried = sum(target["variants"] for target in detail.values())
        return _step("sweep", start, rows, tried, detail, engine, device)

    def register(self) -> Step:
        start = time.perf_counter()
        targets: dict[str, dict[str, Any]] = {}
        rows = 0
        declared = self.pipeline.sweep
        fit = partial(sweep.fit, on=self.warm)
        for name, target in self.pipeline.targets.items():
            with self.console.status(f"register: {name}"):
                frame, matrices = self._matrices(name)
                asked = variants(declared, self.pipeline.seed)
                halving = _halving(declared)
                outcomes = sweep.outcomes(self._journal(name), asked, halving=halving)
                done = register(
                    name,
                    outcomes,
                    frame,
                    matrices,
                    training_set.feature_columns(target, self.pipeline),
                    self.registry,
                    baseline_features=target.baseline,
                    data_version=self._data_version(name),
                    seed=self.pipeline.seed,
                    git_revision=self.run.git_revision,
                    evaluation=self.run.folder / f"evaluation-{name}.json",
                    together=declared.ensemble,
                    calibrate=declared.calibrate,
                    metric=declared.metric,
                    slowest_us=declared.slowest_us,
                    fit=fit,
                )
            rows += matrices.y["test"].size
            told = asdict(done)
            test = told.pop("test")
            lift = test.pop("top_decile_lift")
            targets[name] = {
                **told,
                **{f"test_{metric}": value for metric, value in test.items()},
                "top_decile_lift": lift,
                "data_version": self._data_version(name),
                "split": self.run.step("training").detail[name]["split"],
            }
        # Serving needs the CPUs.
        self._warm.close()
        detail = {"targets": targets}
        return _step("register", start, rows, len(targets), detail, "mlflow")

    def serve(self) -> Step:
        from serving import app
        from serving.access import AccessFiles, add_key
        from serving.client import API_KEY, Client

        start = time.perf_counter()
        _ = self.cluster
        wanted = urlsplit(self.environment.serve_url or "")
        with self.console.status("starting Ray Serve"):
            # A cluster that stays serves every champion; this run's own, its models.
            stays = self.environment.ray_address is not None
            # What `liftyard serve` has set up there goes on as its file says.
            here = app.follow(self.environment.tracking_uri) if stays else None
            key, access = os.environ.get(API_KEY), None
            if not stays:
                # For this run alone, which knows the key; the file has its digest.
                keys = Path(self.stack.enter_context(TemporaryDirectory())) / "keys.json"
                key = add_key(keys, "run", "analyst", days=1)
                log = str(self.run.folder / "audit.jsonl")
                access = AccessFiles(keys=str(keys), audit=log)
            url = (
                app.serve(
                    self.environment.tracking_uri,
                    # Without keys it is opened to nobody else; `liftyard serve` does that.
                    host=wanted.hostname if wanted.hostname in app.HOSTS else app.HOSTS[0],
                    port=wanted.port or ports.free(1)[0],
                    models=None if stays else list(self.pipeline.targets),
                    access=access,
                )
                if here is None
                else here.listener.url
            )
            # Beside TLS, whose certificate may be for another name.
            asked = url if here is None else here.direct
        if not stays:
            self.stack.callback(app.stop)
        elif here is None and wanted.hostname not in (None, *app.HOSTS):
            self.console.print(
                f"served on the head's loopback, not at {self.environment.serve_url}: "
                "`liftyard serve FILE` opens it there, with keys"
            )
        client = self.stack.enter_context(Client(asked, key=key))
        scored: dict[str, list[dict[str, Any]]] = {}
        explained: dict[str, dict[str, Any]] = {}
        for name in self.pipeline.targets:
            frame = training_set.load(name, self.tables, self._version(name))
            names = self._feature_names(name)
            tells = training_set.told_by(self.pipeline.targets[name], self.pipeline)
            rows = frame.filter(frame[training_set.SPLIT] == "test")
            rows = rows.unique(tells or None, keep="last", maintain_order=True).tail(5)
            tells = tells or [training_set.ROW]
            features = rows.select(names)
            # A service scores at least one row.
            found = client.score_table(name, features).scores.tolist() if len(rows) else []
            told = rows.select(tells)
            scored[name] = [
                {**row, "score": score} for row, score in zip(told.to_dicts(), found, strict=True)
            ]
            if access is not None and scored[name]:
                # Of the row with the highest score, why.
                highest = max(range(len(found)), key=found.__getitem__)
                (why,) = client.explain(name, features[highest].to_dicts()).explanations
                reasons = [reason["text"] for reason in why.reasons]
                explained[name] = {**scored[name][highest], "reasons": reasons}
        count = sum(len(rows) for rows in scored.values())
        detail = {"serve_url": url, "scored": scored, "explained": explained}
        return _step("serve", start, count, count, detail, "ray-serve")

    def _journal(self, name: str) -> Path:
        return self.run.folder / f"sweep-{name}.jsonl"

    def _version(self, name: str) -> int:
        return int(self.run.step("training").detail[name]["version"])

    def _data_version(self, name: str) -> str:
        return f"training/{name}@{self._version(name)}"

    def _feature_names(self, name: str) -> list[str]:
        columns = training_set.feature_columns(self.pipeline.targets[name], self.pipeline)
        return [column.name for column in columns]

    def _matrices(self, name: str) -> tuple[Any, training_set.Matrices]:
        frame = training_set.load(name, self.tables, self._version(name))
        return frame, training_set.encode(frame, self._feature_names(name))


def _used(split: dict[str, int]) -> list[int]:
    return [rows for part, rows in split.items() if part not in ("purged", "unknown")]


def _shifts(scored: pl.LazyFrame, declared: Scores) -> list[dict[str, str]]:
    """Where sentiment has shifted in the week before a table's last row."""
    if declared.time is None:
        return []
    time = pl.col(declared.time).cast(pl.Datetime("us"))
    told = scored.select({*declared.by, declared.time, "sentiment"}).with_columns(time).collect()
    last = told[declared.time].max()
    if not isinstance(last, datetime):
        return []
    found = []
    for by in declared.by:
        judged = shift.alarms(
            told,
            entity=by,
            time=declared.time,
            value="sentiment",
            at=last + timedelta(microseconds=1),
        )
        found += [
            {"by": by, "value": str(value), "reason": reason}
            for value, reason in judged.filter("alarm").select(by, "reason").iter_rows()
        ]
    return found


def _halving(declared: Sweep) -> sweep.Halving | None:
    if declared.halving is None:
        return None
    said = declared.halving.model_dump()
    return sweep.Halving(**said | {"rungs": tuple(said["rungs"])})


def _trial(outcome: sweep.Outcome, metric: str, seed: int) -> Trial:
    by = METRICS[metric]
    metrics = dict(outcome.metrics)
    if outcome.score is not None:
        metrics[f"valid_{metric}"] = by.own(outcome.score)
    if outcome.pruned_at is not None:
        metrics["pruned_at_rounds"] = float(outcome.pruned_at)
    return Trial(
        variant=outcome.variant,
        metrics=metrics,
        seconds=outcome.seconds,
        error=outcome.error,
        seed=int(outcome.variant.get("seed", seed)),
        cpu_s=outcome.cpu_s,
        curve=[[step, by.own(score)] for step, score in outcome.curve],
        curve_metric=metric,
    )


def _step(
    name: str,
    start: float,
    rows_in: int,
    rows_out: int,
    detail: dict[str, Any],
    engine: str = "polars-streaming",
    device: str = "cpu",
) -> Step:
    return Step(
        name=name,
        seconds=round(time.perf_counter() - start, 3),
        rows_in=rows_in,
        rows_out=rows_out,
        engine=engine,
        device=device,
        detail=detail,
    )
