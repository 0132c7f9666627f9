"""The keeper on real processes: again after an end, and no more than its own when it stops."""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster import keeper, supervisor

ROOT = Path(__file__).resolve().parents[2]

# Leaves a child behind when it ends, as Ray's processes do.
COMMAND = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"],
                         start_new_session=True)
print("began", os.getpid(), child.pid, flush=True)
time.sleep(600)
"""


def _cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.keeper", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def _until(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 30
    while not (value := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def test_keeps_running_and_ends_all_of_it(tmp_path: Path) -> None:
    states = tmp_path / "states"
    place = ("--states", str(states), "--name", "it")
    up = ("up", *place, "--ready", "log:began", "--", sys.executable, "-c", COMMAND)
    first = _cli(*up)
    assert first.returncode == 0, first.stderr
    state = supervisor.read(states, "it")
    assert state is not None
    # Found running, it is left as it is.
    assert _cli(*up).stdout == first.stdout

    def began() -> list[tuple[str, str]]:
        return re.findall(r"began (\d+) (\d+)", state.log.read_text(encoding="utf-8"))

    ((leader, child),) = began()
    subprocess.run(["kill", "-9", leader], check=True)
    _until(lambda: len(began()) == 2)
    assert "ended with -9, starts again in 1 s" in state.log.read_text(encoding="utf-8")
    assert supervisor.alive(state)
    pids = {str(process.pid) for process in supervisor.processes(state)}
    assert child not in pids
    assert pids == {str(state.pid), *began()[1]}

    assert _cli("down", *place).stdout == "it: ended\n"
    assert supervisor.processes(state) == []
    assert _cli("down", *place).stdout == "it: was not up\n"


def test_says_what_went_wrong(tmp_path: Path) -> None:
    place = ("--states", str(tmp_path), "--name", "it")
    never = _cli("up", *place, "--ready", "log:never", "--limit", "2", "--", "false")
    assert never.returncode == 1
    assert "ended with 1" in never.stderr
    assert supervisor.read(tmp_path, "it") is None
    assert "needs --states and --name" in _cli("up", "--", "true").stderr
    assert "up needs -- COMMAND" in _cli("up", *place).stderr


@pytest.mark.parametrize("text", ["tcp:host", "http:ftp://x", "log:", "file:x"])
def test_refuses_what_is_no_readiness(text: str) -> None:
    with pytest.raises(ValueError, match="allowed are tcp:HOST:PORT, http:URL and log:PATTERN"):
        keeper.readiness(text)
