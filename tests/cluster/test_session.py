"""The Ray session on a real embedded Ray."""

import stat
from pathlib import Path

import pytest
import ray

from cluster.session import SessionError, connect


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "secrets" / "token"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    return path


def test_starts_computes_and_cleans_up(token: Path) -> None:
    with connect(cpus=2) as session:
        assert session.started
        assert session.cpus == 2
        assert session.address.startswith("127.0.0.")
        assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42
        assert stat.S_IMODE(token.stat().st_mode) == 0o600
        assert len(token.read_text()) == 64
        with connect() as inner:
            assert not inner.started
            assert inner.address == session.address
        assert ray.is_initialized()
        with (
            pytest.raises(SessionError, match="already connected"),
            connect(address="127.0.0.9:1"),
        ):
            pass
    assert not ray.is_initialized()
    assert [path.name for path in token.parent.iterdir()] == ["token"]


def test_attaching_without_a_token_says_where_it_belongs(token: Path) -> None:
    with pytest.raises(SessionError, match=str(token)), connect(address="127.0.0.1:1"):
        pass
    assert not token.exists()


@pytest.mark.parametrize(("address", "cpus"), [(None, 0), ("127.0.0.1:6379", 2)])
def test_refuses_cpus_that_do_not_fit(address: str | None, cpus: int) -> None:
    with pytest.raises(SessionError, match=f"cpus={cpus}"), connect(address=address, cpus=cpus):
        pass
