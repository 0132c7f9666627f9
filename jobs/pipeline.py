"""The line from raw events to features, top to bottom.

    source → ingest → validate → features

Each step leaves versioned tables behind and writes down what it did; a resumed run skips what it
finished before.
"""

import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from cluster import dask_lease, session
from jobs.config import Pipeline
from jobs.features import build
from jobs.ingest import ingest
from jobs.runs import Run, Step
from jobs.validate import validate


def execute(
    pipeline: Pipeline,
    run: Run,
    *,
    base: Path,
    tables: Path,
    console: Console,
    dask_workers: int = 0,
) -> Run:
    """Do the steps that `run` hasn't finished.

    Args:
        pipeline: The declaration.
        run: From `jobs.runs.start` or `resume`.
        base: Folder that relative source paths start from.
        tables: Root of the Delta tables.
        console: Where progress is shown.
        dask_workers: Workers of a Dask cluster, leased from an embedded Ray one, that the features
            are spread over; 0 computes them in this process.

    Returns:
        The run, `finished`. On an error it is written as `failed` or `interrupted`, and the error
        goes on.
    """
    try:
        run = run.do("ingest", lambda: _ingest(pipeline, base, tables, console))
        run = run.do("validate", lambda: _validate(pipeline, tables, console))
        run = run.do("features", lambda: _features(pipeline, tables, console, dask_workers))
    except KeyboardInterrupt:
        run.end("interrupted")
        raise
    except Exception:
        run.end("failed")
        raise
    return run.end("finished")


def _ingest(pipeline: Pipeline, base: Path, tables: Path, console: Console) -> Step:
    start = time.perf_counter()
    detail: dict[str, dict[str, Any]] = {}
    for name, table in pipeline.tables.items():
        with console.status(f"ingest: {name}"):
            done = ingest(name, table, str(tables), base=base)
        detail[name] = asdict(done) | {"alarms": [str(alarm) for alarm in done.alarms]}
    rows = sum(table["rows"] for table in detail.values())
    return _step("ingest", start, rows, rows, detail)


def _validate(pipeline: Pipeline, tables: Path, console: Console) -> Step:
    start = time.perf_counter()
    detail: dict[str, dict[str, Any]] = {}
    for name, table in pipeline.tables.items():
        with console.status(f"validate: {name}"):
            done = validate(name, table, str(tables), tables=pipeline.tables)
        detail[name] = asdict(done)
    rows_out = sum(table["rows"] for table in detail.values())
    rows_in = rows_out + sum(table["quarantined"] for table in detail.values())
    return _step("validate", start, rows_in, rows_out, detail)


def _features(pipeline: Pipeline, tables: Path, console: Console, dask_workers: int) -> Step:
    start = time.perf_counter()
    detail: dict[str, dict[str, Any]] = {}
    engine = "polars"
    with ExitStack() as stack:
        lease = None
        if dask_workers and pipeline.features:
            stack.enter_context(session.connect())
            lease = stack.enter_context(dask_lease.lease(workers=dask_workers))
        for name, declared in pipeline.features.items():
            with console.status(f"features: {name}"):
                done = build(name, declared, str(tables), lease=lease)
            engine = done.engine
            detail[name] = asdict(done)
    rows_in = sum(features["events"] for features in detail.values())
    rows_out = sum(features["rows"] for features in detail.values())
    return _step("features", start, rows_in, rows_out, detail, engine)


def _step(
    name: str,
    start: float,
    rows_in: int,
    rows_out: int,
    detail: dict[str, Any],
    engine: str = "polars-streaming",
) -> Step:
    return Step(
        name=name,
        seconds=round(time.perf_counter() - start, 3),
        rows_in=rows_in,
        rows_out=rows_out,
        engine=engine,
        device="cpu",
        detail=detail,
    )
