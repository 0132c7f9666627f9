"""The client, against the real application on a socket, and against a server that plays tricks."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer

import httpx
import numpy as np
import polars as pl
import pytest

from cluster import ports
from models import sentiment
from models.sentiment_head import fit_head
from serving.access import AccessFiles, add_key
from serving.client import Client, Refused, TimedOut, Unreachable
from serving.settings import Limits, Settings
from tests import tiny_encoder
from tests.jobs import published
from tests.jobs.published import Place
from tests.serving.listening import listening
from tests.serving.test_app import ROWS, register, trained
from tests.serving.test_texts import keep


@dataclass(frozen=True, kw_only=True)
class Ground:
    """A service, what is behind it, and a client of it."""

    url: str
    place: Place
    key: str
    client: Client


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("client")
    place = published.make(folder)
    register(place.registry, "visits", trained("boosting", rounds=20), "boosting")
    place.registry.promote("visits", 1)
    encoder = tiny_encoder.write(folder / "encoder")
    fit_head(sentiment.new(str(encoder)), tiny_encoder.labelled(300)).save(folder / "model")
    keep(place.registry, folder / "model")
    key = add_key(folder / "keys.json", "crm", "analyst")
    settings = Settings(
        registry=place.registry.uri,
        models=None,
        limits=Limits(rows=300),
        refresh_s=60,
        access=AccessFiles(keys=str(folder / "keys.json"), audit=str(folder / "audit.jsonl")),
        store=str(place.store),
    )
    with listening(settings) as (url, _), Client(url, key=key) as client:
        yield Ground(url=url, place=place, key=key, client=client)


def test_rows_and_tables_get_the_numbers_of_the_model(ground: Ground) -> None:
    _, scorer = ground.place.registry.load("visits")
    expected = scorer.score(ROWS)
    rows = ROWS.with_columns(recency_days=pl.col("recency_days").fill_null(float("nan")))
    # A dictionary of strings, which the service refuses, is sent as strings.
    table = rows.with_columns(segment=pl.col("segment").cast(pl.Categorical))
    for found in (
        ground.client.score("visits", rows.to_dicts()),
        ground.client.score_table("visits", table),
        ground.client.score_table("visits", rows.to_arrow()),
    ):
        assert (found.model, found.version) == ("visits", 1)
        np.testing.assert_array_equal(found.scores, expected)


def test_every_answer_has_its_type(ground: Ground) -> None:
    client = ground.client
    assert {name: each.version for name, each in client.models().items()} == {
        "lapse": 1,
        "visits": 1,
    }
    assert [each["name"] for each in client.models()["visits"].features] == ROWS.columns
    told = client.explain("visits", ROWS[:2].to_dicts())
    assert (told.version, told.scale) == (1, "log-odds")
    for each in told.explanations:
        log_odds = each.base + sum(each.contributions.values())
        assert each.score == pytest.approx(1 / (1 + np.exp(-log_odds)), abs=1e-6)
        assert each.reasons[0]["feature"] in each.contributions
    seven = client.customer(7)
    assert set(ground.place.names) <= set(seven.features)
    known = client.score_customer("lapse", 7)
    assert seven.scores["lapse"].score == known.score and known.cutoff == seven.cutoff
    event = {"at": "2024-05-02T10:00:00", "amount": 12.5}
    then = client.score_customer("lapse", 7, events={"buys": [event]}, at="2024-05-03T00:00:00")
    assert then.cutoff != known.cutoff and 0 <= then.score <= 1
    labels = client.sentiment(["the parcel is great", ""])
    assert labels.results[0].label == "positive" and labels.results[0].probabilities is not None
    assert (labels.results[1].label, labels.results[1].outcome) == (None, "empty")


def test_refusals_say_why(ground: Ground) -> None:
    with pytest.raises(Refused, match=r"row 1 spend is the string 'much'") as refused:
        rows = [{**row, "spend": "much"} if at else row for at, row in enumerate(ROWS.to_dicts())]
        ground.client.score("visits", rows[:2])
    assert refused.value.status == 422 and refused.value.request_id
    with pytest.raises(Refused, match=r"no model 'a\?b' is served") as refused:
        ground.client.score("a?b", [{}])
    assert refused.value.status == 404
    with pytest.raises(Refused, match="over 300 rows"):
        ground.client.score_table("visits", pl.concat([ROWS] * 2))
    with Client(ground.url) as nobody, pytest.raises(Refused, match="LIFTYARD_API_KEY"):
        nobody.models()


# --- a server that does as it is told


@dataclass
class Tricks:
    """What it answers in turn, status and headers, the last one for ever; what it was asked."""

    answers: list[tuple[int, dict[str, str]]]
    asked: list[dict[str, str]] = field(default_factory=list)
    hold: threading.Event | None = None


@contextmanager
def playing(tricks: Tricks, port: int = 0) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers = tricks.answers[min(len(tricks.asked), len(tricks.answers) - 1)]
            tricks.asked.append({name.lower(): value for name, value in self.headers.items()})
            if tricks.hold is not None:
                tricks.hold.wait(30)
            body = b'{"models": []}' if status == 200 else b'{"detail": "not now"}'
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_what_a_full_service_refuses_is_asked_again() -> None:
    tricks = Tricks([(429, {"retry-after": "1"}), (503, {}), (200, {})])
    began = time.monotonic()
    with playing(tricks) as url, Client(url, key="secret") as client:
        assert client.models() == {}
    assert time.monotonic() - began >= 1
    assert len(tricks.asked) == 3
    left = [int(each["x-deadline-ms"]) for each in tricks.asked]
    # Each try has less of the time left.
    assert 60_000 >= left[0] > left[1] + 900 and left[1] > left[2]
    assert {each["authorization"] for each in tricks.asked} == {"Bearer secret"}


@pytest.mark.parametrize(("status", "tries"), [(503, 3), (422, 1), (500, 1), (401, 1)])
def test_refusals_are_tried_only_so_often(status: int, tries: int) -> None:
    tricks = Tricks([(status, {})])
    with (
        playing(tricks) as url,
        Client(url, retries=2) as client,
        pytest.raises(Refused, match="not now") as refused,
    ):
        client.models()
    assert (refused.value.status, len(tricks.asked)) == (status, tries)


def test_no_wait_goes_past_the_deadline() -> None:
    tricks = Tricks([(429, {"retry-after": "3600"})])
    with playing(tricks) as url, Client(url) as client, pytest.raises(Refused, match="429"):
        client.models()
    assert len(tricks.asked) == 1


def test_a_slow_service_is_given_up_in_time() -> None:
    tricks = Tricks([(200, {})], hold=threading.Event())
    assert tricks.hold is not None
    with playing(tricks) as url, Client(url, deadline_s=0.3) as client:
        try:
            with pytest.raises(TimedOut, match=r"no answer in 0\.3 s"):
                client.models()
        finally:
            tricks.hold.set()


def test_a_service_that_comes_up_is_reached() -> None:
    (port,) = ports.free(1)
    url = f"http://127.0.0.1:{port}"
    found: list[object] = []

    def ask() -> None:
        with Client(url, retries=50) as client:
            found.append(client.models())

    asking = threading.Thread(target=ask)
    with pytest.raises(httpx.ConnectError):
        httpx.get(url)
    asking.start()
    with playing(Tricks([(200, {})]), port):
        asking.join(30)
    assert found == [{}]


def test_nothing_there_is_told() -> None:
    (port,) = ports.free(1)
    with (
        Client(f"http://127.0.0.1:{port}", retries=1) as client,
        pytest.raises(Unreachable, match="can't be reached"),
    ):
        client.models()


@pytest.mark.parametrize("given", [{"url": "127.0.0.1"}, {"deadline_s": 0}, {"retries": -1}])
def test_what_cannot_work_is_refused_at_once(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(given.values())))):
        Client(**{"url": "http://127.0.0.1", **given})  # type: ignore[arg-type]
