"""Who asked for what: a log that is only appended to, each line with the digest of the one before.

A line that was changed, put in or taken out breaks the chain from there on, which `verify` finds.
Lines cut off at the end leave a chain that holds: keep the last digest that `verify` gave somewhere
else, and give it to the next `verify`. A line is handed to the operating system before the request
is answered, so that it outlives the process, but not a power cut.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FIRST = "0" * 64


class AuditError(ValueError):
    """The log isn't as it was written; the message names the first line that doesn't fit."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """A log whose chain holds.

    Attributes:
        lines: How many.
        digest: The last line's, hexadecimal.
    """

    lines: int
    digest: str


class Audit:
    """Appends; several processes may do so to one file, in turns."""

    def __init__(self, path: Path) -> None:
        """Opens the log, made where it isn't there, readable by its owner only.

        Raises:
            AuditError: Its last line isn't whole: verify it, and move it away to begin another.
            OSError: It can't be opened.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        # With its last user; a replica may be told to write another.
        weakref.finalize(self, os.close, self._file)
        self._size = -1
        self._digest = FIRST
        self._number = 0
        self._waiting: list[tuple[Mapping[str, Any], asyncio.Future[None]]] = []
        self.append([])

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes records, JSON objects, each a line.

        Raises:
            AuditError: What another process wrote last isn't whole.
            OSError: The file can't be written.
        """
        fcntl.flock(self._file, fcntl.LOCK_EX)
        try:
            if os.fstat(self._file).st_size != self._size:
                self._catch_up()
            lines = []
            number, digest = self._number, self._digest
            for record in records:
                number += 1
                line, digest = _line(record, number, digest)
                lines.append(line)
            content = "".join(lines).encode()
            if content:
                if os.write(self._file, content) != len(content):
                    raise OSError(f"{self._path}: a line was written in part; is the disk full?")
                self._number, self._digest = number, digest
                self._size = os.fstat(self._file).st_size
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    async def written(self, record: Mapping[str, Any]) -> None:
        """Returns once the record is written; those of one turn of the event loop go together.

        Raises:
            AuditError, OSError: As `append`.
        """
        loop = asyncio.get_running_loop()
        written: asyncio.Future[None] = loop.create_future()
        if not self._waiting:
            loop.call_soon(self._flush)
        self._waiting.append((record, written))
        await written

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        failed: Exception | None = None
        try:
            self.append([record for record, _ in waiting])
        except (OSError, AuditError) as error:
            failed = error
        for _, written in waiting:
            # A client that went away has cancelled its own.
            if written.done():
                continue
            if failed is None:
                written.set_result(None)
            else:
                written.set_exception(failed)

    def _catch_up(self) -> None:
        size = os.fstat(self._file).st_size
        if size:
            last = _last_line(self._file, size)
            try:
                stored = json.loads(last)
                self._number, self._digest = int(stored["number"]), str(stored["digest"])
            except (ValueError, KeyError, TypeError) as error:
                raise AuditError(
                    f"{self._path}: the last line isn't whole ({error!r}); verify the log, and "
                    "move it away to begin another"
                ) from error
        self._size = size


def verify(path: Path, *, digest: str | None = None) -> Verified:
    """Looks through the whole log.

    Args:
        path: The log.
        digest: One that an earlier `verify` gave; a line must have it still.

    Raises:
        AuditError: A line was changed, put in or taken out, or none has the digest.
        OSError: The log can't be read.
    """
    before, number, seen = FIRST, 0, digest in (None, FIRST)
    with path.open(encoding="utf-8", newline="\n", errors="surrogateescape") as file:
        for line in file:
            number += 1
            try:
                record = json.loads(line)
                fits = (record.pop("number"), record.pop("before")) == (number, before)
                claimed = record.pop("digest")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise AuditError(f"{path}, line {number}: isn't a whole record") from error
            again, found = _line(record, number, before)
            if not fits or found != claimed or again != line:
                raise AuditError(
                    f"{path}, line {number}: doesn't follow from the line before; it was changed, "
                    "or lines were put in or taken out there"
                )
            before = found
            seen = seen or found == digest
    if not seen:
        raise AuditError(f"{path}: no line has the digest {digest}; lines are missing at the end")
    return Verified(lines=number, digest=before)


def _line(record: Mapping[str, Any], number: int, before: str) -> tuple[str, str]:
    """The record's line and its digest."""
    told = json.dumps({**record, "number": number, "before": before})
    digest = hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()
    return f'{told[:-1]}, "digest": "{digest}"}}\n', digest


def _last_line(file: int, size: int) -> bytes:
    block = 4_096
    while True:
        tail = os.pread(file, min(block, size), max(0, size - block))
        if not tail.endswith(b"\n"):
            return b""
        cut = tail.rfind(b"\n", 0, -1)
        if cut >= 0 or block >= size:
            return tail[cut + 1 :]
        block *= 4
