"""The routes over HTTP: what comes in, read and checked; what goes out, as JSON or Arrow."""

import asyncio
import json
import logging
import re
import zlib
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response

from models.explain import ExplainError
from serving import arrow, customers, schema, texts, traces
from serving.access import Denied
from serving.audit import AuditError
from serving.explaining import explanations
from serving.gate import Asked, Gate
from serving.metrics import MEDIA_TYPE as METRICS
from serving.replica import Models, RefusedModel, Served, UnknownModel
from serving.settings import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

JSON = "application/json"

# The header that keeps a client's requests at one version while a canary runs.
ROUTING_KEY = b"x-routing-key"

log = logging.getLogger("ray.serve")

# The header with the milliseconds from arrival that a client waits.
DEADLINE = b"x-deadline-ms"

_ROWS = re.compile(r"/v1/models/([^/]+)/(score|explain)")
_CUSTOMER_SCORE = re.compile(r"/v1/models/([^/]+)/customers/([^/]+)")
_CUSTOMER = re.compile(r"/v1/customers/([^/]+)")
# Of texts: to score, to explain.
_TEXTS = {"/v1/sentiment": "score", "/v1/sentiment/explain": "explain"}


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
        action, name, customer = _asked(scope)
        if name is not None:
            name = models.name(name)
        headers = dict(scope["headers"])
        asked = gate.asked(action, name, headers.get(b"x-request-id"), headers.get(b"traceparent"))
        if action is None:
            await others(scope, receive, _watched(send, gate, asked, models))
            return
        body: bytes | None = None
        try:
            sent = headers.get(b"authorization")
            await gate.admit(asked, None if sent is None else sent.decode("latin-1"))
            async with asyncio.timeout(_time_left(headers)):
                body = await _body(receive, models.settings.limits.body_bytes)
                if scope["path"] in _TEXTS:
                    reply = await of_texts(models, asked.action or "", body)
                else:
                    reply = await _answered(models, gate, asked, headers, body, customer)
        except Denied as error:
            asked.who = error.who
            reply = _denial(error)
        except schema.RequestError as error:
            reply = refusal(error)
        except TimeoutError:
            reply = problem(504, "the answer wasn't ready in the time of X-Deadline-Ms")
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
    body: bytes | None,
    customer: str | None = None,
) -> Reply:
    name = asked.model or ""
    match asked.action:
        case "score" if customer is not None:
            return await customer_score(models, gate, asked, customer, body)
        case "customers":
            return await customer_page(models, gate, asked, customer or "")
        case "score":
            key = headers.get(ROUTING_KEY)
            return await score(models, name, _media_type(headers), body, key=key, request=asked.id)
        case "explain":
            return await explain(models, gate, asked, body)
        case "models":
            return as_json(
                {
                    "models": [asdict(each.card) for each in models.served.values()],
                    "challengers": [asdict(each.card) for each in models.challengers.values()],
                    "refused": {**_refusals(models.refused)},
                    "refused_challengers": {**_refusals(models.refused_challengers)},
                }
            )
    return Reply(body=gate.metrics.text(models), media_type=METRICS)


def _refusals(refused: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    return {name: {"version": v, "reason": reason} for name, (v, reason) in refused.items()}


async def score(
    models: Models,
    name: str,
    media_type: str,
    body: bytes | None,
    *,
    key: bytes | None = None,
    request: str = "",
) -> Reply:
    """The scores of a request's rows, as JSON or Arrow, whichever they came in.

    Args:
        models: Those served.
        name: Which.
        media_type: Of the body.
        body: None where it was over the limit.
        key: What decides whether a canary answers; None takes the body.
        request: Its id.
    """
    limits = models.settings.limits
    try:
        served = models.find(name)
        body = _within(body, limits)
        if models.settings.rollout(name).canary:
            served = models.pick(name, key or zlib.crc32(body).to_bytes(4))
        version = served.card.version
        with traces.step("parse"):
            if media_type == arrow.MEDIA_TYPE:
                x_np = arrow.matrix(body, served.scorer.encoder, max_rows=limits.rows)
                rows = None
            else:
                rows = schema.parse(body, max_rows=limits.rows)
                x_np = served.reader.matrix(rows)
    except (schema.RequestError, UnknownModel, RefusedModel) as error:
        return refusal(error)
    scores_n = await served.batcher.score(x_np)
    _shadow(models, request, served, body, rows, scores_n)
    told = {"version": version, "rows": len(x_np)}
    if rows is None:
        return Reply(
            body=arrow.answer(scores_n, model=name, version=version),
            media_type=arrow.MEDIA_TYPE,
            told=told,
        )
    # repr of a float64, which json writes, reads back as the same bits.
    return as_json({"model": name, "version": version, "scores": scores_n.tolist()}, told=told)


def _shadow(
    models: Models,
    request: str,
    served: Served,
    body: bytes,
    rows: list[Any] | None,
    scores_n: np.ndarray,
) -> None:
    """Has a shadow score what the champion has answered."""
    settings, name = models.settings, served.card.name
    challenger = models.challengers.get(name)
    if not settings.rollout(name).shadow or settings.shadow_log is None or challenger is None:
        return
    if challenger.card.version == served.card.version:
        return

    def score() -> np.ndarray:
        # Strings may have other codes there.
        if rows is None:
            encoder = challenger.scorer.encoder
            return challenger.scorer.predict(
                arrow.matrix(body, encoder, max_rows=settings.limits.rows)
            )
        return challenger.scorer.predict(challenger.reader.matrix(rows))

    versions = (served.card.version, challenger.card.version)
    file = Path(settings.shadow_log)
    models.shadow.score(file, request, name, versions, scores_n, score)


async def explain(models: Models, gate: Gate, asked: Asked, body: bytes | None) -> Reply:
    """Why a request's rows have their scores; `body` is None where it was over the limit."""
    limits, name = models.settings.limits, asked.model or ""
    visible = partial(gate.visible, asked, "explain", name)
    try:
        served = models.find(name)
        body = _within(body, limits)
        with traces.step("parse"):
            rows = schema.parse(body, max_rows=limits.explained_rows)
            x_np = served.reader.matrix(rows)
        with traces.step("explain"):
            found = await asyncio.to_thread(explanations, served, rows, x_np, visible)
        return as_json(
            found,
            told={"version": served.card.version, "rows": len(rows)},
        )
    except (schema.RequestError, UnknownModel, RefusedModel, ExplainError) as error:
        return refusal(error)


async def of_texts(models: Models, action: str, body: bytes | None) -> Reply:
    """The sentiment of a request's texts, or why it is so."""
    limits = models.settings.limits
    try:
        most = limits.rows if action == "score" else limits.explained_rows
        said = texts.parse(_within(body, limits), most=most)
        held = await asyncio.to_thread(models.texts.find)
        work, key = (
            (texts.score, "results") if action == "score" else (texts.explain, "explanations")
        )
        found = await asyncio.to_thread(work, held, said)
    except (schema.RequestError, texts.NoTextModel) as error:
        return refusal(error)
    version = held.card.version
    return as_json(
        {"model": texts.MODEL, "version": version, key: found},
        told={"version": version, "rows": len(said)},
    )


async def customer_score(
    models: Models, gate: Gate, asked: Asked, customer: str, body: bytes | None
) -> Reply:
    """A customer's score; `body` may bring new events and the moment that they lead up to."""
    name = asked.model or ""
    try:
        served = models.find(name)
        events, at = customers.parse(_within(body, models.settings.limits))
        known = await asyncio.to_thread(customers.known, models.stores, customer, events, at)
        served = models.pick(name, str(known.id).encode())
        row = customers.row(served, known)
        x_np = served.reader.matrix([row])
    except (schema.RequestError, UnknownModel, RefusedModel) as error:
        return refusal(error)
    (score,) = (await served.batcher.score(x_np)).tolist()
    version = served.card.version
    said = {"model": name, "version": version, "customer": known.id, "cutoff": known.cutoff}
    return as_json(
        {**said, "score": score, "features": gate.visible(asked, "score", name, row)},
        told={"version": version, "rows": 1, "customer": known.id},
    )


async def customer_page(models: Models, gate: Gate, asked: Asked, customer: str) -> Reply:
    """What is known of a customer, with the scores that the asker may have."""
    try:
        known = await asyncio.to_thread(customers.known, models.stores, customer, {}, None)
    except schema.RequestError as error:
        return refusal(error)
    scores: dict[str, Any] = {}
    for name in models.served:
        served = models.pick(name, str(known.id).encode())
        missing = customers.missing(served, known)
        if not gate.may(asked, "score", name) or missing:
            continue
        x_np = served.reader.matrix([customers.row(served, known)])
        (score,) = (await served.batcher.score(x_np)).tolist()
        scores[name] = {"version": served.card.version, "score": score}
    versions = {name: each["version"] for name, each in scores.items()}
    features = gate.visible(asked, "customers", None, known.features)
    return as_json(
        {
            "customer": known.id,
            "cutoff": known.cutoff,
            "scores": scores,
            "segment": features.get("segment"),
            "sentiment": features.get("sentiment"),
            "features": features,
        },
        told={"versions": versions, "rows": 1, "customer": known.id},
    )


def _fastapi(models: Models, gate: Gate) -> FastAPI:
    app = FastAPI(title="Liftyard", summary="Scores of the registry's champions", version="1")
    rows = {"requestBody": schema.REQUEST_BODY}

    # The next eight are answered before FastAPI; here they are for its page.
    @app.post("/v1/models/{name}/score", openapi_extra=rows)
    async def score_rows(name: str, request: Request) -> Response:
        """Scores rows: the probability of 1, one a row, in their order."""
        return _response(await score(models, models.name(name), JSON, await request.body()))

    @app.post("/v1/models/{name}/explain", openapi_extra=rows)
    async def explain_rows(name: str, request: Request) -> Response:
        """Explains rows: what each feature adds to the score, and the main reasons in words.

        `base` and a row's contributions sum to its score on `scale`: "probability", or "log-odds",
        of which a sigmoid gives the score.
        """
        asked = gate.asked("explain", models.name(name), None)
        return _response(await explain(models, gate, asked, await request.body()))

    @app.post("/v1/models/{name}/customers/{id}", openapi_extra=customers.BODY)
    async def score_customer(name: str, id: str, request: Request) -> Response:
        """Scores a customer by the latest features, or with new events as of a moment."""
        asked = gate.asked("score", models.name(name), None)
        return _response(await customer_score(models, gate, asked, id, await request.body()))

    @app.post("/v1/sentiment", openapi_extra=texts.BODY)
    async def score_texts(request: Request) -> Response:
        """Labels texts: the likeliest class, a probability a class, sentiment from -1 to 1."""
        return _response(await of_texts(models, "score", await request.body()))

    @app.post("/v1/sentiment/explain", openapi_extra=texts.BODY)
    async def explain_texts(request: Request) -> Response:
        """Explains texts: what each token adds to the label (integrated gradients), and as HTML."""
        return _response(await of_texts(models, "explain", await request.body()))

    @app.get("/v1/customers/{id}")
    async def customer(id: str) -> Response:
        """A customer's latest features and scores; segment and sentiment where they are known."""
        asked = gate.asked("customers", None, None)
        return _response(await customer_page(models, gate, asked, id))

    @app.get("/v1/models")
    async def cards() -> Response:
        """The cards of the models served."""
        return _response(await _answered(models, gate, gate.asked("models", None, None), {}, b""))

    @app.get("/metrics")
    async def metrics() -> Response:
        """Counts and times, for Prometheus."""
        return _response(await _answered(models, gate, gate.asked("metrics", None, None), {}, b""))

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
        case UnknownModel() | texts.NoTextModel():
            return problem(404, str(error))
        case RefusedModel():
            return problem(503, str(error))
        case ExplainError():
            return problem(501, str(error))
    raise error


def _time_left(headers: Mapping[bytes, bytes]) -> float | None:
    """Seconds that the client waits, by its header; None where it doesn't say."""
    said = headers.get(DEADLINE)
    if said is None:
        return None
    if not said.isdigit() or len(said) > 9 or int(said) == 0:
        reason = f"X-Deadline-Ms is {said.decode('latin-1')!r}; give whole milliseconds above 0"
        raise schema.RequestError([schema.Problem(reason=reason)], status=400)
    return int(said) / 1000


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
