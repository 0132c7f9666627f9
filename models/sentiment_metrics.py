"""How right labels are: macro-recall and macro-F1, whole and by slice; plain rivals beside them.

Macro-recall is TweetEval's measure for sentiment, the mean of the classes' recalls; macro-F1 is
the mean of the classes' F1. Both count a rare class as much as a frequent one.
"""

from collections.abc import Sequence

import numpy as np
import polars as pl


def measured(truth: Sequence[str], said: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """accuracy, macro_recall and macro_f1 over the labels that occur in truth.

    Args:
        truth: What is right, one label a text.
        said: What a model says, in the same order.
        labels: All there are.

    Returns:
        NaN each where there is no text.
    """
    if not len(truth):
        return dict.fromkeys(("accuracy", "macro_recall", "macro_f1"), float("nan"))
    true, told = np.asarray(truth), np.asarray(said)
    recalls, f1s = [], []
    for label in labels:
        is_true, is_told = true == label, told == label
        if not is_true.any():
            continue
        hit = (is_true & is_told).sum()
        recalls.append(hit / is_true.sum())
        f1s.append(2 * hit / (is_true.sum() + is_told.sum()))
    return {
        "accuracy": float((true == told).mean()),
        "macro_recall": float(np.mean(recalls)),
        "macro_f1": float(np.mean(f1s)),
    }


def by_slice(rows: pl.DataFrame, said: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """The metrics whole, by language and by length, such as `macro_f1`, `macro_f1.language_pl`.

    Args:
        rows: Columns text and label; language too, if there is one.
        said: A label a row.
        labels: All there are.

    Returns:
        `rows` and `rows.SLICE` count texts. Lengths are in words: short below 10, long above 25.
    """
    words = pl.col("text").str.count_matches(r"\S+")
    length = (
        pl.when(words < 10).then(pl.lit("short")).when(words > 25).then(pl.lit("long"))
    ).otherwise(pl.lit("middle"))
    frame = rows.select(
        "label",
        *(["language"] if "language" in rows.columns else []),
        length=length,
        said=pl.Series(list(said), dtype=pl.String),
    )
    found = {**measured(frame["label"].to_list(), list(said), labels), "rows": float(len(frame))}
    for column in ("language", "length"):
        if column not in frame.columns:
            continue
        for (value,), part in sorted(frame.group_by(column), key=lambda each: str(each[0])):
            inside = measured(part["label"].to_list(), part["said"].to_list(), labels)
            name = f"{column}_{value}"
            found |= {f"{metric}.{name}": number for metric, number in inside.items()}
            found[f"rows.{name}"] = float(len(part))
    return found


def tfidf_labels(
    train: pl.DataFrame, texts: Sequence[str], *, characters: bool = False
) -> list[str]:
    """What TF-IDF with logistic regression says: the rival that every model has to beat.

    Args:
        train: Columns text and label.
        texts: To be labelled.
        characters: Whether n-grams of 2 to 5 characters are used instead of 1 and 2 words; better
            for languages that inflect.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = (
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=2, sublinear_tf=True)
        if characters
        else TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    )
    x = vectors.fit_transform(train["text"].to_list())
    model = LogisticRegression(max_iter=1000, class_weight="balanced")
    model.fit(x, train["label"].to_list())
    return [str(label) for label in model.predict(vectors.transform(list(texts)))]
