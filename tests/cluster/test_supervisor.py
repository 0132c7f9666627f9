"""The supervisor on real processes."""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from cluster import supervisor
from cluster.supervisor import Http, LogLine, Service, ServiceError, Tcp

PYTHON = [sys.executable, "-u", "-c"]

# A leader with a child in a session of its own that ignores TERM, as the worst behaved have.
FAMILY = """
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up')"
subprocess.Popen([sys.executable, "-u", "-c", child + "; time.sleep(600)"], start_new_session=True)
time.sleep(600)
"""


def _service(tmp_path: Path, code: str, *ready: supervisor.Ready, name: str = "it") -> Service:
    return Service(name=name, command=[*PYTHON, code], ready=ready, folder=tmp_path, limit_s=10)


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_starts_once_and_ends_every_descendant(tmp_path: Path) -> None:
    service = _service(tmp_path, FAMILY, LogLine(pattern="up"))
    state = supervisor.start(service, tmp_path)
    try:
        assert supervisor.start(service, tmp_path) == state
        assert supervisor.read(tmp_path, "it") == state
        family = supervisor.processes(state)
        assert len(family) == 2
        assert os.getsid(state.pid) == state.pid
        assert psutil.Process(state.pid).open_files()[0].path == str(state.log)
        other = _service(tmp_path, "pass", LogLine(pattern="up"))
        with pytest.raises(ServiceError, match=r"(?s)runs another command.*Stop it first"):
            supervisor.start(other, tmp_path)
    finally:
        supervisor.stop(state, grace_s=0.5)
    assert not any(_runs(process) for process in family)
    assert not supervisor.alive(state)
    assert supervisor.read(tmp_path, "it") is None
    assert state.log.read_text() == "up\n"


def test_what_outlived_a_killed_leader_ends_before_the_next_start(tmp_path: Path) -> None:
    service = _service(tmp_path, FAMILY, LogLine(pattern="up"))
    first = supervisor.start(service, tmp_path)
    (orphan,) = [each for each in supervisor.processes(first) if each.pid != first.pid]
    # Quick to end now, so that the test needn't wait for the grace.
    os.kill(first.pid, signal.SIGKILL)
    orphan.kill()
    while supervisor.alive(first):
        time.sleep(0.01)
    second = supervisor.start(service, tmp_path)
    try:
        assert second.pid != first.pid
        assert not supervisor.processes(first)
        assert (tmp_path / "it.before.log").read_text() == "up\n"
    finally:
        supervisor.stop(second, grace_s=0.5)
    assert not supervisor.processes(second)


def test_spares_others_and_a_process_with_a_reused_pid(tmp_path: Path) -> None:
    mine = supervisor.start(_service(tmp_path, FAMILY, LogLine(pattern="up")), tmp_path)
    other = supervisor.start(
        _service(tmp_path, FAMILY, LogLine(pattern="up"), name="other"), tmp_path
    )
    try:
        # The state of a service whose leader died and whose pid another process has got.
        stale = supervisor.State(
            name="stale",
            marker="0" * 32,
            pid=other.pid,
            started=other.started + 1,
            command=(),
            log=tmp_path / "stale.log",
            file=tmp_path / "stale.json",
        )
        assert not supervisor.alive(stale)
        supervisor.stop(stale)
        supervisor.stop(mine, grace_s=0.5)
        assert supervisor.alive(other)
        assert len(supervisor.processes(other)) == 2
    finally:
        supervisor.stop(mine, grace_s=0.5)
        supervisor.stop(other, grace_s=0.5)


def test_tells_the_end_of_the_log_of_one_that_dies(tmp_path: Path) -> None:
    code = "print('reading'); raise SystemExit('no such disk')"
    with pytest.raises(ServiceError, match=r"it ended before .*it\.log:\n  reading\n  no such dis"):
        supervisor.start(_service(tmp_path, code, LogLine(pattern="never")), tmp_path)
    assert supervisor.read(tmp_path, "it") is None


def test_ends_one_that_isnt_ready_in_time(tmp_path: Path) -> None:
    service = Service(
        name="it",
        command=[*PYTHON, "import time; time.sleep(600)"],
        ready=(LogLine(pattern="never"),),
        folder=tmp_path,
        limit_s=0.3,
    )
    with pytest.raises(ServiceError, match=r"within 0.3 s .*never.*\n  \(it wrote nothing\)"):
        supervisor.start(service, tmp_path)
    marked = [
        process
        for process in psutil.process_iter(["cmdline"])
        if process.info["cmdline"] == list(service.command)
    ]
    assert marked == []


def test_a_program_that_isnt_there(tmp_path: Path) -> None:
    service = Service(name="it", command=["no-such-program"], ready=(), folder=tmp_path)
    with pytest.raises(ServiceError, match=r"can't be started.*no-such-program"):
        supervisor.start(service, tmp_path)


def test_waits_for_ports_and_pages(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tcp, http = Tcp(host="127.0.0.1", port=port), Http(url=f"http://127.0.0.1:{port}/none")
    assert not tcp.check("")
    assert not http.check("")
    code = (
        "from http.server import SimpleHTTPRequestHandler as Handler, test\n"
        f"test(Handler, port={port}, bind='127.0.0.1')"
    )
    state = supervisor.start(_service(tmp_path, code, tcp, http), tmp_path)
    try:
        assert tcp.check("")
    finally:
        supervisor.stop(state)
    assert not tcp.check("")


def test_passes_no_variable_of_terraform_nor_one_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TF_VAR_secret", "x")
    monkeypatch.setenv("LEFT_OUT", "x")
    code = "import os, time; print(sorted(os.environ), 'up', flush=True); time.sleep(600)"
    service = Service(
        name="it",
        command=[*PYTHON, code],
        ready=(LogLine(pattern="up"),),
        environment={"LEFT_OUT": None, "PUT_IN": "y"},
        folder=tmp_path,
    )
    state = supervisor.start(service, tmp_path)
    supervisor.stop(state)
    names = state.log.read_text()
    assert "PUT_IN" in names
    assert "TF_VAR_secret" not in names
    assert "LEFT_OUT" not in names
