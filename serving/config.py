"""What `serve.yaml` may say: the whole configuration of what is served.

Knows nothing of YAML, or of how it is applied (`serving.app.apply`).
"""

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from serving import settings, tokens
from serving.access import AccessFiles
from serving.settings import Listener, Rollout, Settings

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65_535)]


def _whole_above_one(gpus: float) -> float:
    if gpus > 1 and gpus != int(gpus):
        raise ValueError(f"got {gpus}; a replica takes a share of a GPU, up to 1, or whole ones")
    return gpus


Gpus = Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)]

# Models with replicas of their own are routed to by path and named in HAProxy's configuration.
_PLAIN = re.compile(r"[A-Za-z0-9_-]+")


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(_Model):
    """One model: which versions answer, by which other names, and where; see `settings.Rollout`."""

    version: Count | None = None
    aliases: tuple[Annotated[str, Field(pattern=r"^[^/\s]+$")], ...] = ()
    canary: Share = 0.0
    shadow: bool = False
    replicas: Count | None = None
    gpus: Gpus = 0.0

    @model_validator(mode="after")
    def _gpus_of_its_own(self) -> "Model":
        if self.gpus and self.replicas is None:
            raise ValueError(
                "gpus are those of replicas of its own: give `replicas` too, or `gpus` at the top "
                "for what all share"
            )
        return self


class Limits(_Model):
    """What one replica takes before it says no; see `settings.Limits`."""

    rows: Count = settings.Limits.rows
    explained_rows: Count = settings.Limits.explained_rows
    body_bytes: Count = settings.Limits.body_bytes
    ongoing: Count = settings.Limits.ongoing
    queued: Annotated[int, Field(ge=0)] = settings.Limits.queued


class Oidc(_Model):
    """Whose tokens are taken; see `tokens.Oidc`."""

    issuer: str
    audience: Annotated[str, Field(min_length=1)]
    roles: Annotated[dict[str, str], Field(min_length=1)]
    roles_claim: str = tokens.Oidc.roles_claim
    algorithms: tuple[str, ...] = tokens.Oidc.algorithms
    leeway_s: Annotated[int, Field(ge=0, le=300)] = tokens.Oidc.leeway_s


class Access(_Model):
    """Files, and an issuer of tokens; rates and rights are the policy's."""

    keys: str | None = None
    policy: str | None = None
    audit: str | None = None
    oidc: Oidc | None = None

    @model_validator(mode="after")
    def _somebody_may_ask(self) -> "Access":
        if self.keys is None and self.oidc is None:
            raise ValueError("names neither keys nor oidc, so that nobody could ask")
        return self


class Traces(_Model):
    """Where spans go, and of how many requests; see `settings.Traces`."""

    endpoint: Annotated[str, Field(pattern=r"^https?://")]
    sample: Share = settings.Traces.sample


class Grpc(_Model):
    """Where gRPC is listened for; on the same host and with the same TLS as HTTP."""

    port: Port = 9000


class Tls(_Model):
    """Files in PEM; with `clients_ca`, clients need a certificate too."""

    certificate: str
    key: str
    clients_ca: str | None = None


class Serve(_Model):
    """A `serve.yaml`; relative paths start from its folder."""

    host: Literal["127.0.0.1", "0.0.0.0"] = "127.0.0.1"
    port: Port | None = None
    grpc: Grpc | None = None
    replicas: Count = 1
    cpus: Annotated[float, Field(gt=0)] = 1.0
    gpus: Gpus = 0.0
    refresh_s: Annotated[float, Field(ge=0.1)] = 2.0
    shadow_log: str | None = None
    store: str | None = None
    models: dict[str, Model] | None = None
    limits: Limits = Limits()
    access: Access | None = None
    tls: Tls | None = None
    traces: Traces | None = None

    @field_validator("grpc", mode="before")
    @classmethod
    def _nothing_said_is_the_default(cls, said: object) -> object:
        return {} if said is None else said

    @field_validator("models", mode="before")
    @classmethod
    def _nothing_said_is_the_champion(cls, models: object) -> object:
        # `lapse_30d:` alone is null in YAML.
        if isinstance(models, dict):
            return {name: {} if said is None else said for name, said in models.items()}
        return models

    @field_validator("models")
    @classmethod
    def _fit_together(
        cls, models: dict[str, Model] | None, info: ValidationInfo
    ) -> dict[str, Model] | None:
        if models is not None and not models:
            raise ValueError("is empty; name some, or leave it out to serve every champion")
        taken = set(models or ())
        for name, model in (models or {}).items():
            for alias in model.aliases:
                if alias in taken:
                    raise ValueError(f"{name}: the alias {alias!r} is another's name or alias")
                taken.add(alias)
            if model.replicas is not None and not _PLAIN.fullmatch(name):
                raise ValueError(
                    f"{name}: replicas of its own need a name of letters, digits, '_' and '-'"
                )
            if model.shadow and info.data.get("shadow_log") is None:
                raise ValueError(f"{name}: shadow needs shadow_log, the file for its scores")
        return models

    def settings(self, registry: str, folder: Path) -> Settings:
        """What the replicas get; paths made absolute from `folder`."""

        def at(path: str | None) -> str | None:
            return None if path is None else str((folder / path).absolute())

        models = access = None
        if self.models is not None:
            models = {name: Rollout(**each.model_dump()) for name, each in self.models.items()}
        if self.access is not None:
            oidc = self.access.oidc
            access = AccessFiles(
                keys=at(self.access.keys),
                policy=at(self.access.policy),
                audit=at(self.access.audit),
                oidc=None if oidc is None else tokens.Oidc(**oidc.model_dump()),
            )
        return Settings(
            registry=registry,
            models=models,
            limits=settings.Limits(**self.limits.model_dump()),
            refresh_s=self.refresh_s,
            access=access,
            shadow_log=at(self.shadow_log),
            store=at(self.store),
            traces=None if self.traces is None else settings.Traces(**self.traces.model_dump()),
        )

    def listener(self, port: int, folder: Path) -> Listener:
        """Where clients connect; `port` where the file names none."""
        tls = None
        if self.tls is not None:
            said = self.tls.model_dump(exclude_none=True)
            tls = settings.Tls(**{key: str((folder / at).absolute()) for key, at in said.items()})
        grpc_port = None if self.grpc is None else self.grpc.port
        return Listener(host=self.host, port=self.port or port, grpc_port=grpc_port, tls=tls)
