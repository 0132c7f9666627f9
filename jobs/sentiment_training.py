"""Sentiment trained on the connected Ray cluster.

Fine-tuning runs in one Ray task, or in several workers of Ray Train that average gradients over
gloo (CPU) or NCCL (GPU). A folder holds all of it, and goes by the hash of settings and texts: a
worker that dies is started again from the last checkpoint, a driver that dies goes on where it was
called again, and what is finished isn't done twice. With workers on several nodes the folder must
be on storage that all of them see.
"""

import hashlib
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
from jobs import progress
from jobs.sentiment_config import SentimentTraining
from jobs.sentiment_sweep import best_variant
from jobs.sentiment_texts import PARTS, SentimentJobError
from models import sentiment
from models.packaged_encoders import PACKAGED
from models.registry import Registry
from models.sentiment_head import fit_head
from models.sentiment_training import Step, fit

# How often a worker that died is started again.
_RETRIES = 3


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
        frame: Of `jobs.sentiment_texts.rows`.
        folder: Where; the training has a folder of its own in it.
        registry: Where a declared sweep is tracked; None doesn't track it.
        console: Where progress is shown live; None shows none.

    Returns:
        The training's folder: `model`, `texts.parquet`, and `trained.json` (what the sweep chose,
        validation by step, seconds, and at which step it went on after a stop).

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
    variant = best_variant(config, frame, work, registry, console) if config.sweep else {}
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
        _write_trained(work, job["variant"], done.history, done.seconds, done.resumed_at)
        shutil.rmtree(work / "checkpoint")


def job_of(job: dict[str, Any]) -> tuple[SentimentTraining, Path, dict[str, pl.DataFrame]]:
    work = Path(job["folder"])
    frame = pl.read_parquet(work / "texts.parquet")
    parts = {name: frame.filter(pl.col("part") == name) for name in PARTS}
    return SentimentTraining.model_validate_json(job["config"]), work, parts


def _write_trained(
    work: Path,
    variant: dict[str, Any],
    history: Sequence[dict[str, float]],
    seconds: float,
    resumed_at: int = 0,
) -> None:
    said = {
        "variant": variant,
        "history": list(history),
        "seconds": seconds,
        "resumed_at": resumed_at,
    }
    replace_text(work / "trained.json", json.dumps(said, indent=2))


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
