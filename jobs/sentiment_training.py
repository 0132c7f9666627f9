"""Sentiment trained on the connected Ray cluster: texts, sweep, training.

Fine-tuning runs in one Ray task, or in several workers of Ray Train that average gradients over
gloo (CPU) or NCCL (GPU). A folder holds all of it, and goes by the hash of settings and texts: a
worker that dies is started again from the last checkpoint, a driver that dies goes on where it was
called again, and what is finished isn't done twice. With workers on several nodes the folder must
be on storage that all of them see.
"""

import hashlib
import itertools
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from cluster.files import replace_text
from jobs import progress, sweep
from jobs.sentiment_config import SentimentTraining, Texts
from jobs.sweep_board import Listed, Outcome
from models import sentiment
from models.families import Variant
from models.packaged_encoders import PACKAGED
from models.registry import Registry, Trial
from models.sentiment_head import fit_head
from models.sentiment_training import Step, fit
from models.text import clean, drawn

PARTS = ("train", "valid", "test")
# How often a worker that died is started again.
_RETRIES = 3


class SentimentJobError(ValueError):
    """Texts can't be trained on as declared; the message says which and what to do."""


def rows(config: SentimentTraining, root: Path) -> pl.DataFrame:
    """The declared texts, masked, each once, with the part it falls in.

    Args:
        config: Its texts and shares.
        root: Folder that relative paths start from.

    Returns:
        text, label, language, part ("train", "valid", "test") and outcome ("ok", "truncated");
        texts with another outcome are left out.

    Raises:
        SentimentJobError: A file can't be read, lacks a column, or says an unknown label.
    """
    frame = pl.concat([_read(each, config, root) for each in config.texts])
    frame = frame.filter(pl.col("outcome").is_in(["ok", "truncated"]))
    frame = frame.unique("text", keep="first", maintain_order=True)
    place = drawn(frame["group"])
    frame = frame.drop("group")
    test, valid = config.test_share, config.test_share + config.valid_share
    part = pl.when(place < test).then(pl.lit("test")).when(place < valid).then(pl.lit("valid"))
    frame = frame.with_columns(part=part.otherwise(pl.lit("train")))
    counts = dict(frame["part"].value_counts().rows())
    if any(counts.get(name, 0) == 0 for name in PARTS):
        raise SentimentJobError(f"{len(frame)} texts leave a part empty: {counts}; give more texts")
    return frame


def _read(texts: Texts, config: SentimentTraining, root: Path) -> pl.DataFrame:
    path = root / texts.path
    try:
        if path.suffix == ".parquet":
            raw = pl.read_parquet(path)
        else:
            raw = pl.read_csv(path, separator=texts.separator, infer_schema=False)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise SentimentJobError(
            f"{path}: can't be read ({error}); name a CSV or Parquet"
        ) from error
    asked = [texts.text, texts.label, *([texts.group] if texts.group else [])]
    missing = [name for name in asked if name not in raw.columns]
    if missing:
        raise SentimentJobError(f"{path}: no columns {missing}; there are {raw.columns}")
    label = raw[texts.label].cast(pl.String).replace(texts.labels) if texts.labels else None
    label = raw[texts.label].cast(pl.String) if label is None else label
    unknown = sorted({str(each) for each in label.unique()} - set(config.labels))
    if unknown:
        raise SentimentJobError(
            f"{path}: labels {unknown[:5]} aren't among {config.labels}; map them in `labels`"
        )
    found = clean(raw[texts.text]).with_columns(label=label)
    if texts.language is not None:
        found = found.with_columns(language=pl.lit(texts.language))
    # A group is one of its file: another may number its own alike.
    group = found["text"]
    if texts.group:
        group = (f"{texts.path} " + raw[texts.group].cast(pl.String)).fill_null(group)
    return found.select("text", "label", "language", "outcome", group=group)


def train(
    config: SentimentTraining,
    frame: pl.DataFrame,
    folder: Path,
    *,
    registry: Registry | None = None,
    console: Console | None = None,
) -> Path:
    """Trains on the connected Ray cluster, and leaves `model` in the returned folder.

    Args:
        config: What to train.
        frame: Of `rows`.
        folder: Where; the training has a folder of its own in it.
        registry: Where a declared sweep is tracked; None doesn't track it.
        console: Where progress is shown live; None shows none.

    Returns:
        The training's folder: `model`, `texts.parquet`, and `trained.json` (what the sweep chose,
        validation by step, seconds).

    Raises:
        SentimentJobError: The training failed three times.
        SentimentError, EncoderError, TrainingError: See `models`.
    """
    said = config.model_dump_json(exclude={"topics", "name"})
    digest = hashlib.sha256(said.encode() + frame.write_json().encode()).hexdigest()[:16]
    work = (folder / digest).absolute()
    work.mkdir(parents=True, exist_ok=True)
    if (work / "trained.json").exists():
        return work
    frame.write_parquet(work / "texts.parquet")
    console = console or Console(quiet=True)
    variant = _best_variant(config, frame, work, registry, console) if config.sweep else {}
    job = {"config": config.model_dump_json(), "folder": str(work), "variant": variant}
    if config.mode == "head":
        with console.status(f"sentiment: {config.encoder}, head"):
            on_ray(config, _train_head)(job)
    else:
        with _shown(f"sentiment {config.encoder}", console) as show:
            _fine_tune(config, job, work, show)
    return work


def on_ray(config: SentimentTraining, work: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The function as a Ray task that is waited for, with the config's CPUs and GPUs."""
    import ray

    task: Any = ray.remote(num_cpus=config.cpus, num_gpus=config.gpus, max_retries=_RETRIES)(work)

    def waited(job: Any) -> Any:
        try:
            return ray.get(task.remote(job))
        except ray.exceptions.RayTaskError as error:
            # The user's mistakes are told as they are, without Ray's account of where.
            cause: Any = error
            raise cause.as_instanceof_cause() from None

    return waited


def _train_head(job: dict[str, Any]) -> None:
    config, work, parts = job_of(job)
    started = time.perf_counter()
    model = sentiment.new(
        config.encoder, labels=config.labels, max_tokens=config.max_tokens, seed=config.seed
    )
    fit_head(model, parts["train"], class_weights=config.class_weights)
    model.save(work / "model", encoder=config.encoder not in PACKAGED)
    _write_trained(work, {}, [], time.perf_counter() - started)


def _fine_tune(
    config: SentimentTraining, job: dict[str, Any], work: Path, show: Callable[[Step], None]
) -> None:
    import ray

    board: Any = ray.remote(num_cpus=0)(_Board).remote()
    told = {**job, "board": board}
    # One process needs no process group, and a worker that is warm starts at once.
    alone = config.workers == 1
    train = partial(on_ray(config, _train_worker), told) if alone else _on_ray_train(config, told)
    failed: list[Exception] = []

    def run() -> None:
        try:
            train()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="sentiment-training", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        last = ray.get(board.last.remote())
        if last is not None:
            show(last)
    ray.kill(board)
    if failed and isinstance(failed[0], ValueError):
        raise failed[0]
    if failed:
        raise SentimentJobError(
            f"training {config.name!r} failed: {failed[0]}; correct the cause and call it again, "
            f"it goes on from the last checkpoint in {work}"
        ) from failed[0]


def _on_ray_train(config: SentimentTraining, job: dict[str, Any]) -> Callable[[], Any]:
    """Ray Train's run of several workers, which are started again together where one dies."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    return TorchTrainer(
        _train_worker,
        train_loop_config=job,
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpus > 0,
            resources_per_worker={"CPU": config.cpus, "GPU": config.gpus},
        ),
        run_config=RunConfig(
            name="ray_train",
            storage_path=job["folder"],
            failure_config=FailureConfig(max_failures=_RETRIES),
        ),
        torch_config=TorchConfig(backend="nccl" if config.gpus else "gloo"),
    ).fit


class _Board:
    """The last step told by a worker; an actor, since workers may be on other nodes."""

    def __init__(self) -> None:
        self._last: Step | None = None

    def put(self, step: Step) -> None:
        # What was measured stays shown until it is measured again.
        if self._last is not None and not step.metrics:
            step = Step(**{**asdict(step), "metrics": self._last.metrics})
        self._last = step

    def last(self) -> Step | None:
        return self._last


def _train_worker(job: dict[str, Any]) -> None:
    config, work, parts = job_of(job)
    model = sentiment.new(
        config.encoder, labels=config.labels, max_tokens=config.max_tokens, seed=config.seed
    )
    board = job["board"]
    first = True
    how: dict[str, Any] = {}
    if config.workers > 1:
        import ray.train
        from ray.train import lightning as ray_lightning

        lightning: Any = ray_lightning
        first = ray.train.get_context().get_world_rank() == 0
        how = {
            "plugins": [lightning.RayLightningEnvironment()],
            "strategy": lightning.RayDDPStrategy(),
        }
    done = fit(
        model,
        parts["train"],
        parts["valid"],
        config.settings(**job["variant"]),
        folder=work / "checkpoint",
        on_step=lambda step: board.put.remote(step),
        accelerator="gpu" if config.gpus else "cpu",
        **how,
    )
    if first:
        done.model.save(work / "model")
        _write_trained(work, job["variant"], done.history, done.seconds)
        shutil.rmtree(work / "checkpoint")


def job_of(job: dict[str, Any]) -> tuple[SentimentTraining, Path, dict[str, pl.DataFrame]]:
    work = Path(job["folder"])
    frame = pl.read_parquet(work / "texts.parquet")
    parts = {name: frame.filter(pl.col("part") == name) for name in PARTS}
    return SentimentTraining.model_validate_json(job["config"]), work, parts


def _write_trained(
    work: Path, variant: dict[str, Any], history: Sequence[dict[str, float]], seconds: float
) -> None:
    said = {"variant": variant, "history": list(history), "seconds": seconds}
    replace_text(work / "trained.json", json.dumps(said, indent=2))


def _best_variant(
    config: SentimentTraining,
    frame: pl.DataFrame,
    work: Path,
    registry: Registry | None,
    console: Console,
) -> dict[str, Any]:
    """The settings that did best on the validation texts, by the project's sweep."""
    assert config.sweep is not None
    tried = {name: each for name, each in config.sweep.model_dump().items() if each}
    variants = [
        {"family": "sentiment", "seed": config.seed, **dict(zip(tried, each, strict=True))}
        for each in itertools.product(*tried.values())
    ]
    data = {"config": config.model_dump_json(), "frame": frame, "folder": str(work)}
    with (
        _tracked(config, work.name, registry) as add,
        console.status(f"sentiment: sweep of {len(variants)} variants"),
        sweep.pool(config.workers, cpus=config.cpus, gpus=config.gpus) as pool,
    ):
        outcomes = sweep.run(
            # Each its own pack: variants of fine-tuning share no work.
            Listed([variant] for variant in variants),
            data,
            journal=work / "sweep.jsonl",
            on=pool,
            train=train_variants,
            on_done=add,
        )
    right = [each for each in outcomes if each.error is None]
    if not right:
        raise SentimentJobError(f"every variant failed; the first: {outcomes[0].error}")
    best = max(right, key=lambda each: each.metrics[config.choose_by])
    return {name: value for name, value in best.variant.items() if name in tried}


@contextmanager
def _tracked(
    config: SentimentTraining, name: str, registry: Registry | None
) -> Iterator[Callable[[Sequence[Outcome]], None]]:
    if registry is None:
        yield lambda outcomes: None
        return
    with registry.sweep(config.name, run_name=f"sweep {name}", params={}, tags={}) as log:

        def add(outcomes: Sequence[Outcome]) -> None:
            log.add(
                [
                    Trial(
                        variant=each.variant,
                        metrics=each.metrics,
                        seconds=each.seconds,
                        error=each.error,
                        seed=config.seed,
                    )
                    for each in outcomes
                ]
            )

        yield add


def train_variants(pack: Sequence[Variant], data: Any, **how: Any) -> list[Outcome]:
    """What a sweep's actor makes of variants of a training, by `jobs.sweep.run(train=…)`.

    Args:
        pack: Settings that replace the config's.
        data: config (JSON), frame (of `rows`) and folder.
        how: device is used, "cpu" or "cuda".

    Returns:
        Outcomes whose `metrics` are those of the validation texts; errors are told, not raised.
    """
    config = SentimentTraining.model_validate_json(data["config"])
    frame: pl.DataFrame = data["frame"]
    outcomes = []
    for variant in pack:
        started, cpu = time.perf_counter(), time.process_time()
        changed = {name: each for name, each in variant.items() if name != "family"}
        name = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]
        folder = Path(data["folder"]) / "variants" / name
        metrics: dict[str, float] = {}
        error = None
        try:
            model = sentiment.new(
                config.encoder, labels=config.labels, max_tokens=config.max_tokens
            )
            done = fit(
                model,
                frame.filter(pl.col("part") == "train"),
                frame.filter(pl.col("part") == "valid"),
                config.settings(**changed),
                folder=folder,
                accelerator="gpu" if how.get("device") == "cuda" else "cpu",
            )
            metrics = {
                metric: each
                for metric, each in max(done.history, key=lambda at: at[config.choose_by]).items()
                if metric != "step"
            }
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        shutil.rmtree(folder, ignore_errors=True)
        outcomes.append(
            Outcome(
                variant=dict(variant),
                score=None,
                seconds=time.perf_counter() - started,
                cpu_s=time.process_time() - cpu,
                error=error,
                metrics=metrics,
            )
        )
    return outcomes


@contextmanager
def _shown(title: str, console: Console) -> Iterator[Callable[[Step], None]]:
    with progress.bars(console) as bars:
        bar = bars.add_task(title, total=None, said="starting workers")

        def show(step: Step) -> None:
            f1 = f", macro-F1 {step.metrics['macro_f1']:.3f}" if step.metrics else ""
            pace = f"{step.texts_per_s:.0f} texts/s, {step.left_s:.0f} s left"
            said = f"loss {step.loss:.3f}{f1}, {pace}"
            bars.update(bar, completed=step.step, total=step.steps, said=said)

        yield show
