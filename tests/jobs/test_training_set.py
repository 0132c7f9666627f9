"""Training sets of a small shop, checked against plain Python over the same files."""

from datetime import datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from cluster import storage
from jobs import training_set
from jobs.config import Pipeline
from jobs.features import build
from jobs.ingest import ingest
from jobs.pipeline_file import ConfigError, load
from tests.jobs import shop


@pytest.fixture
def pipeline(tmp_path: Path) -> Pipeline:
    declared = load(shop.make(tmp_path))
    fill(declared, tmp_path)
    return declared


def fill(pipeline: Pipeline, folder: Path) -> None:
    for name, table in pipeline.tables.items():
        ingest(name, table, folder / "tables", base=folder)
    build("buys", pipeline.features["buys"], folder / "tables")


def assembled(
    name: str, pipeline: Pipeline, folder: Path
) -> tuple[training_set.Assembled, pl.DataFrame]:
    done = training_set.assemble(name, pipeline, folder / "tables")
    return done, storage.scan(folder / "tables", f"training/{name}", done.version).collect()


def test_features_and_label_of_rows_with_their_own_cutoff(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    done, frame = assembled("answers", pipeline, tmp_path)
    orders = pl.read_parquet(tmp_path / "orders.parquet").rows(named=True)
    answers = pl.read_parquet(tmp_path / "answers.parquet").rows(named=True)
    assert done.rows == frame.height == 600
    for row in frame.rows(named=True):
        cutoff = row["_cutoff"]
        before = [o for o in orders if o["customer"] == row["customer"] and o["at"] < cutoff]
        recent = [o for o in before if o["at"] >= cutoff - timedelta(days=30)]
        assert row["buys_count_30d"] == len(recent)
        assert row["amount_sum_30d"] == pytest.approx(sum(o["amount"] for o in recent), rel=1e-6)
        hits = [
            a
            for a in answers
            if (a["customer"], a["mailing"]) == (row["customer"], row["mailing"])
            and cutoff <= a["at"] <= cutoff + timedelta(days=10)
        ]
        # Answers end on day 129 or so: what the last mailing brings isn't known yet.
        assert row["_label"] == (None if row["mailing"] == 4 else int(bool(hits)))


def test_no_row_trains_on_what_came_after_validation_began(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    done, frame = assembled("answers", pipeline, tmp_path)
    bounds = {"train": datetime(2024, 3, 10), "validate": datetime(2024, 4, 10)}
    for part, bound in bounds.items():
        ends = frame.filter(pl.col("_split") == part)["_cutoff"] + timedelta(days=10)
        assert (ends <= bound).all()
    assert done.split == {"test": 120, "train": 120, "validate": 120, "purged": 120, "unknown": 120}
    left_out = frame.filter(pl.col("_split").is_null())
    assert left_out.height == done.split["purged"] + done.split["unknown"]


def test_a_future_event_moves_no_feature(pipeline: Pipeline, tmp_path: Path) -> None:
    columns = [c.name for c in training_set.feature_columns(pipeline.targets["answers"], pipeline)]
    _, before = assembled("answers", pipeline, tmp_path)
    orders = pl.read_parquet(tmp_path / "orders.parquet")
    planted = orders.head(1).with_columns(
        at=pl.lit(datetime(2024, 3, 21), dtype=pl.Datetime("us")), amount=pl.lit(1e6)
    )
    pl.concat([orders, planted]).write_parquet(tmp_path / "orders.parquet")
    fill(pipeline, tmp_path)
    done, after = assembled("answers", pipeline, tmp_path)
    assert done.new
    early = pl.col("_cutoff") <= datetime(2024, 3, 21)
    assert before.filter(early).select(columns).equals(after.filter(early).select(columns))
    late = ~early & (pl.col("customer") == orders["customer"][0])
    assert (after.filter(late)["amount_sum_30d"] > 1e5).any()


def test_rows_of_the_features_cutoffs_take_attributes_and_the_declared_label(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    done, frame = assembled("lapse", pipeline, tmp_path)
    features = storage.scan(tmp_path / "tables", "features/buys").collect()
    keys = ["customer", "cutoff"]
    theirs = features.sort(keys)["lapse_10d"].to_list()
    assert frame.sort("customer", "_cutoff")["_label"].to_list() == theirs
    regions = frame.select("customer", "region").unique()
    assert set(regions.rows()) <= {(c, ["north", "south"][c % 2]) for c in range(120)}
    assert done.features == len(training_set.feature_columns(pipeline.targets["lapse"], pipeline))


def test_the_same_sources_make_no_new_version(pipeline: Pipeline, tmp_path: Path) -> None:
    first, _ = assembled("answers", pipeline, tmp_path)
    second, _ = assembled("answers", pipeline, tmp_path)
    assert (first.new, second.new) == (True, False)
    assert second.version == first.version and second.split == first.split


def test_a_label_of_one_class_is_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    late = pl.DataFrame({"customer": [0], "mailing": [99], "at": [datetime(2024, 5, 9)]})
    late.write_parquet(tmp_path / "answers.parquet")
    fill(pipeline, tmp_path)
    with pytest.raises(training_set.TrainingError, match=r"targets.answers: the label is \[0\]"):
        training_set.assemble("answers", pipeline, tmp_path / "tables")


def test_streams_and_attributes_reach_rows_with_their_own_cutoff(tmp_path: Path) -> None:
    file = shop.make(tmp_path)
    group = (
        "  seen:\n    table: orders\n    entity: customer\n    time: at\n    name: seen\n"
        "    lifetime: [count]\n"
        "    streams: {mails: {table: mailings, time: sent, lifetime: [count]}}\n"
    )
    text = file.read_text().replace("targets:\n", group + "targets:\n")
    rows = "rows: {table: mailings, cutoff: sent}\n    features: "
    text = text.replace(f"{rows}[buys]", f"{rows}[buys, seen]")
    file.write_text(text)
    pipeline = load(file)
    fill(pipeline, tmp_path)
    _, frame = assembled("answers", pipeline, tmp_path)
    # The mailings before a customer's n-th are n.
    assert (frame["mails_count_lifetime"] == frame["mailing"]).all()


def test_a_stream_of_an_undeclared_column_is_told(tmp_path: Path) -> None:
    file = shop.make(tmp_path)
    stream = "    streams: {mails: {table: mailings, time: snt, lifetime: [count]}}\n"
    text = file.read_text()
    file.write_text(text.replace("    lifetime: [recency]\n", "    lifetime: [recency]\n" + stream))
    with pytest.raises(
        ConfigError, match=r"features.buys names column 'snt' of 'mailings'.*'sent'"
    ):
        load(file)


def test_folds_are_by_time_and_purged_or_drawn_as_the_parts_are(
    pipeline: Pipeline, tmp_path: Path
) -> None:
    done, _ = assembled("lapse", pipeline, tmp_path)
    frame = training_set.load("lapse", tmp_path / "tables", done.version)
    names = [c.name for c in training_set.feature_columns(pipeline.targets["lapse"], pipeline)]
    matrices = training_set.encode(frame, names)
    target = pipeline.targets["lapse"]
    rows = frame.filter(pl.col("_split") == "train")
    found = training_set.folds(target, frame, matrices, count=2, seed=0)
    for train, scored in found.parts:
        start = rows["_cutoff"][scored].min()
        # A label looks 10 days ahead.
        assert (rows["_cutoff"][train] + timedelta(days=10) <= start).all()
    assert found.categories == tuple(2 if name == "region" else 0 for name in names)
    for each, (train, _) in zip(found.each, found.parts, strict=True):
        assert each.y_train.tolist() == rows["_label"][train].to_list()

    by_draw = target.split.model_validate({"validate_share": 0.2, "test_share": 0.2})
    drawn = training_set.folds(
        target.model_copy(update={"split": by_draw}), frame, matrices, count=3, seed=0
    )
    assert sum(scored.size for _, scored in drawn.parts) == rows.height
