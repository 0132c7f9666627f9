"""The command line, `liftyard`."""

import os
import signal
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Annotated, cast

import typer

from cluster import environment, local
from cluster.device import Preference, choose
from jobs import dispatch, progress, queue, queue_cli, runs, scoring, sentiment_cli, serve_cli, show
from jobs.console import HOME, RUNS, Env, From, Home, Resume, Runs, Set, console, errors, told
from jobs.pipeline import execute
from jobs.pipeline_file import load
from jobs.report import write as write_report
from models.registry import Registry
from serving.client import API_KEY, Client

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
    queued: Annotated[bool, typer.Option("--queued", hidden=True)] = False,
) -> None:
    """Run a pipeline, from its sources to served scores and a report."""
    # Who stops a job sends TERM: the run then ends as it does on Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupted)
    with told():
        declared = load(pipeline, overrides or [])
        where = environment.load(env, home=home)
        chosen = choose(cast(Preference, device))
        # As `liftyard submit` queues it: an attempt goes on with the run of the one before.
        job = os.environ.get("LIFTYARD_JOB") if queued else None
        if job is not None and (begun := runs.begun(runs_root, job)) is not None:
            resume, again_from = begun, None
        elif again_from is not None and resume is None:
            resume = runs.latest(runs_root, declared.name)
        started = (
            runs.start(runs_root, pipeline=declared.name, seed=declared.seed, job=job)
            if resume is None
            else runs.resume(
                runs_root,
                resume,
                pipeline=declared.name,
                seed=declared.seed,
                again_from=again_from,
                job=job,
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
    url: Annotated[
        str | None,
        typer.Option(
            help=f"A service that scores, such as http://127.0.0.1:8000; its key is in {API_KEY}. "
            "Default: the registry's model, in this process."
        ),
    ] = None,
    batch_rows: Annotated[
        int, typer.Option(min=1, help="Rows scored at once, and kept for a run that goes on.")
    ] = scoring.BATCH_ROWS,
    env: Env = None,
    home: Home = HOME,
) -> None:
    """Score the rows of a file; run again after a stop, and it goes on where it was."""
    with told(), ExitStack() as stack:
        if url is not None and version is not None:
            raise ValueError("--url has the service's version: leave --version out, or --url")
        on_start, on_done = stack.enter_context(progress.counted("rows", console))
        if url is None:
            by = scoring.by_registry(_registry(env, home), model, version)
        else:
            client = stack.enter_context(Client(url, key=os.environ.get(API_KEY)))
            by = scoring.by_service(client, model, key=str(out))
        done = scoring.score_file(
            file, out, by, batch_rows=batch_rows, on_start=on_start, on_done=on_done
        )
    again = f" ({done.resumed:,} of an earlier run)" if done.resumed else ""
    console.print(
        f"{done.rows:,} rows{again} by {by.model} version {by.version} in {done.seconds:.1f} s: "
        f"{out}",
        soft_wrap=True,
    )


def _interrupted(number: int, frame: FrameType | None) -> None:
    # Once: Ray tells a job's every process, and the one that waits for this tells it again.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def _registry(env: str | None, home: Path) -> Registry:
    return Registry(environment.load(env, home=home).tracking_uri)


if __name__ == "__main__":
    app()
