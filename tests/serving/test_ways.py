"""One core, four ways in: JSON, Arrow, gRPC and GraphQL on a real Ray Serve, with keys."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import polars as pl
import pyarrow as pa
import pytest

from cluster import ports, session
from models import sentiment
from models.sentiment_head import fit_head
from serving import app, audit
from serving.access import AccessFiles, add_key
from serving.protocol.liftyard_pb2 import (
    CustomerRequest,
    Events,
    ExplainRequest,
    ModelsRequest,
    Row,
    ScoreCustomerRequest,
    ScoreRequest,
    SentimentRequest,
    Value,
)
from serving.protocol.liftyard_pb2_grpc import LiftyardStub
from serving.settings import Limits, Listener, Settings
from tests import tiny_encoder
from tests.jobs import published
from tests.jobs.published import Place
from tests.serving.test_app import ROWS, register, stream, trained
from tests.serving.test_texts import keep

ROOT = Path(__file__).parents[2]
ARROW = {"content-type": "application/vnd.apache.arrow.stream"}


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A server and what is behind it; `keys` by role."""

    url: str
    channel: grpc.Channel
    place: Place
    keys: dict[str, str]
    audit: Path

    def auth(self, role: str = "analyst") -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[role]}"}

    def post(self, path: str, *, role: str = "analyst", **how: Any) -> httpx.Response:
        headers = {**self.auth(role), **how.pop("headers", {})}
        return httpx.post(f"{self.url}{path}", headers=headers, timeout=30, **how)

    def query(self, text: str, role: str = "analyst", **variables: Any) -> httpx.Response:
        body = {"query": text, "variables": variables}
        return self.post("/v1/graphql", role=role, json=body)

    def call(self, name: str, request: Any, role: str | None = "analyst", **sent: str) -> Any:
        metadata = [*(() if role is None else self.auth(role).items()), *sent.items()]
        return getattr(LiftyardStub(self.channel), name)(request, metadata=metadata, timeout=30)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("ways")
    place = published.make(folder)
    card = register(place.registry, "visits", trained("boosting", rounds=20), "boosting")
    place.registry.promote("visits", card.version)
    encoder = tiny_encoder.write(folder / "encoder")
    fit_head(sentiment.new(str(encoder)), tiny_encoder.labelled(300)).save(folder / "model")
    keep(place.registry, folder / "model")
    files = AccessFiles(keys=str(folder / "keys.json"), audit=str(folder / "audit.jsonl"))
    keys = {
        role: add_key(folder / "keys.json", role, role) for role in ("viewer", "analyst", "admin")
    }
    settings = Settings(
        registry=place.registry.uri,
        models=None,
        limits=Limits(rows=300, explained_rows=20, body_bytes=2**20),
        refresh_s=0.5,
        access=files,
        store=str(place.store),
    )
    http, rpc = ports.free(2)
    with session.connect(cpus=2):
        url = app.apply(settings, Listener(port=http, grpc_port=rpc)).url
        with grpc.insecure_channel(f"127.0.0.1:{rpc}") as channel:
            yield Ground(
                url=url, channel=channel, place=place, keys=keys, audit=folder / "audit.jsonl"
            )
        app.stop()


def as_value(value: Any) -> Value:
    if value is None:
        return Value()
    kinds = {bool: "flag", int: "integer", float: "number", str: "text"}
    return Value(**{kinds[type(value)]: value})


def as_rows(frame: pl.DataFrame) -> list[Row]:
    return [
        Row(fields={name: as_value(value) for name, value in row.items()})
        for row in frame.to_dicts()
    ]


def refused(ground: Ground, name: str, request: Any, **how: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as told:
        ground.call(name, request, **how)
    return told.value.code().name, told.value.details()


def test_a_row_gets_the_same_number_whichever_way_it_comes(ground: Ground) -> None:
    _, scorer = ground.place.registry.load("visits")
    expected = scorer.score(ROWS).tolist()
    rows = ROWS.to_dicts()
    path = "/v1/models/visits/score"
    by_arrow = ground.post(path, content=stream(ROWS), headers=ARROW).content
    graphql = ground.query(
        'query ($rows: [JSON!]!) { score(model: "visits", rows: $rows) { scores } }', rows=rows
    )
    found = {
        "json": ground.post(path, json={"rows": rows}).json()["scores"],
        "arrow": pa.ipc.open_stream(by_arrow).read_all()["score"].to_pylist(),
        "grpc": list(ground.call("Score", ScoreRequest(model="visits", rows=as_rows(ROWS))).scores),
        "grpc with arrow": list(
            ground.call("Score", ScoreRequest(model="visits", arrow=stream(ROWS))).scores
        ),
        "graphql": graphql.json()["data"]["score"]["scores"],
    }
    for way, scores in found.items():
        assert scores == expected, way
    # Literals in the query, too.
    literal = ", ".join(f"{name}: {json.dumps(value)}" for name, value in rows[0].items())
    alone = ground.query(
        f'{{ score(model: "visits", rows: [{{{literal}}}]) {{ scores version }} }}'
    )
    assert alone.json() == {"data": {"score": {"scores": expected[:1], "version": 1}}}


def test_reasons_are_the_same_whichever_way_they_are_asked_for(ground: Ground) -> None:
    rows = ROWS[:3].to_dicts()
    told = ground.post("/v1/models/visits/explain", json={"rows": rows}).json()
    reply = ground.call("Explain", ExplainRequest(model="visits", rows=as_rows(ROWS[:3])))
    asked = ground.query(
        'query ($rows: [JSON!]!) { explain(model: "visits", rows: $rows) '
        "{ model version scale explanations { score base contributions reasons } } }",
        rows=rows,
    )
    assert asked.json()["data"]["explain"] == told
    assert (reply.version, reply.scale) == (told["version"], told["scale"])
    for one, other in zip(reply.explanations, told["explanations"], strict=True):
        assert dict(one.contributions) == other["contributions"]
        assert [why.text for why in one.reasons] == [why["text"] for why in other["reasons"]]
        assert (one.score, one.base) == (other["score"], other["base"])


def test_customers_and_texts_by_every_way(ground: Ground) -> None:
    page = httpx.get(f"{ground.url}/v1/customers/7", headers=ground.auth()).json()
    reply = ground.call("Customer", CustomerRequest(id="7"))
    fields = "customer cutoff features segment scores { model version score }"
    asked = ground.query(f"{{ customers(ids: [7, 100000]) {{ {fields} }} }}")
    assert asked.status_code == 200
    (seven, missing), (error,) = asked.json()["data"]["customers"], asked.json()["errors"]
    assert (missing, error["extensions"]["code"]) == (None, "NOT_FOUND")
    assert seven == {
        **{name: page[name] for name in ("customer", "cutoff", "features", "segment")},
        "scores": [{"model": name, **each} for name, each in page["scores"].items()],
    }
    assert reply.scores["lapse"].score == page["scores"]["lapse"]["score"]
    assert {name: value.WhichOneof("kind") for name, value in reply.features.items()} == {
        name: as_value(value).WhichOneof("kind") for name, value in page["features"].items()
    }
    # With an event that is new, as over HTTP.
    event = {"at": "2024-05-02T10:00:00", "amount": 12.5}
    body = {"at": "2024-05-03T00:00:00", "events": {"buys": [event]}}
    over = ground.post("/v1/models/lapse/customers/7", json=body)
    assert over.status_code == 200, over.text
    asked_anew = ScoreCustomerRequest(
        model="lapse", customer="7", at=body["at"],
        events={"buys": Events(rows=[Row(fields={k: as_value(v) for k, v in event.items()})])},
    )  # fmt: skip
    anew = ground.call("ScoreCustomer", asked_anew)
    assert (anew.score, anew.cutoff) == (over.json()["score"], over.json()["cutoff"])

    texts = ["the parcel is great", ""]
    said = ground.post("/v1/sentiment", json={"texts": texts}).json()["results"]
    labels = ground.call("Sentiment", SentimentRequest(texts=texts)).results
    assert [each.label for each in labels] == [said[0]["label"], ""]
    assert not labels[1].HasField("sentiment") and labels[1].outcome == "empty"
    assert dict(labels[0].probabilities) == said[0]["probabilities"]
    answer = ground.query(
        "query ($t: [String!]!) { sentiment(texts: $t) "
        "{ label probabilities sentiment outcome language } }",
        t=texts,
    )
    assert answer.json()["data"]["sentiment"] == said
    served = {each.name: each.version for each in ground.call("Models", ModelsRequest()).models}
    assert served == {"lapse": 1, "visits": 1}
    listed = ground.query("{ models { name version aliases } }").json()["data"]["models"]
    assert {each["name"]: each["version"] for each in listed} == served


def test_nobody_gets_in_by_any_way_who_may_not(ground: Ground) -> None:
    score = ScoreRequest(model="visits", rows=as_rows(ROWS[:1]))
    assert refused(ground, "Score", score, role=None)[0] == "UNAUTHENTICATED"
    assert refused(ground, "Score", score, role="viewer")[0] == "PERMISSION_DENIED"
    rows = ROWS[:1].to_dicts()
    text = (
        'query ($rows: [JSON!]!) { models { name } score(model: "visits", rows: $rows) { scores } }'
    )
    # A field that may be seen is; the other says why not.
    half = ground.query(text, role="viewer", rows=rows)
    assert half.status_code == 200
    assert len(half.json()["data"]["models"]) == 2 and half.json()["data"]["score"] is None
    assert half.json()["errors"][0]["extensions"]["code"] == "FORBIDDEN"
    none = httpx.post(f"{ground.url}/v1/graphql", json={"query": "{ models { name } }"})
    assert none.status_code == 401
    assert none.headers["www-authenticate"] == "Bearer"
    whole = ground.query("{ customer(id: 7) { cutoff } }", role="viewer")
    assert whole.status_code == 403


def test_what_does_not_fit_has_its_code_and_its_reason(ground: Ground) -> None:
    row = as_rows(ROWS[:1])[0]
    row.fields["spend"].text = "much"
    code, details = refused(ground, "Score", ScoreRequest(model="visits", rows=[row]))
    assert code == "INVALID_ARGUMENT" and "row 0 spend is the string 'much'" in details
    for request, code in (
        (ScoreRequest(model="absent", rows=[row]), "NOT_FOUND"),
        (ScoreRequest(model="visits"), "INVALID_ARGUMENT"),
        (ScoreRequest(model="visits", arrow=b"no stream"), "INVALID_ARGUMENT"),
        (ScoreRequest(model="visits", rows=[row], arrow=b"x"), "INVALID_ARGUMENT"),
        (ScoreRequest(model="visits", rows=[row] * 301), "INVALID_ARGUMENT"),
        (ScoreRequest(model="visits", arrow=b"x" * (2**20 + 1)), "INVALID_ARGUMENT"),
    ):
        assert refused(ground, "Score", request)[0] == code
    code, details = refused(
        ground, "Score", ScoreRequest(model="visits", rows=[row]), **{"x-deadline-ms": "soon"}
    )
    assert code == "INVALID_ARGUMENT" and "whole milliseconds" in details


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 400, "send an object"),
        (b'{"query": 1}', 400, "'query' is not a string"),
        (b'{"variables": {}}', 400, "'query' is missing"),
        (b'{"query": "{ nothing }"}', 400, "Cannot query field 'nothing'"),
        (b'{"query": "{ models { name "}', 400, "Syntax Error"),
        (b'{"query": "query a { models { name } }", "operationName": "b"}', 400, "no operation"),
        (json.dumps({"query": "{" * 3_000}).encode(), 400, ""),
        (
            json.dumps(
                {"query": "{{ customers(ids: [{}]) {{ {} }} }}".format("7," * 200, "cutoff " * 60)}
            ).encode(),
            400,
            "10000 are allowed",
        ),
        (
            json.dumps(
                {
                    "query": 'query ($r: [JSON!]!) { a: explain(model: "visits", rows: $r) '
                    "{ scale } }",
                    "variables": {"r": [{}] * 101},
                }
            ).encode(),
            400,
            "10000 are allowed",
        ),
        (
            json.dumps(
                {
                    "query": "{ models { ...a } } "
                    + " ".join(
                        f"fragment {one} on Model {{ {f'...{other} ' * 40} }}"
                        for one, other in zip("abcd", "bcde", strict=True)
                    )
                    + " fragment e on Model { name }"
                }
            ).encode(),
            400,
            "fields; ask for less",
        ),
        (b'{"query": "' + b" " * 2**20 + b'"}', 413, "over"),
    ],
)
def test_queries_that_are_faulty_or_too_costly_are_refused_before_they_run(
    ground: Ground, body: bytes, status: int, reason: str
) -> None:
    answer = ground.post("/v1/graphql", content=body)
    assert answer.status_code == status, answer.text
    assert any(reason in error["message"] for error in answer.json()["errors"])


def test_depth_is_limited(ground: Ground) -> None:
    def nested(depth: int) -> httpx.Response:
        inner = "... on Model { " * depth + "name" + " }" * depth
        return ground.query(f"{{ models {{ {inner} }} }}")

    assert nested(6).status_code == 200
    deep = nested(7)
    assert deep.status_code == 400
    assert deep.json()["errors"][0]["message"].startswith("the query is nested deeper than 8")


def test_every_way_is_on_record_and_counted(ground: Ground) -> None:
    sent = {"x-request-id": "grpc-1"}
    ground.call("Score", ScoreRequest(model="visits", rows=as_rows(ROWS[:2])), **sent)
    ground.post(
        "/v1/graphql",
        headers={"x-request-id": "graphql-1"},
        json={"query": "{ a: models { name } b: customer(id: 7) { cutoff } }"},
    )
    assert audit.verify(ground.audit).lines > 0
    lines = [json.loads(line) for line in ground.audit.read_text().splitlines()]
    by_id = {line["request"]: line for line in lines}
    assert by_id["grpc-1"]["rows"] == 2 and by_id["grpc-1"]["who"] == "analyst"
    assert by_id["graphql-1.0"]["action"] == "models"
    assert (by_id["graphql-1.1"]["action"], by_id["graphql-1.1"]["customer"]) == ("customers", 7)
    metrics = httpx.get(f"{ground.url}/metrics", headers=ground.auth("admin")).text
    for way, action, model in (("grpc", "score", "visits"), ("graphql", "customers", "")):
        labels = f'action="{action}",model="{model}",replica="\\w+",status="200",way="{way}"'
        assert re.search(f"liftyard_requests_total{{{labels}}} ", metrics)


def test_the_stubs_are_what_the_proto_gives(tmp_path: Path) -> None:
    source = "serving/protocol/liftyard.proto"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "grpc_tools.protoc", "-I.", f"--python_out={tmp_path}"),
            *(f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}", source),
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for made in sorted((tmp_path / "serving/protocol").iterdir()):
        assert made.read_text() == (ROOT / "serving/protocol" / made.name).read_text(), made.name
