"""Serving's commands as a user types them, on a real cluster."""

import re
from pathlib import Path

import httpx
from typer.testing import CliRunner, Result

from jobs.cli import app as liftyard
from jobs.serve_cli import app
from tests.serving import lapse


def said(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return re.sub(r"\s+", " ", result.stdout)


def told(result: Result) -> str:
    assert result.exit_code == 1, result.output
    return re.sub(r"\s+", " ", result.stderr)


def test_keys_and_their_file(tmp_path: Path) -> None:
    file = ("--file", str(tmp_path / "keys.json"))

    def keys(*words: str) -> Result:
        return CliRunner().invoke(app, ["keys", *words, *file])

    first = said(keys("add", "crm", "--role", "service")).strip()
    assert first.startswith("ly_crm_")
    assert "crm: service, until 20" in said(keys("list"))
    assert said(keys("rotate", "crm", "--grace", "1")).strip() != first
    text = said(keys("list"))
    assert "its former until" in text and first.rpartition("_")[2] not in text
    assert "is there; rotate it" in told(keys("add", "crm", "--role", "service"))
    said(keys("revoke", "crm"))
    assert said(keys("list")) == ""
    assert "no key 'crm'" in told(keys("revoke", "crm"))


def test_a_faulty_file_is_told_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    for text, reason in (
        ("port: 80\nlimit: {rows: 1}\n", "serve.yaml:2: limit: unknown key 'limit'"),
        ("limits:\n  rows: 0\n", "serve.yaml:2: limits.rows: got 0"),
        ("models:\n  lapse:\n    canary: 2\n", "serve.yaml:3: models.lapse.canary"),
        ("port: 80\nmodels:\n  lapse: {shadow: true}\n", "serve.yaml:2: models: lapse: shadow"),
        ("models:\n  a: {aliases: [b]}\n  b:\n", "the alias 'b' is another's"),
        ("port: 80\nreplicas: 0\n", "serve.yaml:2: replicas: got 0"),
        ("gpus: 1.5\n", "serve.yaml:1: gpus: got 1.5; a replica takes a share of a GPU"),
        ("models:\n  lapse:\n    replicas: none\n", "serve.yaml:3: models.lapse.replicas"),
        ("models:\n  lapse: {gpus: 1}\n", "serve.yaml:2: models.lapse: gpus are those of replicas"),
        ("models:\n  a b: {replicas: 1}\n", "need a name of letters, digits"),
    ):
        file.write_text(text)
        assert reason in told(CliRunner().invoke(app, ["serve", str(file)]))
    file.write_text("refresh_s: 1\n")
    words = ["serve", str(file), "--env", "embedded", "--home", str(tmp_path)]
    assert "run `liftyard up`" in told(CliRunner().invoke(app, words))


def test_serve_applies_a_file_and_what_changed_of_it(tmp_path: Path) -> None:
    home = ("--home", str(tmp_path))
    lapse.champion(tmp_path)
    file = tmp_path / "serve.yaml"
    text = "cpus: 0.5\naccess: {keys: keys.json, audit: audit.jsonl}\nmodels: {lapse: }\n"
    file.write_text(text)
    keys = ("--file", str(tmp_path / "keys.json"))
    key = said(CliRunner().invoke(app, ["keys", "add", "crm", "--role", "service", *keys])).strip()
    try:
        said(CliRunner().invoke(liftyard, ["up", "--cpus", "2", *home]))

        def serve() -> str:
            return said(CliRunner().invoke(app, ["serve", str(file), *home]))

        url = serve().removeprefix("serves at ").strip()
        assert "nothing to change" in serve()
        words = ["serve", str(file), *home]
        for other, reason in (
            (
                "{lapse: }\ngpus: 0.5",
                "serve.yaml:4: gpus: 0.5 is asked for, and the cluster has no",
            ),
            ("{lapse: {version: 9}}", "serve.yaml:3: models.lapse.version: "),
        ):
            file.write_text(text.replace("{lapse: }", other))
            assert reason in told(CliRunner().invoke(app, words))
        file.write_text(text + "limits: {rows: 1}\n")
        assert f"{url}: changed settings.limits.rows" in serve()
        headers = {"authorization": f"Bearer {key}"}
        for rows, status in ((1, 200), (2, 422)):
            body = {"rows": [{"spend": 1.0}] * rows}
            answer = httpx.post(f"{url}/v1/models/lapse/score", json=body, headers=headers)
            assert answer.status_code == status
        log = str(tmp_path / "audit.jsonl")
        text = said(CliRunner().invoke(app, ["audit", "verify", log]))
        assert text.startswith("2 lines hold; digest ")
        Path(log).write_text(Path(log).read_text().replace("crm", "him", 1))
        assert "line 1" in told(CliRunner().invoke(app, ["audit", "verify", log]))
    finally:
        CliRunner().invoke(liftyard, ["down", *home])
