"""Traces as a collector gets them: by OTLP over HTTP, in protobuf."""

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from serving import settings
from serving.gate import Gate
from serving.replica import Models
from serving.routes import application
from serving.settings import Limits, Settings
from tests.serving import lapse

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@dataclass(kw_only=True)
class Collector:
    """Where spans go."""

    url: str = ""
    paths: set[str] = field(default_factory=set)
    spans: list[Any] = field(default_factory=list)


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            made.paths.add(self.path)
            body = self.rfile.read(int(self.headers["content-length"]))
            sent = ExportTraceServiceRequest.FromString(body)
            made.spans += [
                span
                for resource in sent.resource_spans
                for scope in resource.scope_spans
                for span in scope.spans
            ]
            self.send_response(200)
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield made
        server.shutdown()
        thread.join()


def ask(chosen: Settings, requests: list[dict[str, str]], *, status: int = 200) -> None:
    """A row scored for each request's headers."""

    async def main() -> None:
        gate = Gate(chosen)
        transport = httpx.ASGITransport(application(Models(chosen), gate))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for headers in requests:
                body = {"rows": [{"spend" if status == 200 else "spent": 8.0}]}
                # A task each, as a server has it.
                answer = await asyncio.create_task(
                    client.post("/v1/models/lapse/score", json=body, headers=headers)
                )
                assert answer.status_code == status
        # Sends what waits.
        gate.adapt(replace(chosen, traces=None), None, None)

    asyncio.run(main())
    for thread in threading.enumerate():
        if thread.name == "traces end":
            thread.join()


def test_a_request_is_a_span_with_its_steps_in_the_trace_of_its_client(
    collector: Collector, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = lapse.champion(tmp_path)
    chosen = Settings(
        registry=registry.uri,
        models=None,
        limits=Limits(),
        refresh_s=60,
        traces=settings.Traces(endpoint=collector.url, sample=0.0),
    )
    parent = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    # Of the others none is drawn: no header, one that says no, one that can't be read.
    others = [{}, {"traceparent": f"00-{TRACE}-{PARENT}-00"}, {"traceparent": "00-x"}]
    ask(chosen, [*others, parent])
    assert collector.paths == {"/v1/traces"}
    spans = {span.name: span for span in collector.spans}
    assert sorted(span.name for span in collector.spans) == ["batch", "model", "parse", "score"]
    root = spans.pop("score")
    assert (root.trace_id.hex(), root.parent_span_id.hex()) == (TRACE, PARENT)
    told = {each.key: each.value for each in root.attributes}
    assert told["http.response.status_code"].int_value == 200
    assert told["liftyard.model"].string_value == "lapse"
    for span in spans.values():
        assert (span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id)
        assert root.start_time_unix_nano <= span.start_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano
    batch, model = spans["batch"], spans["model"]
    assert batch.start_time_unix_nano <= model.start_time_unix_nano
    # All are drawn; a refused one has its trace in its line of the log.
    collector.spans.clear()
    with caplog.at_level(logging.WARNING, "ray.serve"):
        ask(replace(chosen, traces=replace(chosen.traces, sample=1.0)), [{}], status=422)
    assert [span.name for span in collector.spans] == ["parse", "score"]
    line = json.loads(caplog.messages[-1])
    assert (line["trace"], line["status"]) == (collector.spans[1].trace_id.hex(), 422)
    assert line["request"]
