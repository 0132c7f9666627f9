"""Load from another process over connections that are kept open; for `benchmarks.serving`."""

import asyncio
import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

# At once, beside one alone.
CLIENTS = 64

CONTENT = {
    "json": "application/json",
    "arrow": "application/vnd.apache.arrow.stream",
}


@dataclass(frozen=True, kw_only=True)
class Load:
    """What one client process found in one go."""

    per_s: float
    p50_ms: float
    p99_ms: float
    answers: int
    errors: int
    wrong: int
    # Connections that the server closed by the book, with an answer, and that were opened again.
    closed: int


class _Client(asyncio.Protocol):
    """Asks again as soon as it has its answer, over one connection while the server keeps it."""

    def __init__(
        self, port: int, requests: Sequence[bytes], expected: Sequence[bytes] | None, at: int
    ) -> None:
        self.port, self.requests, self.expected, self.at = port, requests, expected, at
        self.seconds: list[float] = []
        self.ended: list[float] = []
        self.errors = self.wrong = self.closed = 0
        self.stopped = False
        self._buffer = bytearray()
        self._transport: Any = None
        self._began = 0.0
        # Held, since the loop holds its tasks weakly.
        self._connecting: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        """Opens the connection, and asks."""
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: self, "127.0.0.1", self.port)

    async def _connect_again(self) -> None:
        try:
            await self.connect()
        except OSError:
            self.errors += 1

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._ask()

    def _ask(self) -> None:
        self.at = (self.at + 1) % len(self.requests)
        self._buffer.clear()
        self._began = time.perf_counter()
        self._transport.write(self.requests[self.at])

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._buffer[:end]).lower()
        if b"transfer-encoding: chunked" in head:
            if not self._buffer.endswith(b"0\r\n\r\n"):
                return
            body = b""
        else:
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
            if len(self._buffer) < end + 4 + length:
                return
            body = bytes(self._buffer[end + 4 :])
        now = time.perf_counter()
        self.seconds.append(now - self._began)
        self.ended.append(now)
        if head.split(b" ", 2)[1] != b"200":
            self.errors += 1
        elif self.expected is not None and self.expected[self.at] not in body:
            self.wrong += 1
        if self.stopped:
            return
        if b"connection: close" in head:
            # HAProxy says so with the last answer of a process that a reload replaces.
            self.closed += 1
            self._transport.abort()
            self._transport = None
            self._connecting = asyncio.get_running_loop().create_task(self._connect_again())
        else:
            self._ask()

    def connection_lost(self, exc: Exception | None) -> None:
        # One that went before its answer came; not one that the client itself gave up.
        if self._transport is not None and not self.stopped:
            self.errors += 1


def _load(
    port: int,
    requests: Sequence[bytes],
    expected: Sequence[bytes] | None,
    clients: int,
    seconds: float,
) -> Load:
    import uvloop

    async def run() -> Load:
        made = [_Client(port, requests, expected, at * 7) for at in range(clients)]
        for client in made:
            await client.connect()
        # A tenth to warm up, then what ends within the time counts.
        await asyncio.sleep(seconds / 10)
        began = time.perf_counter()
        await asyncio.sleep(seconds)
        until = time.perf_counter()
        for client in made:
            client.stopped = True
        taken = [
            second
            for client in made
            for second, end in zip(client.seconds, client.ended, strict=True)
            if began <= end <= until
        ]
        times = sorted(taken) or [math.nan]
        return Load(
            per_s=len(taken) / (until - began),
            p50_ms=1e3 * times[len(times) // 2],
            p99_ms=1e3 * times[int(len(times) * 0.99)],
            answers=sum(len(client.seconds) for client in made),
            errors=sum(client.errors for client in made),
            wrong=sum(client.wrong for client in made),
            closed=sum(client.closed for client in made),
        )

    return uvloop.run(run())


def _loader(pipe: Any) -> None:
    while True:
        try:
            asked = pipe.recv()
        except EOFError:
            return
        pipe.send(_load(*asked))


@contextmanager
def loader() -> Iterator[Any]:
    """The process that the load comes from; called like `_load`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_loader, args=(theirs,))
    process.start()
    theirs.close()

    def ask(*arguments: Any) -> Load:
        ours.send(arguments)
        found: Load = ours.recv()
        return found

    try:
        yield ask
    finally:
        ours.close()
        process.join(10)


def request(path: str, body: bytes, kind: str, key: str | None = None) -> bytes:
    """An HTTP request, whole."""
    shown = "" if key is None else f"Authorization: Bearer {key}\r\n"
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: {CONTENT[kind]}\r\n"
        f"{shown}Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def _median(loads: Sequence[Load], name: str) -> float:
    return statistics.median(getattr(load, name) for load in loads)


def summary(loads: Sequence[Load]) -> dict[str, Any]:
    """Medians of the rounds, and what went wrong in all of them."""
    return {
        "per_s": round(_median(loads, "per_s"), 1),
        "per_s_rounds": [round(load.per_s, 1) for load in loads],
        "p50_ms": round(_median(loads, "p50_ms"), 2),
        "p99_ms": round(_median(loads, "p99_ms"), 2),
        "answers": sum(load.answers for load in loads),
        "errors": sum(load.errors for load in loads),
        "wrong": sum(load.wrong for load in loads),
        "closed": sum(load.closed for load in loads),
    }
