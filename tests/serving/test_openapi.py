"""Requests made of the OpenAPI document, fitting and not: none fails without a reason."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from serving import audit
from serving.access import AccessFiles, add_key
from serving.settings import Limits, Settings
from tests.jobs import published
from tests.jobs.published import Place
from tests.serving.listening import listening

EXAMPLES = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("openapi")


@pytest.fixture(scope="module")
def place(folder: Path) -> Place:
    return published.make(folder)


@pytest.fixture(scope="module")
def http(folder: Path, place: Place) -> Iterator[httpx.Client]:
    key = add_key(folder / "keys.json", "tester", "admin")
    chosen = Settings(
        registry=place.registry.uri,
        models=None,
        limits=Limits(rows=50, explained_rows=5),
        refresh_s=3_600,
        access=AccessFiles(keys=str(folder / "keys.json"), audit=str(folder / "audit.jsonl")),
        store=str(place.store),
    )
    headers = {"authorization": f"Bearer {key}"}
    with listening(chosen) as (url, _), httpx.Client(base_url=url, headers=headers) as http:
        yield http


def document(http: httpx.Client, place: Place) -> dict[str, Any]:
    """The OpenAPI document, narrowed to the model, customers and fields that there are."""
    found: dict[str, Any] = http.get("/openapi.json").json()
    known = {"name": ["lapse"], "id": ["7", "8", "100000"]}
    row = {
        "type": "object",
        "properties": {name: {"type": ["number", "null"]} for name in place.names},
        "required": place.names,
        "additionalProperties": False,
    }
    for path in found["paths"].values():
        for operation in path.values():
            for parameter in operation.get("parameters", ()):
                parameter["schema"] = {"enum": known[parameter["name"]]}
            content = operation.get("requestBody", {}).get("content", {})
            fields = content.get("application/json", {}).get("schema", {}).get("properties", {})
            if "rows" in fields:
                fields["rows"] = {**fields["rows"], "items": row, "maxItems": 8}
    return found


def test_each_request_is_answered_or_refused_with_a_reason(
    http: httpx.Client, place: Place, folder: Path
) -> None:
    schema = schemathesis.openapi.from_dict(document(http, place))
    schema.config.update(base_url=str(http.base_url))
    statuses: dict[str, set[int]] = {}

    def ask(case: schemathesis.Case) -> None:
        answer = case.call(headers=dict(authorization=http.headers["authorization"]))
        case.validate_response(answer, checks=[not_a_server_error])
        if answer.status_code >= 400:
            # GraphQL has its own word for it.
            assert answer.json()["errors" if case.operation.path == "/v1/graphql" else "detail"]
        statuses.setdefault(case.operation.label, set()).add(answer.status_code)

    for found in schema.get_all_operations():
        operation = found.ok()
        modes = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        cases = st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in modes))
        settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(cases)(ask))()
    # Both what fits and what doesn't has been asked.
    for action in ("score", "explain"):
        assert {200, 422} <= statuses[f"POST /v1/models/{{name}}/{action}"]
    assert {200, 404} <= statuses["GET /v1/customers/{id}"]
    assert {200, 422} <= statuses["POST /v1/models/{name}/customers/{id}"]
    assert {200, 400} <= statuses["POST /v1/graphql"]
    assert audit.verify(folder / "audit.jsonl").lines > EXAMPLES
