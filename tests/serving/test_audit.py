"""The audit log: whole however it is written, and a change is found wherever it is."""

import asyncio
import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.audit import Audit, AuditError, verify


def write(path: Path, who: str, count: int) -> None:
    audit = Audit(path)
    for at in range(count):
        audit.append([{"who": who, "at": at, "note": "é\ud800"}])


def test_several_processes_make_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=write, args=(path, who, 50)) for who in "ab"]
    for writer in writers:
        writer.start()
    write(path, "c", 50)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert verify(path).lines == 150
    write(path, "d", 1)
    assert verify(path).lines == 151


def test_requests_at_once_are_each_written(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"

    async def ask() -> None:
        audit = Audit(path)
        await asyncio.gather(*(audit.written({"at": at}) for at in range(20)))

    asyncio.run(ask())
    assert verify(path).lines == 20


@given(st.data())
def test_a_changed_log_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("log") / "audit.jsonl"
    write(path, "a", 5)
    before = verify(path)
    lines = path.read_bytes().splitlines(keepends=True)
    at = data.draw(st.integers(0, 4))
    match data.draw(st.sampled_from(["change", "drop", "repeat", "swap", "cut"])):
        case "change":
            place = data.draw(st.integers(0, len(lines[at]) - 1))
            other = (lines[at][place] + data.draw(st.integers(1, 255))) % 256
            lines[at] = lines[at][:place] + bytes([other]) + lines[at][place + 1 :]
        case "drop":
            del lines[at]
        case "repeat":
            lines.insert(at, lines[at])
        case "swap":
            lines[at], lines[at - 1] = lines[at - 1], lines[at]
        case "cut":
            lines = lines[:at]
    path.write_bytes(b"".join(lines))
    with pytest.raises(AuditError):
        verify(path, digest=before.digest)


def test_a_torn_line_stops_the_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, "a", 3)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(AuditError, match="the last line isn't whole"):
        Audit(path)
    with pytest.raises(AuditError, match="line 3"):
        verify(path)
