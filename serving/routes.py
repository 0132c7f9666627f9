"""The routes over HTTP: what comes in, read and checked; what goes out, as JSON or Arrow."""

import re
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

import msgspec
from fastapi import FastAPI, Response

from serving import answers, arrow, customers, graphql, overview, schema, texts
from serving.answers import Answer, guarded
from serving.gate import Asked, Gate
from serving.patience import Patience
from serving.replica import Models
from serving.settings import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

# The header that keeps a client's requests at one version while a canary runs.
ROUTING_KEY = b"x-routing-key"

# The header with the milliseconds from arrival that a client waits.
DEADLINE = b"x-deadline-ms"

# Seconds that a client may take to send a body; it holds a place meanwhile.
BODY_S = 30.0

GRAPHQL = "/v1/graphql"
_ROWS = re.compile(r"/v1/models/([^/]+)/(score|explain)")
_CUSTOMER_SCORE = re.compile(r"/v1/models/([^/]+)/customers/([^/]+)")
_CUSTOMER = re.compile(r"/v1/customers/([^/]+)")
# Of texts: to score, to explain.
_TEXTS = {"/v1/sentiment": "score", "/v1/sentiment/explain": "explain"}


def application(models: Models, gate: Gate) -> Callable[[Scope, Receive, Send], Awaitable[None]]:
    """The ASGI application of a replica.

    Scores are asked for by the thousand a second, and FastAPI's way to a route takes longer than
    the model: what the gate guards is answered here, and FastAPI has the documents and the rest.
    """
    others, patience = _fastapi(models, gate), Patience(BODY_S)

    async def read(receive: Receive, most_bytes: int) -> bytes | None:
        try:
            return await patience.wait(_body(receive, most_bytes))
        except TimeoutError as error:
            reason = f"the body hasn't come whole within {BODY_S:.0f} s; send it anew"
            raise schema.RequestError([schema.Problem(reason=reason)], status=408) from error

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await others(scope, receive, send)
            return
        action, name, customer = _asked(scope)
        if name is not None:
            name = models.name(name)
        headers = dict(scope["headers"])
        asked = gate.asked(action, name, headers.get(b"x-request-id"), headers.get(b"traceparent"))
        if scope["path"] == GRAPHQL and scope["method"] == "POST":
            asked.way = "graphql"
            sent = _text(headers, b"authorization"), _text(headers, DEADLINE)
            try:
                most = min(models.settings.limits.body_bytes, graphql.MOST_BYTES)
                body = await read(receive, most)
                found = await graphql.answer(models, gate, asked, *sent, body)
            except Exception as error:
                found = answers.refused(error, asked)
            gate.done(asked, found.status, models)
            await _send(send, found, asked.id)
            return
        if action is None:
            await others(scope, receive, _watched(send, gate, asked, models))
            return

        async def work() -> Answer:
            asked.body = await read(receive, models.settings.limits.body_bytes)
            if scope["path"] in _TEXTS:
                return await _of_texts(models, asked)
            return await _answered(models, gate, asked, headers, customer)

        sent = _text(headers, b"authorization"), _text(headers, DEADLINE)
        await _send(send, await guarded(models, gate, asked, *sent, work), asked.id)

    return answer


def _asked(scope: Scope) -> tuple[str | None, str | None, str | None]:
    """The action, model and customer that a request is about; none for what is open to all."""
    path, method = scope["path"], scope["method"]
    if method == "POST":
        if found := _ROWS.fullmatch(path):
            return found[2], found[1], None
        if found := _CUSTOMER_SCORE.fullmatch(path):
            return "score", found[1], found[2]
        if path in _TEXTS:
            return _TEXTS[path], texts.MODEL, None
    if method == "GET" and path in ("/v1/models", "/metrics"):
        return path.rpartition("/")[2], None, None
    if method == "GET" and (found := _CUSTOMER.fullmatch(path)):
        return "customers", None, found[1]
    return None, None, None


async def _answered(
    models: Models,
    gate: Gate,
    asked: Asked,
    headers: Mapping[bytes, bytes],
    customer: str | None,
) -> Answer:
    limits = models.settings.limits
    match asked.action:
        case "score" if customer is not None:
            models.require(asked.model or "")
            events, at = customers.parse(_within(asked, limits))
            return await answers.customer_score(models, gate, asked, customer, events, at)
        case "customers":
            return await answers.customer_page(models, gate, asked, customer or "")
        case "score":
            models.require(asked.model or "")
            key, body = headers.get(ROUTING_KEY), _within(asked, limits)
            if _media_type(headers) == arrow.MEDIA_TYPE:
                asked.way = "arrow"
                return await answers.score_arrow(models, gate, asked, body, key=key)
            read = answers.of_json(models, body)
            return await answers.score(models, gate, asked, read, key=key)
        case "explain":
            models.require(asked.model or "")
            rows = schema.parse(_within(asked, limits), max_rows=limits.explained_rows)
            return await answers.explain(models, gate, asked, rows)
        case "models":
            return await overview.cards(models, gate)
    return await overview.metrics(models, gate)


async def _of_texts(models: Models, asked: Asked) -> Answer:
    limits = models.settings.limits
    most = limits.rows if asked.action == "score" else limits.explained_rows
    said = texts.parse(_within(asked, limits), most=most)
    return await answers.sentiment(models, asked, said)


def _fastapi(models: Models, gate: Gate) -> FastAPI:
    app = FastAPI(title="Liftyard", summary="Scores of the registry's champions", version="1")
    rows = {"requestBody": schema.REQUEST_BODY}

    # All but the last are answered before FastAPI; here they are for its page.
    @app.post("/v1/models/{name}/score", openapi_extra=rows)
    async def score_rows(name: str) -> Response:
        """Scores rows: the probability of 1, one a row, in their order."""
        raise NotImplementedError

    @app.post("/v1/models/{name}/explain", openapi_extra=rows)
    async def explain_rows(name: str) -> Response:
        """Explains rows: what each feature adds to the score, and the main reasons in words.

        `base` and a row's contributions sum to its score on `scale`: "probability", or "log-odds",
        of which a sigmoid gives the score.
        """
        raise NotImplementedError

    @app.post("/v1/models/{name}/customers/{id}", openapi_extra=customers.BODY)
    async def score_customer(name: str, id: str) -> Response:
        """Scores a customer by the latest features, or with new events as of a moment."""
        raise NotImplementedError

    @app.post("/v1/sentiment", openapi_extra=texts.BODY)
    async def score_texts() -> Response:
        """Labels texts: the likeliest class, a probability a class, sentiment from -1 to 1."""
        raise NotImplementedError

    @app.post("/v1/sentiment/explain", openapi_extra=texts.BODY)
    async def explain_texts() -> Response:
        """Explains texts: what each token adds to the label (integrated gradients), and as HTML."""
        raise NotImplementedError

    @app.post(GRAPHQL, openapi_extra=graphql.BODY)
    async def query() -> Response:
        """Answers a GraphQL query of customers, scores, reasons, sentiment and models."""
        raise NotImplementedError

    @app.get("/v1/customers/{id}")
    async def customer(id: str) -> Response:
        """A customer's latest features and scores; segment and sentiment where they are known."""
        raise NotImplementedError

    @app.get("/v1/models")
    async def cards() -> Response:
        """The cards of the models served."""
        raise NotImplementedError

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        raise NotImplementedError

    @app.get("/healthz")
    async def healthz() -> Response:
        """Whether every model is loaded, and which versions were refused."""
        said = await overview.health(models, gate)
        status = 200 if said["status"] == "ready" else 503
        return Response(_json(said), status_code=status, media_type="application/json")

    return app


def _watched(send: Send, gate: Gate, asked: Asked, models: Models) -> Send:
    """`send` that adds the request's id and counts the answer."""

    async def watched(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message["headers"], (b"x-request-id", asked.id.encode())]
            gate.done(asked, message["status"], models)
        await send(message)

    return watched


def _within(asked: Asked, limits: Limits) -> bytes:
    if asked.body is None:
        reason = f"the body is over {limits.body_bytes} bytes; send rows in parts"
        raise schema.RequestError([schema.Problem(reason=reason)], status=413)
    return asked.body


def _text(headers: Mapping[bytes, bytes], name: bytes) -> str | None:
    sent = headers.get(name)
    return None if sent is None else sent.decode("latin-1")


def _media_type(headers: Mapping[bytes, bytes]) -> str:
    text = headers.get(b"content-type", b"").decode("latin-1")
    return text.partition(";")[0].strip().lower()


async def _body(receive: Receive, most_bytes: int) -> bytes | None:
    """The request's body, or None where it is longer; then the rest isn't read.

    Raises:
        RequestError: The client has gone.
    """
    message = await receive()
    body: bytes = message.get("body", b"")
    if message.get("more_body", False):
        pieces = bytearray(body)
        while message.get("more_body", False) and len(pieces) <= most_bytes:
            message = await receive()
            pieces += message.get("body", b"")
        body = bytes(pieces)
    if message["type"] == "http.disconnect":
        reason = "the connection ended before the body did"
        raise schema.RequestError([schema.Problem(reason=reason)], status=400)
    return body if len(body) <= most_bytes else None


async def _send(send: Send, answer: Answer, request_id: str) -> None:
    body = answer.value if isinstance(answer.value, bytes) else _json(answer.value)
    headers = [
        (b"content-type", answer.media_type.encode()),
        (b"content-length", str(len(body)).encode()),
        (b"x-request-id", request_id.encode()),
    ]
    if answer.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if answer.retry_after_s is not None:
        headers.append((b"retry-after", str(answer.retry_after_s).encode()))
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


_encoder = msgspec.json.Encoder()


def _json(value: Any) -> bytes:
    return _encoder.encode(value)
