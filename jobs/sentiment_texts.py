"""The labelled texts of a sentiment training: read, masked, each once, in the part it falls in."""

from pathlib import Path

import polars as pl

from jobs.sentiment_config import SentimentTraining, Texts
from models.text import clean, drawn

PARTS = ("train", "valid", "test")


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
