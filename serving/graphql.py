"""GraphQL, one way into `serving.answers`: queries read, reckoned and executed.

A query is refused before it runs where it is nested too deep or would cost too much. What a field
costs is reckoned in fields; those of lists are counted once for each item that is asked for, and
rows and texts by the work that one makes.
"""

import json
from collections.abc import Mapping
from typing import Any

from serving import answers
from serving.answers import Answer
from serving.gate import Asked, Gate
from serving.graphql_schema import CODES, Asking, Refused, schema
from serving.replica import Models
from serving.schema import Problem, RequestError

MOST_BYTES = 2**20
MOST_DEPTH = 8
MOST_COST = 10_000
# Fields that a row, text or customer in an argument counts as.
WEIGHTS = {"rows": {"score": 0.1, "explain": 100.0}, "texts": {"sentiment": 10.0}}

# The body as the OpenAPI page shows it.
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "required": ["query"],
                    "properties": {
                        "query": {"type": "string"},
                        "variables": {"type": ["object", "null"]},
                        "operationName": {"type": ["string", "null"]},
                    },
                },
                "example": {"query": "{ models { name version aliases } }"},
            }
        },
    }
}


async def answer(
    models: Models,
    gate: Gate,
    asked: Asked,
    authorization: str | None,
    deadline_ms: str | None,
    body: bytes | None,
) -> Answer:
    """The answer to a request's query.

    Its status is 200, or where no field of the root was let in, what they were all refused with.

    Args:
        models: Those served.
        gate: What each field of the root passes.
        asked: The request as a whole.
        authorization: As for `guarded`.
        deadline_ms: As for `guarded`.
        body: JSON; None where it is longer than `MOST_BYTES`.
    """
    import graphql

    try:
        query, variables, operation = _parse(body)
        document = graphql.parse(query, max_tokens=20_000)
        if errors := graphql.validate(schema().graphql_schema, document):
            return _errors(400, [error.formatted for error in errors])
        _require_modest(document, operation, variables)
    except RequestError as error:
        return _errors(error.status, [{"message": each.reason} for each in error.problems])
    except graphql.GraphQLError as error:
        return _errors(400, [error.formatted])
    except RecursionError:
        return _errors(400, [{"message": "the query is nested too deep to be read"}])

    asking = Asking(models, gate, asked, authorization, deadline_ms)
    executed = graphql.execute(
        schema().graphql_schema,
        document,
        context_value=asking,
        variable_values=variables,
        operation_name=operation,
    )
    # A query of the schema alone is answered at once.
    found = executed if isinstance(executed, graphql.ExecutionResult) else await executed
    status = 200
    if asking.statuses and min(asking.statuses) >= 400:
        status = min(asking.statuses)
    elif found.data is None and not asking.statuses:
        status = 400
    value: dict[str, Any] = {"data": found.data}
    if found.errors:
        value["errors"] = [_told(error, asked) for error in found.errors]
    return Answer(status=status, value=value)


def _told(error: Any, asked: Asked) -> dict[str, Any]:
    said: dict[str, Any] = error.formatted
    inner = error.original_error
    if inner is not None and not isinstance(inner, Refused):
        answers.refused(inner, asked)
        said["message"] = f"the server failed; ask for request {asked.id} in its log"
    return said


def _errors(status: int, errors: list[Any]) -> Answer:
    for error in errors:
        error.setdefault("extensions", {"code": CODES[status]})
    return Answer(status=status, value={"errors": errors})


def _parse(body: bytes | None) -> tuple[str, dict[str, Any], str | None]:
    if body is None:
        raise _faulty(413, f"the body is over {MOST_BYTES} bytes; ask for less at a time")
    try:
        said = json.loads(body.decode())
    except (ValueError, RecursionError) as error:
        raise _faulty(400, f'the body is not JSON: {error}; send {{"query": "..."}}') from error
    known = {"query": str, "variables": dict, "operationName": str}
    if not isinstance(said, dict) or said.keys() - known.keys():
        raise _faulty(400, f"send an object with {list(known)} and nothing else")
    for name, kind in known.items():
        if said.get(name) is not None and not isinstance(said[name], kind):
            raise _faulty(400, f"{name!r} is not {'an object' if kind is dict else 'a string'}")
    if said.get("query") is None:
        raise _faulty(400, "'query' is missing; send GraphQL there")
    return said["query"], said.get("variables") or {}, said.get("operationName")


def _faulty(status: int, reason: str) -> RequestError:
    return RequestError([Problem(reason=reason)], status=status)


def _require_modest(document: Any, operation: str | None, variables: Mapping[str, Any]) -> None:
    """The operation that is asked for is neither too deep nor too costly.

    Raises:
        RequestError: It is.
    """
    import graphql

    fragments = {
        each.name.value: each
        for each in document.definitions
        if isinstance(each, graphql.FragmentDefinitionNode)
    }
    asked = graphql.get_operation_ast(document, operation)
    if asked is None:
        raise _faulty(400, f"no operation {operation!r} in the query; name one of those it has")
    reckoning = _Reckoning(fragments, variables)
    cost = reckoning.of(asked.selection_set, depth=1)
    if cost > MOST_COST:
        reason = f"the query costs {cost:.0f}, and {MOST_COST} are allowed; ask for less at a time"
        raise _faulty(400, reason)


class _Reckoning:
    """Reckons a valid document's cost; each fragment wherever it is spread."""

    def __init__(self, fragments: Mapping[str, Any], variables: Mapping[str, Any]) -> None:
        self._fragments, self._variables = fragments, variables
        self._left = 10 * MOST_COST

    def of(self, selections: Any, *, depth: int) -> float:
        if depth > MOST_DEPTH:
            raise _faulty(400, f"the query is nested deeper than {MOST_DEPTH}; ask for less of it")
        return sum(self._selection(each, depth) for each in selections.selections)

    def _selection(self, node: Any, depth: int) -> float:
        # Fragments that spread fragments multiply faster than the cost can be summed.
        self._left -= 1
        if self._left < 0:
            raise _faulty(400, f"the query has more than {10 * MOST_COST} fields; ask for less")
        if node.kind == "fragment_spread":
            return self.of(self._fragments[node.name.value].selection_set, depth=depth + 1)
        if node.kind == "inline_fragment":
            return self.of(node.selection_set, depth=depth + 1)
        name = node.name.value
        if name.startswith("__"):
            # Introspection: as deep as tools ask, and of a schema that is small.
            return 1
        lists = {each.name.value: self._items(each.value) for each in node.arguments}
        rows = sum(
            lists[argument] * weights.get(name, 0.0)
            for argument, weights in WEIGHTS.items()
            if argument in lists
        )
        inner = 0.0 if node.selection_set is None else self.of(node.selection_set, depth=depth + 1)
        return 1 + rows + lists.get("ids", 1) * inner

    def _items(self, value: Any) -> int:
        if value.kind == "list_value":
            return len(value.values)
        if value.kind == "variable":
            given = self._variables.get(value.name.value)
            return len(given) if isinstance(given, list) else 1
        return 1
