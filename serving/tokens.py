"""Bearer tokens of an OpenID Connect issuer: checked by its public keys. Knows nothing of HTTP
requests to us.

A token has to be signed by a key that the issuer publishes, for our audience, and in its time. The
keys are fetched aside from requests, again and again; a token by a key that isn't known yet has
them fetched once more, at most every `RETRY_S` seconds, whoever asks.
"""

import asyncio
import base64
import binascii
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx

from serving.policy import AccessError

# Of public keys alone: with HS256, who knows the public key could sign.
ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "EdDSA")

REFRESH_S = 300.0
RETRY_S = 10.0
TIMEOUT_S = 5.0
MOST_BYTES = 2**20
LONGEST = 16_384

log = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True)
class Oidc:
    """Whose tokens are taken.

    Attributes:
        issuer: URL, as the tokens' claim `iss` has it; its discovery document names the keys.
        audience: What the claim `aud` has to hold.
        roles: The claim's value to a role of the policy; the first that a token has counts.
        roles_claim: The claim with the values, a string or a list; dots go into objects.
        algorithms: Signatures taken, of `ALGORITHMS`.
        leeway_s: Seconds that the issuer's clock may be off.
    """

    issuer: str
    audience: str
    roles: Mapping[str, str]
    roles_claim: str = "roles"
    algorithms: tuple[str, ...] = ("RS256", "ES256")
    leeway_s: int = 30


@dataclass(frozen=True, kw_only=True)
class Bearer:
    """Who a good token stands for.

    Attributes:
        subject: The claim `sub`.
        role: A role of the policy; None where the token has none of the values.
        until: When the token ends, seconds since 1970, with the leeway.
    """

    subject: str
    role: str | None
    until: float


class TokenError(ValueError):
    """The token isn't good; the message says why."""


class UnknownKey(TokenError):
    """The token names a key that the issuer hadn't published when it was last asked."""


class Tokens:
    """Checks tokens of one issuer."""

    def __init__(self, oidc: Oidc) -> None:
        """Fetches nothing yet.

        Raises:
            AccessError: The issuer's URL or an algorithm can't be used.
        """
        _require_safe(oidc.issuer, "oidc.issuer")
        if unknown := sorted(set(oidc.algorithms) - set(ALGORITHMS)):
            raise AccessError(f"oidc.algorithms: {unknown}; allowed are {ALGORITHMS}")
        self.oidc = oidc
        self._keys: dict[str, Any] = {}
        self._published: Any = None
        self._fetching: asyncio.Task[bool] | None = None
        self._tried_at = -RETRY_S

    def fetch(self) -> None:
        """Fetches the issuer's keys; waits for at most twice `TIMEOUT_S`.

        Raises:
            AccessError: It can't be reached, or what it answers isn't as it should be; the keys
                that were known stay.
        """
        self._tried_at = time.monotonic()
        where = self.oidc.issuer.rstrip("/") + "/.well-known/openid-configuration"
        found = _json(where)
        if found.get("issuer") != self.oidc.issuer:
            raise AccessError(
                f"{where} names the issuer {found.get('issuer')!r}, not {self.oidc.issuer!r}; "
                "write oidc.issuer as it does"
            )
        at = str(found.get("jwks_uri"))
        _require_safe(at, f"{where}: jwks_uri")
        published = _json(at)
        if published != self._published:
            self._keys, self._published = _keys(published, at), published

    async def refresh(self) -> bool:
        """Fetches the keys in a thread, whoever else asks for it waiting for the same.

        Returns:
            Whether they were fetched; not where it failed, or was tried only a moment ago.
        """
        if self._fetching is None or self._fetching.done():
            if time.monotonic() - self._tried_at < RETRY_S:
                return False
            # Set here too, since the thread may begin later than the next request comes.
            self._tried_at = time.monotonic()
            self._fetching = asyncio.create_task(self._fetched())
        # One client that goes away doesn't end it for the others.
        return await asyncio.shield(self._fetching)

    async def _fetched(self) -> bool:
        try:
            await asyncio.to_thread(self.fetch)
        except AccessError as error:
            log.error(f"the issuer's keys stay as they are: {error}")
            return False
        return True

    async def keep_fresh(self) -> None:
        """Fetches the keys now and from time to time."""
        while True:
            await self.refresh()
            await asyncio.sleep(REFRESH_S if self._keys else RETRY_S)

    @property
    def published(self) -> Any:
        """The issuer's keys as it publishes them; another object after they changed."""
        return self._published

    def bearer(self, token: str) -> Bearer:
        """Who the token stands for.

        Raises:
            UnknownKey: Its key isn't known; `refresh` may bring it.
            TokenError: It isn't good.
        """
        from joserfc import jwt
        from joserfc.errors import JoseError

        head = _head(token)
        if head.get("alg") not in self.oidc.algorithms:
            raise TokenError(
                f"the token's algorithm {str(head.get('alg'))[:20]!r} isn't allowed; allowed are "
                f"{self.oidc.algorithms}"
            )
        key = self._keys.get(str(head.get("kid")))
        if key is None:
            raise UnknownKey("the token is signed by a key that its issuer doesn't publish")
        rules = jwt.JWTClaimsRegistry(
            leeway=self.oidc.leeway_s,
            iss={"essential": True, "value": self.oidc.issuer},
            aud={"essential": True, "value": self.oidc.audience},
            exp={"essential": True},
            sub={"essential": True},
        )
        try:
            claims = jwt.decode(token, key, algorithms=list(self.oidc.algorithms)).claims
            rules.validate(claims)
        except (JoseError, ValueError) as error:
            raise TokenError(f"the token isn't good: {error}") from error
        held = _claim(claims, self.oidc.roles_claim)
        values = held if isinstance(held, list) else [held]
        role = next((role for value, role in self.oidc.roles.items() if value in values), None)
        return Bearer(
            subject=str(claims["sub"]),
            role=role,
            until=float(claims["exp"]) + self.oidc.leeway_s,
        )


def _head(token: str) -> dict[str, Any]:
    """The token's header, not to be trusted."""
    parts = token.split(".")
    if len(parts) != 3 or len(token) > LONGEST:
        raise TokenError("neither an API key nor a signed token (JWS, three parts with dots)")
    try:
        head = json.loads(base64.urlsafe_b64decode(parts[0] + "=" * (-len(parts[0]) % 4)))
    except (ValueError, binascii.Error, RecursionError) as error:
        raise TokenError("the token's header can't be read") from error
    if not isinstance(head, dict):
        raise TokenError("the token's header isn't an object")
    return head


def _claim(claims: Mapping[str, Any], name: str) -> Any:
    # A name with dots may be a whole one, such as a URL.
    if name in claims:
        return claims[name]
    here: Any = claims
    for part in name.split("."):
        here = here.get(part) if isinstance(here, dict) else None
    return here


def _keys(published: Any, at: str) -> dict[str, Any]:
    """The public keys for signatures by their ids."""
    from joserfc.errors import JoseError
    from joserfc.jwk import JWKRegistry

    found = {}
    try:
        for each in published["keys"]:
            # A secret is nobody's to publish; other kinds may be for other clients.
            if each.get("kty") in ("RSA", "EC", "OKP") and each.get("use", "sig") == "sig":
                found[str(each.get("kid"))] = JWKRegistry.import_key(each)
    except (JoseError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise AccessError(f"{at}: isn't a set of keys: {error!r}") from error
    if not found:
        raise AccessError(f"{at}: has no public key for signatures")
    return found


def _json(url: str) -> dict[str, Any]:
    try:
        with (
            httpx.Client(timeout=TIMEOUT_S) as client,
            client.stream("GET", url, headers={"accept": "application/json"}) as answer,
        ):
            answer.raise_for_status()
            body, began = bytearray(), time.monotonic()
            for piece in answer.iter_bytes():
                body += piece
                if len(body) > MOST_BYTES or time.monotonic() - began > TIMEOUT_S:
                    raise AccessError(f"{url}: is too long or too slow")
        found = json.loads(body)
    except AccessError:
        raise
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError) as error:
        raise AccessError(f"{url}: can't be fetched: {error!r}") from error
    if not isinstance(found, dict):
        raise AccessError(f"{url}: isn't a JSON object")
    return found


def _require_safe(url: str, what: str) -> None:
    parts = urlsplit(url)
    local = parts.hostname in ("127.0.0.1", "localhost", "::1")
    if parts.scheme != "https" and not (parts.scheme == "http" and local):
        raise AccessError(f"{what} is {url!r}; give an https URL (http on this machine alone)")
