"""The pipeline's sentiment step: trained, tested, explained, grouped by topic, registered."""

import json
import shutil
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from cluster import estimators
from cluster.device import choose
from cluster.files import replace_text
from jobs.sentiment_config import SentimentTraining
from jobs.sentiment_texts import rows
from jobs.sentiment_training import job_of, on_ray, train
from models import sentiment, sentiment_explain, topics
from models.registry import Registry
from models.registry_versions import Card
from models.sentiment_metrics import by_slice, measured, tfidf_labels

_EXAMPLES = 6


def run(
    config: SentimentTraining,
    run_folder: Path,
    registry: Registry,
    *,
    root: Path,
    git_revision: str = "",
    console: Console | None = None,
) -> dict[str, Any]:
    """Trains, tests, registers and describes; the pipeline's sentiment step.

    The first version becomes champion; a later one does if its macro-F1 on this test's texts is at
    least the champion's, and is the challenger otherwise.

    Args:
        config: What to train.
        run_folder: `sentiment.json` is written there, and the training's folder `sentiment`.
        registry: Where the model goes.
        root: Folder that relative paths start from.
        git_revision: Of the code.
        console: Where progress is shown live; None shows none.

    Returns:
        What `sentiment.json` holds, JSON values: name, version, aliases, encoder, mode, settings,
        rows (by part), languages, metrics (whole and by slice, as `by_slice` names them),
        tfidf_macro_f1, champion_macro_f1 (None without one), history, train_s, examples (text,
        language, label, said, probability, html), topics (see `models.topics.Topic`),
        topics_engine (what grouped them, where and why there), seconds.

    Raises:
        SentimentJobError: See `rows` and `train`.
        RegistryError, OSError: The registry's.
    """
    started = time.perf_counter()
    summary = run_folder / "sentiment.json"
    if summary.exists():
        done: dict[str, Any] = json.loads(summary.read_text(encoding="utf-8"))
        return done
    frame = rows(config, root)
    work = train(config, frame, run_folder / "sentiment", registry=registry, console=console)
    trained = json.loads((work / "trained.json").read_text(encoding="utf-8"))
    champion = _champion(config, registry, work)
    job = {"config": config.model_dump_json(), "folder": str(work), "champion": champion}
    found = on_ray(config, _assess)(job)
    if console is not None:
        console.print(f"topics: {found['topics_engine']}", soft_wrap=True, markup=False)
    settings = asdict(config.settings(**trained["variant"]))
    card = registry.register_folder(
        config.name,
        work / "model",
        family="sentiment",
        variant={"encoder": config.encoder, "mode": config.mode, **settings},
        metrics=found["metrics"],
        data_version=f"texts {work.name}",
        seed=config.seed,
        git_revision=git_revision,
        history=trained["history"],
    )
    card = _promoted(registry, card, found)
    said = {
        "name": card.name,
        "version": card.version,
        "aliases": list(card.aliases),
        "encoder": config.encoder,
        "mode": config.mode,
        "settings": settings,
        "rows": dict(frame["part"].value_counts(sort=True).rows()),
        "languages": dict(frame["language"].value_counts(sort=True).rows()),
        **found,
        "history": trained["history"],
        "train_s": trained["seconds"],
        "seconds": time.perf_counter() - started,
    }
    replace_text(summary, json.dumps(said, indent=2, ensure_ascii=False))
    return said


def _champion(config: SentimentTraining, registry: Registry, work: Path) -> str | None:
    """The champion's folder, fetched; None without one, or where its labels are others."""
    card = registry.champion(config.name)
    if card is None:
        return None
    into = work / "champion"
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    _, folder = registry.folder(config.name, into, card.version)
    labels = json.loads((folder / "sentiment.json").read_text(encoding="utf-8"))["labels"]
    return str(folder) if labels == config.labels else None


def _promoted(registry: Registry, card: Card, found: dict[str, Any]) -> Card:
    before = found["champion_macro_f1"]
    if registry.champion(card.name) is None or (
        before is not None and found["metrics"]["macro_f1"] >= before
    ):
        return registry.promote(card.name, card.version)
    return registry.challenge(card.name, card.version)


def _assess(job: dict[str, Any]) -> dict[str, Any]:
    """Metrics, examples and topics, on a worker."""
    config, work, parts = job_of(job)
    model = sentiment.load(work / "model")
    test = parts["test"]
    texts = test["text"].to_list()
    probabilities = model.probabilities(texts)
    said = [model.labels[at] for at in probabilities.argmax(axis=1)]
    rival = tfidf_labels(parts["train"], texts, characters=True)
    before = None
    if job["champion"] is not None:
        champion = sentiment.load(Path(job["champion"]))
        told = [champion.labels[at] for at in champion.logits(texts).argmax(axis=1)]
        before = measured(test["label"].to_list(), told, model.labels)["macro_f1"]
        shutil.rmtree(Path(job["champion"]).parent)
    engine, grouped = _topics(config, model, pl.concat(list(parts.values())))
    return {
        "metrics": by_slice(test, said, model.labels),
        "tfidf_macro_f1": measured(test["label"].to_list(), rival, model.labels)["macro_f1"],
        "champion_macro_f1": before,
        "examples": _examples(model, test.with_columns(said=pl.Series(said))),
        "topics": grouped,
        "topics_engine": engine,
    }


def _examples(model: sentiment.Sentiment, test: pl.DataFrame) -> list[dict[str, Any]]:
    """A few test texts of each label, explained; texts in the order of the file."""
    each = -(-_EXAMPLES // len(model.labels))
    chosen = test.group_by("label", maintain_order=True).head(each)
    found = []
    for row in chosen.iter_rows(named=True):
        why = sentiment_explain.explain(model, row["text"], label=row["said"], tolerance=0.1)
        found.append(
            {
                **{name: row[name] for name in ("text", "language", "label", "said")},
                "probability": why.probability,
                "html": sentiment_explain.html([why]),
            }
        )
    return found


def _topics(
    config: SentimentTraining, model: sentiment.Sentiment, frame: pl.DataFrame
) -> tuple[str, list[dict[str, Any]]]:
    """Of all texts, with the sentiment that their labels say; first, what grouped them and why."""
    declared, texts = config.topics, frame["text"].to_list()
    # With `gpus` it must be CUDA, or this is an error: nothing falls back.
    device = choose("cuda" if config.gpus else "cpu")
    library = "cuML" if device.kind == "cuda" else "scikit-learn"
    _, found = topics.topics(
        texts,
        model.embeddings(texts),
        labels=frame["label"].to_list(),
        languages=frame["language"].to_list(),
        method=declared.method,
        groups=min(declared.groups, len(texts)),
        least=declared.least,
        seed=config.seed,
        kmeans=partial(estimators.kmeans, device),
        hdbscan=partial(estimators.hdbscan, device),
    )
    engine = f"{declared.method} of {library} on {device.kind} (gpus: {config.gpus:g})"
    return engine, [
        {
            **asdict(topic),
            "terms": list(topic.terms),
            "examples": [texts[at] for at in topic.examples],
        }
        for topic in found
    ]
