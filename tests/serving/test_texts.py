"""Sentiment over HTTP: the same numbers as the model's own, reasons, and what is refused."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from cluster import ports, session
from models import sentiment
from models.registry import Registry
from models.sentiment_head import fit_head
from serving import app
from tests import tiny_encoder
from tests.serving.test_app import register, trained

TEXTS = ["the parcel is great", "my app is broken and useless", "the invoice @anna me@site.org"]


@dataclass(frozen=True)
class Server:
    url: str
    model: sentiment.Sentiment
    registry: Registry
    folder: Path

    def post(self, body: object, path: str = "") -> httpx.Response:
        return httpx.post(f"{self.url}/v1/sentiment{path}", json=body, timeout=60)


def keep(registry: Registry, folder: Path) -> int:
    card = registry.register_folder(
        "sentiment", folder, family="sentiment", variant={}, metrics={"macro_f1": 0.9},
        data_version="texts", seed=0, git_revision="",
    )  # fmt: skip
    registry.promote("sentiment", card.version)
    return card.version


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("texts")
    encoder = tiny_encoder.write(folder / "encoder")
    rows = tiny_encoder.labelled(300)
    model = fit_head(sentiment.new(str(encoder)), rows)
    model.save(folder / "model")
    registry = Registry(f"sqlite:///{folder}/mlflow.db")
    card = register(registry, "visits", trained("boosting", rounds=3), "boosting")
    registry.promote("visits", card.version)
    with session.connect(cpus=2):
        url = app.serve(registry.uri, port=ports.free(1)[0], refresh_s=0.2)
        try:
            yield Server(url, model, registry, folder)
        finally:
            app.stop()


def test_without_a_champion_it_says_so_and_then_follows_the_registry(server: Server) -> None:
    absent = server.post({"texts": TEXTS})
    assert absent.status_code == 404
    assert "liftyard sentiment train" in absent.json()["detail"]
    version = keep(server.registry, server.folder / "model")
    assert server.post({"texts": TEXTS}).json()["version"] == version
    again = keep(server.registry, server.folder / "model")
    for _ in range(100):
        if server.post({"texts": TEXTS[:1]}).json()["version"] == again:
            break
    else:
        pytest.fail("the new champion never answered")
    # Rows are scored beside it, and it is no model of rows.
    models = httpx.get(f"{server.url}/v1/models").json()["models"]
    assert [each["name"] for each in models] == ["visits"]


def test_texts_get_the_models_own_numbers(server: Server) -> None:
    keep(server.registry, server.folder / "model")
    answer = server.post({"texts": [*TEXTS, "  "]})
    assert answer.status_code == 200
    told = answer.json()["results"]
    expected = server.model.probabilities([*TEXTS[:2], "the invoice @user email"])
    labels = server.model.labels
    for one, share in zip(told[:2], expected[:2], strict=True):
        found = [one["probabilities"][label] for label in labels]
        assert found == pytest.approx(share.tolist(), abs=1e-5)
        assert one["label"] == labels[int(np.argmax(share))]
        gap = one["probabilities"]["positive"] - one["probabilities"]["negative"]
        assert one["sentiment"] == gap
    assert told[0]["label"] == "positive" and told[1]["label"] == "negative"
    assert told[3] == {
        "label": None, "probabilities": None, "sentiment": None, "outcome": "empty",
        "language": told[3]["language"],
    }  # fmt: skip


def test_reasons_add_up_and_show_no_names(server: Server) -> None:
    keep(server.registry, server.folder / "model")
    (why,) = server.post({"texts": [TEXTS[2]]}, "/explain").json()["explanations"]
    assert "anna" not in why["text"] and "site.org" not in why["text"]
    assert why["completeness_error"] <= 0.1
    assert why["html"].startswith('<p class="explanation">')
    assert [part["text"] for part in why["parts"]] == [
        why["text"][part["start"] : part["end"]] for part in why["parts"]
    ]


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"texts": []}, 422, "0 texts"),
        ({"texts": ["a", 3]}, 422, "a int"),
        ({"text": "a"}, 422, "must be"),
        ({"texts": ["a"] * 20_000}, 422, "20000 texts"),
    ],
)
def test_what_is_not_texts_is_refused(server: Server, body: object, status: int, said: str) -> None:
    answer = server.post(body)
    assert answer.status_code == status
    assert said in answer.text
    assert server.post({"texts": ["  "]}, "/explain").status_code == 422
    url = f"{server.url}/v1/sentiment"
    assert httpx.post(url, content=b"{", timeout=60).status_code == 400
