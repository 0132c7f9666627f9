"""The line from raw events to checked tables, top to bottom.

    source → ingest → validate

Each step leaves versioned tables behind and writes down what it did; a resumed run skips what it
finished before.
"""

import time
from pathlib import Path
from typing import Any

from rich.console import Console

from jobs.config import Pipeline
from jobs.ingest import ingest
from jobs.runs import Run, Step
from jobs.validate import validate

STEPS = ("ingest", "validate")


def execute(pipeline: Pipeline, run: Run, *, base: Path, tables: Path, console: Console) -> Run:
    """Do the steps that `run` hasn't finished.

    Args:
        pipeline: The declaration.
        run: From `jobs.runs.start` or `resume`.
        base: Folder that relative source paths start from.
        tables: Root of the Delta tables.
        console: Where progress is shown.

    Returns:
        The run, `finished`. On an error it is written as `failed` or `interrupted`, and the error
        goes on.
    """
    try:
        run = run.do("ingest", lambda: _ingest(pipeline, base, tables, console))
        run = run.do("validate", lambda: _validate(pipeline, tables, console))
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
        detail[name] = {
            "version": done.version,
            "rows": done.rows,
            "partitions": done.partitions,
            "new": done.new,
            "alarms": [str(alarm) for alarm in done.alarms],
        }
    rows = sum(table["rows"] for table in detail.values())
    return _step("ingest", start, rows, rows, detail)


def _validate(pipeline: Pipeline, tables: Path, console: Console) -> Step:
    start = time.perf_counter()
    detail: dict[str, dict[str, Any]] = {}
    for name, table in pipeline.tables.items():
        with console.status(f"validate: {name}"):
            done = validate(name, table, str(tables), tables=pipeline.tables)
        detail[name] = {
            "version": done.version,
            "rows": done.rows,
            "quarantined": done.quarantined,
            "by_rule": done.by_rule,
        }
    rows_out = sum(table["rows"] for table in detail.values())
    rows_in = rows_out + sum(table["quarantined"] for table in detail.values())
    return _step("validate", start, rows_in, rows_out, detail)


def _step(name: str, start: float, rows_in: int, rows_out: int, detail: dict[str, Any]) -> Step:
    return Step(
        name=name,
        seconds=round(time.perf_counter() - start, 3),
        rows_in=rows_in,
        rows_out=rows_out,
        engine="polars-streaming",
        device="cpu",
        detail=detail,
    )
