"""What a replica serves, how much it takes, and where it is listened for."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import TypeAdapter

from serving.access import AccessFiles

# Serves the models that share replicas; each with replicas of its own has a further application.
APPLICATION = "liftyard"


def application(model: str | None) -> str:
    """The name in Ray Serve of what holds the model alone; None for what the others share."""
    return APPLICATION if model is None else f"{APPLICATION}-{model}"


class ServingError(ValueError):
    """Serving can't start or change as asked; the message says what to do.

    Attributes:
        key: Where `serve.yaml` says it, from the top down; empty where it doesn't.
    """

    def __init__(self, reason: str, *, key: tuple[str, ...] = ()) -> None:
        super().__init__(reason)
        self.key = key


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one replica takes before it says no.

    Attributes:
        rows: Rows of a request; more are answered 422.
        explained_rows: Rows of a request to explain; a row takes as long as a thousand to score.
        body_bytes: Bytes of a request's body; more are answered 413.
        ongoing: Requests worked on at a time.
        queued: Requests that wait for that; further ones are answered 429 with Retry-After.
    """

    rows: int = 10_000
    explained_rows: int = 100
    body_bytes: int = 32 * 2**20
    ongoing: int = 128
    queued: int = 512


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """Which versions of a model are asked, and whether by replicas of its own.

    Attributes:
        version: The one that answers; None for the champion, whichever that is.
        aliases: Other names that clients may ask by.
        canary: Share of the requests that the challenger answers, from 0 to 1.
        shadow: Whether the challenger also scores what the champion answers, for the shadow log.
        replicas: How many hold this model alone; None shares those of the others.
        gpus: GPUs of each of those; a share of one below 1.
    """

    version: int | None = None
    aliases: tuple[str, ...] = ()
    canary: float = 0.0
    shadow: bool = False
    replicas: int | None = None
    gpus: float = 0.0

    @property
    def challenged(self) -> bool:
        """Whether there is work for a challenger."""
        return self.shadow or self.canary > 0


# Every model by its champion, where none are named.
DEFAULT = Rollout()


@dataclass(frozen=True, kw_only=True)
class Traces:
    """Where spans of requests go.

    Attributes:
        endpoint: URL that takes OTLP over HTTP, such as http://127.0.0.1:4318; without a path,
            "/v1/traces" is added.
        sample: Share of the requests that are traced, from 0 to 1; a client's own `traceparent`
            decides for its request.
    """

    endpoint: str
    sample: float = 0.01


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a replica serves.

    Attributes:
        registry: URI of the registry.
        models: By name; None for all that have a champion.
        limits: See `Limits`.
        refresh_s: Seconds between two looks for new champions, and for changed keys.
        access: Keys, policy and audit log; None lets everyone in who reaches the address.
        shadow_log: File that shadow scores are appended to.
        store: Folder of the online features (`serving.online`); None where there are none.
        traces: None traces nothing.
    """

    registry: str
    models: Mapping[str, Rollout] | None
    limits: Limits
    refresh_s: float
    access: AccessFiles | None = None
    shadow_log: str | None = None
    store: str | None = None
    traces: Traces | None = None

    def rollout(self, name: str) -> Rollout:
        """The model's; every model is served by its champion where none are named."""
        return DEFAULT if self.models is None else self.models.get(name, DEFAULT)

    @property
    def alone(self) -> dict[str, Rollout]:
        """The models with replicas of their own."""
        named = self.models or {}
        return {name: each for name, each in named.items() if each.replicas is not None}

    def held(self, model: str | None) -> list[str] | None:
        """The models of a replica: `model` alone, or those that share; None for every champion."""
        if model is not None:
            return [model]
        return None if self.models is None else [n for n in self.models if n not in self.alone]

    def digest(self) -> str:
        """The same for the same settings; tells them apart without telling them."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Settings":
        """The settings that `dataclasses.asdict` took apart."""
        return TypeAdapter(cls).validate_python(values)


@dataclass(frozen=True, kw_only=True)
class Tls:
    """Files in PEM that HAProxy ends TLS with; read again whenever it starts.

    Attributes:
        certificate: The server's, with those between it and the root.
        key: The certificate's private key, without a passphrase.
        clients_ca: Who signs clients' certificates, which are then required; None asks for none.
    """

    certificate: str
    key: str
    clients_ca: str | None = None


@dataclass(frozen=True, kw_only=True)
class Listener:
    """Where clients connect; it stays for as long as serving runs.

    Attributes:
        host: "127.0.0.1", or "0.0.0.0" for every interface.
        port: Port of HTTP.
        grpc_port: Port of gRPC, by the same TLS; None listens for none.
        tls: None speaks without.
    """

    host: str = "127.0.0.1"
    port: int
    grpc_port: int | None = None
    tls: Tls | None = None

    @property
    def url(self) -> str:
        """Base URL."""
        return f"{'https' if self.tls else 'http'}://{self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class Running:
    """What a cluster serves with.

    Attributes:
        settings: Its replicas'.
        listener: Where it is asked.
        replicas: How many hold the models that share.
        cpus: CPUs of a replica.
        gpus: GPUs of a replica of those that share; a share of one below 1.
        direct: Base URL that answers on the head's machine without TLS.
        code: Digest of the code that the replicas run.
    """

    settings: Settings
    listener: Listener
    replicas: int = 1
    cpus: float
    gpus: float = 0.0
    direct: str
    code: str

    @property
    def all(self) -> dict[str | None, int]:
        """How many replicas there are by the model that they hold alone; None for the shared."""
        alone = self.settings.alone.items()
        return {None: self.replicas, **{name: each.replicas or 0 for name, each in alone}}

    @property
    def total(self) -> int:
        """How many replicas there are in all."""
        return sum(self.all.values())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Running":
        """What `dataclasses.asdict` took apart."""
        return TypeAdapter(cls).validate_python(values)

    def differences(self, other: "Running") -> list[str]:
        """Dotted names of what isn't the same, such as `settings.limits.rows`."""
        here, there = _flat("", asdict(self)), _flat("", asdict(other))
        names = sorted(here.keys() | there.keys())
        return [name for name in names if here.get(name) != there.get(name)]


def _flat(at: str, value: Any) -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {
            name: each
            for key, inner in value.items()
            for name, each in _flat(f"{at}.{key}" if at else str(key), inner).items()
        }
    return {at: value}
