"""The routes over HTTP: what comes in, read and checked; what goes out, as JSON or Arrow."""

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import unquote

from fastapi import FastAPI, Request, Response

from serving import arrow, schema
from serving.replica import Models, RefusedModel, UnknownModel

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = "application/json"

_SCORE = re.compile(r"/v1/models/([^/]+)/score")


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer; `headers` come besides the content's type and length."""

    status: int = 200
    body: bytes
    media_type: str = JSON
    headers: tuple[tuple[bytes, bytes], ...] = ()


def application(models: Models) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The ASGI application of a replica."""
    others = _fastapi(models)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        # Scores are asked for by the thousand a second, and FastAPI's way to a route takes longer
        # than the model.
        if scope["type"] == "http" and scope["method"] == "POST":
            found = _SCORE.fullmatch(scope["path"])
            if found is not None:
                name, kind = unquote(found[1]), _content_type(scope)
                body = await _body(receive, models.settings.limits.body_bytes)
                reply = await score(models, name, kind, body)
                await _send(send, reply)
                return
        await others(scope, receive, send)

    return answer


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
    except (UnknownModel, RefusedModel) as error:
        return problem(404 if isinstance(error, UnknownModel) else 503, str(error))
    if body is None:
        return problem(413, f"the body is over {limits.body_bytes} bytes; send rows in parts")
    version = served.card.version
    try:
        if media_type == arrow.MEDIA_TYPE:
            x_np = arrow.matrix(body, served.scorer.encoder, max_rows=limits.rows)
            scores_n = await served.batcher.score(x_np)
            return Reply(
                body=arrow.answer(scores_n, model=name, version=version),
                media_type=arrow.MEDIA_TYPE,
            )
        x_np = served.reader.matrix(schema.parse(body, max_rows=limits.rows))
    except schema.RequestError as error:
        return as_json(error.body(), status=error.status)
    scores_n = await served.batcher.score(x_np)
    # repr of a float64, which json writes, reads back as the same bits.
    return as_json({"model": name, "version": version, "scores": scores_n.tolist()})


def _fastapi(models: Models) -> FastAPI:
    app = FastAPI(title="Liftyard", summary="Scores of the registry's champions", version="1")

    @app.post("/v1/models/{name}/score", openapi_extra={"requestBody": schema.REQUEST_BODY})
    async def score_rows(name: str, request: Request) -> Response:
        """Scores rows: the probability of 1, one a row, in their order."""
        return _response(
            await score(models, name, _content_type(request.scope), await request.body())
        )

    @app.get("/v1/models")
    async def cards() -> Response:
        """The cards of the models served."""
        return _response(
            as_json({"models": [asdict(served.card) for served in models.served.values()]})
        )

    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether every model is loaded, and which versions were refused."""
        body = models.health()
        return _response(as_json(body, status=200 if body["status"] == "ready" else 503))

    return app


def as_json(body: dict[str, Any], *, status: int = 200) -> Reply:
    """A reply of a JSON object."""
    text = json.dumps(body, ensure_ascii=False, allow_nan=False)
    return Reply(status=status, body=text.encode())


def problem(status: int, detail: str) -> Reply:
    """A reply that says what is wrong."""
    return as_json({"detail": detail}, status=status)


def _content_type(scope: Scope) -> str:
    for name, value in scope["headers"]:
        if name == b"content-type":
            text: str = value.decode("latin-1")
            return text.partition(";")[0].strip().lower()
    return ""


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


async def _send(send: Send, reply: Reply) -> None:
    headers = [
        (b"content-type", reply.media_type.encode()),
        (b"content-length", str(len(reply.body)).encode()),
        *reply.headers,
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})


def _response(reply: Reply) -> Response:
    return Response(reply.body, status_code=reply.status, media_type=reply.media_type)
