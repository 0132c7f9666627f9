"""Who may ask: API keys, hashed at rest; roles by a policy file; rates. Knows nothing of HTTP.

A key is `ly_<name>_<secret>`. The keys file holds SHA-256 digests of the secrets, which are 256
random bits, so that a slow hash would add nothing. A replica reads both files again when they
change.
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
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

ACTIONS = ("score", "explain", "customers", "models", "metrics")


class AccessError(ValueError):
    """A keys or policy file, or a change of it, can't be so; the message says what to do."""


class Denied(ValueError):
    """A request that isn't allowed.

    Attributes:
        status: 401 without a valid key, 403 without the right, 429 over the rate.
        who: The key's name, or None where it isn't known.
        retry_after_s: Where waiting helps, whole seconds.
    """

    def __init__(
        self, status: int, reason: str, *, who: str | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.who = who
        self.retry_after_s = retry_after_s


class Role(BaseModel):
    """What holders of a role may do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    actions: tuple[str, ...]
    # Names of models, or patterns such as "lapse_*".
    models: tuple[str, ...] = ("*",)
    requests_per_s: float | None = Field(default=None, gt=0)
    burst: int = Field(default=20, ge=1)


DEFAULT_ROLES = {
    "viewer": Role(actions=("models",)),
    "service": Role(actions=("models", "score", "customers")),
    "analyst": Role(actions=("models", "score", "explain", "customers")),
    "admin": Role(actions=ACTIONS),
}


@dataclass(frozen=True, kw_only=True)
class AccessFiles:
    """Where access is kept.

    Attributes:
        keys: Made by `add_key`.
        policy: YAML, `roles: {name: {actions, models, requests_per_s, burst}}`; None for
            `DEFAULT_ROLES`.
        audit: The audit log to append to; None for none.
    """

    keys: str
    policy: str | None = None
    audit: str | None = None

    def absolute(self) -> "AccessFiles":
        """The same files for a process with another working directory."""
        return AccessFiles(
            keys=str(Path(self.keys).absolute()),
            policy=None if self.policy is None else str(Path(self.policy).absolute()),
            audit=None if self.audit is None else str(Path(self.audit).absolute()),
        )


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


class Access:
    """Decides on requests."""

    def __init__(self, files: AccessFiles) -> None:
        """Reads the files.

        Raises:
            AccessError: One isn't as it should be.
            OSError: One can't be read.
        """
        self._keys_path = Path(files.keys)
        self._policy_path = None if files.policy is None else Path(files.policy)
        self._seen: tuple[int, ...] = ()
        self._keys: dict[str, Any] = {}
        self._roles: Mapping[str, Role] = {}
        # Secrets that were found good, by what was sent: until they expire.
        self._good: dict[str, tuple[str, str, float]] = {}
        # Per key: tokens left, and when that was.
        self._buckets: dict[str, tuple[float, float]] = {}
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
        keys = _read(self._keys_path)
        for name, key in keys.items():
            if key["role"] not in roles:
                raise AccessError(
                    f"{self._keys_path}: key {name!r} has the role {key['role']!r}; the policy "
                    f"has {sorted(roles)}"
                )
        self._keys, self._roles, self._good = keys, roles, {}
        self._seen = seen

    def allow(self, authorization: str | None, action: str, model: str | None) -> str:
        """The name of the key that may do this.

        Args:
            authorization: The header's value, "Bearer ly_...".
            action: One of `ACTIONS`.
            model: The model that it is about, or None.

        Raises:
            Denied: It may not; the message says why.
        """
        who, role = self._who(authorization)
        may = self._roles[role]
        if action not in may.actions:
            raise Denied(403, f"the role {role!r} may not {action}", who=who)
        if model is not None and not any(fnmatchcase(model, allowed) for allowed in may.models):
            raise Denied(403, f"the role {role!r} may not {action} with model {model!r}", who=who)
        if may.requests_per_s is not None:
            self._take(who, may.requests_per_s, may.burst)
        return who

    def may(self, who: str, action: str, model: str) -> bool:
        """Whether the key of that name may do this too; counts on no rate."""
        key = self._keys.get(who)
        role = None if key is None else self._roles[key["role"]]
        return (
            role is not None
            and action in role.actions
            and any(fnmatchcase(model, allowed) for allowed in role.models)
        )

    def _who(self, authorization: str | None) -> tuple[str, str]:
        found = self._good.get(authorization or "")
        now = time.time()
        if found is not None and now < found[2]:
            return found[0], found[1]
        kind, _, key = (authorization or "").partition(" ")
        parts = key.strip().split("_", 2)
        if kind.lower() != "bearer" or len(parts) != 3 or parts[0] != "ly":
            raise Denied(401, "no API key; send the header 'Authorization: Bearer ly_...'")
        _, name, secret = parts
        stored = self._keys.get(name)
        sent = _digest(secret)
        # Unknown names take as long as wrong secrets.
        entries = [stored, stored.get("former")] if stored else [{"sha256": "", "expires": ""}]
        for entry in entries:
            if entry and hmac.compare_digest(entry["sha256"], sent):
                until = _moment(entry["expires"]).timestamp()
                if now >= until:
                    raise Denied(401, f"the key has expired on {entry['expires']}", who=name)
                if len(self._good) > 10_000:
                    self._good = {}
                assert stored is not None, "only a stored key matches"
                self._good[authorization or ""] = (name, stored["role"], until)
                return name, stored["role"]
        raise Denied(401, "the API key isn't known; ask for a new one")

    def _take(self, who: str, per_s: float, burst: int) -> None:
        now = time.monotonic()
        left, then = self._buckets.get(who, (float(burst), now))
        left = min(float(burst), left + (now - then) * per_s)
        if left < 1:
            wait = max(1, round((1 - left) / per_s + 0.5))
            self._buckets[who] = (left, now)
            raise Denied(
                429, f"over {per_s:g} requests a second; slow down", who=who, retry_after_s=wait
            )
        self._buckets[who] = (left - 1, now)


def read_policy(path: Path) -> dict[str, Role]:
    """The roles of a policy file.

    Raises:
        AccessError: It isn't such a file; the message says where.
        OSError: It can't be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.keys() != {"roles"}:
            raise AccessError(f"{path}: holds 'roles' and nothing else, one entry a role")
        roles = {name: Role.model_validate(role) for name, role in content["roles"].items()}
    except (yaml.YAMLError, ValidationError, AttributeError) as error:
        raise AccessError(f"{path}: {error}") from error
    for name, role in roles.items():
        if unknown := sorted(set(role.actions) - set(ACTIONS)):
            raise AccessError(f"{path}: role {name!r}: actions {unknown}; allowed are {ACTIONS}")
    return roles


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
