"""The steps that leave tables: from source files to features."""

import time
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any

import polars as pl

from cluster import storage
from jobs.config import Scores
from jobs.features import build
from jobs.ingest import ingest
from jobs.pipeline_work import Work, step
from jobs.runs import Step
from jobs.validate import validate
from models import shift


def ingest_step(work: Work) -> Step:
    """Source files to tables."""
    start = time.perf_counter()
    detail: dict[str, dict[str, Any]] = {}
    for name, table in work.pipeline.tables.items():
        with work.console.status(f"ingest: {name}"):
            done = ingest(name, table, work.tables, base=work.base, device=work.device)
        detail[name] = asdict(done) | {"alarms": [str(alarm) for alarm in done.alarms]}
    rows = sum(table["rows"] for table in detail.values())
    ran = [table["ran"] for table in detail.values() if table["ran"]]
    engines = ", ".join(sorted({each["engine"] for each in ran})) or "nothing had changed"
    devices = ", ".join(sorted({each["device"] for each in ran})) or "cpu"
    return step("ingest", start, rows, rows, detail, engines, devices)


def validate_step(work: Work) -> Step:
    """Rows that break a rule to quarantine."""
    start = time.perf_counter()
    detail: dict[str, dict[str, Any]] = {}
    for name, table in work.pipeline.tables.items():
        with work.console.status(f"validate: {name}"):
            done = validate(name, table, work.tables, tables=work.pipeline.tables)
        detail[name] = asdict(done)
    rows_out = sum(table["rows"] for table in detail.values())
    rows_in = rows_out + sum(table["quarantined"] for table in detail.values())
    return step("validate", start, rows_in, rows_out, detail, "pandera on polars")


def sentiment_step(work: Work) -> Step:
    """A sentiment model trained, and tables scored by it."""
    from jobs import sentiment

    declared = work.pipeline.sentiment
    assert declared is not None
    start = time.perf_counter()
    _ = work.cluster
    done = sentiment.run(
        declared.training,
        work.run.folder,
        work.registry,
        root=work.base,
        git_revision=work.run.git_revision,
        console=work.console,
    )
    told = ("name", "version", "aliases", "encoder", "mode", "metrics", "tfidf_macro_f1")
    detail = {key: done[key] for key in told}
    detail["scored"] = {table: _scored(work, table) for table in declared.scores}
    rows = sum(each["rows"] for each in detail["scored"].values())
    return step("sentiment", start, sum(done["rows"].values()), rows, detail, "torch on Ray")


def _scored(work: Work, table: str) -> dict[str, Any]:
    """The table's texts scored by the champion, as `TABLE_sentiment`."""
    from jobs import sentiment_scoring

    declared = work.pipeline.sentiment
    assert declared is not None
    scores = declared.scores[table]
    into = work.run.folder / "sentiment" / table
    into.mkdir(parents=True, exist_ok=True)
    _, model = work.registry.folder(declared.name, into)
    with sentiment_scoring.shown(work.console) as (on_start, on_done):
        done = sentiment_scoring.score_file(
            table,
            f"{table}_sentiment",
            text_column=scores.text,
            model=model,
            storage_root=work.tables,
            work=into,
            device=work.device.kind,
            on_start=on_start,
            on_done=on_done,
        )
    return {
        "rows": done.rows,
        "engine": done.engine.reason,
        "outcomes": dict(done.outcomes),
        "alarms": _shifts(storage.scan(work.tables, f"{table}_sentiment"), scores),
    }


def _shifts(scored: pl.LazyFrame, declared: Scores) -> list[dict[str, str]]:
    """Where sentiment has shifted in the week before a table's last row."""
    if declared.time is None:
        return []
    time = pl.col(declared.time).cast(pl.Datetime("us"))
    told = scored.select({*declared.by, declared.time, "sentiment"}).with_columns(time).collect()
    last = told[declared.time].max()
    if not isinstance(last, datetime):
        return []
    found = []
    for by in declared.by:
        judged = shift.alarms(
            told,
            entity=by,
            time=declared.time,
            value="sentiment",
            at=last + timedelta(microseconds=1),
        )
        found += [
            {"by": by, "value": str(value), "reason": reason}
            for value, reason in judged.filter("alarm").select(by, "reason").iter_rows()
        ]
    return found


def features_step(work: Work) -> Step:
    """Events to features, group by group."""
    start = time.perf_counter()
    detail: dict[str, dict[str, Any]] = {}
    engine = "polars"
    for name, declared in work.pipeline.features.items():
        # Groups without cutoffs are computed where a target's rows ask for them.
        if declared.cutoffs == []:
            continue
        with work.console.status(f"features: {name}"):
            done = build(name, declared, work.tables, lease=work.lease)
        engine = done.engine
        detail[name] = asdict(done)
    rows_in = sum(features["events"] for features in detail.values())
    rows_out = sum(features["rows"] for features in detail.values())
    return step("features", start, rows_in, rows_out, detail, engine)
