"""The command line, `liftyard`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster import environment
from jobs import runs, show
from jobs.pipeline import execute
from jobs.pipeline_file import load

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
console = Console()
errors = Console(stderr=True)


Home = Annotated[
    Path, typer.Option(envvar="LIFTYARD_HOME", help="Folder of tables, models and environments.")
]
Env = Annotated[
    str | None,
    typer.Option("--env", help="Environment: embedded (default), local, a name or a file."),
]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of the runs.")]
HOME, RUNS = Path(".liftyard"), Path("runs")


@contextmanager
def _told() -> Iterator[None]:
    """A user's mistake (settings, data, names, disks) is told, not traced."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print("interrupted; `liftyard run … --resume RUN` goes on with a run")
        raise typer.Exit(130) from None
    except (ValueError, OSError) as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None


@app.callback()
def liftyard() -> None:
    """Marketing analytics on one Ray and Dask cluster."""


@app.command()
def run(
    pipeline: Annotated[Path, typer.Argument(help="The pipeline's YAML file.")],
    env: Env = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="KEY=VALUE, in place of what the file says; may be repeated."),
    ] = None,
    again_from: Annotated[
        str | None,
        typer.Option("--from", help="Do this step of the run to resume, or of the latest, again."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(help="Go on with this run: its finished steps are not redone.")
    ] = None,
    dask_workers: Annotated[
        int | None,
        typer.Option(min=0, help="Spread the features over so many Dask workers, or (0) none."),
    ] = None,
    home: Home = HOME,
    runs_root: Runs = RUNS,
) -> None:
    """Run a pipeline, from its sources to served scores and a report."""
    with _told():
        declared = load(pipeline, overrides or [])
        where = environment.load(env, home=home)
        if again_from is not None and resume is None:
            resume = runs.latest(runs_root, declared.name)
        started = (
            runs.start(runs_root, pipeline=declared.name, seed=declared.seed)
            if resume is None
            else runs.resume(
                runs_root,
                resume,
                pipeline=declared.name,
                seed=declared.seed,
                again_from=again_from,
            )
        )
        console.print(f"run {started.run_id}")
        done = execute(
            declared,
            started,
            environment=where,
            base=pipeline.parent,
            console=console,
            dask_workers=dask_workers,
        )
    show.run(done, console)


if __name__ == "__main__":
    app()
