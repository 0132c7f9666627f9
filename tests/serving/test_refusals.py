"""What should not get in is refused with its status, and has one line in the replica's log."""

import json
import logging
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from serving import audit, routes
from serving.access import AccessFiles, add_key
from serving.settings import Limits, Settings
from tests.serving import lapse
from tests.serving.listening import listening
from tests.serving.test_app import stream

BYTES = 10_000
SCORE = "/v1/models/lapse/score"
ARROW = {"content-type": "application/vnd.apache.arrow.stream"}
FITTING = stream(lapse.FRAME[:4])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("refusals") / "audit.jsonl"


@pytest.fixture(scope="module")
def http(log: Path) -> Iterator[httpx.Client]:
    keys = log.with_name("keys.json")
    key = add_key(keys, "tester", "analyst")
    chosen = Settings(
        registry=lapse.champion(log.parent).uri,
        models=None,
        limits=Limits(rows=50, body_bytes=BYTES),
        refresh_s=3_600,
        access=AccessFiles(keys=str(keys), audit=str(log)),
    )
    headers = {"authorization": f"Bearer {key}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(routes, "BODY_S", 0.5)
        with listening(chosen) as (url, _), httpx.Client(base_url=url, headers=headers) as http:
            yield http


def refusals(caplog: pytest.LogCaptureFixture) -> list[tuple[str, int]]:
    """Who and which status, of each line of the replica's log."""
    lines = [json.loads(each.message) for each in caplog.records if each.name == "ray.serve"]
    return [(line["who"], line["status"]) for line in lines]


@pytest.mark.parametrize(
    ("path", "body", "headers", "who", "status"),
    [
        (SCORE, FITTING[:-40], ARROW, "tester", 400),
        (SCORE, FITTING[:60] + b"\xff" * 40 + FITTING[100:], ARROW, "tester", 400),
        (SCORE, b"x" * (BYTES + 1), {}, "tester", 413),
        (SCORE, b"x" * (BYTES + 1), ARROW, "tester", 413),
        (SCORE, b'{"rows": [{}]}', {"authorization": "Bearer ly_tester_forged"}, None, 401),
        (SCORE, b'{"rows": [{}]}', {"authorization": "Bearer a.b.c"}, None, 401),
        ("/v1/graphql", json.dumps({"query": "{ models " * 400}).encode(), {}, None, 400),
        (
            "/v1/graphql",
            json.dumps({"query": "{ models {" + "... { " * 20 + "name" + "}" * 22}).encode(),
            {},
            None,
            400,
        ),
    ],
)
def test_each_has_its_status_and_one_line(
    http: httpx.Client,
    caplog: pytest.LogCaptureFixture,
    path: str,
    body: bytes,
    headers: dict[str, str],
    who: str | None,
    status: int,
) -> None:
    with caplog.at_level(logging.WARNING, "ray.serve"):
        answer = http.post(path, content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert refusals(caplog) == [(who, status)]


@pytest.mark.parametrize(("deadline", "status"), [("x-deadline-ms: 200\r\n", 504), ("", 408)])
def test_a_client_that_stops_halfway_is_answered_all_the_same(
    http: httpx.Client,
    log: Path,
    caplog: pytest.LogCaptureFixture,
    deadline: str,
    status: int,
) -> None:
    port = urlsplit(str(http.base_url)).port
    head = (
        f"POST {SCORE} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n{deadline}"
        f"authorization: {http.headers['authorization']}\r\n\r\n"
    )
    with (
        caplog.at_level(logging.WARNING, "ray.serve"),
        socket.create_connection(("127.0.0.1", port or 0), timeout=30) as slow,
    ):
        slow.sendall(head.encode() + b'{"rows": ')
        answer = slow.recv(4_096)
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    assert refusals(caplog) == [("tester", status)]
    assert json.loads(log.read_text().splitlines()[-1])["status"] == status
    audit.verify(log)


def test_a_client_that_leaves_halfway_is_on_record(
    http: httpx.Client, log: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = urlsplit(str(http.base_url)).port
    head = (
        f"POST {SCORE} HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n"
        f"authorization: {http.headers['authorization']}\r\n\r\n"
    )
    # What has come would be a whole body.
    rows = json.dumps({"rows": lapse.FRAME[:1].to_dicts()}).encode()
    assert len(rows) < 100
    before = len(log.read_text().splitlines())
    with caplog.at_level(logging.WARNING, "ray.serve"):
        with socket.create_connection(("127.0.0.1", port or 0), timeout=30) as gone:
            gone.sendall(head.encode() + rows)
        deadline = time.monotonic() + 10
        while not refusals(caplog):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert refusals(caplog) == [("tester", 400)]
    (line,) = log.read_text().splitlines()[before:]
    assert json.loads(line)["status"] == 400
