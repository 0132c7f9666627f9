"""The routes over HTTP: what comes in, read and checked; what goes out, as JSON or Arrow."""

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from fastapi import FastAPI, Request, Response

from models.explain import ExplainError
from serving import arrow, schema
from serving.access import Denied
from serving.audit import AuditError
from serving.explaining import explanations
from serving.gate import Asked, Gate
from serving.metrics import MEDIA_TYPE as METRICS
from serving.replica import Models, RefusedModel, UnknownModel
from serving.settings import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = "application/json"

log = logging.getLogger("ray.serve")

_ROWS = re.compile(r"/v1/models/([^/]+)/(score|explain)")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer.

    Attributes:
        status: HTTP status.
        body: Whole.
        media_type: Of the body.
        headers: Besides the body's type and length.
        told: What the audit log keeps of it.
    """

    status: int = 200
    body: bytes
    media_type: str = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()
    told: Mapping[str, Any] = field(default_factory=dict)


def application(models: Models, gate: Gate) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The ASGI application of a replica.

    Scores are asked for by the thousand a second, and FastAPI's way to a route takes longer than
    the model: what the gate guards is answered here, and FastAPI has the documents and the rest.
    """
    others = _fastapi(models, gate)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await others(scope, receive, send)
            return
        action, name = _asked(scope)
        headers = dict(scope["headers"])
        asked = gate.asked(action, name, headers.get(b"x-request-id"))
        if action is None:
            await others(scope, receive, _watched(send, gate, asked, models))
            return
        body: bytes | None = None
        try:
            sent = headers.get(b"authorization")
            gate.admit(asked, None if sent is None else sent.decode("latin-1"))
            body = await _body(receive, models.settings.limits.body_bytes)
            reply = await _answered(models, gate, action, name or "", _media_type(headers), body)
        except Denied as error:
            asked.who = error.who
            reply = _denial(error)
        except Exception:
            log.exception(f"request {asked.id} failed")
            reply = problem(500, f"the server failed; ask for request {asked.id} in its log")
        try:
            await gate.keep(asked, reply.status, reply.told, body)
        except (AuditError, OSError):
            reply = problem(503, "the audit log can't be written, so there is no answer")
        gate.done(asked, reply.status, models.served)
        await _send(send, reply, asked.id)

    return answer


def _asked(scope: Scope) -> tuple[str | None, str | None]:
    """The action and model that a request is about; none for what is open to all."""
    path, method = scope["path"], scope["method"]
    if method == "POST":
        found = _ROWS.fullmatch(path)
        return (found[2], found[1]) if found else (None, None)
    if method == "GET" and path in ("/v1/models", "/metrics"):
        return path.rpartition("/")[2], None
    return None, None


async def _answered(
    models: Models, gate: Gate, action: str, name: str, media_type: str, body: bytes | None
) -> Reply:
    match action:
        case "score":
            return await score(models, name, media_type, body)
        case "explain":
            return await explain(models, name, body)
        case "models":
            return as_json({"models": [asdict(each.card) for each in models.served.values()]})
    served = {name: (each.card.version, each.batcher) for name, each in models.served.items()}
    return Reply(body=gate.metrics.text(served), media_type=METRICS)


async def score(models: Models, name: str, media_type: str, body: bytes | None) -> Reply:
    """The scores of a request's rows, as JSON or Arrow, whichever they came in.

    Args:
        models: Those served.
        name: Which.
        media_type: Of the body.
        body: None where it was over the limit.
    """
    limits = models.settings.limits
    try:
        served = models.find(name)
        version = served.card.version
        body = _within(body, limits)
        if media_type == arrow.MEDIA_TYPE:
            x_np = arrow.matrix(body, served.scorer.encoder, max_rows=limits.rows)
            scores_n = await served.batcher.score(x_np)
            return Reply(
                body=arrow.answer(scores_n, model=name, version=version),
                media_type=arrow.MEDIA_TYPE,
                told={"version": version, "rows": len(x_np)},
            )
        x_np = served.reader.matrix(schema.parse(body, max_rows=limits.rows))
    except (schema.RequestError, UnknownModel, RefusedModel) as error:
        return refusal(error)
    scores_n = await served.batcher.score(x_np)
    # repr of a float64, which json writes, reads back as the same bits.
    return as_json(
        {"model": name, "version": version, "scores": scores_n.tolist()},
        told={"version": version, "rows": len(x_np)},
    )


async def explain(models: Models, name: str, body: bytes | None) -> Reply:
    """Why a request's rows have their scores; `body` is None where it was over the limit."""
    limits = models.settings.limits
    try:
        served = models.find(name)
        body = _within(body, limits)
        rows = schema.parse(body, max_rows=limits.explained_rows)
        x_np = served.reader.matrix(rows)
        return as_json(
            await asyncio.to_thread(explanations, served, rows, x_np),
            told={"version": served.card.version, "rows": len(rows)},
        )
    except (schema.RequestError, UnknownModel, RefusedModel, ExplainError) as error:
        return refusal(error)


def _fastapi(models: Models, gate: Gate) -> FastAPI:
    app = FastAPI(title="Liftyard", summary="Scores of the registry's champions", version="1")
    rows = {"requestBody": schema.REQUEST_BODY}

    # The next four are answered before FastAPI; here they are for its page.
    @app.post("/v1/models/{name}/score", openapi_extra=rows)
    async def score_rows(name: str, request: Request) -> Response:
        """Scores rows: the probability of 1, one a row, in their order."""
        return _response(await score(models, name, JSON, await request.body()))

    @app.post("/v1/models/{name}/explain", openapi_extra=rows)
    async def explain_rows(name: str, request: Request) -> Response:
        """Explains rows: what each feature adds to the score, and the main reasons in words.

        `base` and a row's contributions sum to its score on `scale`: "probability", or "log-odds",
        of which a sigmoid gives the score.
        """
        return _response(await explain(models, name, await request.body()))

    @app.get("/v1/models")
    async def cards() -> Response:
        """The cards of the models served."""
        return _response(await _answered(models, gate, "models", "", JSON, b""))

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return _response(await _answered(models, gate, "metrics", "", JSON, b""))

    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether every model is loaded, and which versions were refused."""
        body = models.health()
        return _response(as_json(body, status=200 if body["status"] == "ready" else 503))

    return app


def _watched(send: Send, gate: Gate, asked: Asked, models: Models) -> Send:
    """`send` that adds the request's id and counts the answer."""

    async def watched(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-request-id", asked.id.encode())]
            gate.done(asked, message["status"], models.served)
        await send(message)

    return watched


def _denial(error: Denied) -> Reply:
    headers = []
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    return replace(problem(error.status, str(error)), headers=tuple(headers))


def as_json(
    body: dict[str, Any], *, status: int = 200, told: Mapping[str, Any] | None = None
) -> Reply:
    """A reply of a JSON object."""
    text = json.dumps(body, ensure_ascii=False, allow_nan=False)
    return Reply(status=status, body=text.encode(), told=told or {})


def problem(status: int, detail: str) -> Reply:
    """A reply that says what is wrong."""
    return as_json({"detail": detail}, status=status)


def refusal(error: Exception) -> Reply:
    """A reply that says why a request isn't answered."""
    match error:
        case schema.RequestError():
            return as_json(error.body(), status=error.status)
        case UnknownModel():
            return problem(404, str(error))
        case RefusedModel():
            return problem(503, str(error))
        case ExplainError():
            return problem(501, str(error))
    raise error


def _within(body: bytes | None, limits: Limits) -> bytes:
    if body is None:
        reason = f"the body is over {limits.body_bytes} bytes; send rows in parts"
        raise schema.RequestError([schema.Problem(reason=reason)], status=413)
    return body


def _media_type(headers: Mapping[bytes, bytes]) -> str:
    text = headers.get(b"content-type", b"").decode("latin-1")
    return text.partition(";")[0].strip().lower()


async def _body(receive: Receive, most_bytes: int) -> bytes | None:
    """The request's body, or None where it is longer; then the rest isn't read."""
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body", False):
        pieces = bytearray(body)
        while message.get("more_body", False) and len(pieces) <= most_bytes:
            message = await receive()
            pieces += message.get("body", b"")
        body = bytes(pieces)
    return body if len(body) <= most_bytes else None


async def _send(send: Send, reply: Reply, request_id: str) -> None:
    headers = [
        (b"content-type", reply.media_type.encode()),
        (b"content-length", str(len(reply.body)).encode()),
        (b"x-request-id", request_id.encode()),
        *reply.headers,
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


def _response(reply: Reply) -> Response:
    return Response(reply.body, status_code=reply.status, media_type=reply.media_type)
