"""Training of a sentiment model with pytorch-lightning, the same whether killed or not.

What a step sees depends on the seed and the step's number alone: batches are planned ahead, and
dropout draws from a generator seeded by the step. A checkpoint so needs weights, optimizer and a
count, and a run that goes on from one ends with the weights of a run that never stopped.

Several processes each take their share of every batch; gradients are averaged by
Lightning's strategy. Knows nothing of where its processes run.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from models.sentiment import Sentiment, padded
from models.sentiment_head import TrainingError, label_places
from models.sentiment_metrics import measured
from models.sentiment_schedule import Settings, parameter_groups, plan, rate_at

_CHECKPOINT = "last.ckpt"


@dataclass(frozen=True, kw_only=True)
class Step:
    """Where a training is.

    Attributes:
        step: Steps done.
        steps: Steps there are.
        loss: Mean training loss since the last report.
        texts_per_s: Texts trained on a second since the start, over all processes.
        left_s: Seconds left at that rate.
        metrics: On the validation texts; empty where they weren't just measured.
    """

    step: int
    steps: int
    loss: float
    texts_per_s: float
    left_s: float
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What came of a training.

    Attributes:
        model: With the weights of the best validation; of the last step without validation texts.
        steps: Steps done.
        resumed_at: Those that an earlier call had done.
        best_step: Step of the weights.
        history: Validation metrics by step: {"step": …, "macro_f1": …, …}.
        seconds: Wall seconds of this process's part, checkpoints and validation among them.
    """

    model: Sentiment
    steps: int
    resumed_at: int
    best_step: int
    history: list[dict[str, float]]
    seconds: float


def fit(
    model: Sentiment,
    train: pl.DataFrame,
    valid: pl.DataFrame | None,
    settings: Settings,
    *,
    folder: Path,
    on_step: Callable[[Step], None] = lambda step: None,
    accelerator: str = "cpu",
    devices: int = 1,
    plugins: Sequence[Any] = (),
    strategy: Any = "auto",
) -> Trained:
    """Fine-tunes the model in place; goes on where the folder holds a checkpoint of it.

    Args:
        model: Its module is trained.
        train: Columns text (cleaned) and label (a name out of the model's labels).
        valid: The same for choosing the best weights and for stopping; None for neither.
        settings: See `Settings`.
        folder: For the checkpoint; one folder a training, on storage that all processes see.
        on_step: Called in the first process about twice a second, and after each validation.
        accelerator: Lightning's.
        devices: Processes or GPUs that Lightning sees on this machine.
        plugins: Lightning's, such as a cluster environment.
        strategy: Lightning's; over processes, one with DistributedDataParallel.

    Raises:
        TrainingError: A label isn't known, a class has no text, there are too few texts, or the
            folder's checkpoint is of another training.
        OSError: The folder can't be written.
    """
    import pytorch_lightning as lightning

    started = time.perf_counter()
    y = label_places(model, train)
    if len(train) < settings.batch:
        raise TrainingError(
            f"{len(train)} texts and batches of {settings.batch}; give more texts, or a smaller "
            "batch"
        )
    ids = model.tokenize(train["text"].to_list())
    batches = plan([len(each) for each in ids], settings)
    folder.mkdir(parents=True, exist_ok=True)
    task = _task()(model, ids, y, batches, settings)
    watch = _watch()(model, valid, settings, batches, folder, on_step, len(train))
    with _quiet():
        trainer = lightning.Trainer(
            max_steps=len(batches),
            max_epochs=1,
            accelerator=accelerator,
            devices=devices,
            strategy=strategy,
            plugins=list(plugins) or None,
            precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[watch],
            default_root_dir=str(folder),
        )
    last = folder / _CHECKPOINT
    with _quiet():
        trainer.fit(
            task,
            train_dataloaders=_steps(len(batches)),
            ckpt_path=str(last) if last.exists() else None,
            # From a folder that only this training writes; it holds a callback's state as well.
            weights_only=False,
        )
    watch.restore_best()
    model.module.eval()
    return Trained(
        model=model,
        steps=trainer.global_step,
        resumed_at=watch.resumed_at,
        best_step=watch.best_step or trainer.global_step,
        history=watch.history,
        seconds=time.perf_counter() - started,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's hints on loaders: ours gives numbers, and needs neither processes nor
    to go on where it was."""
    import logging

    loggers = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning_fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        for said in (
            ".*does not have many workers.*",
            ".*ended before the epoch ended.*",
            ".*GPU available but not used.*",
            ".*isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        ):
            warnings.filterwarnings("ignore", message=said)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def _steps(steps: int) -> Any:
    from torch.utils.data import DataLoader

    numbers: Any = range(steps)
    return DataLoader(numbers, batch_size=None)


@cache
def _task() -> Any:
    import pytorch_lightning as lightning
    import torch
    from torch.nn.functional import cross_entropy

    class Task(lightning.LightningModule):
        """One step: its batch out of the plan, this process's share of it, and the loss."""

        def __init__(
            self,
            model: Sentiment,
            ids: list[np.ndarray],
            y: np.ndarray,
            batches: list[np.ndarray],
            settings: Settings,
        ) -> None:
            super().__init__()
            self.module = model.module
            if settings.freeze_words:
                self.module.encoder.get_input_embeddings().weight.requires_grad_(False)
            self._model, self._ids, self._y = model, ids, torch.tensor(y)
            self._batches, self._settings = batches, settings
            counts = np.bincount(y, minlength=len(model.labels))
            weights = len(y) / (len(counts) * counts)
            self._weights = (
                torch.tensor(weights, dtype=torch.float32) if settings.class_weights else None
            )

        def on_fit_start(self) -> None:
            self.module.train()

        def training_step(self, _: Any, __: int) -> Any:
            # By the optimizer's own count and not by what a loader gives: it survives a kill.
            step = self.global_step
            torch.manual_seed(hash((self._settings.seed, step, self.global_rank)) % 2**31)
            places = self._batches[step][self.global_rank :: self.trainer.world_size]
            batch, mask = padded([self._ids[place] for place in places], self._model.pad_id)
            logits = self.module(
                torch.from_numpy(batch).to(self.device),
                None if mask is None else torch.from_numpy(mask).to(self.device),
            )
            return cross_entropy(
                logits.float(),
                self._y[places].to(self.device),
                weight=None if self._weights is None else self._weights.to(self.device),
                label_smoothing=self._settings.smoothing,
            )

        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            # Lightning's own refuses fused AdamW under autocast, for the sake of float16's scaler.
            torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(parameter_groups(self.module, self._settings), fused=True)
            steps, rising = len(self._batches), self._settings.warm_up
            schedule = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: rate_at(step, steps, rising)
            )
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": schedule, "interval": "step"},
            }

    return Task


@cache
def _watch() -> Any:
    import pytorch_lightning as lightning
    import torch

    class Watch(lightning.Callback):
        """Validates, keeps the best weights, stops early, writes checkpoints, and reports."""

        def __init__(
            self,
            model: Sentiment,
            valid: pl.DataFrame | None,
            settings: Settings,
            batches: list[np.ndarray],
            folder: Path,
            on_step: Callable[[Step], None],
            texts: int,
        ) -> None:
            self._model, self._valid, self._settings = model, valid, settings
            self._steps, self._last = len(batches), folder / _CHECKPOINT
            self._on_step = on_step
            self._losses: list[float] = []
            per_epoch = math.ceil(texts / settings.batch)
            self._every = max(1, round(per_epoch / settings.checks))
            # What a checkpoint of another training would differ in.
            self._of = {"settings": repr(settings), "texts": texts, "base": model.base}
            self.history: list[dict[str, float]] = []
            self.best_step = self.resumed_at = 0
            self._best: dict[str, Any] | None = None
            self._started = self._told = time.monotonic()
            self._from: int | None = None

        def state_dict(self) -> dict[str, Any]:
            return {
                "of": self._of,
                "history": self.history,
                "best_step": self.best_step,
                "best": self._best,
            }

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            if state_dict["of"] != self._of:
                raise TrainingError(
                    f"{self._last} is of another training ({state_dict['of']}, and this one is "
                    f"{self._of}); give this one another folder, or remove the checkpoint"
                )
            self.history = state_dict["history"]
            self.best_step, self._best = state_dict["best_step"], state_dict["best"]

        def on_train_start(self, trainer: Any, task: Any) -> None:
            self.resumed_at = trainer.global_step

        def on_train_batch_end(
            self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            step = trainer.global_step
            self._losses.append(float(outputs["loss"]))
            if self._from is None:
                # The first step allocates; it would make the rate look slower than it is.
                self._from, self._started = step, time.monotonic() - 1e-6
            metrics: dict[str, float] = {}
            if self._valid is not None and (step % self._every == 0 or step == self._steps):
                metrics = self._validate(trainer, step)
                if self._patience_is_over():
                    trainer.should_stop = True
            if step % self._settings.checkpoint_steps == 0 and step < self._steps:
                draft = self._last.with_name(_CHECKPOINT + ".draft")
                trainer.save_checkpoint(draft)
                if trainer.is_global_zero:
                    draft.replace(self._last)
                trainer.strategy.barrier()
            now = time.monotonic()
            due = metrics or step == self._steps
            if trainer.is_global_zero and (due or (step > self._from and now - self._told > 0.5)):
                rate = max(step - self._from, 1) / (now - self._started)
                self._on_step(
                    Step(
                        step=step,
                        steps=self._steps,
                        loss=float(np.mean(self._losses)),
                        texts_per_s=rate * self._settings.batch,
                        left_s=(self._steps - step) / rate,
                        metrics=metrics,
                    )
                )
                self._losses, self._told = [], now

        def _validate(self, trainer: Any, step: int) -> dict[str, float]:
            # Each process scores all of it: they hold the same weights, and so decide alike.
            assert self._valid is not None
            bf16 = self._settings.precision == "bf16"
            device = next(self._model.module.parameters()).device.type
            with torch.autocast(device, dtype=torch.bfloat16, enabled=bf16):
                logits = self._model.logits(self._valid["text"].to_list())
            found = measured(
                self._valid["label"].to_list(),
                [self._model.labels[place] for place in logits.argmax(axis=1)],
                self._model.labels,
            )
            by = self._settings.choose_by
            if all(found[by] > each[by] for each in self.history):
                self.best_step = step
                self._best = {
                    name: each.detach().cpu().clone()
                    for name, each in self._model.module.named_parameters()
                    if each.requires_grad
                }
            self.history.append({"step": step, **found})
            return found

        def _patience_is_over(self) -> bool:
            patience = self._settings.patience
            since = [each for each in self.history if each["step"] > self.best_step]
            return patience is not None and len(since) >= patience

        def restore_best(self) -> None:
            """Puts the best validation's weights in, where there was one."""
            if self._best is not None:
                self._model.module.load_state_dict(self._best, strict=False)

    return Watch
