"""What can be asked, however it is asked: REST, gRPC and GraphQL are three ways into these.

A question is a coroutine that returns an `Answer` or raises one of the errors that `refused` knows.
`guarded` puts the gate around it: access, deadline, audit, metrics. Knows nothing of HTTP but its
status codes, which each way translates.
"""

import asyncio
import logging
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field, replace
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import numpy as np

from models.explain import ExplainError
from serving import arrow, customers, schema, texts, traces
from serving.access import Denied
from serving.audit import AuditError
from serving.explaining import explanations
from serving.fleet import Away, Busy
from serving.gate import Asked, Gate
from serving.replica import Models, RefusedModel, Served, UnknownModel

log = logging.getLogger("ray.serve")

# Makes a model's matrix of a request's rows, (n, p) float32; raises RequestError.
Reader = Callable[[Served], np.ndarray]

P = ParamSpec("P")

# Of a model with replicas of its own, by name, which they are asked by others.
QUESTIONS: dict[str, Callable[..., Awaitable["Answer"]]] = {}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What is answered.

    Attributes:
        status: HTTP status.
        value: By name, as JSON has it; as bytes where it is of another media type.
        media_type: Of the value, where it is sent as it is.
        told: What the audit log keeps of it.
        retry_after_s: Where waiting helps, whole seconds.
    """

    status: int = 200
    value: dict[str, Any] | bytes
    media_type: str = "application/json"
    told: Mapping[str, Any] = field(default_factory=dict)
    retry_after_s: int | None = None


async def guarded(
    models: Models,
    gate: Gate,
    asked: Asked,
    authorization: str | None,
    deadline_ms: str | None,
    work: Callable[[], Awaitable[Answer]],
) -> Answer:
    """The answer to a question, or why there is none.

    Args:
        models: Those served.
        gate: What every question passes.
        asked: The question; `work` puts its body there.
        authorization: "Bearer " and a key or token, or None.
        deadline_ms: Milliseconds from now that the client waits, as it said them; None for ever.
        work: Called once who asks is let in.
    """
    try:
        await gate.admit(asked, authorization)
        if deadline_ms is None:
            answer = await work()
        else:
            async with asyncio.timeout(_seconds(deadline_ms)):
                answer = await work()
    except Exception as error:
        answer = refused(error, asked)
    try:
        await gate.keep(asked, answer.status, answer.told, asked.body)
    except (AuditError, OSError):
        answer = problem(503, "the audit log can't be written, so there is no answer")
    gate.done(asked, answer.status, models)
    return answer


def refused(error: Exception, asked: Asked) -> Answer:
    """The answer that says why there is no other; what isn't known here is logged."""
    match error:
        case Denied():
            asked.who = error.who
            return problem(error.status, str(error), retry_after_s=error.retry_after_s)
        case schema.RequestError():
            return Answer(status=error.status, value=error.body())
        case UnknownModel() | texts.NoTextModel():
            return problem(404, str(error))
        case RefusedModel() | Away():
            return problem(503, str(error))
        case Busy():
            return problem(429, str(error), retry_after_s=1)
        case ExplainError():
            return problem(501, str(error))
        case TimeoutError():
            return problem(504, "the answer wasn't ready in the time of X-Deadline-Ms")
    log.error(f"request {asked.id} failed", exc_info=error)
    return problem(500, f"the server failed; ask for request {asked.id} in its log")


def problem(status: int, detail: str, *, retry_after_s: int | None = None) -> Answer:
    """An answer that says what is wrong."""
    return Answer(status=status, value={"detail": detail}, retry_after_s=retry_after_s)


def of_rows(rows: list[Any]) -> Reader:
    """Reads rows by name of field, as `schema.parse` gives them."""
    return partial(_rows, rows)


def of_json(models: Models, body: bytes) -> Reader:
    """Reads a JSON body's rows."""
    return partial(_json, body, models.settings.limits.rows)


def of_arrow(models: Models, stream: bytes) -> Reader:
    """Reads an Arrow stream's rows."""
    return partial(_arrow, stream, models.settings.limits.rows)


# Not closures, which another replica couldn't be sent.
def _rows(rows: list[Any], version: Served) -> np.ndarray:
    return version.reader.matrix(rows)


def _json(body: bytes, most: int, version: Served) -> np.ndarray:
    return version.reader.decoded(body, max_rows=most)


def _arrow(stream: bytes, most: int, version: Served) -> np.ndarray:
    return arrow.matrix(stream, version.scorer.encoder, max_rows=most)


def by_its_replicas(
    question: Callable[Concatenate[Models, Gate, Asked, P], Coroutine[Any, Any, Answer]],
) -> Callable[Concatenate[Models, Gate, Asked, P], Coroutine[Any, Any, Answer]]:
    """Has the replicas of the model that is asked about answer, where it has some of its own."""
    QUESTIONS[question.__name__] = question

    async def answered(
        models: Models, gate: Gate, asked: Asked, /, *said: P.args, **how: P.kwargs
    ) -> Answer:
        if not models.away(asked.model):
            return await question(models, gate, asked, *said, **how)
        with traces.step("forward"):
            answer: Answer = await gate.fleet.ask(question.__name__, asked, said, how)
        return answer

    update_wrapper(answered, question)
    return answered


@by_its_replicas
async def score(
    models: Models, gate: Gate, asked: Asked, read: Reader, *, key: bytes | None = None
) -> Answer:
    """The scores of rows.

    Args:
        models: Those served.
        gate: What the question has passed.
        asked: The question.
        read: Of the rows.
        key: What decides whether a canary answers; None takes the body.

    Raises:
        RequestError, UnknownModel, RefusedModel: It can't be answered.
    """
    served, scores_n = await _scored(models, asked, key, read)
    version = served.card.version
    # repr of a float64, which json writes, reads back as the same bits.
    return Answer(
        value={"model": served.card.name, "version": version, "scores": scores_n.tolist()},
        told={"version": version, "rows": len(scores_n)},
    )


@by_its_replicas
async def score_arrow(
    models: Models, gate: Gate, asked: Asked, stream: bytes, *, key: bytes | None = None
) -> Answer:
    """The same of an Arrow stream's rows; the answer is a stream with the column `score`.

    Raises:
        RequestError, UnknownModel, RefusedModel: It can't be answered.
    """
    served, scores_n = await _scored(models, asked, key, of_arrow(models, stream))
    name, version = served.card.name, served.card.version
    return Answer(
        value=arrow.answer(scores_n, model=name, version=version),
        media_type=arrow.MEDIA_TYPE,
        told={"version": version, "rows": len(scores_n)},
    )


async def _scored(
    models: Models, asked: Asked, key: bytes | None, read: Reader
) -> tuple[Served, np.ndarray]:
    name = asked.model or ""
    served = models.find(name)
    with traces.step("parse"):
        if models.settings.rollout(name).canary:
            served = models.pick(name, key or zlib.crc32(asked.body or b"").to_bytes(4))
        x_np = read(served)
    scores_n = await served.batcher.score(x_np)
    _shadow(models, asked.id, served, read, scores_n)
    return served, scores_n


def _shadow(
    models: Models, request: str, served: Served, read: Reader, scores_n: np.ndarray
) -> None:
    """Has a shadow score what the champion has answered."""
    settings, name = models.settings, served.card.name
    challenger = models.challengers.get(name)
    if not settings.rollout(name).shadow or settings.shadow_log is None or challenger is None:
        return
    if challenger.card.version == served.card.version:
        return

    def score() -> np.ndarray:
        # Read again: strings may have other codes there.
        return challenger.scorer.predict(read(challenger))

    versions = (served.card.version, challenger.card.version)
    models.shadow.score(Path(settings.shadow_log), request, name, versions, scores_n, score)


@by_its_replicas
async def explain(models: Models, gate: Gate, asked: Asked, rows: list[Any]) -> Answer:
    """Why rows have their scores.

    Raises:
        RequestError, UnknownModel, RefusedModel, ExplainError: It can't be answered.
    """
    name = asked.model or ""
    visible = partial(gate.visible, asked, "explain", name)
    served = models.find(name)
    with traces.step("parse"):
        x_np = served.reader.matrix(rows)
    with traces.step("explain"):
        found = await asyncio.to_thread(explanations, served, rows, x_np, visible)
    return Answer(value=found, told={"version": served.card.version, "rows": len(rows)})


async def sentiment(models: Models, asked: Asked, said: list[str]) -> Answer:
    """The sentiment of texts; where the action is "explain", why it is so.

    Raises:
        RequestError, NoTextModel: It can't be answered.
    """
    held = await asyncio.to_thread(models.texts.find)
    work, name = (
        (texts.explain, "explanations") if asked.action == "explain" else (texts.score, "results")
    )
    found = await asyncio.to_thread(work, held, said)
    version = held.card.version
    return Answer(
        value={"model": texts.MODEL, "version": version, name: found},
        told={"version": version, "rows": len(said)},
    )


@by_its_replicas
async def customer_score(
    models: Models,
    gate: Gate,
    asked: Asked,
    customer: str,
    events: customers.Events,
    at: Any,
) -> Answer:
    """A customer's score, by the latest features or with events that lead up to the moment `at`.

    Raises:
        RequestError, UnknownModel, RefusedModel: It can't be answered.
    """
    name = asked.model or ""
    models.find(name)
    known = await asyncio.to_thread(customers.known, models.stores, customer, events, at)
    served = models.pick(name, str(known.id).encode())
    row = customers.row(served, known)
    (score,) = (await served.batcher.score(served.reader.matrix([row]))).tolist()
    version = served.card.version
    return Answer(
        value={
            "model": name,
            "version": version,
            "customer": known.id,
            "cutoff": known.cutoff,
            "score": score,
            "features": gate.visible(asked, "score", name, row),
        },
        told={"version": version, "rows": 1, "customer": known.id},
    )


async def customer_page(models: Models, gate: Gate, asked: Asked, customer: str) -> Answer:
    """What is known of a customer, with the scores that the asker may have.

    Raises:
        RequestError, Busy, Away: It can't be answered.
    """
    known = await asyncio.to_thread(customers.known, models.stores, customer, {}, None)
    scores: dict[str, Any] = {}
    elsewhere = sorted(name for name in models.elsewhere if gate.may(asked, "score", name))
    for name in elsewhere:
        there = replace(asked, model=name, action="score")
        answer = await customer_score(models, gate, there, customer, {}, None)
        if answer.status == 200 and isinstance(answer.value, dict):
            scores[name] = {part: answer.value[part] for part in ("version", "score")}
        elif answer.status != 422:
            # It doesn't lack features; without its score the page would be half of one.
            return answer
    for name in models.served:
        served = models.pick(name, str(known.id).encode())
        missing = customers.missing(served, known)
        if not gate.may(asked, "score", name) or missing:
            continue
        x_np = served.reader.matrix([customers.row(served, known)])
        (score,) = (await served.batcher.score(x_np)).tolist()
        scores[name] = {"version": served.card.version, "score": score}
    features = gate.visible(asked, "customers", None, known.features)
    return Answer(
        value={
            "customer": known.id,
            "cutoff": known.cutoff,
            "scores": scores,
            "segment": features.get("segment"),
            "sentiment": features.get("sentiment"),
            "features": features,
        },
        told={
            "versions": {name: each["version"] for name, each in scores.items()},
            "rows": 1,
            "customer": known.id,
        },
    )


def _seconds(deadline_ms: str) -> float:
    if not deadline_ms.isascii() or not deadline_ms.isdigit() or not 0 < len(deadline_ms) < 10:
        deadline = 0
    else:
        deadline = int(deadline_ms)
    if deadline == 0:
        reason = f"X-Deadline-Ms is {deadline_ms!r}; give whole milliseconds above 0"
        raise schema.RequestError([schema.Problem(reason=reason)], status=400)
    return deadline / 1000
