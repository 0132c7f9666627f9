"""Who may ask: API keys, hashed at rest, and an issuer's tokens. Knows nothing of HTTP.

A key is `ly_<name>_<secret>`. The keys file holds SHA-256 digests of the secrets, which are 256
random bits, so that a slow hash would add nothing. A replica reads the keys and the policy again
when they change.
"""

import fcntl
import hashlib
import hmac
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

from serving.policy import DEFAULT_ROLES, AccessError, Policy, read_policy
from serving.tokens import Oidc, TokenError, Tokens, UnknownKey


class Denied(ValueError):
    """A request that isn't allowed.

    Attributes:
        status: 401 without a valid key or token, 403 without the right, 429 over the rate, 503
            where rates can't be counted.
        who: Who asked, or None where it isn't known.
        retry_after_s: Where waiting helps, whole seconds.
    """

    def __init__(
        self, status: int, reason: str, *, who: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.who = who
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class AccessFiles:
    """Where access is kept, and whose tokens are taken; one of `keys` and `oidc` is there.

    Attributes:
        keys: Made by `add_key`; None takes no keys.
        policy: YAML, `roles: {name: {actions, models, fields, hidden, requests_per_s, burst}}`;
            None for `policy.DEFAULT_ROLES`.
        audit: The audit log to append to; None for none.
        oidc: None takes no tokens.
    """

    keys: str | None = None
    policy: str | None = None
    audit: str | None = None
    oidc: Oidc | None = None

    def absolute(self) -> "AccessFiles":
        """The same files for a process with another working directory."""

        def at(path: str | None) -> str | None:
            return None if path is None else str(Path(path).absolute())

        return replace(self, keys=at(self.keys), policy=at(self.policy), audit=at(self.audit))


def add_key(path: Path, name: str, role: str, *, days: float = 90) -> str:
    """A new key, which is told this once.

    Args:
        path: The keys file, made where it isn't there, readable by its owner only.
        name: Whose it is; letters and digits, also "-".
        role: A role of the policy.
        days: Until it expires.

    Raises:
        AccessError: The name has other characters or is taken, or `days` isn't above 0.
        OSError: The file can't be written.
    """
    if not name or not all(
        letter == "-" or (letter.isascii() and letter.isalnum()) for letter in name
    ):
        raise AccessError(f"key name {name!r}: allowed are letters, digits and '-'")
    if days <= 0:
        raise AccessError(f"days is {days}; a key expires later than now")
    with _changing(path) as keys:
        if name in keys:
            raise AccessError(f"key {name!r} is there; rotate it, or choose another name")
        secret, stored = _secret(role, days)
        keys[name] = stored
    return f"ly_{name}_{secret}"


def rotate_key(path: Path, name: str, *, days: float = 90, grace_s: float = 86_400) -> str:
    """A new secret of a key; the former one goes on for the grace.

    Raises:
        AccessError: There is no such key.
        OSError: The file can't be written.
    """
    with _changing(path) as keys:
        former = _known(keys, name)
        secret, stored = _secret(former["role"], days)
        until = min(_moment(former["expires"]), datetime.now(UTC) + timedelta(seconds=grace_s))
        keys[name] = {
            **stored,
            "former": {"sha256": former["sha256"], "expires": until.isoformat()},
        }
    return f"ly_{name}_{secret}"


def revoke_key(path: Path, name: str) -> None:
    """Ends a key at once.

    Raises:
        AccessError: There is no such key.
        OSError: The file can't be written.
    """
    with _changing(path) as keys:
        _known(keys, name)
        del keys[name]


@dataclass(frozen=True, kw_only=True)
class Key:
    """What may be told of a key.

    Attributes:
        name: Whose it is.
        role: Of the policy.
        expires: ISO 8601, with its time zone.
        expired: Whether it has.
        former_expires: Of the key before it that still goes on; None where there is none.
    """

    name: str
    role: str
    expires: str
    expired: bool
    former_expires: str | None


def list_keys(path: Path) -> list[Key]:
    """The keys by name, without what opens anything.

    Raises:
        AccessError: It isn't a keys file.
        OSError: It can't be read.
    """
    now = datetime.now(UTC)
    found = []
    for name, key in sorted(_read(path).items()):
        former = key.get("former")
        goes_on = former is not None and _moment(former["expires"]) > now
        found.append(
            Key(
                name=name,
                role=key["role"],
                expires=key["expires"],
                expired=_moment(key["expires"]) <= now,
                former_expires=former["expires"] if goes_on else None,
            )
        )
    return found


class Asker(NamedTuple):
    """Who was let in: a key's name, or "oidc:" and a token's subject; and the role."""

    who: str
    role: str


class UnknownSigner(Denied):
    """A token by a key that isn't known yet; `tokens.refresh` may bring it."""


class Access:
    """Decides on requests."""

    def __init__(self, files: AccessFiles) -> None:
        """Reads the files; fetches no keys of an issuer yet.

        Raises:
            AccessError: One isn't as it should be, or nobody could ask.
            OSError: One can't be read.
        """
        if files.keys is None and files.oidc is None:
            raise AccessError("access names neither keys nor oidc, so that nobody could ask")
        self._keys_path = None if files.keys is None else Path(files.keys)
        self._policy_path = None if files.policy is None else Path(files.policy)
        self.tokens = None if files.oidc is None else Tokens(files.oidc)
        self._seen: tuple[int, ...] | None = None
        self._keys: dict[str, Any] = {}
        self._policy = Policy({})
        # What was sent and found good: until it expires.
        self._good: dict[str, tuple[Asker, float]] = {}
        self._published: Any = None
        self.reload()

    def reload(self) -> None:
        """Reads the files again where they changed.

        Raises:
            AccessError: One isn't as it should be; then what was read before holds.
            OSError: One can't be read.
        """
        paths = [path for path in (self._keys_path, self._policy_path) if path is not None]
        seen = tuple(n for path in paths for n in (path.stat().st_mtime_ns, path.stat().st_ino))
        if seen == self._seen:
            return
        roles = DEFAULT_ROLES if self._policy_path is None else read_policy(self._policy_path)
        keys = {} if self._keys_path is None else _read(self._keys_path)
        held = [(f"{self._keys_path}: key {name!r}", key["role"]) for name, key in keys.items()]
        if self.tokens is not None:
            said = self.tokens.oidc.roles
            held += [(f"oidc.roles: {value!r}", role) for value, role in said.items()]
        for what, role in held:
            if role not in roles:
                raise AccessError(f"{what} has the role {role!r}; the policy has {sorted(roles)}")
        self._keys, self._policy, self._good = keys, Policy(roles), {}
        self._seen = seen

    def allow(self, authorization: str | None, action: str, model: str | None) -> Asker:
        """Who may do this.

        Args:
            authorization: The header's value, "Bearer ly_..." or "Bearer " and a token.
            action: One of `policy.ACTIONS`.
            model: The model that it is about, or None.

        Raises:
            UnknownSigner: It has a token by a key that isn't known yet.
            Denied: It may not; the message says why.
        """
        asker = self._asker(authorization)
        who, role = asker
        if not self._policy.allows(role, action, model):
            models = model is not None and self._policy.allows(role, action)
            reason = f"{action} with model {model!r}" if models else action
            raise Denied(403, f"the role {role!r} may not {reason}", who=who)
        return asker

    def rate(self, role: str) -> tuple[float, int] | None:
        """Requests a second, and how many at once; None where the role has no rate."""
        may = self._policy.roles[role]
        return None if may.requests_per_s is None else (may.requests_per_s, may.burst)

    def may(self, role: str, action: str, model: str | None, field: str = "") -> bool:
        """Whether the role may do this too, or be shown this field; counts on no rate."""
        return self._policy.allows(role, action, model, field)

    def _asker(self, authorization: str | None) -> Asker:
        sent = authorization or ""
        if self.tokens is not None and self.tokens.published is not self._published:
            # A key that the issuer took back opens nothing any more.
            self._published, self._good = self.tokens.published, {}
        found = self._good.get(sent)
        if found is not None and time.time() < found[1]:
            return found[0]
        kind, _, key = sent.partition(" ")
        key = key.strip()
        if kind.lower() != "bearer" or not key:
            reason = "no API key; send the header 'Authorization: Bearer ly_...'"
            raise Denied(401, reason if self.tokens is None else reason + ", or a token there")
        if self.tokens is not None and not key.startswith("ly_"):
            asker, until = _by_token(self.tokens, key)
        else:
            asker, until = self._by_key(key)
        if len(self._good) > 10_000:
            self._good = {}
        self._good[sent] = (asker, until)
        return asker

    def _by_key(self, key: str) -> tuple[Asker, float]:
        parts = key.split("_", 2)
        if len(parts) != 3 or parts[0] != "ly":
            raise Denied(401, "no API key; send the header 'Authorization: Bearer ly_...'")
        _, name, secret = parts
        stored = self._keys.get(name)
        sent = _digest(secret)
        # Unknown names take as long as wrong secrets.
        entries = [stored, stored.get("former")] if stored else [{"sha256": "", "expires": ""}]
        for entry in entries:
            if entry and hmac.compare_digest(entry["sha256"], sent):
                until = _moment(entry["expires"]).timestamp()
                if time.time() >= until:
                    raise Denied(401, f"the key has expired on {entry['expires']}", who=name)
                assert stored is not None, "only a stored key matches"
                return Asker(name, stored["role"]), until
        raise Denied(401, "the API key isn't known; ask for a new one")


def _by_token(tokens: Tokens, token: str) -> tuple[Asker, float]:
    try:
        bearer = tokens.bearer(token)
    except UnknownKey as error:
        raise UnknownSigner(401, str(error)) from error
    except TokenError as error:
        raise Denied(401, str(error)) from error
    who = f"oidc:{bearer.subject}"
    if bearer.role is None:
        claim = tokens.oidc.roles_claim
        raise Denied(403, f"the token's {claim!r} has none of the values with a role", who=who)
    return Asker(who, bearer.role), bearer.until


@contextmanager
def _changing(path: Path) -> Iterator[dict[str, Any]]:
    """The keys, to be changed; written aside and renamed, one change at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(path.name + ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        keys = _read(path) if path.exists() else {}
        yield keys
        aside = path.with_name(f"{path.name}.{os.getpid()}")
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(keys, file, indent=2, sort_keys=True)
        aside.replace(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        keys: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for key in keys.values():
            for entry in filter(None, (key, key.get("former"))):
                bytes.fromhex(entry["sha256"])
                _moment(entry["expires"])
            str.strip(key["role"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise AccessError(
            f"{path} isn't a keys file ({error!r}); make one with add_key, or restore it"
        ) from error
    return keys


def _known(keys: Mapping[str, Any], name: str) -> dict[str, Any]:
    if name not in keys:
        raise AccessError(f"no key {name!r}; there are {sorted(keys)}")
    key: dict[str, Any] = keys[name]
    return key


def _secret(role: str, days: float) -> tuple[str, dict[str, str]]:
    secret = secrets.token_urlsafe(32)
    expires = (datetime.now(UTC) + timedelta(days=days)).isoformat(timespec="seconds")
    return secret, {"sha256": _digest(secret), "role": role, "expires": expires}


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _moment(text: str) -> datetime:
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return moment
