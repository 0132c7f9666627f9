"""The command line, `liftyard`."""

import signal
from pathlib import Path
from types import FrameType
from typing import Annotated, cast

import typer

from cluster import environment, local
from cluster.device import Preference, choose
from jobs import dispatch, queue, queue_cli, runs, scoring, sentiment_cli, serve_cli, show
from jobs.console import HOME, RUNS, Env, From, Home, Resume, Runs, Set, console, errors, told
from jobs.pipeline import execute
from jobs.pipeline_file import load
from jobs.report import write as write_report
from models.registry import Registry

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(queue_cli.app)
app.add_typer(serve_cli.app)
app.add_typer(sentiment_cli.app, name="sentiment")

Model = Annotated[str, typer.Argument(help="The model's name.")]


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
    signal.signal(signal.SIGTERM, _interrupted)
    with told():
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
    with told():
        console.print(str(write_report(runs.folder(runs_root, run_id))), soft_wrap=True)


@app.command()
def up(
    cpus: Annotated[int | None, typer.Option(min=1, help="CPUs that Ray gives out.")] = None,
    dask_workers: Annotated[
        int | None, typer.Option(min=0, help="Workers of a standing Dask cluster, one CPU each.")
    ] = None,
    home: Home = HOME,
) -> None:
    """Start the environment `local`: a cluster and its queue, until `liftyard down`."""
    with told(), console.status("starting"):
        where = local.up(home, cpus=cpus, dask_workers=dask_workers)
        dispatch.up(where, home)
    show.environment(where, console)


@app.command()
def down(home: Home = HOME) -> None:
    """End what `liftyard up` started; tables, models, runs and queued jobs stay."""
    with told(), console.status("ending"):
        ended = dispatch.down(home) + local.down(home)
    console.print(f"ended {', '.join(ended)}" if ended else "nothing was up")


@app.command()
def status(env: Env = "local", home: Home = HOME) -> None:
    """Show an environment's addresses, nodes, Dask workers, jobs, and its cost per hour."""
    with told():
        where = environment.load(env, home=home)
        found = local.status(where)
        jobs = [] if where.queue is None else queue.of(where).jobs()
    show.environment(where, console)
    show.status(found, jobs, where.prices, console)


@app.command()
def models(env: Env = None, home: Home = HOME) -> None:
    """List the registered models, their test metrics, champions and challengers."""
    with told():
        show.models(_registry(env, home).models(), console)


@app.command()
def promote(
    model: Model,
    version: Annotated[int, typer.Argument(help="The version to become champion.")],
    env: Env = None,
    home: Home = HOME,
) -> None:
    """Make a version the champion; what is served follows within seconds."""
    with told():
        card = _registry(env, home).promote(model, version)
    console.print(f"champion of {card.name}: version {card.version}")


@app.command()
def rollback(model: Model, env: Env = None, home: Home = HOME) -> None:
    """Go back to the champion before; again, to the one before that."""
    with told():
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
    with told(), console.status(f"scoring {file}"):
        done = scoring.score_file(file, out, _registry(env, home), model, version=version)
    console.print(f"{done.rows:,} rows by {model} version {done.version}: {out}", soft_wrap=True)


def _interrupted(number: int, frame: FrameType | None) -> None:
    # Once: Ray tells a job's every process, and the one that waits for this tells it again.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _registry(env: str | None, home: Path) -> Registry:
    return Registry(environment.load(env, home=home).tracking_uri)


if __name__ == "__main__":
    app()
