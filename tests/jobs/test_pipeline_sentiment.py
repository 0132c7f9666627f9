"""A pipeline that trains on texts, scores a table's, and has features of what they say."""

import json
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from cluster import session, storage
from jobs import sentiment_texts, training_set
from jobs.cli import app
from jobs.pipeline_file import ConfigError, load
from jobs.sentiment_config import SentimentTraining
from tests import tiny_encoder

PIPELINE = """\
name: voices
seed: 5
tables:
  comments:
    source: {path: comments.parquet}
    entity: customer
    columns: {customer: int64, product: string, at: datetime, text: string}
sentiment:
  texts: [{path: labelled.csv}]
  encoder: ENCODER
  mode: head
  topics: {groups: 2}
  scores:
    comments: {text: text, time: at, by: [product]}
features:
  mood:
    table: comments_sentiment
    entity: customer
    time: at
    name: comments
    measures: {mood: sentiment}
    windows: [10d]
    aggregations: [count, mean, slope]
    lifetime: [mean]
    trends: [[10d, 20d]]
    cutoffs: ["2024-03-01T00:00:00"]
"""
# Rows of their own, so that features are computed at each row's cutoff.
TARGET = """\
targets:
  broken:
    features: [mood]
    rows: {table: comments, cutoff: at}
    label: {column: product, positive: lamp}
    split: {validate_share: 0.2, test_share: 0.2}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("voices")
    encoder = tiny_encoder.write(folder / "encoder")
    tiny_encoder.labelled(300).write_csv(folder / "labelled.csv")
    start, hours = datetime(2024, 2, 1), 840
    texts = tiny_encoder.labelled(hours, seed=9)["text"].to_list()
    # In the last week, the lamp is broken.
    texts[-168::2] = [f"the {tiny_encoder.BAD[i % 5]} price" for i in range(84)]
    # No text: its sentiment is null, and counts in no mean.
    texts[600] = "12345"
    pl.DataFrame(
        {
            "customer": [i % 7 for i in range(hours)],
            "product": ["lamp", "kettle"] * (hours // 2),
            "at": [start + timedelta(hours=i) for i in range(hours)],
            "text": texts,
        }
    ).write_parquet(folder / "comments.parquet")
    (folder / "voices.yaml").write_text(PIPELINE.replace("ENCODER", str(encoder)))
    return folder


def test_features_say_what_the_texts_said(folder: Path) -> None:
    arguments = ["run", str(folder / "voices.yaml"), "--home", str(folder / "home")]
    with session.connect(cpus=2):
        result = CliRunner().invoke(app, [*arguments, "--runs", str(folder / "runs")])
    assert result.exit_code == 0, result.output
    (summary,) = (folder / "runs").glob("*/summary.json")
    steps = {step["name"]: step for step in json.loads(summary.read_text())["steps"]}
    told = steps["sentiment"]["detail"]
    assert told["scored"]["comments"]["rows"] == 840
    (alarm,) = told["scored"]["comments"]["alarms"]
    assert (alarm["by"], alarm["value"]) == ("product", "lamp")
    assert alarm["reason"].startswith("mean fell from")
    assert f"lamp: {alarm['reason']}" in " ".join(result.output.split())
    assert told["aliases"] == ["champion"]
    assert "Sentiment" in (summary.parent / "report.html").read_text()

    tables = folder / "home" / "tables"
    scored = storage.scan(tables, "comments_sentiment").collect()
    assert dict(scored["outcome"].value_counts().rows()) == {"ok": 839, "not_text": 1}
    assert scored["sentiment"].is_between(-1, 1).sum() == 839
    cutoff = datetime(2024, 3, 1)
    recent = scored.filter(pl.col("at") >= cutoff - timedelta(days=10), pl.col("at") < cutoff)
    expected = recent.group_by("customer").agg(pl.col("sentiment").mean()).sort("customer")
    features = storage.scan(tables, "features/mood").collect().sort("customer")
    assert features["mood_mean_10d"].to_list() == pytest.approx(
        expected["sentiment"].to_list(), rel=1e-6
    )

    # The step after it, for a target that is predicted from them.
    (folder / "target.yaml").write_text((folder / "voices.yaml").read_text() + TARGET)
    made = training_set.assemble("broken", load(folder / "target.yaml"), tables)
    rows = training_set.load("broken", tables, made.version)
    assert rows.height == 840
    expected = scored.filter(pl.col("at") >= cutoff - timedelta(days=10), pl.col("at") < cutoff)
    (row,) = rows.filter(pl.col("_cutoff") == cutoff).iter_rows(named=True)
    assert row["comments_count_10d"] == (expected["customer"] == row["customer"]).sum() > 0


def test_a_group_is_on_one_side(tmp_path: Path) -> None:
    texts = tiny_encoder.labelled(300).with_row_index("id")
    texts.with_columns(pair=pl.col("id") // 2).write_csv(tmp_path / "texts.csv")
    declared = {"texts": [{"path": "texts.csv", "group": "pair"}]}
    found = sentiment_texts.rows(SentimentTraining.model_validate(declared), tmp_path)
    apart = found.join(texts.unique("text", keep="first"), on="text").with_columns(
        pair=pl.col("id") // 2
    )
    assert apart.group_by("pair").agg(pl.col("part").n_unique())["part"].max() == 1
    assert set(found["part"]) == {"train", "valid", "test"}


def test_a_table_that_is_not_declared_is_refused(folder: Path) -> None:
    wrong = folder / "wrong.yaml"
    wrong.write_text(
        (folder / "voices.yaml").read_text().replace("    comments: {text", "    coments: {text")
    )
    with pytest.raises(ConfigError, match=r"sentiment.scores.coments: no such table.*'comments'"):
        load(wrong)
    wrong.write_text((folder / "voices.yaml").read_text().replace("{text: text", "{text: txt"))
    with pytest.raises(ConfigError, match=r"sentiment.scores.comments names column 'txt'.*'text'"):
        load(wrong)
