"""The command line, `liftyard`."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from cluster import environment, local
from cluster.device import DeviceError, Preference, choose
from jobs import runs, scoring, show, submission
from jobs.pipeline import execute
from jobs.pipeline_file import load
from jobs.report import write as write_report
from jobs.sweep import SweepError
from models.registry import Registry

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
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="KEY=VALUE, in place of what the file says; may be repeated."),
]
From = Annotated[
    str | None,
    typer.Option("--from", help="Do this step of the run to resume, or of the latest, again."),
]
Resume = Annotated[
    str | None, typer.Option(help="Go on with this run: its finished steps are not redone.")
]
Job = Annotated[str, typer.Argument(help="The job's id.")]
Model = Annotated[str, typer.Argument(help="The model's name.")]
Runs = Annotated[Path, typer.Option("--runs", help="Folder of the runs.")]
HOME, RUNS = Path(".liftyard"), Path("runs")


@contextmanager
def _told() -> Iterator[None]:
    """A user's mistake (settings, data, names, disks) is told, not traced."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print("interrupted")
        raise typer.Exit(130) from None
    except (ValueError, OSError, DeviceError, SweepError) as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None


@app.callback()
def liftyard() -> None:
    """Marketing analytics on one Ray and Dask cluster."""


@app.command()
def run(
    pipeline: Annotated[Path, typer.Argument(help="The pipeline's YAML file.")],
    env: Env = None,
    overrides: Set = None,
    again_from: From = None,
    resume: Resume = None,
    dask_workers: Annotated[
        int | None,
        typer.Option(min=0, help="Spread the features over so many Dask workers, or (0) none."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, or auto: CUDA where a GPU and RAPIDS are.")
    ] = "auto",
    home: Home = HOME,
    runs_root: Runs = RUNS,
) -> None:
    """Run a pipeline, from its sources to served scores and a report."""
    # Who stops a job sends TERM: the run then ends as it does on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with _told():
        declared = load(pipeline, overrides or [])
        where = environment.load(env, home=home)
        chosen = choose(cast(Preference, device))
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
        console.print(f"run {started.run_id} on {chosen.kind}: {chosen.reason}", soft_wrap=True)
        try:
            done = execute(
                declared,
                started,
                environment=where,
                base=pipeline.parent,
                console=console,
                device=chosen,
                dask_workers=dask_workers,
            )
        except BaseException:
            errors.print(
                f"the run stopped; `--resume {started.run_id}` goes on where it did",
                highlight=False,
                soft_wrap=True,
            )
            raise
    show.run(done, console)


@app.command()
def report(
    run_id: Annotated[str | None, typer.Argument(metavar="RUN", help="Default: newest.")] = None,
    runs_root: Runs = RUNS,
) -> None:
    """Make a run's report anew, and print where it is."""
    with _told():
        console.print(str(write_report(runs.folder(runs_root, run_id))), soft_wrap=True)


@app.command()
def up(
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that Ray gives out.")] = None,
    dask_workers: Annotated[
        int | None, typer.Option(min=0, help="Workers of a standing Dask cluster, one CPU each.")
    ] = None,
    home: Home = HOME,
) -> None:
    """Start the environment `local`: a Ray cluster that stays until `liftyard down`."""
    with _told(), console.status("starting"):
        where = local.up(home, cpus=cpus, dask_workers=dask_workers)
    show.environment(where, console)


@app.command()
def down(home: Home = HOME) -> None:
    """End what `liftyard up` started; tables, models and runs stay."""
    with _told(), console.status("ending"):
        ended = local.down(home)
    console.print(f"ended {', '.join(ended)}" if ended else "nothing was up")


@app.command()
def status(env: Env = "local", home: Home = HOME) -> None:
    """Show an environment's addresses, nodes, Dask workers and jobs."""
    with _told():
        where = environment.load(env, home=home)
        found = local.status(where)
    show.environment(where, console)
    show.status(found, console)


@app.command()
def submit(
    pipeline: Annotated[Path, typer.Argument(help="The pipeline's YAML file.")],
    env: Env = "local",
    overrides: Set = None,
    again_from: From = None,
    resume: Resume = None,
    home: Home = HOME,
    runs_root: Runs = RUNS,
) -> None:
    """Run a pipeline as a job of an environment, and return at once."""
    with _told():
        load(pipeline, overrides or [])
        options: dict[str, Path | str | None] = {
            "--home": home.resolve(),
            "--runs": runs_root.resolve(),
            "--from": again_from,
            "--resume": resume,
        }
        arguments = [str(a) for pair in options.items() if pair[1] is not None for a in pair]
        arguments += [argument for each in overrides or [] for argument in ("--set", each)]
        where = environment.load(env, home=home)
        console.print(submission.submit(where, pipeline, arguments=arguments))


@app.command("jobs")
def list_jobs(env: Env = "local", home: Home = HOME) -> None:
    """List an environment's jobs."""
    with _told():
        found = submission.jobs(environment.load(env, home=home))
    show.jobs(found, console)


@app.command()
def logs(
    job: Job,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until it ends.")] = False,
    env: Env = "local",
    home: Home = HOME,
) -> None:
    """Print what a job has written."""
    with _told():
        for piece in submission.logs(environment.load(env, home=home), job, follow=follow):
            typer.echo(piece, nl=False)


@app.command()
def stop(job: Job, env: Env = "local", home: Home = HOME) -> None:
    """Stop a job; `liftyard run --resume` can go on with its run."""
    with _told():
        ended = submission.stop(environment.load(env, home=home), job)
    console.print(f"{ended.id} {ended.status}")


@app.command()
def models(env: Env = None, home: Home = HOME) -> None:
    """List the registered models, their test metrics, champions and challengers."""
    with _told():
        show.models(_registry(env, home).models(), console)


@app.command()
def promote(
    model: Model,
    version: Annotated[int, typer.Argument(help="The version to become champion.")],
    env: Env = None,
    home: Home = HOME,
) -> None:
    """Make a version the champion; what is served follows within seconds."""
    with _told():
        card = _registry(env, home).promote(model, version)
    console.print(f"champion of {card.name}: version {card.version}")


@app.command()
def rollback(model: Model, env: Env = None, home: Home = HOME) -> None:
    """Go back to the champion before; again, to the one before that."""
    with _told():
        card = _registry(env, home).rollback(model)
    console.print(f"champion of {card.name}: version {card.version}")


@app.command()
def score(
    file: Annotated[Path, typer.Argument(help="CSV or Parquet with the model's features.")],
    model: Annotated[str, typer.Option(help="The model.")],
    out: Annotated[Path, typer.Option(help="CSV or Parquet: the rows and their `score`.")],
    version: Annotated[int | None, typer.Option(help="Default: the champion.")] = None,
    env: Env = None,
    home: Home = HOME,
) -> None:
    """Score the rows of a file with a registered model, in this process."""
    with _told(), console.status(f"scoring {file}"):
        done = scoring.score_file(file, out, _registry(env, home), model, version=version)
    console.print(f"{done.rows:,} rows by {model} version {done.version}: {out}", soft_wrap=True)


def _registry(env: str | None, home: Path) -> Registry:
    return Registry(environment.load(env, home=home).tracking_uri)


if __name__ == "__main__":
    app()
