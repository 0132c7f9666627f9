"""What can be asked in GraphQL. Every field of the query's root passes the gate by itself."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import cache
from typing import Any

from serving import answers, overview
from serving.answers import Answer, guarded
from serving.gate import Asked, Gate
from serving.replica import Models
from serving.schema import require_rows
from serving.texts import MODEL as TEXTS
from serving.texts import require_texts

CODES = {
    400: "BAD_REQUEST",
    401: "UNAUTHENTICATED",
    403: "FORBIDDEN",
    404: "NOT_FOUND",
    413: "TOO_LARGE",
    422: "BAD_INPUT",
    429: "TOO_MANY_REQUESTS",
    501: "NOT_IMPLEMENTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class Refused(Exception):
    """A field that was refused; what GraphQL makes an error of."""

    def __init__(self, answer: Answer) -> None:
        assert isinstance(answer.value, dict), "only JSON refuses"
        detail = answer.value["detail"]
        super().__init__(detail if isinstance(detail, str) else "the input doesn't fit")
        self.extensions: dict[str, Any] = {"code": CODES.get(answer.status, "INTERNAL")}
        if not isinstance(detail, str):
            self.extensions["problems"] = detail
        if answer.retry_after_s is not None:
            self.extensions["retry_after_s"] = answer.retry_after_s


class Asking:
    """What the fields of one request's root share."""

    def __init__(
        self,
        models: Models,
        gate: Gate,
        whole: Asked,
        authorization: str | None,
        deadline_ms: str | None,
    ) -> None:
        self.models, self.gate, self._whole = models, gate, whole
        self._authorization, self._deadline_ms = authorization, deadline_ms
        self.statuses: list[int] = []

    async def field(
        self,
        action: str,
        model: str | None,
        work: Callable[[Asked], Awaitable[Answer]],
        said: Any = None,
    ) -> dict[str, Any]:
        """The value of a field of the root.

        Raises:
            Refused: It isn't answered.
        """
        name = None if model is None else self.models.name(model)
        number = len(self.statuses)
        self.statuses.append(200)
        asked = self.gate.asked(action, name, f"{self._whole.id[:60]}.{number}".encode())
        asked.way = "graphql"
        asked.body = None if said is None else json.dumps(said, ensure_ascii=False).encode()
        found = await guarded(
            self.models,
            self.gate,
            asked,
            self._authorization,
            self._deadline_ms,
            lambda: work(asked),
        )
        self.statuses[number] = found.status
        if found.status >= 400:
            raise Refused(found)
        assert isinstance(found.value, dict), "GraphQL asks for no streams"
        return found.value


@cache
def schema() -> Any:
    import graphene
    from graphene.types.generic import GenericScalar

    class Json(GenericScalar):
        """Any JSON value."""

        class Meta:
            name = "JSON"

    class Model(graphene.ObjectType):
        """A model that is served."""

        name = graphene.String(required=True)
        version = graphene.Int(required=True)
        aliases = graphene.List(graphene.NonNull(graphene.String), required=True)
        family = graphene.String(required=True)
        features = graphene.List(graphene.NonNull(Json), required=True)
        metrics = Json(required=True)

    class Score(graphene.ObjectType):
        """A customer's score by a model."""

        model = graphene.String(required=True)
        version = graphene.Int(required=True)
        score = graphene.Float(required=True)

    class Scores(graphene.ObjectType):
        """Scores of rows, one a row, in their order."""

        model = graphene.String(required=True)
        version = graphene.Int(required=True)
        scores = graphene.List(graphene.NonNull(graphene.Float), required=True)

    class Explanation(graphene.ObjectType):
        """`base` and the contributions sum to the score on the answer's scale."""

        score = graphene.Float(required=True)
        base = graphene.Float(required=True)
        contributions = Json(required=True)
        reasons = graphene.List(graphene.NonNull(Json), required=True)

    class Explanations(graphene.ObjectType):
        """Why rows have their scores; `scale` is probability or log-odds."""

        model = graphene.String(required=True)
        version = graphene.Int(required=True)
        scale = graphene.String(required=True)
        explanations = graphene.List(graphene.NonNull(Explanation), required=True)

    class Customer(graphene.ObjectType):
        """A customer's latest features and scores."""

        customer = Json(required=True)
        cutoff = graphene.String()
        segment = Json()
        sentiment = Json()
        features = Json(required=True)
        scores = graphene.List(graphene.NonNull(Score), required=True)

        @staticmethod
        def resolve_scores(page: dict[str, Any], info: Any) -> list[dict[str, Any]]:
            return [{"model": name, **each} for name, each in page["scores"].items()]

    class Sentiment(graphene.ObjectType):
        """What a text says; nulls where the outcome says why it wasn't scored."""

        label = graphene.String()
        probabilities = Json()
        sentiment = graphene.Float()
        outcome = graphene.String(required=True)
        language = graphene.String()

    rows = {
        "model": graphene.String(required=True),
        "rows": graphene.List(graphene.NonNull(Json), required=True),
    }

    class Query(graphene.ObjectType):
        """What can be asked."""

        models = graphene.List(graphene.NonNull(Model), required=True)
        score = graphene.Field(Scores, **rows, routing_key=graphene.String())
        explain = graphene.Field(Explanations, **rows)
        customer = graphene.Field(Customer, id=graphene.ID(required=True))
        customers = graphene.List(
            Customer, ids=graphene.List(graphene.NonNull(graphene.ID), required=True)
        )
        sentiment = graphene.List(
            graphene.NonNull(Sentiment),
            texts=graphene.List(graphene.NonNull(graphene.String), required=True),
        )

        @staticmethod
        async def resolve_models(root: Any, info: Any) -> Any:
            asking: Asking = info.context
            found = await asking.field(
                "models", None, lambda _: overview.cards(asking.models, asking.gate)
            )
            return found["models"]

        @staticmethod
        async def resolve_score(
            root: Any, info: Any, model: str, rows: list[Any], routing_key: str | None = None
        ) -> Any:
            asking: Asking = info.context
            key = None if routing_key is None else routing_key.encode()

            async def work(asked: Asked) -> Answer:
                most = asking.models.settings.limits.rows
                read = answers.of_rows(require_rows(rows, max_rows=most))
                return await answers.score(asking.models, asking.gate, asked, read, key=key)

            return await asking.field("score", model, work, {"rows": rows})

        @staticmethod
        async def resolve_explain(root: Any, info: Any, model: str, rows: list[Any]) -> Any:
            asking: Asking = info.context

            async def work(asked: Asked) -> Answer:
                most = asking.models.settings.limits.explained_rows
                checked = require_rows(rows, max_rows=most)
                return await answers.explain(asking.models, asking.gate, asked, checked)

            return await asking.field("explain", model, work, {"rows": rows})

        @staticmethod
        async def resolve_customer(root: Any, info: Any, id: str) -> Any:
            return await _customer(info.context, id)

        @staticmethod
        async def resolve_customers(root: Any, info: Any, ids: list[str]) -> Any:
            return await asyncio.gather(
                *(_customer(info.context, each) for each in ids), return_exceptions=True
            )

        @staticmethod
        async def resolve_sentiment(root: Any, info: Any, texts: list[str]) -> Any:
            asking: Asking = info.context

            async def work(asked: Asked) -> Answer:
                most = asking.models.settings.limits.rows
                checked = require_texts(texts, most=most)
                return await answers.sentiment(asking.models, asked, checked)

            found = await asking.field("score", TEXTS, work, {"texts": texts})
            return found["results"]

    async def _customer(asking: Asking, id: str) -> Any:
        return await asking.field(
            "customers",
            None,
            lambda asked: answers.customer_page(asking.models, asking.gate, asked, id),
        )

    return graphene.Schema(query=Query)
