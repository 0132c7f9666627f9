"""The whole application but for Ray: access, audit, metrics, and whatever a client may send."""

import asyncio
import json
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.encoding import Encoder
from models.families import FAMILIES, TrainingData
from models.registry import Registry
from models.scoring import Scorer
from serving import audit
from serving.access import AccessFiles, add_key
from serving.batching import Batcher
from serving.gate import Gate
from serving.replica import Models
from serving.routes import application
from serving.settings import Limits, Rollout, Settings

FRAME = pl.DataFrame({"spend": [1.5, None, -3.0, 8.0] * 20, "segment": ["a", None, "b", "a"] * 20})
ENCODER = Encoder.fit(FRAME, FRAME.columns)
ROW = {"spend": 2.0, "segment": "a"}
LIMITS = Limits(rows=50, explained_rows=5, body_bytes=10_000)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A registry, and keys by role."""

    uri: str
    folder: Path
    keys: dict[str, str]

    @property
    def log(self) -> Path:
        return self.folder / "audit.jsonl"

    def settings(self, *, guarded: bool = True) -> Settings:
        files = AccessFiles(
            keys=str(self.folder / "keys.json"),
            policy=str(self.folder / "policy.yaml"),
            audit=str(self.log),
        )
        return Settings(
            registry=self.uri,
            models=None,
            limits=LIMITS,
            refresh_s=60,
            access=files if guarded else None,
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("place")
    uri = f"sqlite:///{folder}/mlflow.db"
    x = ENCODER.transform(FRAME)
    y = (np.arange(len(x)) % 4 == 3).astype(np.int8)
    data = TrainingData(x_train=x, y_train=y, x_valid=x, y_valid=y)
    (fitted,) = FAMILIES["boosting"]([{"family": "boosting", "rounds": 5, "depth": 2}], data)
    registry = Registry(uri)
    for name in ("lapse", "churn"):
        registry.register(
            name,
            Scorer(encoder=ENCODER, predict=fitted.predict),
            example=FRAME[:2],
            family="boosting",
            variant={"family": "boosting"},
            features=[
                {"name": "spend", "kind": "number", "description": "Spend", "unit": "USD"},
                {"name": "segment", "kind": "string", "description": "", "unit": ""},
            ],
            metrics={},
            data_version="training/test@1",
            seed=1,
            git_revision="0" * 40,
        )
        registry.promote(name, 1)
    (folder / "policy.yaml").write_text(
        "roles:\n"
        "  caller: {actions: [score], models: [lapse]}\n"
        "  slow: {actions: [score], requests_per_s: 0.01, burst: 2}\n"
        "  admin: {actions: [score, explain, models, metrics]}\n"
        "  partly: {actions: [score, explain], hidden: [sp*]}\n"
        "  blind: {actions: [explain], fields: []}\n"
    )
    roles = ("caller", "slow", "admin", "partly", "blind")
    keys = {role: add_key(folder / "keys.json", f"the-{role}", role) for role in roles}
    yield Place(uri=uri, folder=folder, keys=keys)


Use = Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]


def run(chosen: Settings, use: Use) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(application(Models(chosen), Gate(chosen)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await use(client)

    asyncio.run(main())


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_each_gets_what_its_role_allows_and_a_line_in_the_log(place: Place) -> None:
    before = audit.verify(place.log).lines if place.log.exists() else 0
    asked = [
        (None, "POST", "/v1/models/lapse/score", 401),
        ("caller", "POST", "/v1/models/lapse/score", 200),
        ("caller", "POST", "/v1/models/churn/score", 403),
        ("caller", "POST", "/v1/models/lapse/explain", 403),
        ("caller", "GET", "/v1/models", 403),
        ("slow", "POST", "/v1/models/churn/score", 200),
        ("slow", "POST", "/v1/models/churn/score", 200),
        ("slow", "POST", "/v1/models/churn/score", 429),
        ("admin", "POST", "/v1/models/churn/explain", 200),
        ("admin", "POST", "/v1/models/none/score", 404),
        ("admin", "GET", "/v1/models", 200),
        ("admin", "GET", "/metrics", 200),
    ]

    async def use(client: httpx.AsyncClient) -> None:
        for at, (role, method, path, status) in enumerate(asked):
            headers = {"x-request-id": f"r{at}"}
            if role is not None:
                headers |= bearer(place.keys[role])
            body = json.dumps({"rows": [ROW]}) if method == "POST" else None
            answer = await client.request(method, path, content=body, headers=headers)
            assert (path, answer.status_code) == (path, status)
            assert answer.headers["x-request-id"] == f"r{at}"
            assert ("retry-after" in answer.headers) == (status == 429)
            assert ("www-authenticate" in answer.headers) == (status == 401)
        # Open to all, and not in the log.
        assert (await client.get("/healthz")).status_code == 200
        assert (await client.get("/openapi.json")).status_code == 200

    run(place.settings(), use)
    assert audit.verify(place.log).lines == before + len(asked)
    lines = [json.loads(line) for line in place.log.read_text().splitlines()[before:]]
    assert [line["request"] for line in lines] == [f"r{at}" for at in range(len(asked))]
    assert [line["status"] for line in lines] == [status for *_, status in asked]
    assert [line["who"] for line in lines] == [
        None if role is None else f"the-{role}" for role, *_ in asked
    ]
    assert (lines[1]["version"], lines[1]["rows"], lines[1]["model"]) == (1, 1, "lapse")
    assert not any(key in place.log.read_text() for key in place.keys.values())


def test_an_explanation_shows_only_the_fields_that_a_role_may_see(place: Place) -> None:
    shown = {}

    async def use(client: httpx.AsyncClient) -> None:
        for role in ("admin", "partly", "blind"):
            answer = await client.post(
                "/v1/models/lapse/explain", json={"rows": [ROW]}, headers=bearer(place.keys[role])
            )
            assert answer.status_code == 200
            (shown[role],) = answer.json()["explanations"]

    run(place.settings(), use)
    every = shown["admin"]
    assert set(every["contributions"]) == {"spend", "segment"}
    assert {reason["feature"] for reason in every["reasons"]} <= {"spend", "segment"}
    assert "spend" in {reason["feature"] for reason in every["reasons"]}
    for role, names in (("partly", {"segment"}), ("blind", set())):
        assert shown[role]["score"] == every["score"]
        assert shown[role]["contributions"] == {
            name: every["contributions"][name] for name in names
        }
        assert shown[role]["reasons"] == [
            reason for reason in every["reasons"] if reason["feature"] in names
        ]


def test_no_answer_without_its_line_in_the_log(place: Place, tmp_path: Path) -> None:
    log = tmp_path / "audit.jsonl"

    async def use(client: httpx.AsyncClient) -> None:
        async def ask() -> httpx.Response:
            return await client.post(
                "/v1/models/lapse/score", json={"rows": [ROW]}, headers=bearer(place.keys["admin"])
            )

        assert (await ask()).status_code == 200
        # Another process that was stopped in the middle of a line.
        with log.open("a") as file:
            file.write('{"time"')
        answer = await ask()
        assert (answer.status_code, "scores" in answer.text) == (503, False)
        assert "audit log" in answer.json()["detail"]

    chosen = place.settings()
    assert chosen.access is not None
    files = AccessFiles(keys=chosen.access.keys, policy=chosen.access.policy, audit=str(log))
    run(
        Settings(
            registry=place.uri,
            models={"lapse": Rollout()},
            limits=LIMITS,
            refresh_s=60,
            access=files,
        ),
        use,
    )


def test_after_its_deadline_a_request_is_answered_504_and_its_rows_are_left(place: Place) -> None:
    free = threading.Event()
    calls: list[int] = []

    def predict(x: np.ndarray) -> np.ndarray:
        calls.append(len(x))
        free.wait(30)
        return x[:, 0].astype(np.float64)

    chosen = place.settings(guarded=False)
    models = Models(chosen)
    # Held up by a model that is at work for as long as this test wants.
    held = replace(models.served["lapse"], batcher=Batcher(predict))
    models.served = {**models.served, "lapse": held}

    async def use(client: httpx.AsyncClient) -> None:
        async def ask(rows: int, deadline: str | None = None) -> httpx.Response:
            headers = {} if deadline is None else {"x-deadline-ms": deadline}
            body = {"rows": [ROW] * rows}
            return await client.post("/v1/models/lapse/score", json=body, headers=headers)

        first = asyncio.create_task(ask(1))
        while not calls:
            await asyncio.sleep(0.001)
        late = await ask(2, "20")
        assert (late.status_code, "X-Deadline-Ms" in late.json()["detail"]) == (504, True)
        free.set()
        assert (await first).status_code == 200
        assert (await ask(3, "30000")).status_code == 200
        for said in ("0", "-1", "soon", "1e3"):
            assert (await ask(1, said)).status_code == 400
        assert calls == [1, 3]

    async def main() -> None:
        transport = httpx.ASGITransport(application(models, Gate(chosen)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await use(client)

    asyncio.run(main())


def test_metrics_count_answers_by_model_and_not_invented_names(place: Place) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        for name in ("lapse", "lapse", "invented"):
            await client.post(f"/v1/models/{name}/score", json={"rows": [ROW, ROW]})
        text = (await client.get("/metrics")).text
        for line in (
            'requests_total{action="score",model="lapse",replica="",status="200",way="json"} 2.0',
            'requests_total{action="score",model="",replica="",status="404",way="json"} 1.0',
            'request_seconds_count{action="score",model="lapse",replica="",way="json"} 2.0',
            'model_rows_total{model="lapse",replica=""} 4.0',
            'model_version{model="churn",replica=""} 1.0',
        ):
            assert f"liftyard_{line}" in text.splitlines()
        assert "invented" not in text

    run(place.settings(guarded=False), use)


# What no document describes: `test_openapi` asks for what it does.
PATHS = [
    *(f"/v1/models/{{name}}/{action}" for action in ("score", "explain", "customers/7")),
    *("/v1/sentiment", "/v1/sentiment/explain", "/v1/graphql"),
]
FITTING = json.dumps({"rows": [ROW]}).encode()
BODY = st.sampled_from([FITTING, b"[" * 9_000, b" " * 10_001]) | st.binary(max_size=60)
HEADER = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20)


def test_whatever_is_sent_by_whomever_is_answered_with_a_reason(place: Place) -> None:
    keys = [f"Bearer {key}" for key in place.keys.values()]
    requests = st.tuples(
        st.sampled_from(PATHS),
        st.sampled_from(["lapse", "none"]) | st.text(min_size=1, max_size=4),
        BODY,
        st.sampled_from(["application/json", "application/vnd.apache.arrow.stream"]) | HEADER,
        st.sampled_from(keys) | HEADER,
    )
    found: list[Any] = []

    @given(requests)
    @settings(max_examples=300, deadline=None, derandomize=True)
    def draw(request: Any) -> None:
        found.append(request)

    draw()
    statuses = set()

    async def use(client: httpx.AsyncClient) -> None:
        for path, name, body, kind, key in found:
            answer = await client.post(
                path.replace("{name}", quote(name, safe="")),
                content=body,
                headers={"content-type": kind, "authorization": key},
            )
            assert answer.status_code < 500, (path, name, body, kind)
            if answer.status_code >= 400:
                # GraphQL has its own word for it.
                told = answer.json()
                assert told["errors" if path == "/v1/graphql" else "detail"]
            statuses.add(answer.status_code)

    run(place.settings(), use)
    assert statuses >= {200, 400, 401, 403, 404, 413}
