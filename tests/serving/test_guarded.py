"""Keys and audit log on a real Ray Serve."""

import json
import socket
from pathlib import Path

import httpx
import pytest

from cluster import session
from serving import app, audit
from serving.access import AccessError, AccessFiles, add_key
from tests.serving import lapse


def test_only_keys_get_in_and_the_log_tells_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = lapse.champion(tmp_path)
    # Paths are those of the process that starts serving.
    monkeypatch.chdir(tmp_path)
    files = AccessFiles(keys="keys.json", audit="audit.jsonl")
    key = add_key(Path("keys.json"), "crm", "service")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with session.connect(cpus=2):
        Path("broken.json").write_text("[]")
        with pytest.raises(AccessError, match=r"broken\.json isn't a keys file"):
            app.serve(registry.uri, port=port, access=AccessFiles(keys="broken.json"))
        url = app.serve(registry.uri, port=port, access=files)
        body = {"rows": [{"spend": 8.0}]}
        statuses = [
            httpx.post(f"{url}/v1/models/lapse/score", json=body, headers=headers).status_code
            for headers in ({}, {"authorization": f"Bearer {key}"}, {"authorization": "Bearer ly"})
        ]
        app.stop()
    assert statuses == [401, 200, 401]
    assert audit.verify(tmp_path / "audit.jsonl").lines == 3
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    assert [line["who"] for line in lines] == [None, "crm", None]
