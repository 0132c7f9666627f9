"""Several replicas, and a model with its own, on a real Ray Serve: as one to whoever asks."""

import json
import os
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pyarrow as pa
import pytest
import ray

from cluster import ports, session
from serving import app, audit, rates
from serving.access import AccessFiles, add_key
from serving.protocol.liftyard_pb2 import (
    CustomerRequest,
    ModelsRequest,
    ScoreCustomerRequest,
    ScoreRequest,
)
from serving.protocol.liftyard_pb2_grpc import LiftyardStub
from serving.settings import Limits, Listener, Rollout, Settings
from tests.jobs import published
from tests.jobs.published import Place
from tests.serving.test_app import ROWS, register, stream, trained
from tests.serving.test_ways import ARROW, as_rows

ROLES = """
roles:
  caller: {actions: [score, explain, customers, models, metrics]}
  slow: {actions: [score], requests_per_s: 0.01, burst: 7}
"""
SHARED = {"lapse": Rollout(), "visits": Rollout(aliases=("calls",))}
ALONE = {**SHARED, "visits": replace(SHARED["visits"], replicas=1)}
SCORE = "/v1/models/visits/score"


@dataclass(frozen=True, kw_only=True)
class Ground:
    """What is served, and by which settings."""

    place: Place
    settings: Settings
    listener: Listener
    keys: Mapping[str, str]
    expected: list[float]
    channel: grpc.Channel

    def apply(
        self, *, replicas: int, models: Mapping[str, Rollout] = SHARED, **limits: int
    ) -> tuple[str, ...]:
        settings = replace(self.settings, models=models, limits=Limits(**limits))
        done = app.apply(settings, self.listener, replicas=replicas, cpus=0.25)
        return done.changed or ()

    def client(self, who: str = "caller") -> httpx.Client:
        headers = {"authorization": f"Bearer {self.keys[who]}"}
        return httpx.Client(base_url=self.listener.url, headers=headers, timeout=30)

    def call(self, name: str, request: Any) -> Any:
        metadata = [("authorization", f"Bearer {self.keys['caller']}")]
        return getattr(LiftyardStub(self.channel), name)(request, metadata=metadata, timeout=30)

    def replicas(self) -> dict[str, str | None]:
        """By id, which model each holds alone."""
        with self.client() as client:
            told = client.get("/v1/models").json()["replicas"]
        return {each["replica"]: each["alone"] for each in told}

    def counted(self, family: str, **labels: str) -> Counter[str]:
        """A family's figures by replica."""
        with self.client() as client:
            text = client.get("/metrics").text
        found: Counter[str] = Counter()
        for told, count in re.findall(rf"^liftyard_{family}{{(.*)}} (.*)$", text, re.M):
            said = dict(re.findall(r'(\w+)="([^"]*)"', told))
            if labels.items() <= said.items():
                found[said["replica"]] += int(float(count))
        return found

    def by_every_way(self) -> dict[str, list[float]]:
        """The scores of `ROWS` by the model `visits`."""
        rows = ROWS.to_dicts()
        query = "query ($rows: [JSON!]!) { score(model: %s, rows: $rows) { scores } }"
        with self.client() as client:
            by_arrow = client.post(SCORE, content=stream(ROWS), headers=ARROW)
            body = {"query": query % '"visits"', "variables": {"rows": rows}}
            by_alias = client.post("/v1/models/calls/score", json={"rows": rows})
            return {
                "json": client.post(SCORE, json={"rows": rows}).json()["scores"],
                "alias": by_alias.json()["scores"],
                "arrow": pa.ipc.open_stream(by_arrow.content).read_all()["score"].to_pylist(),
                "grpc": list(
                    self.call("Score", ScoreRequest(model="visits", rows=as_rows(ROWS))).scores
                ),
                "grpc with arrow": list(
                    self.call("Score", ScoreRequest(model="visits", arrow=stream(ROWS))).scores
                ),
                "graphql": client.post("/v1/graphql", json=body).json()["data"]["score"]["scores"],
            }


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("replicas")
    place = published.make(folder)
    scorer = trained("boosting", rounds=20)
    register(place.registry, "visits", scorer, "boosting")
    place.registry.promote("visits", 1)
    (folder / "policy.yaml").write_text(ROLES)
    files = AccessFiles(
        keys=f"{folder}/keys.json", policy=f"{folder}/policy.yaml", audit=f"{folder}/audit.jsonl"
    )
    keys = {role: add_key(folder / "keys.json", role, role) for role in ("caller", "slow")}
    http, rpc = ports.free(2)
    settings = Settings(
        registry=place.registry.uri,
        models=SHARED,
        limits=Limits(),
        refresh_s=0.2,
        access=files,
        store=str(place.store),
    )
    with (
        session.connect(cpus=2),
        grpc.insecure_channel(f"127.0.0.1:{rpc}") as channel,
    ):
        ground = Ground(
            place=place,
            settings=settings,
            listener=Listener(port=http, grpc_port=rpc),
            keys=keys,
            expected=scorer.score(ROWS).tolist(),
            channel=channel,
        )
        assert ground.apply(replicas=2) == ()
        # HAProxy may hear of a replica after it is up, and asks it only then.
        eventually(
            lambda: (
                ground.counted("requests_total", action="models").keys() == ground.replicas().keys()
            )
        )
        yield ground
        app.stop()


@contextmanager
def load(ground: Ground) -> Iterator[Counter[Any]]:
    """Asks by three ways without a pause; counts what is answered by way."""
    seen: Counter[Any] = Counter()
    ended = threading.Event()
    rows = ROWS[:3].to_dicts()
    request = ScoreRequest(model="visits", rows=as_rows(ROWS[:3]))
    expected = ground.expected[:3]

    def by_json(client: httpx.Client, path: str) -> list[float]:
        answer = client.post(path, json={"rows": rows})
        if answer.status_code != 200:
            raise ValueError(f"{answer.status_code}: {answer.text}")
        scores: list[float] = answer.json()["scores"]
        return scores

    def ask(way: str, once: Callable[[], list[float]]) -> None:
        while not ended.is_set():
            try:
                seen[way if once() == expected else f"{way}: wrong"] += 1
            except (httpx.TransportError, grpc.RpcError, ValueError) as error:
                seen[f"{way}: {error!r}"] += 1

    with ground.client() as one, ground.client() as other:
        ways: dict[str, Callable[[], list[float]]] = {
            "path": lambda: by_json(one, SCORE),
            "alias": lambda: by_json(other, "/v1/models/calls/score"),
            "grpc": lambda: list(ground.call("Score", request).scores),
        }
        threads = [threading.Thread(target=ask, args=each) for each in ways.items()]
        for thread in threads:
            thread.start()
        try:
            eventually(lambda: seen.keys() >= ways.keys())
            yield seen
            before = Counter(seen)
            eventually(lambda: all(seen[way] > before[way] + 5 for way in ways))
        finally:
            ended.set()
            for thread in threads:
                thread.join()


def eventually(fits: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not fits():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_replicas_give_the_same_numbers_and_each_is_counted(ground: Ground) -> None:
    assert list(ground.replicas().values()) == [None, None]
    for _ in range(4):
        for way, scores in ground.by_every_way().items():
            assert scores == ground.expected, way
    counted = ground.counted("requests_total", model="visits", status="200")
    assert counted.keys() == ground.replicas().keys()
    assert min(counted.values()) > 0
    assert counted.total() == 4 * 6
    assert ground.counted("model_version", model="visits") == dict.fromkeys(ground.replicas(), 1)


def test_a_rate_is_that_of_all_replicas_together(ground: Ground) -> None:
    body = {"rows": ROWS[:1].to_dicts()}

    def ask(_: int) -> int:
        # A connection each, so that both replicas are asked.
        with ground.client("slow") as client:
            return client.post(SCORE, json=body).status_code

    before = ground.counted("requests_total", action="score", status="429")
    with ThreadPoolExecutor(8) as several:
        statuses = Counter(several.map(ask, range(40)))
    assert statuses == {200: 7, 429: 33}
    after = ground.counted("requests_total", action="score", status="429")
    assert min((after - before)[replica] for replica in ground.replicas()) > 0


def test_rates_go_on_when_the_actor_that_counts_them_is_lost(ground: Ground) -> None:
    body = {"rows": ROWS[:1].to_dicts()}
    seen: Counter[int] = Counter()

    def let_in() -> bool:
        with ground.client("slow") as client:
            seen[client.post(SCORE, json=body).status_code] += 1
        return seen[200] > 0

    assert not let_in()
    ray.kill(ray.get_actor(rates.NAME, namespace=rates.NAMESPACE), no_restart=False)
    # Its buckets are full again.
    eventually(let_in)
    assert seen.keys() <= {200, 429, 503}


def test_a_change_in_the_registry_and_the_keys_reaches_every_replica(ground: Ground) -> None:
    registry = ground.place.registry
    version = register(registry, "visits", trained("boosting", rounds=5), "boosting").version
    registry.promote("visits", version)
    try:
        eventually(
            lambda: (
                ground.counted("model_version", model="visits")
                == dict.fromkeys(ground.replicas(), version)
            )
        )
    finally:
        registry.promote("visits", 1)
    eventually(
        lambda: (
            ground.counted("model_version", model="visits") == dict.fromkeys(ground.replicas(), 1)
        )
    )


def test_the_audit_log_of_all_replicas_is_one_chain(ground: Ground) -> None:
    path = Path(ground.settings.access.audit if ground.settings.access else "")
    before = audit.verify(path)

    def ask(client: httpx.Client, at: int) -> int:
        headers = {"x-request-id": f"chain-{at}"}
        return client.post(SCORE, json={"rows": [{}]}, headers=headers).status_code

    with ground.client() as client, ThreadPoolExecutor(8) as several:
        assert set(several.map(lambda at: ask(client, at), range(200))) == {422}
    after = audit.verify(path, digest=before.digest)
    lines = [json.loads(line) for line in path.read_text().splitlines()[before.lines :]]
    assert after.lines == before.lines + len(lines)
    asked = Counter(line["request"] for line in lines)
    assert {asked[f"chain-{at}"] for at in range(200)} == {1}


def test_more_and_fewer_replicas_without_a_failed_request(ground: Ground) -> None:
    with load(ground) as seen:
        assert ground.apply(replicas=3) == ("replicas",)
        assert list(ground.replicas().values()) == [None] * 3
        assert ground.apply(replicas=1) == ("replicas",)
        assert list(ground.replicas().values()) == [None]
        assert ground.apply(replicas=2) == ("replicas",)
    assert seen.keys() == {"path", "alias", "grpc"}


def test_a_model_moves_to_replicas_of_its_own_and_back(ground: Ground) -> None:
    with load(ground) as seen:
        assert ground.apply(replicas=1, models=ALONE) == (
            "replicas",
            "settings.models.visits.replicas",
        )
        replicas = ground.replicas()
        assert sorted(replicas.values(), key=str) == [None, "visits"]
        (own,) = (replica for replica, alone in replicas.items() if alone)
        assert ground.counted("model_version").keys() == replicas.keys()
        assert ground.counted("model_version", model="visits") == {own: 1}
        assert ground.counted("model_version", model="lapse").keys() == replicas.keys() - {own}
    assert seen.keys() == {"path", "alias", "grpc"}

    # By the model's path they are asked themselves, by any other way through the others.
    before = ground.counted("requests_total", model="visits")
    rows = ground.counted("model_rows_total", model="visits")
    found = ground.by_every_way()
    for way, scores in found.items():
        assert scores == ground.expected, way
    after = ground.counted("requests_total", model="visits")
    assert after[own] - before[own] == 2
    assert after.total() - before.total() == len(found)
    rows = ground.counted("model_rows_total", model="visits") - rows
    assert rows == {own: len(found) * len(ROWS)}

    with ground.client() as client:
        cards = client.get("/v1/models").json()
        told = {card["name"]: (card["version"], card["device"]["kind"]) for card in cards["models"]}
        assert told == {"lapse": (1, "cpu"), "visits": (1, "cpu")}
        assert client.get("/healthz").json()["models"] == {"lapse": 1, "visits": 1}
        reasons = client.post("/v1/models/calls/explain", json={"rows": ROWS[:2].to_dicts()}).json()
        assert [each["score"] for each in reasons["explanations"]] == ground.expected[:2]
        # What is refused there is refused here, with its reasons.
        refused = client.post("/v1/models/calls/score", json={"rows": [{"spend": "much"}]})
        by_path = client.post(SCORE, json={"rows": [{"spend": "much"}]})
        assert (refused.status_code, refused.json()) == (422, by_path.json())
        assert client.post("/v1/models/nothing/score", json={"rows": [{}]}).status_code == 404
    named = {each.name for each in ground.call("Models", ModelsRequest()).models}
    assert named == {"lapse", "visits"}

    with load(ground) as seen:
        changed = ground.apply(replicas=2)
        assert changed == ("replicas", "settings.models.visits.replicas")
        assert list(ground.replicas().values()) == [None, None]
    assert seen.keys() == {"path", "alias", "grpc"}


def test_customers_are_scored_by_the_models_own_replicas(ground: Ground) -> None:
    def asked() -> tuple[Any, Any, Any, float]:
        with ground.client() as client:
            page = client.get("/v1/customers/7").json()
            score = client.post("/v1/models/lapse/customers/7").json()
        reply = ground.call("Customer", CustomerRequest(id="7"))
        scored = ground.call("ScoreCustomer", ScoreCustomerRequest(model="lapse", customer="7"))
        return page, score, reply.scores["lapse"].score, scored.score

    shared = asked()
    assert shared[0]["scores"].keys() == {"lapse"}
    ground.apply(replicas=1, models={**SHARED, "lapse": Rollout(replicas=1)})
    assert asked() == shared
    ((own, rows),) = ground.counted("model_rows_total", model="lapse").items()
    assert (ground.replicas()[own], rows) == ("lapse", 4)


def test_a_killed_replica_fails_none_but_those_it_was_at(ground: Ground) -> None:
    ground.apply(replicas=2)
    with load(ground) as seen:
        former = ground.replicas()
        os.kill(processes()[0].pid, signal.SIGKILL)
        eventually(lambda: len(ground.replicas().keys() - former.keys()) == 1)
    # Each of the three clients had one request on its way.
    failed = {way: count for way, count in seen.items() if way not in ("path", "alias", "grpc")}
    assert sum(failed.values()) <= 3, failed
    path = Path(ground.settings.access.audit if ground.settings.access else "")
    assert audit.verify(path).lines > 0


def processes() -> list[psutil.Process]:
    """Those of the replicas."""
    found = []
    for child in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica:liftyard" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def test_gpus_that_the_cluster_has_not_are_refused_before_anything_changes(ground: Ground) -> None:
    before = ground.replicas()
    with pytest.raises(app.ServingError, match=r"gpus: 0\.5 is asked for, and .* has no GPU") as at:
        app.apply(ground.settings, ground.listener, replicas=2, cpus=0.25, gpus=0.5)
    assert at.value.key == ("gpus",)
    settings = replace(ground.settings, models={"visits": Rollout(replicas=1, gpus=1.0)})
    with pytest.raises(app.ServingError, match=r"models\.visits\.gpus: 1 is asked for") as at:
        app.apply(settings, ground.listener, replicas=2, cpus=0.25)
    assert at.value.key == ("models", "visits", "gpus")
    assert ground.replicas() == before
