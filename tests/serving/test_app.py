"""Serving on a real Ray Serve, over HTTP, from a real registry."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import psutil
import pyarrow as pa
import pytest

from cluster import ports, session
from models.encoding import Encoder
from models.families import FAMILIES, TrainingData
from models.registry import Registry
from models.registry_versions import Card
from models.scoring import Scorer
from serving import app, arrow

LIMITS = app.Limits(rows=3_000, body_bytes=2**20, ongoing=16, queued=24)


def bad_predict(x: np.ndarray) -> np.ndarray:
    return np.full(len(x), 7.0)


def make_frame(rows: int, seed: int) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "recency_days": [
                None if random.random() < 0.2 else float(day)
                for day in random.integers(0, 90, rows)
            ],
            "spend": random.gamma(2.0, 30.0, rows),
            "visits": random.integers(0, 40, rows),
            "segment": random.choice(["gold", "silver", "bronze"], rows),
            "has_coupon": random.random(rows) < 0.5,
        },
        schema_overrides={"recency_days": pl.Float64},
    )


TRAINING = make_frame(600, 1)
ENCODER = Encoder.fit(TRAINING, TRAINING.columns)
ROWS = make_frame(200, 2)


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What the module's tests share: an address, and the registry behind it."""

    url: str
    uri: str

    @property
    def registry(self) -> Registry:
        return Registry(self.uri)

    def post(self, name: str, body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/models/{name}/score", json=body, timeout=30)

    def post_arrow(self, name: str, body: bytes) -> httpx.Response:
        kind = {"content-type": arrow.MEDIA_TYPE}
        url = f"{self.url}/v1/models/{name}/score"
        return httpx.post(url, content=body, headers=kind, timeout=30)


def stream(frame: pl.DataFrame) -> bytes:
    table = frame.to_arrow()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def trained(family: str, **variant: Any) -> Scorer:
    x = ENCODER.transform(TRAINING)
    y = (TRAINING["spend"].to_numpy() + 10 * (TRAINING["visits"].to_numpy() % 5) > 70).astype(
        np.int8
    )
    data = TrainingData(x_train=x[:400], y_train=y[:400], x_valid=x[400:], y_valid=y[400:])
    (fitted,) = FAMILIES[family]([{"family": family, **variant}], data)
    return Scorer(encoder=ENCODER, predict=fitted.predict)


def register(registry: Registry, name: str, scorer: Scorer, family: str) -> Card:
    return registry.register(
        name,
        scorer,
        example=TRAINING[:3],
        family=family,
        variant={"family": family},
        features=[
            {"name": column.name, "kind": column.kind, "description": "", "unit": ""}
            for column in ENCODER.columns
        ],
        metrics={"auc": 0.8},
        data_version="training/test@1",
        seed=1,
        git_revision="0" * 40,
    )


def haproxies() -> list[psutil.Process]:
    return [
        child for child in psutil.Process().children(recursive=True) if "haproxy" in name(child)
    ]


def name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return ""


def eventually(fits: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 30
    while not fits():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with session.connect(cpus=2):
        yield


@pytest.fixture(scope="module")
def ground(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    uri = f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"
    registry = Registry(uri)
    for family, variant in {
        "boosting": {"rounds": 20, "depth": 3},
        "forest": {"trees": 20, "depth": 5},
        "network": {"width": 16, "depth": 2, "epochs": 2},
    }.items():
        register(registry, family, trained(family, **variant), family)
        registry.promote(family, 1)
    register(registry, "unpromoted", trained("forest", trees=3, depth=2), "forest")
    url = app.serve(uri, port=ports.free(1)[0], limits=LIMITS, refresh_s=0.2)
    try:
        yield Ground(url=url, uri=uri)
    finally:
        app.stop()
        app.stop()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/healthz")
        assert eventually(lambda: not haproxies())


def test_without_ray_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(app.ServingError, match=r"session\.connect"):
        app.serve(f"sqlite:///{tmp_path}/none.db", port=ports.free(1)[0])


# What doesn't start, before `ground` starts what does.
def test_what_can_not_be_served_is_told_and_leaves_nothing(cluster: None, tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    registry = Registry(uri)
    with pytest.raises(app.ServingError, match="nothing to serve"):
        app.serve(uri, port=ports.free(1)[0])
    register(registry, "bad", Scorer(encoder=ENCODER, predict=bad_predict), "boosting")
    with pytest.raises(app.ServingError, match=r"\['bad'\] have no champion"):
        app.serve(uri, port=ports.free(1)[0], models=["bad"])
    with pytest.raises(app.ServingError, match=r"10\.1\.2\.3:80"):
        app.serve(uri, host="10.1.2.3", port=80)
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        taken = holder.getsockname()[1]
        with pytest.raises(app.ServingError, match=rf"127.0.0.1:{taken}.*another port"):
            app.serve(uri, port=taken)
    registry.promote("bad", 1)
    port = ports.free(1)[0]
    with pytest.raises(app.ServingError, match="smoke test"):
        app.serve(uri, port=port)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz")
    assert eventually(lambda: not haproxies())


@pytest.mark.parametrize("family", ["boosting", "forest", "network"])
def test_scores_are_the_scorers_to_the_bit(ground: Ground, family: str) -> None:
    card, scorer = ground.registry.load(family)
    for frame in (ROWS[:1], ROWS[:7], ROWS.with_columns(pl.lit(None).alias("segment"))):
        answer = ground.post(family, {"rows": frame.to_dicts()})
        assert answer.status_code == 200
        body = answer.json()
        assert (body["model"], body["version"]) == (family, card.version)
        assert body["scores"] == scorer.score(frame).tolist()


@pytest.mark.parametrize("family", ["boosting", "forest", "network"])
def test_arrow_gives_the_same_numbers(ground: Ground, family: str) -> None:
    card, scorer = ground.registry.load(family)
    gaps = ROWS.with_columns(pl.lit(None).alias("segment"), pl.col("spend").cast(pl.Float32))
    for frame in (ROWS[:1], pl.concat([ROWS] * 10).select(reversed(ROWS.columns)), gaps):
        answer = ground.post_arrow(family, stream(frame))
        assert answer.status_code == 200
        assert answer.headers["content-type"] == arrow.MEDIA_TYPE
        table = pa.ipc.open_stream(answer.content).read_all()
        assert table.schema.metadata == {
            b"model": family.encode(),
            b"version": str(card.version).encode(),
        }
        assert table["score"].to_pylist() == scorer.score(frame).tolist()


@pytest.mark.parametrize("family", ["boosting", "forest", "network"])
def test_explanations_sum_to_the_scores_and_give_reasons(ground: Ground, family: str) -> None:
    card, scorer = ground.registry.load(family)
    rows = ROWS[:5].to_dicts()
    answer = httpx.post(f"{ground.url}/v1/models/{family}/explain", json={"rows": rows}, timeout=30)
    assert answer.status_code == 200
    body = answer.json()
    assert (body["model"], body["version"]) == (family, card.version)
    told = body["explanations"]
    assert [each["score"] for each in told] == scorer.score(ROWS[:5]).tolist()
    for row, each in zip(rows, told, strict=True):
        total = each["base"] + sum(each["contributions"].values())
        if body["scale"] == "log-odds":
            total = 1 / (1 + np.exp(-total))
        assert total == pytest.approx(each["score"], abs=2e-6)
        largest = max(each["contributions"].items(), key=lambda item: abs(item[1]))
        reason = each["reasons"][0]
        assert (reason["feature"], reason["contribution"]) == largest
        assert reason["value"] == row[reason["feature"]]
        assert reason["text"].endswith("the score")
    answer = httpx.post(f"{ground.url}/v1/models/{family}/explain", json={"rows": rows * 21})
    assert (answer.status_code, "at most 100" in answer.text) == (422, True)


def test_arrow_that_does_not_fit_is_told(ground: Ground) -> None:
    spent = ROWS.with_columns(spend=pl.Series([1.0, 4e38] * 100))
    for body, status, field, reason in (
        (stream(ROWS.rename({"spend": "spent"})), 422, "spend", "missing"),
        (stream(ROWS.cast({"visits": pl.String})), 422, "visits", "send numbers"),
        (stream(spent), 422, "spend", "too large for float32"),
        (stream(pl.concat([ROWS] * 16)), 422, None, "over 3000 rows"),
        (stream(ROWS[:0]), 422, None, "no rows"),
        (b"ARROW1", 400, None, "not an Arrow IPC stream"),
    ):
        answer = ground.post_arrow("boosting", body)
        assert answer.status_code == status
        problem = answer.json()["detail"][0]
        assert (problem["field"], reason in problem["reason"]) == (field, True)


@pytest.mark.parametrize("family", ["boosting", "forest", "network"])
def test_single_rows_at_once_get_what_they_get_alone(ground: Ground, family: str) -> None:
    _, scorer = ground.registry.load(family)
    alone = [float(scorer.score(ROWS[at : at + 1])[0]) for at in range(32)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(
                lambda at: ground.post(family, {"rows": ROWS[at : at + 1].to_dicts()}), range(32)
            )
        )
    assert [answer.status_code for answer in answers] == [200] * 32
    assert [answer.json()["scores"] for answer in answers] == [[score] for score in alone]


def test_health_cards_and_documents(ground: Ground) -> None:
    health = httpx.get(f"{ground.url}/healthz")
    assert health.status_code == 200
    assert health.json()["status"] == "ready"
    cards = httpx.get(f"{ground.url}/v1/models").json()["models"]
    assert {card["name"] for card in cards} >= {"boosting", "forest", "network"}
    assert cards[0]["metrics"] == {"auc": 0.8}
    assert [feature["name"] for feature in cards[0]["features"]] == TRAINING.columns
    paths = httpx.get(f"{ground.url}/openapi.json").json()["paths"]
    assert "/v1/models/{name}/score" in paths


def test_only_loopback_is_listened_on(ground: Ground) -> None:
    listened = {
        connection.laddr.ip
        for process in haproxies()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listened == {"127.0.0.1"}


def row(**changes: Any) -> dict[str, Any]:
    return {**ROWS[:1].to_dicts()[0], **changes}


def without(field: str) -> dict[str, Any]:
    return {key: value for key, value in row().items() if key != field}


@pytest.mark.parametrize(
    ("rows", "at", "field", "reason"),
    [
        ([row(), row(spent=1)], 1, "spent", "did you mean 'spend'"),
        ([without("visits")], 0, "visits", "missing"),
        ([row(spend="12")], 0, "spend", "the string '12'; give a number"),
        ([row(spend=True)], 0, "spend", "the boolean True; give a number"),
        ([row(has_coupon=1)], 0, "has_coupon", "the number 1; give a boolean"),
        ([row(segment=["gold"])], 0, "segment", "a list; give a string"),
        ([row(spend=10**400)], 0, "spend", "out of range"),
        ([row(spend=-4e38)], 0, "spend", "out of range"),
        ([row(), 5], 1, None, "a row is an object"),
        ([], None, "rows", "at least one row"),
        ("gold", None, "rows", "at least one row"),
        ([row()] * 3_001, None, "rows", "at most 3000"),
    ],
)
def test_bad_rows_are_told_by_row_and_field(
    ground: Ground, rows: Any, at: int | None, field: str | None, reason: str
) -> None:
    answer = ground.post("boosting", {"rows": rows})
    assert answer.status_code == 422
    (problem,) = answer.json()["detail"]
    assert (problem["row"], problem["field"]) == (at, field)
    assert reason in problem["reason"]


def test_every_problem_is_counted_and_the_first_ones_told(ground: Ground) -> None:
    answer = ground.post("boosting", {"rows": [row(spend="x")] * 150})
    assert answer.json()["problems"] == 150
    assert [problem["row"] for problem in answer.json()["detail"]] == list(range(100))


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b'{"rows": [', 400, "not JSON"),
        (b"\xff\xfe\xfd", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[1]", 422, "send an object"),
        (b"{}", 422, "missing"),
        (b'{"rows": [{}], "row": 1}', 422, "only 'rows'"),
        (json.dumps({"rows": [row(spend=float("nan"))]}).encode(), 422, "not finite"),
        (json.dumps({"rows": [row(spend=float("inf"))]}).encode(), 422, "not finite"),
        (b" " * (2**20 + 1), 413, "over 1048576 bytes"),
    ],
)
def test_bad_bodies_are_told(ground: Ground, body: bytes, status: int, reason: str) -> None:
    answer = httpx.post(f"{ground.url}/v1/models/forest/score", content=body)
    assert answer.status_code == status
    assert reason in str(answer.json()["detail"])


def test_an_unknown_model_names_those_there(ground: Ground) -> None:
    answer = ground.post("forrest", {"rows": [row()]})
    assert answer.status_code == 404
    assert "'forrest'" in answer.json()["detail"]
    assert "'forest'" in answer.json()["detail"]


def test_a_full_queue_says_429_and_loses_no_request_it_took(ground: Ground) -> None:
    _, scorer = ground.registry.load("boosting")
    frame = pl.concat([ROWS] * 10)
    body = json.dumps({"rows": frame.to_dicts()}).encode()

    async def flood() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            url = f"{ground.url}/v1/models/boosting/score"
            return await asyncio.gather(*(client.post(url, content=body) for _ in range(100)))

    answers = asyncio.run(flood())
    refused = [answer for answer in answers if answer.status_code == 429]
    scored = [answer for answer in answers if answer.status_code == 200]
    assert refused
    assert all("retry-after" in answer.headers for answer in refused)
    assert len(scored) >= LIMITS.ongoing
    assert len(refused) + len(scored) == len(answers)
    assert all(answer.json()["scores"] == scorer.score(frame).tolist() for answer in scored)


def test_a_new_champion_is_served_and_a_bad_one_refused(ground: Ground) -> None:
    def version() -> int:
        return int(httpx.get(f"{ground.url}/healthz").json()["models"]["forest"])

    registry = ground.registry
    second = register(registry, "forest", trained("forest", trees=7, depth=4), "forest")
    registry.promote("forest", second.version)
    assert eventually(lambda: version() == second.version)
    _, scorer = registry.load("forest", second.version)
    expected = scorer.score(ROWS).tolist()
    assert ground.post("forest", {"rows": ROWS.to_dicts()}).json()["scores"] == expected

    bad = register(registry, "forest", Scorer(encoder=ENCODER, predict=bad_predict), "forest")
    registry.promote("forest", bad.version)
    assert eventually(lambda: "forest" in httpx.get(f"{ground.url}/healthz").json()["refused"])
    health = httpx.get(f"{ground.url}/healthz")
    assert health.status_code == 200
    assert f"version {bad.version}" in health.json()["refused"]["forest"]
    assert "smoke test" in health.json()["refused"]["forest"]
    assert ground.post("forest", {"rows": ROWS.to_dicts()}).json()["scores"] == expected

    port = int(ground.url.rpartition(":")[2])
    with pytest.raises(app.ServingError, match=rf"refused.*version {bad.version}.*roll back"):
        app.serve(ground.uri, port=port, limits=LIMITS, refresh_s=0.2)

    registry.rollback("forest")
    assert eventually(lambda: not httpx.get(f"{ground.url}/healthz").json()["refused"])
    assert version() == second.version


def test_a_model_promoted_later_is_served_too(ground: Ground) -> None:
    assert ground.post("unpromoted", {"rows": [row()]}).status_code == 404
    ground.registry.promote("unpromoted", 1)
    assert eventually(lambda: ground.post("unpromoted", {"rows": [row()]}).status_code == 200)


def test_serve_again_finds_what_runs_or_says_that_it_differs(ground: Ground) -> None:
    port = int(ground.url.rpartition(":")[2])
    assert app.serve(ground.uri, port=port, limits=LIMITS, refresh_s=0.2) == ground.url
    for other in ({"port": ports.free(1)[0]}, {"port": port, "models": ["boosting"]}):
        with pytest.raises(app.ServingError, match="already runs"):
            app.serve(ground.uri, limits=LIMITS, refresh_s=0.2, **other)
    assert httpx.get(f"{ground.url}/healthz").status_code == 200
