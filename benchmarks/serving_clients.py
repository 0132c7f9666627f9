"""Clients that ask by every way without a pause, and write down what they got.

In a process of their own, for `benchmarks.serving_faults`.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import polars as pl
import pyarrow as pa

from benchmarks.serving_load import CONTENT
from benchmarks.serving_servers import MODEL
from benchmarks.serving_work import AT, REORDER, Expected, Work
from serving.protocol.liftyard_pb2 import Events, Row, ScoreCustomerRequest, ScoreRequest, Value
from serving.protocol.liftyard_pb2_grpc import LiftyardStub

# Clients by the way that they ask.
CLIENTS = {"json": 4, "arrow": 2, "explain": 1, "customers": 1, "grpc": 1, "graphql": 1}

BACK_OFF_S = 0.05
TIMEOUT_S = 30.0

QUERY = (
    f'query ($rows: [JSON!]!, $id: ID!) {{ score(model: "{MODEL}", rows: $rows) '
    "{ version scores } customer(id: $id) { scores { model version score } } }"
)

# By itself gRPC waits up to two minutes before it connects anew.
CHANNEL = [(f"grpc.{name}_reconnect_backoff_ms", 100) for name in ("initial", "min", "max")]

# Of the file that `ask` writes; `lines` are the ids that the audit log has to have.
ANSWERS = pl.Schema(
    {
        "kind": pl.String,
        "began": pl.Float64,
        "ended": pl.Float64,
        "failure": pl.String,
        "version": pl.Int64,
        "right": pl.Boolean,
        "lines": pl.List(pl.String),
    }
)


class Failed(Exception):
    """There is no answer; the message is a status, or how the connection ended."""


@dataclass(frozen=True)
class Part:
    """Scores in an answer."""

    version: int
    scores: Sequence[float]
    expected: Expected

    @property
    def right(self) -> bool:
        """Whether they are the version's own, to the bit."""
        return list(self.scores) == list(self.expected[self.version])


def ask(url: str, rpc: str, key: str, work: Work, answers: Path, until: float) -> None:
    """Asks until a time, and writes a line an answer, as `ANSWERS` has it.

    Args:
        url: Base URL of HTTP.
        rpc: Address of gRPC.
        key: API key.
        work: What is asked for.
        answers: The file that is written.
        until: Seconds since the epoch.
    """

    async def main() -> None:
        with answers.open("w", encoding="utf-8") as log:
            await asyncio.gather(
                *(
                    _client(f"{kind}-{at}", kind, url, rpc, key, work, log, until)
                    for kind, count in CLIENTS.items()
                    for at in range(count)
                )
            )

    asyncio.run(main())


async def _client(
    name: str, kind: str, url: str, rpc: str, key: str, work: Work, log: Any, until: float
) -> None:
    authorization = f"Bearer {key}"
    async with (
        httpx.AsyncClient(
            base_url=url,
            timeout=TIMEOUT_S,
            trust_env=False,
            headers={"authorization": authorization},
        ) as http,
        grpc.aio.insecure_channel(rpc, options=CHANNEL) as channel,
    ):
        way = getattr(_Ways(http, LiftyardStub(channel), authorization, work), f"by_{kind}")
        asked = 0
        while (began := time.time()) < until:
            id = f"{name}-{asked}"
            told: dict[str, Any] = {"kind": kind, "began": began, "right": True, "version": 0}
            try:
                parts = await way(id, asked)
                told |= {
                    "version": parts[0].version,
                    "right": all(part.right for part in parts),
                    # A field of GraphQL is a request of its own.
                    "lines": [f"{id}.0", f"{id}.1"] if kind == "graphql" else [id],
                }
            except Failed as failed:
                told["failure"] = str(failed)
                await asyncio.sleep(BACK_OFF_S)
            log.write(json.dumps(told | {"ended": time.time()}) + "\n")
            asked += 1


@dataclass(frozen=True)
class _Ways:
    """A question by each way: its id and number in, the scores of its answer out.

    Raises:
        Failed: There is no answer.
    """

    http: httpx.AsyncClient
    stub: LiftyardStub
    authorization: str
    work: Work

    async def by_json(self, id: str, asked: int) -> list[Part]:
        row, expected = self._row(asked)
        said = await self._post(f"/v1/models/{MODEL}/score", id, {"rows": [row]})
        return [Part(said["version"], said["scores"], expected)]

    async def by_arrow(self, id: str, asked: int) -> list[Part]:
        answer = await self._sent("POST", f"/v1/models/{MODEL}/score", id, "arrow", self.work.batch)
        table = pa.ipc.open_stream(answer.content).read_all()
        version = int(table.schema.metadata[b"version"])
        return [Part(version, table["score"].to_pylist(), self.work.scores)]

    async def by_explain(self, id: str, asked: int) -> list[Part]:
        row, expected = self._row(asked)
        said = await self._post(f"/v1/models/{MODEL}/explain", id, {"rows": [row]})
        scores = [each["score"] for each in said["explanations"]]
        return [Part(said["version"], scores, expected)]

    async def by_customers(self, id: str, asked: int) -> list[Part]:
        at = asked % len(self.work.customers)
        customer = self.work.customers[at]
        if asked % 2:
            answer = await self._sent("GET", f"/v1/customers/{customer}", id)
            found = answer.json()["scores"][REORDER]
            return [Part(found["version"], [found["score"]], _only(self.work.latest, at))]
        body = {"at": AT.isoformat(), "events": {"buys": [self.work.events[at]]}}
        said = await self._post(f"/v1/models/{REORDER}/customers/{customer}", id, body)
        return [Part(said["version"], [said["score"]], _only(self.work.anew, at))]

    async def by_grpc(self, id: str, asked: int) -> list[Part]:
        if asked % 2:
            row, expected = self._row(asked)
            request = ScoreRequest(model=MODEL, rows=[_as_row(row)])
            said = await self._called(self.stub.Score, request, id)
            return [Part(said.version, said.scores, expected)]
        at = asked % len(self.work.customers)
        request = ScoreCustomerRequest(
            model=REORDER,
            customer=str(self.work.customers[at]),
            at=AT.isoformat(),
            events={"buys": Events(rows=[_as_row(self.work.events[at])])},
        )
        said = await self._called(self.stub.ScoreCustomer, request, id)
        return [Part(said.version, [said.score], _only(self.work.anew, at))]

    async def by_graphql(self, id: str, asked: int) -> list[Part]:
        row, expected = self._row(asked)
        at = asked % len(self.work.customers)
        variables = {"rows": [row], "id": str(self.work.customers[at])}
        said = await self._post("/v1/graphql", id, {"query": QUERY, "variables": variables})
        if "errors" in said:
            raise Failed(said["errors"][0]["extensions"]["code"])
        scored, (found,) = said["data"]["score"], said["data"]["customer"]["scores"]
        return [
            Part(scored["version"], scored["scores"], expected),
            Part(found["version"], [found["score"]], _only(self.work.latest, at)),
        ]

    def _row(self, asked: int) -> tuple[Mapping[str, Any], Expected]:
        at = asked * 7 % len(self.work.rows)
        return self.work.rows[at], _only(self.work.scores, at)

    async def _post(self, path: str, id: str, body: Mapping[str, Any]) -> Any:
        answer = await self._sent("POST", path, id, "json", json.dumps(body).encode())
        return answer.json()

    async def _sent(
        self, method: str, path: str, id: str, kind: str = "json", body: bytes | None = None
    ) -> httpx.Response:
        headers = {"content-type": CONTENT[kind], "x-request-id": id}
        try:
            answer = await self.http.request(method, path, content=body, headers=headers)
        except httpx.TransportError as error:
            raise Failed(type(error).__name__) from error
        if answer.status_code != 200:
            raise Failed(str(answer.status_code))
        return answer

    async def _called(self, method: Any, request: Any, id: str) -> Any:
        metadata = (("authorization", self.authorization), ("x-request-id", id))
        try:
            return await method(request, metadata=metadata, timeout=TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise Failed(error.code().name) from error


def _only(expected: Expected, at: int) -> Expected:
    return {version: [scores[at]] for version, scores in expected.items()}


def _as_row(values: Mapping[str, Any]) -> Row:
    kinds: dict[type, str] = {bool: "flag", int: "integer", float: "number", str: "text"}
    return Row(
        fields={
            name: Value() if value is None else Value(**{kinds[type(value)]: value})
            for name, value in values.items()
        }
    )
