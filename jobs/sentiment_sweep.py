"""The variants of a sentiment training, tried by the project's sweep.

Each is fine-tuned on an actor of the pool and judged by the validation texts; the journal is beside
the training, so that a sweep that stopped goes on.
"""

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from jobs import sweep
from jobs.sentiment_config import SentimentTraining
from jobs.sentiment_texts import SentimentJobError
from jobs.sweep_board import Listed, Outcome
from models import sentiment
from models.families import Variant
from models.registry import Registry
from models.registry_sweeps import Trial
from models.sentiment_training import fit


def best_variant(
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
        data: config (JSON), frame (of `jobs.sentiment_texts.rows`) and folder.
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
