"""gRPC, one way into `serving.answers`; `serving/protocol/liftyard.proto` says what can be asked.

After a change of that file, from the repository's root:

    python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. \\
        serving/protocol/liftyard.proto
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from serving import answers, customers, overview
from serving.answers import Answer, guarded
from serving.gate import Asked, Gate
from serving.replica import Models
from serving.schema import Problem, RequestError, require_rows
from serving.texts import MODEL as TEXTS
from serving.texts import require_texts

SERVICER = "serving.protocol.liftyard_pb2_grpc.add_LiftyardServicer_to_server"

# By HTTP status; what isn't here is INTERNAL.
CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    413: "INVALID_ARGUMENT",
    422: "INVALID_ARGUMENT",
    429: "RESOURCE_EXHAUSTED",
    501: "UNIMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class RpcError(ValueError):
    """A call that isn't answered; its code and details are in the call's context."""


class Rpcs:
    """The calls of the service, by their names in the `.proto`, for a class with these two."""

    models: Models
    gate: Gate

    async def Score(self, request: Any, grpc_context: Any) -> Any:
        """Scores rows, or an Arrow stream of them."""
        from serving.protocol.liftyard_pb2 import ScoreReply

        key = _sent(grpc_context).get("x-routing-key")
        routing = None if key is None else key.encode()
        limits = self.models.settings.limits

        async def work(asked: Asked) -> Answer:
            if request.arrow and request.rows:
                raise _faulty("rows", "and arrow are both given; give one of them")
            if request.arrow:
                read = answers.of_arrow(self.models, request.arrow)
            else:
                read = answers.of_rows(require_rows(_rows(request.rows), max_rows=limits.rows))
            return await answers.score(self.models, self.gate, asked, read, key=routing)

        found = await self._answered("score", request.model, request, grpc_context, work)
        return ScoreReply(**_value(found))

    async def Explain(self, request: Any, grpc_context: Any) -> Any:
        """Why rows have their scores."""
        from serving.protocol.liftyard_pb2 import ExplainReply, Explanation, Reason

        most = self.models.settings.limits.explained_rows

        async def work(asked: Asked) -> Answer:
            rows = require_rows(_rows(request.rows), max_rows=most)
            return await answers.explain(self.models, self.gate, asked, rows)

        said = _value(await self._answered("explain", request.model, request, grpc_context, work))
        return ExplainReply(
            model=said["model"],
            version=said["version"],
            scale=said["scale"],
            explanations=[
                Explanation(
                    score=each["score"],
                    base=each["base"],
                    contributions=each["contributions"],
                    reasons=[
                        Reason(**{name: why[name] for name in ("feature", "text", "contribution")})
                        for why in each["reasons"]
                    ],
                )
                for each in said["explanations"]
            ],
        )

    async def Customer(self, request: Any, grpc_context: Any) -> Any:
        """A customer's latest features and scores."""
        from serving.protocol.liftyard_pb2 import CustomerReply, CustomerScore

        said = _value(
            await self._answered(
                "customers",
                None,
                request,
                grpc_context,
                lambda asked: answers.customer_page(self.models, self.gate, asked, request.id),
            )
        )
        return CustomerReply(
            customer=str(said["customer"]),
            cutoff=said["cutoff"] or "",
            features=_values(said["features"]),
            scores={name: CustomerScore(**each) for name, each in said["scores"].items()},
        )

    async def ScoreCustomer(self, request: Any, grpc_context: Any) -> Any:
        """A customer's score by the latest features, or with events that are new."""
        from serving.protocol.liftyard_pb2 import ScoreCustomerReply

        async def work(asked: Asked) -> Answer:
            said: dict[str, Any] = {} if not request.at else {"at": request.at}
            if request.events:
                said["events"] = {name: _rows(each.rows) for name, each in request.events.items()}
            events, at = customers.parse(json.dumps(said).encode())
            return await answers.customer_score(
                self.models, self.gate, asked, request.customer, events, at
            )

        said = _value(await self._answered("score", request.model, request, grpc_context, work))
        return ScoreCustomerReply(
            model=said["model"],
            version=said["version"],
            customer=str(said["customer"]),
            cutoff=said["cutoff"] or "",
            score=said["score"],
            features=_values(said["features"]),
        )

    async def Sentiment(self, request: Any, grpc_context: Any) -> Any:
        """Labels of texts."""
        from serving.protocol import liftyard_pb2

        most = self.models.settings.limits.rows

        async def work(asked: Asked) -> Answer:
            checked = require_texts(list(request.texts), most=most)
            return await answers.sentiment(self.models, asked, checked)

        said = _value(await self._answered("score", TEXTS, request, grpc_context, work))
        return liftyard_pb2.SentimentReply(
            version=said["version"],
            results=[
                # What is left out has no value.
                liftyard_pb2.Sentiment(**{k: v for k, v in each.items() if v is not None})
                for each in said["results"]
            ],
        )

    async def Models(self, request: Any, grpc_context: Any) -> Any:
        """What is served."""
        from serving.protocol import liftyard_pb2

        found = await self._answered(
            "models", None, request, grpc_context, lambda _: overview.cards(self.models, self.gate)
        )
        shown = ("name", "version", "family", "aliases", "metrics")
        return liftyard_pb2.ModelsReply(
            models=[
                liftyard_pb2.Model(**{name: each[name] for name in shown})
                for each in _value(found)["models"]
            ]
        )

    async def _answered(
        self,
        action: str,
        model: str | None,
        request: Any,
        context: Any,
        work: Callable[[Asked], Awaitable[Answer]],
    ) -> Answer:
        """The answer; it is OK.

        Raises:
            RpcError: It isn't.
        """
        import grpc

        sent = _sent(context)
        name = None if model is None else self.models.name(model)
        request_id, traceparent = sent.get("x-request-id"), sent.get("traceparent")
        asked = self.gate.asked(
            action,
            name,
            None if request_id is None else request_id.encode(),
            None if traceparent is None else traceparent.encode(),
        )
        asked.way = "grpc"
        limit = self.models.settings.limits.body_bytes

        async def within_limits() -> Answer:
            if request.ByteSize() > limit:
                raise _faulty(None, f"the message is over {limit} bytes; send rows in parts")
            # As it was sent, but for the order of maps.
            asked.body = request.SerializeToString(deterministic=True)
            return await work(asked)

        found = await guarded(
            self.models,
            self.gate,
            asked,
            sent.get("authorization"),
            sent.get("x-deadline-ms"),
            within_limits,
        )
        trailing = [("x-request-id", asked.id)]
        if found.retry_after_s is not None:
            trailing.append(("retry-after", str(found.retry_after_s)))
        context.set_trailing_metadata(trailing)
        if found.status < 400:
            return found
        code = getattr(grpc.StatusCode, CODES.get(found.status, "INTERNAL"))
        details = _details(_value(found))
        context.set_code(code)
        context.set_details(details)
        raise RpcError(details)


def _sent(context: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in context.invocation_metadata()}


def _details(said: Mapping[str, Any]) -> str:
    """Problems in a line, since gRPC has one text."""
    detail = said["detail"]
    if isinstance(detail, str):
        return detail
    told = []
    for each in detail[:10]:
        where = [] if each["row"] is None else [f"row {each['row']}"]
        where += [] if each["field"] is None else [str(each["field"])]
        told.append(" ".join((*where, each["reason"])) if where else each["reason"])
    if said["problems"] > len(told):
        told.append(f"and {said['problems'] - len(told)} more")
    return "; ".join(told)


def _faulty(field: str | None, reason: str) -> RequestError:
    return RequestError([Problem(field=field, reason=reason)])


def _value(answer: Answer) -> dict[str, Any]:
    assert isinstance(answer.value, dict), "gRPC asks for no streams"
    return answer.value


def _rows(rows: Any) -> list[dict[str, Any]]:
    return [{name: _plain(value) for name, value in row.fields.items()} for row in rows]


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("kind")
    return None if kind is None else getattr(value, kind)


def _values(values: Mapping[str, Any]) -> dict[str, Any]:
    from serving.protocol.liftyard_pb2 import Value

    kinds: dict[type, str] = {bool: "flag", int: "integer", float: "number", str: "text"}
    return {
        name: Value() if value is None else Value(**{kinds[type(value)]: value})
        for name, value in values.items()
    }
