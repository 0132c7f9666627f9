"""The line from raw events to served scores, top to bottom.

    source → ingest → validate → sentiment → features → training → sweep → register → serve → report

Each step leaves versioned tables or models behind and writes down what it did; a resumed run skips
what it finished before.
"""

from contextlib import ExitStack
from functools import partial
from pathlib import Path

from rich.console import Console

from cluster.device import Device
from cluster.environment import Environment
from jobs import pipeline_models, pipeline_tables, report
from jobs.config import Pipeline
from jobs.pipeline_work import Work
from jobs.runs import Run


def execute(
    pipeline: Pipeline,
    run: Run,
    *,
    environment: Environment,
    base: Path,
    console: Console,
    device: Device,
    dask_workers: int | None = None,
) -> Run:
    """Do the steps that `run` hasn't finished.

    Args:
        pipeline: The declaration.
        run: From `jobs.runs.start` or `resume`.
        environment: Where it runs.
        base: Folder that relative source paths start from.
        console: Where progress is shown.
        device: From `cluster.device.choose`.
        dask_workers: Workers of a Dask cluster leased from Ray that features are spread over; 0
            computes them in this process; None takes the environment's standing lease, and where
            there is none decides by the number of events.

    Returns:
        The run, `finished`. On an error it is written as `failed` or `interrupted`, and the error
        goes on.
    """
    with ExitStack() as stack:
        work = Work(
            pipeline=pipeline,
            run=run,
            environment=environment,
            base=base,
            console=console,
            device=device,
            dask_workers=dask_workers,
            stack=stack,
        )
        try:
            run = run.do("ingest", partial(pipeline_tables.ingest_step, work))
            run = work.run = run.do("validate", partial(pipeline_tables.validate_step, work))
            if pipeline.sentiment is not None:
                run = work.run = run.do("sentiment", partial(pipeline_tables.sentiment_step, work))
            run = run.do("features", partial(pipeline_tables.features_step, work))
            if pipeline.targets:
                run = work.run = run.do("training", partial(pipeline_models.training_step, work))
                run = work.run = run.do("sweep", partial(pipeline_models.sweep_step, work))
                run = work.run = run.do("register", partial(pipeline_models.register_step, work))
                run = run.do("serve", partial(pipeline_models.serve_step, work))
        except BaseException as error:
            run = run.end("interrupted" if isinstance(error, KeyboardInterrupt) else "failed")
            try:
                report.write(run.folder)
            except (report.ReportError, OSError) as unwritten:
                # The run's own error is the one to tell.
                error.add_note(f"and its report can't be written: {unwritten}")
            raise
        run = run.end("finished")
        report.write(run.folder)
        return run
