"""The command line, `liftyard`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs import config, runs
from jobs.pipeline import execute

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
errors = Console(stderr=True)


@app.callback()
def liftyard() -> None:
    """Marketing analytics on one Ray and Dask cluster."""


@app.command()
def run(
    pipeline: Annotated[Path, typer.Argument(help="The pipeline's YAML file.")],
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run: its finished steps are not redone.")
    ] = None,
    dask_workers: Annotated[
        int, typer.Option(min=0, help="Spread the features over this many Dask workers.")
    ] = 0,
    root: Annotated[Path, typer.Option(help="Folder of the versioned tables.")] = Path(".liftyard"),
    runs_root: Annotated[Path, typer.Option("--runs", help="Folder of the runs.")] = Path("runs"),
) -> None:
    """Run a pipeline."""
    try:
        declared = config.load(pipeline)
        started = (
            runs.start(runs_root, pipeline=declared.name, seed=declared.seed)
            if resume is None
            else runs.resume(runs_root, resume, pipeline=declared.name, seed=declared.seed)
        )
        console.print(f"run {started.run_id}")
        done = execute(
            declared,
            started,
            base=pipeline.parent,
            tables=root / "tables",
            console=console,
            dask_workers=dask_workers,
        )
    except KeyboardInterrupt:
        errors.print("interrupted; go on with --resume and the run's id")
        raise typer.Exit(130) from None
    # The user's mistakes (settings, data, names, disks) are told, not traced.
    except (ValueError, OSError) as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
    _print(done)


def _print(run: runs.Run) -> None:
    table = Table("step", "seconds", "rows in", "rows out", "engine", "device")
    for step in run.steps:
        table.add_row(
            step.name,
            f"{step.seconds:.1f}",
            f"{step.rows_in:,}",
            f"{step.rows_out:,}",
            step.engine,
            step.device,
        )
    console.print(table)
    console.print(f"summary: {run.folder / 'summary.json'}", soft_wrap=True)
