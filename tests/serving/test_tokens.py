"""Tokens of a local issuer: an HTTP server that publishes its keys, as a real one does."""

import asyncio
import base64
import hmac
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, OctKey, RSAKey
from pydantic import ValidationError

from serving import tokens
from serving.access import AccessFiles
from serving.config import Serve
from serving.gate import Gate
from serving.policy import AccessError
from serving.replica import Models
from serving.routes import application
from serving.settings import Limits, Settings
from serving.tokens import Oidc, TokenError, Tokens, UnknownKey
from tests.serving import lapse

RSA, EC, OTHER = (
    RSAKey.generate_key(2048, {"kid": "rsa"}),
    ECKey.generate_key("P-256", {"kid": "ec"}),
    RSAKey.generate_key(2048, {"kid": "rsa"}),
)
ROLES = {"marketing-analysts": "analyst", "marketing": "viewer"}


@dataclass(kw_only=True)
class Issuer:
    """What it publishes now, and what it was asked for."""

    url: str = ""
    keys: list[Any] = field(default_factory=lambda: [RSA, EC])
    asked: list[str] = field(default_factory=list)
    named: str | None = None

    def token(self, key: Any = RSA, alg: str = "RS256", **claims: Any) -> str:
        said = {
            "iss": self.url,
            "aud": ["liftyard", "others"],
            "sub": "ada",
            "exp": int(time.time()) + 300,
            "roles": ["marketing-analysts"],
            **claims,
        }
        said = {name: value for name, value in said.items() if value is not None}
        return jwt.encode({"alg": alg, "kid": key.kid}, said, key, algorithms=[alg])

    def oidc(self, **changed: Any) -> Oidc:
        said: dict[str, Any] = {"issuer": self.url, "audience": "liftyard", "roles": ROLES}
        return Oidc(**said | changed)


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with _issuer() as made:
        yield made


@contextmanager
def _issuer() -> Iterator[Issuer]:
    made = Issuer()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.asked.append(self.path)
            body: dict[str, Any] = {
                "issuer": made.named or made.url,
                "jwks_uri": f"{made.url}/keys",
            }
            if self.path == "/keys":
                body = {"keys": [key.as_dict(private=False) for key in made.keys]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        made.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield made
        finally:
            server.shutdown()
            thread.join()


def unsigned(issuer: Issuer) -> str:
    """A token whose header says that it needs no signature."""
    _, claims, _ = issuer.token().split(".")
    head = base64.urlsafe_b64encode(b'{"alg":"none","kid":"rsa"}').decode().rstrip("=")
    return f"{head}.{claims}."


def signed_by_the_public_key(issuer: Issuer) -> str:
    """HS256 with what everyone knows as the secret; by hand, since joserfc won't."""
    head = base64.urlsafe_b64encode(b'{"alg":"HS256","kid":"rsa"}').rstrip(b"=")
    signed = head + b"." + issuer.token().split(".")[1].encode()
    signature = hmac.digest(RSA.as_pem(private=False), signed, "sha256")
    return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


def tampered(issuer: Issuer) -> str:
    head, claims, signature = issuer.token().split(".")
    said = json.loads(base64.urlsafe_b64decode(claims + "=="))
    said["sub"] = "eve"
    again = base64.urlsafe_b64encode(json.dumps(said).encode()).decode().rstrip("=")
    return f"{head}.{again}.{signature}"


def test_a_good_token_tells_who_and_which_role(issuer: Issuer) -> None:
    checked = Tokens(issuer.oidc())
    checked.fetch()
    until = int(time.time()) + 300
    found = checked.bearer(issuer.token(exp=until))
    assert (found.subject, found.role, found.until) == ("ada", "analyst", until + 30)
    assert checked.bearer(issuer.token(EC, "ES256", roles="marketing")).role == "viewer"
    assert checked.bearer(issuer.token(roles=["marketing", "marketing-analysts"])).role == "analyst"
    assert checked.bearer(issuer.token(roles=["else", 1])).role is None
    assert checked.bearer(issuer.token(roles=None)).role is None
    # The clocks differ by less than the leeway.
    assert checked.bearer(issuer.token(exp=int(time.time()) - 10)).subject == "ada"
    for claims in ({"realm": {"roles": ["marketing"]}}, {"realm.roles": "marketing"}):
        nested = Tokens(issuer.oidc(roles_claim="realm.roles"))
        nested.fetch()
        assert nested.bearer(issuer.token(roles=None, **claims)).role == "viewer"


def test_a_token_that_is_not_good_is_refused(issuer: Issuer) -> None:
    checked = Tokens(issuer.oidc())
    checked.fetch()
    now = int(time.time())
    bad = {
        "expired": issuer.token(exp=now - 31),
        "without an end": issuer.token(exp=None),
        "not yet": issuer.token(nbf=now + 300),
        "another audience": issuer.token(aud="others"),
        "no audience": issuer.token(aud=None),
        "another issuer": issuer.token(iss="http://127.0.0.1:1"),
        "nobody": issuer.token(sub=None),
        "another's signature": issuer.token(OTHER),
        "changed": tampered(issuer),
        "unsigned": unsigned(issuer),
        "by the public key": signed_by_the_public_key(issuer),
        "an algorithm that isn't allowed": issuer.token(RSA, "PS256"),
        "another key's algorithm": jwt.encode(
            {"alg": "ES256", "kid": "rsa"}, {"sub": "ada"}, EC, algorithms=["ES256"]
        ),
        "no token": "a.b.c",
        "a word": "secret",
        "deep": base64.urlsafe_b64encode(b"[" * 5_000).decode().rstrip("=") + ".e30.",
    }
    for what, token in bad.items():
        with pytest.raises(TokenError) as caught:
            checked.bearer(token)
        assert not isinstance(caught.value, UnknownKey), what
    with pytest.raises(UnknownKey):
        checked.bearer(issuer.token(RSAKey.generate_key(2048, {"kid": "new"})))


def test_an_issuer_that_can_not_be_used_is_told(issuer: Issuer) -> None:
    with pytest.raises(AccessError, match="https"):
        Tokens(issuer.oidc(issuer="http://issuer.example"))
    for algorithm in ("HS256", "none"):
        with pytest.raises(AccessError, match="allowed are"):
            Tokens(issuer.oidc(algorithms=(algorithm,)))
    checked = Tokens(issuer.oidc())
    issuer.named = "http://127.0.0.1:2"
    with pytest.raises(AccessError, match="names the issuer 'http://127"):
        checked.fetch()
    issuer.named, issuer.keys = None, [OctKey.generate_key(256, {"kid": "secret"})]
    with pytest.raises(AccessError, match="no public key"):
        checked.fetch()
    settings = Settings(
        registry="sqlite:///none.db",
        models=None,
        limits=Limits(),
        refresh_s=1,
        access=AccessFiles(oidc=issuer.oidc(roles={"x": "nobody"})),
    )
    with pytest.raises(AccessError, match="'nobody'"):
        Gate.opened(settings)
    with pytest.raises(ValidationError, match="nobody could ask"):
        Serve.model_validate({"access": {"audit": "audit.jsonl"}})


def test_tokens_over_http_and_a_key_that_comes_later(
    issuer: Issuer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = lapse.champion(tmp_path)
    log = tmp_path / "audit.jsonl"
    said = {
        "refresh_s": 60,
        "access": {
            "audit": "audit.jsonl",
            "oidc": {"issuer": issuer.url, "audience": "liftyard", "roles": ROLES},
        },
    }
    chosen = Serve.model_validate(said).settings(registry.uri, tmp_path)
    new = ECKey.generate_key("P-256", {"kid": "new"})

    async def main() -> None:
        gate = Gate(chosen)
        watch = asyncio.create_task(gate.keep_fresh())
        transport = httpx.ASGITransport(application(Models(chosen), gate))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def ask(token: str, path: str = "/v1/models/lapse/score") -> httpx.Response:
                headers = {"authorization": f"Bearer {token}"}
                if path == "/v1/models":
                    return await client.get(path, headers=headers)
                return await client.post(path, json={"rows": [{"spend": 8.0}]}, headers=headers)

            # The first wait for the issuer's keys, all for one answer of it.
            first = await asyncio.gather(*(ask(issuer.token()) for _ in range(3)))
            assert [answer.status_code for answer in first] == [200] * 3
            assert issuer.asked == ["/.well-known/openid-configuration", "/keys"]
            viewer = issuer.token(roles="marketing")
            assert (await ask(viewer)).status_code == 403
            assert (await ask(viewer, "/v1/models")).status_code == 200
            assert (await ask(issuer.token(roles="else"))).status_code == 403
            refused = await ask(unsigned(issuer))
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            # A moment ago it was asked, so it isn't again, whoever sends what.
            issuer.keys = [EC, new]
            for _ in range(3):
                assert (await ask(issuer.token(new, "ES256"))).status_code == 401
            assert len(issuer.asked) == 2
            monkeypatch.setattr(tokens, "RETRY_S", 0.0)
            assert (await ask(issuer.token(new, "ES256"))).status_code == 200
            # What it took back opens nothing, though it did before.
            assert (await ask(viewer, "/v1/models")).status_code == 401
        watch.cancel()

    asyncio.run(main())
    who = [json.loads(line)["who"] for line in log.read_text().splitlines()]
    assert who == ["oidc:ada"] * 6 + [None] * 4 + ["oidc:ada", None]
