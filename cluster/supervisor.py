"""Starts a service as processes of its own, finds them again, and ends exactly those.

A service is a command that stays in the foreground. It gets its own session, no stdin, and a log
file for its output, so that it outlives whoever started it and holds none of their pipes. All its
processes carry a random marker in their environment, by which descendants are found whatever
their parents; the leader is known by pid and start time, so that a reused pid isn't mistaken for
it. Knows nothing of what the services do.
"""

import dataclasses
import fcntl
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import psutil

from cluster.files import replace_text

MARKER = "LIFTYARD_SERVICE"

# By marker: a Popen that is forgotten warns, and its process can't be waited for.
_children: dict[str, subprocess.Popen[bytes]] = {}


class ServiceError(OSError):
    """A service didn't start or end as asked; the message has the last lines of its log."""


class Ready(Protocol):
    """How a service shows that it can be used."""

    def check(self, log: str) -> bool:
        """Whether it does now; `log` is what the service has written so far."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tcp:
    """Ready when a TCP port accepts connections."""

    host: str
    port: int

    def check(self, log: str) -> bool:
        try:
            with socket.create_connection((self.host, self.port), timeout=1) as connection:
                # A connection to a free ephemeral port can be answered by itself.
                return bool(connection.getsockname() != connection.getpeername())
        except OSError:
            return False


@dataclass(frozen=True, kw_only=True)
class Http:
    """Ready when a URL answers with anything but a server's error; it may ask for a token."""

    url: str

    def check(self, log: str) -> bool:
        try:
            with urllib.request.urlopen(self.url, timeout=2):
                return True
        except urllib.error.HTTPError as answer:
            with answer:
                return bool(answer.code < 500)
        except OSError:
            return False


@dataclass(frozen=True, kw_only=True)
class LogLine:
    """Ready when the log holds a match of a regular expression."""

    pattern: str

    def check(self, log: str) -> bool:
        return re.search(self.pattern, log) is not None


@dataclass(frozen=True, kw_only=True)
class Service:
    """What to run.

    Attributes:
        name: Names its state file and log.
        command: Program and arguments; it must stay in the foreground.
        ready: Every one of them must hold.
        environment: Variables on top of this process's own; None leaves one out.
        folder: Working directory.
        limit_s: How long it may take to be ready.
    """

    name: str
    command: Sequence[str]
    ready: Sequence[Ready]
    environment: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    folder: Path
    limit_s: float = 60


@dataclass(frozen=True, kw_only=True)
class State:
    """A service that was started.

    Attributes:
        name: The service's name.
        marker: Value of `LIFTYARD_SERVICE` in the environment of all its processes.
        pid: The leader's.
        started: The leader's start time, in the unit of `psutil` or the kernel; only compared.
        command: What runs.
        log: File of its output.
        file: Where this state is kept.
    """

    name: str
    marker: str
    pid: int
    started: float
    command: tuple[str, ...]
    log: Path
    file: Path


def start(service: Service, states: Path) -> State:
    """Starts a service, or finds it running; returns when it is ready.

    What is left of a dead one is ended first.

    Args:
        service: What to run.
        states: Folder of the state files and logs; made if absent.

    Raises:
        ServiceError: It ended or wasn't ready in time (then nothing of it is left), or the name
            runs another command.
    """
    states.mkdir(parents=True, exist_ok=True)
    with locked(states / f"{service.name}.lock"):
        state = read(states, service.name)
        if state is not None and alive(state):
            if state.command != tuple(service.command):
                raise ServiceError(
                    f"{service.name} runs another command: {' '.join(state.command)}; "
                    f"asked for: {' '.join(service.command)}. Stop it first"
                )
            _wait(service, state)
            return state
        if state is not None:
            stop(state)
        state = _spawn(service, states.resolve())
        try:
            _wait(service, state)
        except BaseException:
            stop(state)
            raise
        return state


def read(states: Path, name: str) -> State | None:
    """The state of a service that was started and not stopped since; it may have died."""
    file = states / f"{name}.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return State(**{**kept, "command": tuple(kept["command"]), "log": Path(kept["log"])}, file=file)


def alive(state: State) -> bool:
    """Whether the leader runs."""
    return _start_time(state.pid) == state.started


def stop(state: State, *, grace_s: float = 10) -> None:
    """Ends all processes of a service and forgets its state; its log stays.

    The leader is asked to end (TERM) and given time to end the others; what is left is asked, and
    then killed. The calling process is spared, should it be one of them.

    Args:
        state: From `start` or `read`.
        grace_s: Time for the leader, and again for the others.

    Raises:
        ServiceError: A process outlived KILL, as one that hangs in the kernel does.
    """
    if alive(state):
        _signal(state.pid, signal.SIGTERM)
        _gone_within(grace_s, lambda: not alive(state))
    left = processes(state)
    for process in left:
        _signal(process.pid, signal.SIGTERM)
    if left and not _gone_within(grace_s, lambda: not processes(state)):
        # Again until none is left: a process can be born while others are killed.
        deadline = time.monotonic() + grace_s
        while left := processes(state):
            if time.monotonic() > deadline:
                raise ServiceError(f"{state.name}: processes outlived KILL: {left}")
            for process in left:
                _signal(process.pid, signal.SIGKILL)
            time.sleep(0.05)
    child = _children.pop(state.marker, None)
    if child is not None:
        child.wait()
    state.file.unlink(missing_ok=True)


def processes(state: State) -> list[psutil.Process]:
    """The service's processes: those whose environment has its marker, but not this one."""
    return marked(state.marker)


def marked(marker: str) -> list[psutil.Process]:
    """The processes whose environment has a marker, but not this one."""
    found = []
    for process in psutil.process_iter():
        # What ends meanwhile, and what belongs to other users, isn't the service's.
        with suppress(psutil.Error, OSError):
            if (
                process.pid != os.getpid()
                and process.environ().get(MARKER) == marker
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process)
    return found


def _spawn(service: Service, states: Path) -> State:
    marker = secrets.token_hex(16)
    # Terraform's variables are not the service's. SPT_NOENV keeps setproctitle, which Ray uses,
    # from overwriting the environment that the marker is read from.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TF_")}
    merged = {**inherited, **service.environment, MARKER: marker, "SPT_NOENV": "1"}
    environment = {name: value for name, value in merged.items() if value is not None}
    log = states / f"{service.name}.log"
    if log.exists():
        # It tells why the one before died.
        log.replace(states / f"{service.name}.before.log")
    with log.open("wb") as output:
        try:
            child = subprocess.Popen(
                service.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=service.folder,
                start_new_session=True,
            )
        except OSError as error:
            raise ServiceError(f"{service.name} can't be started: {error}") from error
    _children[marker] = child
    state = State(
        name=service.name,
        marker=marker,
        pid=child.pid,
        started=_start_time(child.pid) or 0.0,
        command=tuple(service.command),
        log=log,
        file=states / f"{service.name}.json",
    )
    try:
        _write(state)
    except BaseException:
        stop(state)
        raise
    return state


def _write(state: State) -> None:
    kept = {**dataclasses.asdict(state), "log": str(state.log)}
    del kept["file"]
    replace_text(state.file, json.dumps(kept, indent=2) + "\n")


def _wait(service: Service, state: State) -> None:
    deadline = time.monotonic() + service.limit_s
    while True:
        log = state.log.read_text(encoding="utf-8", errors="replace")
        if not alive(state):
            raise ServiceError(f"{service.name} ended before it was ready{_tail(state)}")
        if all(ready.check(log) for ready in service.ready):
            return
        if time.monotonic() > deadline:
            wanted = ", ".join(str(ready) for ready in service.ready)
            raise ServiceError(
                f"{service.name} wasn't ready within {service.limit_s:g} s "
                f"(waited for {wanted}){_tail(state)}"
            )
        time.sleep(0.1)


def _tail(state: State, lines: int = 15) -> str:
    last = state.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
    said = "\n  ".join(last) if last else "(it wrote nothing)"
    return f"; the end of {state.log}:\n  {said}"


def _start_time(pid: int) -> float | None:
    """When a process started, or None if it doesn't run; equal only for the same process."""
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        if psutil.LINUX:
            # In clock ticks since boot, as `psutil` shows wall time, which clocks can move.
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2]
            return float(fields.split()[19])
        return float(process.create_time())
    except (psutil.Error, OSError):
        return None


def _gone_within(limit_s: float, gone: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + limit_s
    while not gone():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Held by one process at a time; the kernel lets go when its holder dies."""
    with file.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        yield
