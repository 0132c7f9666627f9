"""What the parts of the command line share: output, options, and how faults are told."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from cluster.device import DeviceError
from jobs.sweep import SweepError

console = Console()
# Not wrapped, so that a path or an address can be copied.
errors = Console(stderr=True, soft_wrap=True)

HOME, RUNS = Path(".liftyard"), Path("runs")

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
Runs = Annotated[Path, typer.Option("--runs", help="Folder of the runs.")]


@contextmanager
def told() -> Iterator[None]:
    """A user's mistake (settings, data, names, disks) is told, not traced."""
    try:
        yield
    except KeyboardInterrupt:
        errors.print("interrupted")
        raise typer.Exit(130) from None
    except (ValueError, OSError, DeviceError, SweepError) as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(1) from None
