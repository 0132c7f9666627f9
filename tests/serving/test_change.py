"""Versions and settings that change under load, on a real Ray Serve with TLS: no request fails."""

import json
import re
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest

from cluster import ports, session
from models.encoding import Encoder
from models.families import FAMILIES, TrainingData
from models.registry import Registry
from models.scoring import Scorer
from serving import app
from serving.access import AccessFiles, add_key
from serving.settings import APPLICATION, Limits, Listener, Rollout, Settings, Tls

FRAME = pl.DataFrame({"spend": [1.5, None, -3.0, 8.0] * 20, "segment": ["a", None, "b", "a"] * 20})
ENCODER = Encoder.fit(FRAME, FRAME.columns)
ROWS = [{"spend": 2.0, "segment": "a"}, {"spend": None, "segment": "b"}]


def bad_predict(x: np.ndarray) -> np.ndarray:
    return np.full(len(x), 7.0)


def broken_predict(x: np.ndarray) -> np.ndarray:
    # Passes the smoke test of two rows, and fails on any other number.
    if len(x) != 2 and len(x) != 64:
        raise RuntimeError("a challenger's own mistake")
    return np.full(len(x), 0.5)


def register(registry: Registry, scorer: Scorer, name: str = "lapse") -> int:
    card = registry.register(
        name,
        scorer,
        example=FRAME[:2],
        family="boosting",
        variant={},
        features=[
            {"name": column.name, "kind": column.kind, "description": "", "unit": ""}
            for column in scorer.encoder.columns
        ],
        metrics={},
        data_version="training/test@1",
        seed=1,
        git_revision="0" * 40,
    )
    return card.version


def trained(rounds: int) -> Scorer:
    x = ENCODER.transform(FRAME)
    y = (np.arange(len(x)) % 4 == 3).astype(np.int8)
    data = TrainingData(x_train=x, y_train=y, x_valid=x, y_valid=y)
    (fitted,) = FAMILIES["boosting"]([{"family": "boosting", "rounds": rounds, "depth": 2}], data)
    return Scorer(encoder=ENCODER, predict=fitted.predict)


def scores(registry: Registry, version: int) -> list[float]:
    _, scorer = registry.load("lapse", version)
    return scorer.score(pl.DataFrame(ROWS, schema=FRAME.schema)).tolist()


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A registry with versions of a model, served.

    `direct` is the replica's address without TLS, for whoever is on the head's machine.
    """

    registry: Registry
    settings: Settings
    listener: Listener
    direct: str
    folder: Path
    trusted: ssl.SSLContext
    expected: dict[int, list[float]]

    def apply(self, settings: Settings) -> tuple[str, ...]:
        return app.apply(settings, self.listener, cpus=0.5).changed or ()

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.listener.url, verify=self.trusted, timeout=60)

    def ask(self, client: httpx.Client, **headers: str) -> httpx.Response:
        return client.post("/v1/models/lapse/score", json={"rows": ROWS}, headers=headers)

    def health(self) -> Any:
        return httpx.get(f"{self.direct}/healthz").json()


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("change")
    registry = Registry(f"sqlite:///{folder}/mlflow.db")
    for rounds in (3, 5, 8):
        register(registry, trained(rounds))
    registry.promote("lapse", 1)
    settings = Settings(
        registry=registry.uri,
        models={"lapse": Rollout(aliases=("churn",))},
        limits=Limits(),
        refresh_s=0.1,
        shadow_log=str(folder / "shadow.jsonl"),
    )
    trusted = certificates(folder)
    tls = Tls(
        certificate=f"{folder}/server.pem",
        key=f"{folder}/server.key",
        clients_ca=f"{folder}/client.pem",
    )
    listener = Listener(port=ports.free(1)[0], tls=tls)
    with session.connect(cpus=2):
        wrong = replace(listener, tls=replace(tls, key=f"{folder}/client.key"))
        with pytest.raises(app.ServingError, match=r"tls: .*can't be used"):
            app.apply(settings, wrong, cpus=0.5)
        assert app.apply(settings, listener, cpus=0.5).changed is None
        running = app.running()
        assert running is not None
        yield Ground(
            registry=registry,
            settings=settings,
            listener=listener,
            direct=running.direct,
            folder=folder,
            trusted=trusted,
            expected={version: scores(registry, version) for version in (1, 2, 3)},
        )
        app.stop()


def certificates(folder: Path) -> ssl.SSLContext:
    """Makes the server's and a client's; gives what a client with them goes by."""
    for name in ("server", "client"):
        subprocess.run(
            [
                *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt"),
                *("ec_paramgen_curve:P-256", "-nodes", "-days", "1", "-subj", f"/CN={name}"),
                *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", f"{folder}/{name}.key"),
                *("-out", f"{folder}/{name}.pem"),
            ],
            check=True,
            capture_output=True,
        )
    trusted = ssl.create_default_context(cafile=f"{folder}/server.pem")
    trusted.load_cert_chain(f"{folder}/client.pem", f"{folder}/client.key")
    return trusted


@contextmanager
def load(ground: Ground, **headers: str) -> Iterator[Counter[Any]]:
    """Asks without a pause from two clients; counts what is answered, wrong numbers too."""
    seen: Counter[Any] = Counter()
    ended = threading.Event()

    def ask() -> None:
        with ground.client() as client:
            while not ended.is_set():
                try:
                    answer = ground.ask(client, **headers)
                    body = answer.json()
                    right = (
                        answer.status_code == 200
                        and body["scores"] == ground.expected[body["version"]]
                    )
                    seen[body["version"] if right else answer.text] += 1
                except httpx.TransportError as error:
                    seen[repr(error)] += 1

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def eventually(fits: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not fits():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_no_request_fails_during_promotions_a_bad_version_and_a_rollback(ground: Ground) -> None:
    registry = ground.registry
    bad = register(registry, Scorer(encoder=ENCODER, predict=bad_predict))
    with load(ground) as seen:
        for turn in range(100):
            version = 2 + turn % 2
            registry.promote("lapse", version)
            eventually(lambda: ground.health()["models"]["lapse"] == version)  # noqa: B023
        registry.promote("lapse", bad)
        eventually(lambda: "lapse" in ground.health()["refused"])
        assert ground.health()["models"]["lapse"] == 3
        told = httpx.get(f"{ground.direct}/v1/models").json()
        assert [card["version"] for card in told["models"]] == [3]
        assert told["refused"]["lapse"]["version"] == bad
        assert "smoke test" in told["refused"]["lapse"]["reason"]
        metrics = httpx.get(f"{ground.direct}/metrics").text
        line = r'liftyard_model_refused_version\{model="lapse",replica="\w+",role="champion"\} '
        assert re.search(f"^{line}{float(bad)}$", metrics, re.M)
        registry.rollback("lapse")
        eventually(lambda: not ground.health()["refused"])
        registry.rollback("lapse")
        eventually(lambda: ground.health()["models"]["lapse"] == 2)
    assert set(seen) <= {1, 2, 3}
    assert min(seen[2], seen[3]) > 0


def test_a_change_of_settings_changes_only_that_and_fails_no_request(ground: Ground) -> None:
    ground.registry.promote("lapse", 1)
    files = AccessFiles(
        keys=str(ground.folder / "keys.json"), audit=str(ground.folder / "audit.jsonl")
    )
    key = add_key(Path(files.keys), "crm", "service")
    others = replace(ground.settings, limits=Limits(rows=2, ongoing=64))
    with load(ground, authorization=f"Bearer {key}") as seen:
        assert ground.apply(ground.settings) == ()
        assert ground.apply(others) == ("settings.limits.ongoing", "settings.limits.rows")
        body = {"rows": ROWS * 2}
        answer = httpx.post(f"{ground.direct}/v1/models/lapse/score", json=body)
        assert (answer.status_code, "at most 2" in answer.text) == (422, True)
        changed = ground.apply(replace(others, access=files))
        assert set(changed) >= {"settings.access.audit", "settings.access.keys"}
        assert all(name.startswith("settings.access") for name in changed)
        assert httpx.post(answer.url, json={"rows": ROWS}).status_code == 401
        # A version by its number, and by another name.
        pinned = replace(ground.settings, models={"lapse": Rollout(version=2, aliases=("away",))})
        ground.apply(replace(pinned, access=files))
        assert ground.health()["models"] == {"lapse": 2}
        headers = {"authorization": f"Bearer {key}"}
        url = f"{ground.direct}/v1/models/away/score"
        answer = httpx.post(url, json={"rows": ROWS}, headers=headers)
        assert answer.json() == {"model": "lapse", "version": 2, "scores": ground.expected[2]}
        with pytest.raises(app.ServingError, match="99"):
            ground.apply(replace(ground.settings, models={"lapse": Rollout(version=99)}))
        with pytest.raises(app.ServingError, match="--restart"):
            app.apply(ground.settings, replace(ground.listener, port=1), cpus=0.5)
        ground.apply(ground.settings)
    assert set(seen) <= {1, 2}
    assert min(seen[1], seen[2]) > 0


def test_a_canary_answers_its_share_and_a_key_always_gets_the_same(ground: Ground) -> None:
    ground.registry.promote("lapse", 1)
    ground.registry.challenge("lapse", 2)

    def versions(share: float) -> list[int]:
        ground.apply(replace(ground.settings, models={"lapse": Rollout(canary=share)}))
        eventually(lambda: ground.health()["challengers"] == {"lapse": 2})
        with ground.client() as client:
            answers = [
                ground.ask(client, **{"x-routing-key": f"customer {at}"}).json()
                for at in range(200)
            ]
            for answer in answers:
                assert answer["scores"] == ground.expected[answer["version"]]
            # Without a key, the same body is the same request.
            assert len({ground.ask(client).json()["version"] for _ in range(5)}) == 1
        return [answer["version"] for answer in answers]

    tenth, third = versions(0.1), versions(0.3)
    assert versions(0.3) == third
    # 200 draws of 0.1 and 0.3: five standard deviations to either side.
    assert 1 <= tenth.count(2) <= 41
    assert 28 <= third.count(2) <= 92
    assert all(more == 2 for less, more in zip(tenth, third, strict=True) if less == 2)
    assert set(versions(1.0)) == {2}
    ground.apply(ground.settings)
    assert set(versions(0.0001)) == {1}


def test_a_shadow_scores_and_is_logged_and_never_answers_or_fails_one(ground: Ground) -> None:
    ground.registry.promote("lapse", 1)
    ground.registry.challenge("lapse", 3)
    log = Path(ground.settings.shadow_log or "")
    ground.apply(replace(ground.settings, models={"lapse": Rollout(shadow=True)}))
    eventually(lambda: ground.health()["challengers"] == {"lapse": 3})
    with ground.client() as client:
        answer = ground.ask(client, **{"x-request-id": "r1"}).json()
        assert (answer["version"], answer["scores"]) == (1, ground.expected[1])
        eventually(lambda: log.exists() and log.read_text().endswith("\n"))
        line = json.loads(log.read_text().splitlines()[-1])
        assert (line["request"], line["champion"], line["challenger"]) == ("r1", 1, 3)
        assert line["scores"] == {
            "champion": ground.expected[1],
            "challenger": ground.expected[3],
        }
        # A challenger that fails on what is asked, and one that takes other rows.
        broken = register(ground.registry, Scorer(encoder=ENCODER, predict=broken_predict))
        ground.registry.challenge("lapse", broken)
        eventually(lambda: ground.health()["challengers"] == {"lapse": broken})
        body = {"rows": ROWS[:1] * 3}
        url = f"{ground.direct}/v1/models/lapse/score"
        assert client.post(url, json=body).json()["version"] == 1
        failed = r'liftyard_shadow_requests_total\{model="lapse",outcome="failed",.*\} 1\.0'
        metrics = f"{ground.direct}/metrics"
        eventually(lambda: re.search(failed, client.get(metrics).text) is not None)
        narrow = Encoder.fit(FRAME, ["spend"])
        other = register(ground.registry, Scorer(encoder=narrow, predict=broken_predict))
        ground.registry.challenge("lapse", other)
        eventually(lambda: "lapse" in ground.health()["refused_challengers"])
        assert "takes other rows" in ground.health()["refused_challengers"]["lapse"]
        assert ground.ask(client).json()["version"] == 1
    ground.apply(ground.settings)


def test_tls_ends_before_serve_and_asks_clients_for_a_certificate(ground: Ground) -> None:
    assert ground.listener.url == f"https://127.0.0.1:{ground.listener.port}"
    alone = ssl.create_default_context(cafile=f"{ground.folder}/server.pem")
    with httpx.Client(verify=alone) as client, pytest.raises(httpx.TransportError):
        client.get(f"{ground.listener.url}/healthz")
    with ground.client() as client:
        assert client.get("/healthz").json() == ground.health()


# The last one here: the replica has other CPUs from then on.
def test_the_next_replica_is_ready_before_the_last_one_goes(ground: Ground) -> None:
    ground.registry.promote("lapse", 1)
    eventually(lambda: ground.health()["models"]["lapse"] == 1)
    with ground.client() as idle, load(ground) as seen:
        assert ground.ask(idle).status_code == 200
        changed = app.apply(ground.settings, ground.listener, cpus=0.75).changed
        assert changed == ("cpus",)
        # The former replica goes on while it is drained, and then ends.
        eventually(lambda: replicas() == {"RUNNING": 1})
        before = seen[1]
        eventually(lambda: seen[1] > before + 20)
        # Its connection is older than the new replica.
        assert ground.ask(idle).json()["scores"] == ground.expected[1]
    assert set(seen) == {1}


def replicas() -> dict[str, int]:
    """How many there are by state."""
    # Not above: its import warns, which `serving.app` keeps still.
    from ray import serve as engine

    states = engine.status().applications[APPLICATION].deployments["Server"].replica_states
    return {str(state): count for state, count in states.items()}
