"""Keeps a command running: what ends is started again, until it is told to stop.

    python -m cluster.keeper up --states DIR --name NAME [--ready tcp:HOST:PORT] … -- COMMAND …
    python -m cluster.keeper down --states DIR --name NAME

`up` starts a service (`cluster.supervisor`) whose leader is a keeper, and returns when it is ready;
where it runs already it changes nothing. `down` ends exactly its processes. For callers that are
no Python program, such as Terraform. Knows nothing of what the commands do.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from cluster import supervisor
from cluster.supervisor import Http, LogLine, Ready, Service, ServiceError, State, Tcp

ROOT = Path(__file__).resolve().parents[1]

USAGE = "python -m cluster.keeper up|down --states DIR --name NAME [options] [-- COMMAND …]"

# A command that ran this long had worked: the pauses between restarts begin anew.
SETTLED_S = 60.0
LONGEST_PAUSE_S = 30.0
# Ray's processes end one after the other.
GRACE_S = 20.0


def up(
    states: Path, name: str, command: Sequence[str], *, ready: Sequence[Ready], limit_s: float = 90
) -> State:
    """Starts a command that is kept running, or finds it running; returns when it is ready.

    Args:
        states: Folder of the state files and logs.
        name: The service's name.
        command: Program and arguments; it must stay in the foreground.
        ready: Every one of them must hold.
        limit_s: How long it may take to be ready, restarts included.

    Raises:
        ServiceError: It wasn't ready in time, or the name runs another command.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    service = Service(
        name=name,
        command=[sys.executable, "-m", "cluster.keeper", "hold", "--", *command],
        ready=ready,
        environment={
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            # Another cluster's, which would win over the command's own.
            "RAY_ADDRESS": None,
        },
        folder=ROOT,
        limit_s=limit_s,
    )
    return supervisor.start(service, states)


def down(states: Path, name: str) -> bool:
    """Ends a service; False if there was none."""
    if not states.is_dir():
        return False
    with supervisor.locked(states / f"{name}.lock"):
        state = supervisor.read(states, name)
        if state is None:
            return False
        supervisor.stop(state, grace_s=GRACE_S)
        return True


def hold(command: Sequence[str]) -> None:
    """Runs a command again and again, with longer pauses while it keeps failing, until TERM.

    What a command leaves behind is ended before it is started again.
    """
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    pause_s = 1.0
    while not ended.is_set():
        began = time.monotonic()
        child = subprocess.Popen(command)
        while child.poll() is None and not ended.wait(0.2):
            pass
        if ended.is_set():
            child.terminate()
            with suppress(subprocess.TimeoutExpired):
                child.wait(GRACE_S - 5)
            return
        _end_the_rest()
        if time.monotonic() - began > SETTLED_S:
            pause_s = 1.0
        print(f"keeper: ended with {child.returncode}, starts again in {pause_s:g} s", flush=True)
        ended.wait(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def _end_the_rest() -> None:
    """Ends the processes of this service but the keeper."""
    marker = os.environ.get(supervisor.MARKER)
    if marker is None:
        return
    # Again until none is left: a process can be born while others are killed.
    while left := supervisor.marked(marker):
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1)


def readiness(text: str) -> Ready:
    """Reads `tcp:HOST:PORT`, `http:URL` or `log:PATTERN`.

    Raises:
        ValueError: It is none of these.
    """
    kind, _, rest = text.partition(":")
    if kind == "tcp" and (found := re.fullmatch(r"(.+):(\d+)", rest)):
        return Tcp(host=found[1], port=int(found[2]))
    if kind == "http" and rest.startswith(("http://", "https://")):
        return Http(url=rest)
    if kind == "log" and rest:
        return LogLine(pattern=rest)
    raise ValueError(f"ready {text!r}: allowed are tcp:HOST:PORT, http:URL and log:PATTERN")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description="Keep a command running.", usage=USAGE)
    parser.add_argument("do", choices=["up", "down", "hold"])
    parser.add_argument("--states", type=Path, help="folder of state files and logs")
    parser.add_argument("--name", help="the service's name")
    parser.add_argument("--ready", action="append", default=[], help="tcp:, http: or log:")
    parser.add_argument("--limit", type=float, default=90, help="seconds to be ready in")
    # By hand: argparse takes no second positional after options.
    all_of = list(sys.argv[1:] if arguments is None else arguments)
    cut = all_of.index("--") if "--" in all_of else len(all_of)
    given, command = parser.parse_args(all_of[:cut]), all_of[cut + 1 :]
    if given.do == "hold":
        return hold(command)
    if given.states is None or given.name is None:
        parser.error(f"{given.do} needs --states and --name")
    try:
        if given.do == "down":
            ended = down(given.states, given.name)
            print(f"{given.name}: {'ended' if ended else 'was not up'}")
        elif not command:
            parser.error("up needs -- COMMAND")
        else:
            ready = [readiness(text) for text in given.ready]
            state = up(given.states, given.name, command, ready=ready, limit_s=given.limit)
            print(f"{given.name}: up, process {state.pid}, log {state.log}")
    except (ServiceError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
