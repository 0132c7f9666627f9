"""The command line's part for serving: serve, keys, audit, publish."""

from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer

from cluster import environment, ports, session
from jobs import online, pipeline_file
from jobs.console import HOME, Env, Home, console, told
from serving import access, audit
from serving.config import Serve
from serving.settings import ServingError

app = typer.Typer(no_args_is_help=True)
keys = typer.Typer(no_args_is_help=True, help="Who may ask what is served.")
audits = typer.Typer(no_args_is_help=True, help="The log of who asked for what.")
app.add_typer(keys, name="keys")
app.add_typer(audits, name="audit")

Name = Annotated[str, typer.Argument(help="The key's name.")]
KeysFile = Annotated[
    Path,
    typer.Option("--file", envvar="LIFTYARD_KEYS", help="The keys file, `access.keys` of SERVE."),
]
Days = Annotated[float, typer.Option(help="Until it expires.")]
KEYS = Path("keys.json")


@app.command()
def serve(
    file: Annotated[Path, typer.Argument(metavar="SERVE", help="A serve.yaml.")],
    env: Annotated[
        str, typer.Option("--env", help="Environment: local (default), a name or a file.")
    ] = "local",
    restart: Annotated[
        bool, typer.Option("--restart", help="End what is served first, to listen elsewhere.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds to be ready in.")] = 60.0,
    home: Home = HOME,
) -> None:
    """Serve models as a file says, and return when they answer; again, to change what it says."""
    from serving import app as serving

    with told():
        said = pipeline_file.read(file, Serve)
        where = environment.load(env, home=home)
        if where.ray_address is None:
            raise ServingError(
                f"environment {where.name!r} ends with this command, and what it serves too: run "
                "`liftyard up`, and serve with --env local"
            )
        wanted = said.settings(where.tracking_uri, file.parent)
        listener = said.listener(_port(where.serve_url), file.parent)
        with (
            console.status("applying"),
            session.connect(address=where.ray_address),
        ):
            if restart:
                serving.stop()
            try:
                done = serving.apply(
                    wanted,
                    listener,
                    replicas=said.replicas,
                    cpus=said.cpus,
                    gpus=said.gpus,
                    timeout_s=timeout,
                )
            except ServingError as error:
                raise ServingError(f"{pipeline_file.place(file, error.key)}{error}") from error
    if done.changed is None:
        console.print(f"serves at {done.url}", soft_wrap=True)
    elif done.changed:
        console.print(f"{done.url}: changed {', '.join(done.changed)}", soft_wrap=True)
    else:
        console.print(f"{done.url}: nothing to change", soft_wrap=True)


@app.command()
def publish(
    pipeline: Annotated[Path, typer.Argument(help="The pipeline's YAML file.")],
    target: Annotated[str, typer.Argument(help="The target whose features are served.")],
    store: Annotated[Path, typer.Option(help="Folder of the store, `store` of SERVE.")],
    env: Env = None,
    home: Home = HOME,
) -> None:
    """Make the latest features of customers readable to replicas, which follow within seconds."""
    with told():
        declared = pipeline_file.load(pipeline)
        where = environment.load(env, home=home)
        with console.status("publishing"):
            done = online.publish(target, declared, where.storage_root, store)
    made = "" if done.new else " (as it was)"
    console.print(
        f"{done.customers:,} customers, {done.features} features: {store}, version {done.version}"
        f"{made}",
        soft_wrap=True,
    )


@keys.command("add")
def add(
    name: Name,
    role: Annotated[str, typer.Option(help="One of the policy; without one: viewer, service, …")],
    days: Days = 90,
    file: KeysFile = KEYS,
) -> None:
    """Make a key and print it, this once; the file holds its digest only."""
    with told():
        made = access.add_key(file, name, role, days=days)
    # For a script, as it is.
    typer.echo(made)


@keys.command("list")
def list_(file: KeysFile = KEYS) -> None:
    """List the keys' names, roles and ends."""
    with told():
        found = access.list_keys(file)
    for each in found:
        former = "" if each.former_expires is None else f", its former until {each.former_expires}"
        state = " (expired)" if each.expired else ""
        console.print(
            f"{each.name}: {each.role}, until {each.expires}{state}{former}",
            highlight=False,
            soft_wrap=True,
        )


@keys.command("rotate")
def rotate(
    name: Name,
    days: Days = 90,
    grace: Annotated[
        float, typer.Option(min=0, help="Hours that the former key goes on for.")
    ] = 24.0,
    file: KeysFile = KEYS,
) -> None:
    """Make a new key in a key's place and print it, this once."""
    with told():
        made = access.rotate_key(file, name, days=days, grace_s=grace * 3600)
    typer.echo(made)


@keys.command("revoke")
def revoke(name: Name, file: KeysFile = KEYS) -> None:
    """End a key at once."""
    with told():
        access.revoke_key(file, name)
    console.print(f"{name}: revoked")


@audits.command("verify")
def verify(
    file: Annotated[Path, typer.Argument(help="The audit log.")],
    digest: Annotated[
        str | None, typer.Option(help="One that an earlier verify gave; it must be there still.")
    ] = None,
) -> None:
    """Look through an audit log: no line was changed, put in or taken out."""
    with told():
        found = audit.verify(file, digest=digest)
    console.print(f"{found.lines:,} lines hold; digest {found.digest}", soft_wrap=True)


def _port(url: str | None) -> int:
    """The environment's own, or a free one."""
    return (urlsplit(url).port if url else None) or ports.free(1)[0]
