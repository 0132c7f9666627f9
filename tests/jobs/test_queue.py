"""The queue on real processes, in SQLite and PostgreSQL; with Ray in `test_queue_on_ray.py`."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from cluster.environment import Prices
from jobs.dispatch import dispatch, step
from jobs.queue import Queue, QueueError, Spec
from jobs.schedule import ScheduleError, next_after, parse
from tests.jobs.postgres import serving

ROOT = Path(__file__).resolve().parents[2]


class Processes:
    """An engine of plain processes, each id once, as Ray takes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.taken: dict[str, subprocess.Popen[bytes]] = {}
        self.down = False

    def submit(self, id: str, entrypoint: str, spec: Spec) -> None:
        if self.down:
            raise ConnectionError("the head doesn't answer")
        if id not in self.taken:
            log = (self.folder / f"{id}.log").open("wb")
            with log:
                self.taken[id] = subprocess.Popen(
                    shlex.split(entrypoint.removeprefix("exec ")), stdout=log, stderr=log
                )

    def living(self) -> set[str]:
        if self.down:
            raise ConnectionError("the head doesn't answer")
        return {id for id, process in self.taken.items() if process.poll() is None}

    def stop(self, id: str) -> None:
        self.taken[id].terminate()

    def refusal(self, id: str) -> str:
        return ""

    def cpus(self) -> float:
        return 2.0

    def end(self) -> None:
        for process in self.taken.values():
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def queue(request: pytest.FixtureRequest, tmp_path: Path) -> Queue:
    if request.param == "sqlite":
        return Queue(f"sqlite:///{tmp_path}/queue.sqlite")
    url = request.getfixturevalue("server")
    made = Queue(url)
    with made.database.changed() as connection:
        for table in ("jobs", "teams", "schedules"):
            connection.execute(f"DELETE FROM {table}")
    return made


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Processes]:
    made = Processes(tmp_path)
    yield made
    made.end()


def _spec(folder: Path, name: str, code: str = "pass", **more: Any) -> Spec:
    """Appends its name to `ran`, then does what the code says."""
    line = f"import os, sys, time; print({name!r}, file=open('ran', 'a')); {code}"
    return Spec(command=(sys.executable, "-S", "-c", line), folder=str(folder), **more)


def _ran(folder: Path) -> list[str]:
    file = folder / "ran"
    return file.read_text(encoding="utf-8").split() if file.exists() else []


def _drive(
    queue: Queue, engine: Processes, *, slots: float = 1, until: Callable[[], bool] | None = None
) -> None:
    """Steps until every job has ended."""
    over = until or (lambda: not queue.jobs(states=("WAITING", "RUNNING")))
    deadline = time.monotonic() + 30
    while not over():
        assert time.monotonic() < deadline, [(j.id, j.state, j.message) for j in queue.jobs()]
        step(queue, engine, slots=slots)
        time.sleep(0.01)


def test_the_same_content_is_one_job(queue: Queue, engine: Processes, tmp_path: Path) -> None:
    spec = _spec(tmp_path, "one")
    assert queue.submit(spec) == queue.submit(replace(spec, priority=9)) == spec.id
    assert queue.submit(replace(spec, key="again")) != spec.id
    _drive(queue, engine)
    assert queue.submit(spec) == spec.id
    assert queue.find(spec.id).state == "SUCCEEDED"
    assert _ran(tmp_path) == ["one", "one"]

    # A pipeline that was edited is another job.
    pipeline = tmp_path / "p.yaml"
    pipeline.write_text("seed: 1")
    run = Spec(command=("liftyard", "run", "p.yaml"), folder=str(tmp_path))
    before = run.id
    pipeline.write_text("seed: 2")
    assert run.id != before


def test_priority_then_fair_share_within_quota(
    queue: Queue, engine: Processes, tmp_path: Path
) -> None:
    queue.set_team("twice", share=2)
    for n in range(4):
        queue.submit(_spec(tmp_path, f"once-{n}", "time.sleep(60)", team="once"))
        queue.submit(_spec(tmp_path, f"twice-{n}", "time.sleep(60)", team="twice"))
    urgent = queue.submit(_spec(tmp_path, "urgent", team="once", priority=5))
    queue.set_team("small", quota_cpus=1)
    for n in range(2):
        queue.submit(_spec(tmp_path, f"s-{n}", "time.sleep(60)", team="small", priority=9))

    assert step(queue, engine, slots=2) == 2
    first = queue.jobs(states=("RUNNING",))
    # The second of `small` is over its quota: others go on.
    assert sorted(job.spec.team for job in first) == ["once", "small"]
    assert urgent in [job.id for job in first]
    _drive(queue, engine, slots=2, until=lambda: queue.find(urgent).state == "SUCCEEDED")
    step(queue, engine, slots=7)
    teams = [job.spec.team for job in queue.jobs(states=("RUNNING",))]
    assert (teams.count("once"), teams.count("twice"), teams.count("small")) == (2, 4, 1)


def test_a_large_job_isnt_passed_by_small_ones(
    queue: Queue, engine: Processes, tmp_path: Path
) -> None:
    queue.submit(_spec(tmp_path, "first", "time.sleep(0.3)"))
    step(queue, engine, slots=2)
    queue.submit(_spec(tmp_path, "large", cpus=2, priority=1))
    queue.submit(_spec(tmp_path, "small"))
    assert step(queue, engine, slots=2) == 0
    _drive(queue, engine, slots=2)
    assert _ran(tmp_path) == ["first", "large", "small"]


def test_retries_by_cause(queue: Queue, engine: Processes, tmp_path: Path) -> None:
    flaky = "sys.exit(0 if open('ran').read().count('flaky') == 3 else 3)"
    killed = "os.kill(os.getpid(), 9) if open('ran').read().count('killed') == 1 else None"
    specs = [
        _spec(tmp_path, "flaky", flaky, retries={"failed": 2}, backoff_s=0.05),
        _spec(tmp_path, "wrong", "sys.exit(4)", retries={"lost": 3}),
        _spec(tmp_path, "killed", killed, retries={"lost": 1}, backoff_s=0),
        _spec(
            tmp_path, "slow", "time.sleep(60)", timeout_s=0.3, retries={"timeout": 1}, backoff_s=0
        ),
        Spec(command=("no-such-program",), folder=str(tmp_path)),
    ]
    ids = [queue.submit(spec) for spec in specs]
    _drive(queue, engine, slots=5)
    flaky_, wrong, killed_, slow, absent = (queue.find(id) for id in ids)
    assert (flaky_.state, flaky_.attempt, flaky_.causes) == ("SUCCEEDED", 3, {"failed": 2})
    assert (wrong.state, wrong.attempt) == ("FAILED", 1)
    assert "exit status 4 (attempt 1; retries allowed for 'failed': 0)" in wrong.message
    assert (killed_.state, killed_.attempt, killed_.causes) == ("SUCCEEDED", 2, {"lost": 1})
    assert (slow.state, slow.attempt, slow.causes) == ("FAILED", 2, {"timeout": 2})
    assert slow.seconds >= 0.6
    assert (absent.state, absent.causes) == ("FAILED", {"failed": 1})


def test_dependencies(queue: Queue, engine: Processes, tmp_path: Path) -> None:
    first = queue.submit(_spec(tmp_path, "first", "time.sleep(0.1)"))
    queue.submit(_spec(tmp_path, "second", after=(first,), priority=9))
    wrong = queue.submit(_spec(tmp_path, "wrong", "sys.exit(1)"))
    waits = queue.submit(_spec(tmp_path, "waits", after=(wrong,)))
    behind = queue.submit(_spec(tmp_path, "behind", after=(waits,)))
    with pytest.raises(QueueError, match=r"waits for job 'job-0'.*submit it first"):
        queue.submit(_spec(tmp_path, "nothing", after=("job-0",)))
    _drive(queue, engine, slots=3)
    assert _ran(tmp_path).index("first") < _ran(tmp_path).index("second")
    assert {"waits", "behind"}.isdisjoint(_ran(tmp_path))
    assert queue.find(waits).message == f"{wrong}, which it waits for, is FAILED"
    assert queue.find(behind).state == "FAILED"


def test_stop_and_queue_anew(queue: Queue, engine: Processes, tmp_path: Path) -> None:
    spec = _spec(tmp_path, "long", "time.sleep(60)", retries={"lost": 5})
    running, waiting = queue.submit(spec), queue.submit(_spec(tmp_path, "waits"))
    step(queue, engine, slots=1)
    _drive(queue, engine, until=lambda: _ran(tmp_path) == ["long"])
    assert queue.stop(waiting).state == "STOPPED"
    assert queue.stop(running).state == "RUNNING"
    _drive(queue, engine)
    assert queue.find(running).state == "STOPPED"
    assert _ran(tmp_path) == ["long"]
    assert queue.submit(_spec(tmp_path, "waits")) == waiting
    _drive(queue, engine)
    assert _ran(tmp_path) == ["long", "waits"]
    with pytest.raises(QueueError, match="no job 'job-0'"):
        queue.stop("job-0")


def test_a_head_that_dies_loses_and_doubles_nothing(
    queue: Queue, engine: Processes, tmp_path: Path
) -> None:
    job = queue.submit(_spec(tmp_path, "it", "time.sleep(0.5)", backoff_s=0))
    step(queue, engine, slots=1)
    _drive(queue, engine, until=lambda: _ran(tmp_path) == ["it"])
    # It doesn't answer: nothing is concluded from that.
    engine.down = True
    with pytest.raises(ConnectionError):
        step(queue, engine, slots=1)
    assert queue.find(job).attempt == 1
    # It has forgotten an attempt that in truth still runs: the next one waits for that one's end.
    orphan = engine.taken.pop(f"{job}-1")
    engine.down = False
    _drive(queue, engine)
    orphan.wait()
    found = queue.find(job)
    assert found.state == "SUCCEEDED"
    assert found.attempt == 2
    assert found.causes == {"lost": 1}
    # Given up, it did the job all the same, and the second attempt didn't do it again.
    assert _ran(tmp_path) == ["it"]


@pytest.mark.parametrize("point", ["before_submit", "after_submit", "running"])
def test_a_dispatcher_that_is_killed(
    point: str, queue: Queue, engine: Processes, tmp_path: Path
) -> None:
    jobs = [queue.submit(_spec(tmp_path, f"j{n}", "time.sleep(0.2)")) for n in range(3)]
    # The engine outlives the dispatcher, as Ray does: a marker file is what it has taken.
    script = f"""
import os, shlex, signal, subprocess, sys, threading
from pathlib import Path
from jobs import dispatch, queue
class Engine:
    def submit(self, id, entrypoint, spec):
        if {point!r} == "before_submit":
            os.kill(os.getpid(), signal.SIGKILL)
        subprocess.Popen(shlex.split(entrypoint.removeprefix("exec ")), start_new_session=True)
        Path({str(tmp_path)!r}, id + ".taken").touch()
        if {point!r} == "after_submit":
            os.kill(os.getpid(), signal.SIGKILL)
    def living(self):
        return {{path.stem for path in Path({str(tmp_path)!r}).glob("*.taken")}}
    def stop(self, id):
        pass
    def refusal(self, id):
        return ""
dispatch.dispatch(
    queue.Queue({queue.url!r}), Engine(), slots=2, ended=threading.Event()
)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) as killed:
        if point == "running":
            while not _ran(tmp_path):
                time.sleep(0.02)
            killed.kill()
        assert killed.wait(30) == -signal.SIGKILL

    class Taken(Processes):
        def submit(self, id: str, entrypoint: str, spec: Spec) -> None:
            if not (self.folder / f"{id}.taken").exists():
                super().submit(id, entrypoint, spec)

        def living(self) -> set[str]:
            return super().living() | {path.stem for path in self.folder.glob("*.taken")}

    after = Taken(tmp_path)
    _drive(queue, after, slots=2)
    after.end()
    assert sorted(_ran(tmp_path)) == ["j0", "j1", "j2"]
    assert [queue.find(job).state for job in jobs] == ["SUCCEEDED"] * 3


def test_submitters_at_once_and_one_killed(queue: Queue, tmp_path: Path) -> None:
    script = (
        "from jobs.queue import Queue, Spec\n"
        f"queue = Queue({queue.url!r})\n"
        "for n in range(40):\n"
        f"    queue.submit(Spec(command=('true', str(n)), folder={str(tmp_path)!r}))\n"
    )
    clients = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) for _ in range(3)]
    while not queue.jobs():
        time.sleep(0.01)
    clients[0].kill()
    for client in clients:
        client.wait()
    numbers = [int(job.spec.command[1]) for job in queue.jobs()]
    assert sorted(numbers) == list(range(40))


def test_a_database_that_goes_away_is_waited_for(
    server: str, engine: Processes, tmp_path: Path
) -> None:
    queue = Queue(server)
    ended = threading.Event()
    dispatcher = threading.Thread(
        target=dispatch, args=(queue, engine), kwargs={"slots": 1, "ended": ended}
    )
    dispatcher.start()
    try:
        first = queue.submit(_spec(tmp_path, "before"))
        while queue.find(first).state != "SUCCEEDED":
            time.sleep(0.01)
        # Every connection ends, the dispatcher's with its lock.
        with queue.database.opened() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE pid <> pg_backend_pid() AND backend_type = 'client backend'"
            )
        second = queue.submit(_spec(tmp_path, "after"))
        while queue.find(second).state != "SUCCEEDED":
            time.sleep(0.01)
    finally:
        ended.set()
        dispatcher.join()
    assert _ran(tmp_path) == ["before", "after"]


def test_one_dispatcher_at_a_time(queue: Queue, engine: Processes, tmp_path: Path) -> None:
    queue.submit(_spec(tmp_path, "it"))
    ended = threading.Event()
    second = threading.Thread(
        target=dispatch, args=(queue, engine), kwargs={"slots": 1, "ended": ended}
    )
    with queue.database.dispatching():
        second.start()
        time.sleep(0.3)
        assert queue.jobs()[0].state == "WAITING"
    while queue.jobs()[0].state != "SUCCEEDED":
        time.sleep(0.01)
    ended.set()
    second.join()


def test_a_schedule_queues_each_tick_once(queue: Queue, engine: Processes, tmp_path: Path) -> None:
    spec = _spec(tmp_path, "nightly")
    due = queue.set_schedule("nightly", "* * * * *", spec, zone="Europe/Berlin")
    assert 0 < (due - datetime.now(UTC)).total_seconds() <= 60
    assert queue.schedules() == {"nightly": ("* * * * *", "Europe/Berlin", due)}
    step(queue, engine, slots=0)
    assert queue.jobs() == []
    # Ten minutes without a dispatcher: one job makes up for them.
    with queue.database.changed() as connection:
        connection.execute("UPDATE schedules SET due = due - 600")
    step(queue, engine, slots=0)
    step(queue, engine, slots=0)
    (job,) = queue.jobs()
    assert job.spec.key.startswith("nightly 20")
    assert queue.schedules()["nightly"][2] >= due
    queue.remove_schedule("nightly")
    with pytest.raises(QueueError, match="no schedule 'nightly': there are none"):
        queue.remove_schedule("nightly")


@pytest.mark.parametrize(
    ("expression", "zone", "after", "due"),
    [
        ("30 2 * * 1-5", "UTC", "2026-11-27T02:30", "2026-11-30T02:30"),
        ("*/20 * * * *", "UTC", "2026-11-24T10:05", "2026-11-24T10:20"),
        ("0 0 29 2 *", "UTC", "2026-11-24T00:00", "2028-02-29T00:00"),
        ("0 6 1 * MON", "UTC", "2026-11-24T00:00", "2026-11-30T06:00"),
        ("0 12 * JAN sun", "UTC", "2026-11-24T00:00", "2027-01-03T12:00"),
        ("0 12 * * 7", "UTC", "2026-11-24T00:00", "2026-11-29T12:00"),
        ("5/20 9-10 * * *", "UTC", "2026-11-24T09:46", "2026-11-24T10:05"),
        # Clocks go forward over 02:30 on 29 March 2026, and back over it on 25 October.
        ("30 2 * * *", "Europe/Berlin", "2026-03-28T12:00", "2026-03-30T00:30"),
        ("30 2 * * *", "Europe/Berlin", "2026-10-25T00:30", "2026-10-26T01:30"),
    ],
)
def test_cron(expression: str, zone: str, after: str, due: str) -> None:
    moment = datetime.fromisoformat(after).replace(tzinfo=UTC)
    assert next_after(parse(expression, zone=zone), moment).isoformat()[:16] == due


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("* * * *", "has 4 fields"),
        ("61 * * * *", "minute '61': '61' isn't a number from 0 to 59"),
        ("0 0 * FOO *", "from 1 to 12, or JAN to DEC"),
        ("0 5-3 * * *", "goes backwards"),
        ("*/0 * * * *", "step '0' isn't a number above 0"),
        ("0 0 30 2 *", "is never due"),
    ],
)
def test_refuses_schedules(expression: str, said: str) -> None:
    with pytest.raises(ScheduleError, match=said.replace("*", r"\*")):
        parse(expression)
    with pytest.raises(ScheduleError, match="time zone 'Mars/Base'"):
        parse("* * * * *", zone="Mars/Base")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"timeout_s": 0}, "cpus and timeout_s are above 0"),
        ({"cpus": 0}, "cpus and timeout_s are above 0"),
        ({"retries": {"bad": 1}}, "allowed are counts of at least 0 for failed, lost, timeout"),
        ({"command": ()}, "needs a program"),
    ],
)
def test_refuses_specs(more: dict[str, Any], said: str, queue: Queue, tmp_path: Path) -> None:
    with pytest.raises(QueueError, match=said):
        queue.submit(replace(_spec(tmp_path, "it"), **more))


def test_cost_and_carbon_by_the_price_table(
    queue: Queue, engine: Processes, tmp_path: Path
) -> None:
    job = queue.submit(_spec(tmp_path, "it", "time.sleep(0.2)", cpus=2, gpus=1))
    _drive(queue, engine, slots=2)
    prices = Prices(cpu_hour=3600, gpu_hour=7200, cpu_watts=36_000, gpu_watts=0, grams_per_kwh=500)
    found = Queue(queue.url, prices=prices).find(job)
    assert found.seconds >= 0.2
    assert found.cost == pytest.approx(found.seconds * (2 * 1 + 1 * 2))
    assert found.carbon_g == pytest.approx(found.seconds * 2 * 36_000 / 3.6e6 * 500)


def test_the_command_dies_with_its_attempt(queue: Queue, engine: Processes, tmp_path: Path) -> None:
    code = "print(os.getpid(), file=open('pid', 'w'), flush=True); time.sleep(60)"
    job = queue.submit(_spec(tmp_path, "it", code, retries={}))
    step(queue, engine, slots=1)
    pid = tmp_path / "pid"
    _drive(queue, engine, until=lambda: pid.exists() and pid.read_text() != "")
    engine.taken[f"{job}-1"].kill()
    _drive(queue, engine)
    assert queue.find(job).causes == {"lost": 1}
    while Path(f"/proc/{int(pid.read_text())}").exists():
        time.sleep(0.01)


def test_the_example(engine: Processes, tmp_path: Path) -> None:
    file = tmp_path / "environments" / "shop.json"
    file.parent.mkdir()
    where = {"ray_address": "127.0.0.2:1", "tracking_uri": "sqlite:////none"}
    where |= {"storage_root": "/none", "queue": f"sqlite:///{tmp_path}/queue.sqlite"}
    file.write_text(json.dumps(where))
    for _ in range(2):
        said = subprocess.run(
            [sys.executable, ROOT / "examples" / "queue_report.py", "--env", file],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    queue = Queue(where["queue"])
    assert [job.id for job in queue.jobs()] == said.split()
    _drive(queue, engine)
    log = tmp_path / f"{said.split()[1]}-1.log"
    assert log.read_text(encoding="utf-8") == "customers: 42\n"
