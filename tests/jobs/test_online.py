"""Customers' features, published, read and folded with new events, over the whole application."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import pytest

from jobs import online
from models.features import compute
from serving import audit
from serving.access import AccessFiles, add_key
from serving.gate import Gate
from serving.online import StoreError, Stores
from serving.replica import Models
from serving.routes import application
from serving.settings import Limits, Settings
from tests.jobs import published
from tests.jobs.published import Place

LATER = datetime(2024, 5, 4, 12)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return published.make(tmp_path_factory.mktemp("online"))


def run(
    place: Place,
    use: Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]],
    access: AccessFiles | None = None,
) -> None:
    chosen = Settings(
        registry=place.registry.uri,
        models=None,
        limits=Limits(),
        refresh_s=60,
        access=access,
        store=str(place.store),
    )

    async def main() -> None:
        transport = httpx.ASGITransport(application(Models(chosen), Gate(chosen)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await use(client)

    asyncio.run(main())


def test_a_customer_has_the_latest_features_and_scores(place: Place) -> None:
    table = compute(place.events(), place.pipeline.features["buys"])
    latest = table.filter(pl.col("cutoff") == pl.col("cutoff").max().over("customer"))
    _, scorer = place.registry.load("lapse")
    rows = latest.head(20)
    scores = scorer.score(rows).tolist()

    async def use(client: httpx.AsyncClient) -> None:
        for row, score in zip(rows.to_dicts(), scores, strict=True):
            answer = await client.get(f"/v1/customers/{row['customer']}")
            assert answer.status_code == 200
            body = answer.json()
            assert body["cutoff"] == row["cutoff"].isoformat()
            region = ["north", "south"][row["customer"] % 2]
            assert body["features"] == {**{n: row[n] for n in place.names}, "region": region}
            assert body["scores"] == {"lapse": {"version": 1, "score": score}}
            # The same number for the same row, in the other ways.
            sent = {"rows": [{name: row[name] for name in place.names}]}
            alone = await client.post("/v1/models/lapse/score", json=sent)
            asked = await client.post(f"/v1/models/lapse/customers/{row['customer']}")
            assert (alone.json()["scores"], asked.json()["score"]) == ([score], score)
        for said in ("100000", "x", "1.5"):
            assert (await client.get(f"/v1/customers/{said}")).status_code == 404

    run(place, use)


def test_new_events_give_what_training_would_have_made_of_them(place: Place) -> None:
    new = {at: [(LATER - timedelta(hours=at + 1), 9.5 + at), (LATER, 1e6)] for at in range(5)}
    rows = [(at, moment, amount) for at, events in new.items() for moment, amount in events]
    added = pl.DataFrame(rows, schema=place.events().schema, orient="row")
    expected = compute(pl.concat([place.events(), added]), place.pipeline.features["buys"], [LATER])
    expected = expected.filter(pl.col("customer") < 5)
    assert expected.height == 5
    _, scorer = place.registry.load("lapse")
    scores = scorer.score(expected).tolist()

    async def use(client: httpx.AsyncClient) -> None:
        for row, score in zip(expected.to_dicts(), scores, strict=True):
            events = [{"at": at.isoformat(), "amount": n} for at, n in new[row["customer"]]]
            answer = await client.post(
                f"/v1/models/lapse/customers/{row['customer']}",
                json={"at": LATER.isoformat(), "events": {"buys": events}},
            )
            body = answer.json()
            assert (answer.status_code, body["score"]) == (200, score)
            assert body["features"] == {name: row[name] for name in place.names}

    run(place, use)


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 422, "send an object"),
        (b'{"events": {"buys": [{}]}}', 422, "give the moment"),
        (b'{"at": 5}', 422, "not a moment"),
        (b'{"at": "2024-05-01", "events": {"sells": []}}', 422, "there are ['buys']"),
        (b'{"at": "2024-05-01", "events": {"buys": [{"at": "x"}]}}', 422, "['amount'] are missing"),
        (
            b'{"at": "2024-05-01", "events": {"buys": [{"at": "2024-04-01", "amount": "1"}]}}',
            422,
            "give a number",
        ),
        (
            b'{"at": "2024-05-01", "events": {"buys": [{"at": null, "amount": 1}]}}',
            422,
            "allowed: a datetime",
        ),
    ],
)
def test_what_does_not_fit_is_told(place: Place, body: bytes, status: int, reason: str) -> None:
    async def use(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/models/lapse/customers/1", content=body)
        assert answer.status_code == status
        assert reason in str(answer.json()["detail"])

    run(place, use)


def test_roles_and_the_audit_log_know_of_customers(place: Place, tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(
        "roles:\n"
        "  page: {actions: [customers]}\n"
        "  desk: {actions: [customers, score]}\n"
        "  watch: {actions: [metrics]}\n"
    )
    files = AccessFiles(
        keys=str(tmp_path / "keys.json"),
        policy=str(tmp_path / "policy.yaml"),
        audit=str(tmp_path / "audit.jsonl"),
    )
    keys = {role: add_key(Path(files.keys), role, role) for role in ("page", "desk", "watch")}

    async def use(client: httpx.AsyncClient) -> None:
        answers = {
            role: await client.get("/v1/customers/1", headers={"authorization": f"Bearer {key}"})
            for role, key in keys.items()
        }
        assert {role: each.status_code for role, each in answers.items()} == {
            "page": 200,
            "desk": 200,
            "watch": 403,
        }
        assert answers["page"].json()["scores"] == {}
        assert set(answers["desk"].json()["scores"]) == {"lapse"}

    run(place, use, files)
    log = Path(files.audit or "")
    assert audit.verify(log).lines == 3
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line.get("customer") for line in lines] == [1, 1, None]
    assert lines[1]["versions"] == {"lapse": 1}


def test_a_new_version_replaces_the_one_that_is_read(place: Place, tmp_path: Path) -> None:
    store = tmp_path / "store"
    with pytest.raises(StoreError, match="liftyard publish"):
        Stores(store)
    first = online.publish("lapse", place.pipeline, place.tables, store)
    stores = Stores(store)
    held = stores.now
    changed = place.pipeline.model_copy(update={"seed": 4})
    second = online.publish("lapse", changed, place.tables, store)
    stores.reload()
    assert (held.version, stores.now.version) == (first.version, second.version)
    for seed in (5, 6):
        other = place.pipeline.model_copy(update={"seed": seed})
        online.publish("lapse", other, place.tables, store)
    assert not (store / first.version).exists()
    assert len(list(store.iterdir())) == 3
    # Whoever has it open goes on reading it.
    assert held.customer(1) == stores.now.customer(1)
    # A pointer to what isn't there leaves the one before.
    (store / "current").write_text("gone")
    with pytest.raises(StoreError, match="gone"):
        stores.reload()
    assert stores.now.version == second.version
    with pytest.raises(online.OnlineError, match=r"\['lapse'\]"):
        online.publish("answers", place.pipeline, place.tables, store)
