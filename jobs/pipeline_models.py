"""The steps that leave models: from training sets to served scores."""

import os
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from cluster import ports
from jobs import progress, sweep, training_set
from jobs.config_sweep import Sweep
from jobs.pipeline_work import Work, step
from jobs.register import register
from jobs.runs import Step
from jobs.search import most, variants
from jobs.sweep_folds import train_folds
from models.families import TrainingData
from models.folds import Folds
from models.metrics import METRICS
from models.registry_sweeps import Trial


def training_step(work: Work) -> Step:
    """Features and labels to a training set a target, in parts."""
    start = time.perf_counter()
    detail: dict[str, dict[str, Any]] = {}
    engine = "polars"
    for name in work.pipeline.targets:
        with work.console.status(f"training set: {name}"):
            done = training_set.assemble(name, work.pipeline, work.tables, lease=work.lease)
        engine = done.engine
        detail[name] = asdict(done)
    rows = sum(target["rows"] for target in detail.values())
    used = sum(rows for target in detail.values() for rows in _used(target["split"]))
    return step("training", start, rows, used, detail, engine)


def _used(split: dict[str, int]) -> list[int]:
    return [rows for part, rows in split.items() if part not in ("purged", "unknown")]


def sweep_step(work: Work) -> Step:
    """Each target's variants trained on warm actors."""
    start = time.perf_counter()
    declared = work.pipeline.sweep
    families = most(declared.families, work.pipeline.seed, declared.sampler)
    detail: dict[str, dict[str, Any]] = {}
    rows = 0
    for name in work.pipeline.targets:
        frame, matrices = _matrices(work, name)
        rows += sum(y.size for part, y in matrices.y.items() if part != "test")
        with (
            work.registry.sweep(
                work.pipeline.name,
                run_name=f"{work.run.run_id} {work.run.attempt} {name}",
                params={
                    "target": name,
                    "variants": len(families),
                    "seed": work.pipeline.seed,
                    "data_version": _data_version(work, name),
                },
                tags={"run_id": work.run.run_id, "git_revision": work.run.git_revision},
            ) as log,
            progress.sweep(name, families, work.console) as show,
        ):

            def on_done(outcomes: Any, log: Any = log, show: progress.SweepView = show) -> None:
                log.add(
                    [_trial(outcome, declared.metric, work.pipeline.seed) for outcome in outcomes]
                )
                show.add(outcomes)

            data: TrainingData | Folds = matrices.training_data
            if declared.folds:
                data = training_set.folds(
                    work.pipeline.targets[name],
                    frame,
                    matrices,
                    count=declared.folds,
                    seed=work.pipeline.seed,
                )
            outcomes = sweep.run(
                variants(declared, work.pipeline.seed),
                data,
                journal=_journal(work, name),
                on=work.warm,
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
    share = f" of GPU {work.warm.gpus:g}" if work.warm.gpus else ""
    engine = f"packs on {len(work.warm.actors)} Ray actors{share}"
    device = work.warm.device
    tried = sum(target["variants"] for target in detail.values())
    return step("sweep", start, rows, tried, detail, engine, device)


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
        ran=outcome.ran,
    )


def register_step(work: Work) -> Step:
    """Each target's best variant tested and registered."""
    start = time.perf_counter()
    targets: dict[str, dict[str, Any]] = {}
    rows = 0
    declared = work.pipeline.sweep
    fit = partial(sweep.fit, on=work.warm, metric=declared.metric)
    for name, target in work.pipeline.targets.items():
        with work.console.status(f"register: {name}"):
            frame, matrices = _matrices(work, name)
            asked = variants(declared, work.pipeline.seed)
            halving = _halving(declared)
            outcomes = sweep.outcomes(_journal(work, name), asked, halving=halving)
            done = register(
                name,
                outcomes,
                frame,
                matrices,
                training_set.feature_columns(target, work.pipeline),
                work.registry,
                baseline_features=target.baseline,
                data_version=_data_version(work, name),
                seed=work.pipeline.seed,
                git_revision=work.run.git_revision,
                evaluation=work.run.folder / f"evaluation-{name}.json",
                together=declared.ensemble,
                calibrate=declared.calibrate,
                metric=declared.metric,
                slowest_us=declared.slowest_us,
                fit=fit,
                refit=declared.refit,
            )
        rows += matrices.y["test"].size
        told = asdict(done)
        test = told.pop("test")
        lift = test.pop("top_decile_lift")
        targets[name] = {
            **told,
            **{f"test_{metric}": value for metric, value in test.items()},
            "top_decile_lift": lift,
            "data_version": _data_version(work, name),
            "split": work.run.step("training").detail[name]["split"],
        }
    # Serving needs the CPUs.
    work.cool()
    detail = {"targets": targets}
    return step("register", start, rows, len(targets), detail, "mlflow")


def serve_step(work: Work) -> Step:
    """Champions served, and a few test rows scored and explained over HTTP."""
    from serving import app
    from serving.access import AccessFiles, add_key
    from serving.client import API_KEY, Client

    start = time.perf_counter()
    _ = work.cluster
    wanted = urlsplit(work.environment.serve_url or "")
    with work.console.status("starting Ray Serve"):
        # A cluster that stays serves every champion; this run's own, its models.
        stays = work.environment.ray_address is not None
        # What `liftyard serve` has set up there goes on as its file says.
        here = app.follow(work.environment.tracking_uri) if stays else None
        key, access = os.environ.get(API_KEY), None
        if not stays:
            # For this run alone, which knows the key; the file has its digest.
            keys = Path(work.stack.enter_context(TemporaryDirectory())) / "keys.json"
            key = add_key(keys, "run", "analyst", days=1)
            log = str(work.run.folder / "audit.jsonl")
            access = AccessFiles(keys=str(keys), audit=log)
        url = (
            app.serve(
                work.environment.tracking_uri,
                # Without keys it is opened to nobody else; `liftyard serve` does that.
                host=wanted.hostname if wanted.hostname in app.HOSTS else app.HOSTS[0],
                port=wanted.port or ports.free(1)[0],
                models=None if stays else list(work.pipeline.targets),
                access=access,
            )
            if here is None
            else here.listener.url
        )
        # Beside TLS, whose certificate may be for another name.
        asked = url if here is None else here.direct
    if not stays:
        work.stack.callback(app.stop)
    elif here is None and wanted.hostname not in (None, *app.HOSTS):
        work.console.print(
            f"served on the head's loopback, not at {work.environment.serve_url}: "
            "`liftyard serve FILE` opens it there, with keys"
        )
    client = work.stack.enter_context(Client(asked, key=key))
    scored: dict[str, list[dict[str, Any]]] = {}
    explained: dict[str, dict[str, Any]] = {}
    for name in work.pipeline.targets:
        frame = training_set.load(name, work.tables, _version(work, name))
        names = _feature_names(work, name)
        tells = training_set.told_by(work.pipeline.targets[name], work.pipeline)
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
    return step("serve", start, count, count, detail, "ray-serve")


def _journal(work: Work, name: str) -> Path:
    return work.run.folder / f"sweep-{name}.jsonl"


def _version(work: Work, name: str) -> int:
    return int(work.run.step("training").detail[name]["version"])


def _data_version(work: Work, name: str) -> str:
    return f"training/{name}@{_version(work, name)}"


def _feature_names(work: Work, name: str) -> list[str]:
    columns = training_set.feature_columns(work.pipeline.targets[name], work.pipeline)
    return [column.name for column in columns]


def _matrices(work: Work, name: str) -> tuple[Any, training_set.Matrices]:
    frame = training_set.load(name, work.tables, _version(work, name))
    return frame, training_set.encode(frame, _feature_names(work, name))
