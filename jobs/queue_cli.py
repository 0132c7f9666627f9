"""The command line's part for the queue: submit, jobs, logs, stop, team and schedule."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster import environment
from cluster.environment import Environment
from jobs import package, queue, show, submission
from jobs.console import HOME, RUNS, From, Home, Resume, Runs, Set, console, errors, told
from jobs.pipeline_file import load
from jobs.queue import CAUSES, QueueError, Spec

app = typer.Typer(no_args_is_help=True)
schedules = typer.Typer(no_args_is_help=True, help="Queue jobs whenever they are due.")
app.add_typer(schedules, name="schedule")

ROOT = Path(__file__).resolve().parents[1]
STOP_LIMIT_S = 30.0

Staying = Annotated[
    str, typer.Option("--env", help="Environment: local (default), a name or a file.")
]
Id = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]
What = Annotated[
    str, typer.Argument(metavar="PIPELINE", help="A pipeline's YAML file, or FOLDER:JOB.")
]
Arguments = Annotated[list[str] | None, typer.Argument(help="What a FOLDER:JOB gets, after `--`.")]
Priority = Annotated[int, typer.Option(help="Higher goes first.")]
Team = Annotated[str, typer.Option(help="Whose quota and share it counts on.")]
After = Annotated[
    list[str] | None, typer.Option(help="A job that must have succeeded; may be repeated.")
]
Timeout = Annotated[float | None, typer.Option(help="Seconds that an attempt may run.")]
Retries = Annotated[
    list[str] | None,
    typer.Option(help="CAUSE=COUNT, of failed, lost (5) and timeout; may be repeated."),
]
Cpus = Annotated[float | None, typer.Option(help="CPUs that it is reckoned to take.")]
Gpus = Annotated[float | None, typer.Option(help="GPUs, likewise.")]


@app.command()
def submit(
    what: What,
    arguments: Arguments = None,
    env: Staying = "local",
    priority: Priority = 0,
    team: Team = "default",
    after: After = None,
    timeout: Timeout = None,
    retries: Retries = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    key: Annotated[str, typer.Option(help="Tells jobs of the same content apart.")] = "",
    overrides: Set = None,
    again_from: From = None,
    resume: Resume = None,
    home: Home = HOME,
    runs_root: Runs = RUNS,
) -> None:
    """Queue a pipeline, or a job of a package, and return at once.

    The same again is the same job; one that failed or was stopped is queued anew.
    """
    with told():
        where = environment.load(env, home=home)
        spec = _spec(
            what,
            arguments or [],
            where,
            env,
            home,
            pipeline={"--runs": runs_root.resolve(), "--from": again_from, "--resume": resume},
            overrides=overrides or [],
            given={"timeout_s": timeout, "retries": _retries(retries), "cpus": cpus, "gpus": gpus},
            fixed={"priority": priority, "team": team, "after": tuple(after or ()), "key": key},
        )
        there = queue.of(where)
        before = next((job for job in there.jobs() if job.id == spec.id), None)
        console.print(there.submit(spec))
        if before is not None and before.state not in (queue.FAILED, queue.STOPPED):
            errors.print(
                f"it is there, and is {before.state}; --key makes another of the same content"
            )


@app.command("jobs")
def list_jobs(env: Staying = "local", home: Home = HOME) -> None:
    """List an environment's jobs."""
    with told():
        found = queue.of(environment.load(env, home=home)).jobs()
    show.jobs(found, console)


@app.command()
def logs(
    job: Id,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until it ends, over all its attempts.")
    ] = False,
    env: Staying = "local",
    home: Home = HOME,
) -> None:
    """Print what a job's last attempt has written."""
    with told():

        def where() -> Environment:
            return environment.load(env, home=home)

        for piece in submission.logs(queue.of(where()), job, where, follow=follow):
            typer.echo(piece, nl=False)


@app.command()
def stop(job: Id, env: Staying = "local", home: Home = HOME) -> None:
    """Stop a job; `liftyard run --resume` can go on with its run."""
    with told():
        there = queue.of(environment.load(env, home=home))
        found = there.stop(job)
        deadline = time.monotonic() + STOP_LIMIT_S
        while not found.over:
            if time.monotonic() > deadline:
                raise QueueError(
                    f"job {job!r} was told to stop, and is {found.state} {STOP_LIMIT_S:g} s later: "
                    "see the dispatcher's log"
                )
            time.sleep(0.1)
            found = there.find(job)
    console.print(f"{found.id} {found.state}")


@app.command()
def team(
    name: Annotated[str | None, typer.Argument(help="The team; left out, all are listed.")] = None,
    quota_cpus: Annotated[
        float | None, typer.Option(help="CPUs of its running jobs at most; default: no limit.")
    ] = None,
    quota_gpus: Annotated[float | None, typer.Option(help="GPUs, likewise.")] = None,
    share: Annotated[
        float, typer.Option(help="Against other teams': 2 gets twice the CPUs of 1.")
    ] = 1.0,
    env: Staying = "local",
    home: Home = HOME,
) -> None:
    """Set what a team may have at a time, or list what is set."""
    with told():
        there = queue.of(environment.load(env, home=home))
        if name is not None:
            there.set_team(name, quota_cpus=quota_cpus, quota_gpus=quota_gpus, share=share)
    show.teams(there.teams(), console)


@schedules.command("add")
def add(
    name: Annotated[str, typer.Argument(help="The schedule's; one of that name is replaced.")],
    cron: Annotated[str, typer.Argument(help="Five cron fields, as '30 2 * * 1-5'.")],
    what: What,
    arguments: Arguments = None,
    zone: Annotated[str, typer.Option(help="Time zone, as Europe/Berlin.")] = "UTC",
    env: Staying = "local",
    priority: Priority = 0,
    team: Team = "default",
    timeout: Timeout = None,
    retries: Retries = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    overrides: Set = None,
    home: Home = HOME,
    runs_root: Runs = RUNS,
) -> None:
    """Queue a pipeline, or a job of a package, whenever it is due."""
    with told():
        where = environment.load(env, home=home)
        spec = _spec(
            what,
            arguments or [],
            where,
            env,
            home,
            pipeline={"--runs": runs_root.resolve()},
            overrides=overrides or [],
            given={"timeout_s": timeout, "retries": _retries(retries), "cpus": cpus, "gpus": gpus},
            fixed={"priority": priority, "team": team},
        )
        due = queue.of(where).set_schedule(name, cron, spec, zone=zone)
    console.print(f"{name}: first on {due:%Y-%m-%d %H:%M} UTC")


@schedules.command("list")
def list_schedules(env: Staying = "local", home: Home = HOME) -> None:
    """List the schedules, and when they are due next."""
    with told():
        found = queue.of(environment.load(env, home=home)).schedules()
    show.schedules(found, console)


@schedules.command("remove")
def remove(
    name: Annotated[str, typer.Argument(help="The schedule's.")],
    env: Staying = "local",
    home: Home = HOME,
) -> None:
    """Remove a schedule; jobs it has queued stay."""
    with told():
        queue.of(environment.load(env, home=home)).remove_schedule(name)
    console.print(f"{name}: removed")


def _spec(
    what: str,
    arguments: list[str],
    where: Environment,
    env: str,
    home: Path,
    *,
    pipeline: dict[str, Any],
    overrides: list[str],
    given: dict[str, Any],
    fixed: dict[str, Any],
) -> Spec:
    """What a command line asks for; `given` wins over what a package says, where it isn't None."""
    # The job may be told another folder's environment by the file that was named.
    named = str(Path(env).resolve()) if env.endswith(".json") else where.name
    variables = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    folder, colon, name = what.rpartition(":")
    if colon:
        asked = [key for key, value in pipeline.items() if value is not None and key != "--runs"]
        if asked or overrides:
            raise QueueError(
                f"{what!r} is a package's job: --set, --from and --resume are a pipeline's; give "
                "it arguments after `--`"
            )
        found = package.registered(Path(folder), name, copies=home / "packages")
        declared = {
            "packages": found.packages,
            "cpus": found.cpus,
            "gpus": found.gpus,
            "timeout_s": found.timeout_s,
            "retries": found.retries,
        }
        command = (*found.command, *arguments)
        variables |= {"LIFTYARD_ENV": named, "LIFTYARD_HOME": str(home.resolve())}
    else:
        if arguments:
            raise QueueError(
                f"arguments {arguments}: a pipeline takes none; --set KEY=VALUE is in place of "
                "what the file says"
            )
        load(Path(what), overrides)
        options = {"--env": named, "--home": home.resolve(), **pipeline}
        words = [str(each) for pair in options.items() if pair[1] is not None for each in pair]
        words += [word for each in overrides for word in ("--set", each)]
        # -P: a folder `jobs` of the user's isn't ours.
        file = str(Path(what).resolve())
        run = (sys.executable, "-P", "-m", "jobs.cli", "run", file, "--queued")
        command, declared = (*run, *words), {}
    chosen = {**declared, **{key: value for key, value in given.items() if value is not None}}
    return Spec(
        command=command,
        folder=str(Path.cwd()),
        variables=variables,
        **{key: value for key, value in chosen.items() if value is not None},
        **fixed,
    )


def _retries(given: list[str] | None) -> dict[str, int] | None:
    if given is None:
        return None
    found = {"lost": 5}
    for each in given:
        cause, _, count = each.partition("=")
        if cause not in CAUSES or not count.isdecimal():
            raise QueueError(
                f"retries {each!r}: give CAUSE=COUNT, with a cause of {', '.join(CAUSES)}"
            )
        found[cause] = int(count)
    return found
