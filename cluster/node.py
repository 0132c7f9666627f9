"""What a node is told, by environment variables (infra/README.md, «What a node is told»)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Role = Literal["head", "worker"]

SECRETS = ("RAY_AUTH_TOKEN_PATH", "RAY_TLS_CA_CERT", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY")
# The cloud gives two minutes' notice; what can't move by then is run again by Ray.
DRAIN_S = 110


class BootstrapError(ValueError):
    """The node isn't told what it needs; the message names every variable."""


@dataclass(frozen=True, kw_only=True)
class Node:
    """What a node is told.

    Attributes:
        role: Head or worker.
        address: Its own IP address, by which the cluster knows it.
        head_host: The head's name or address.
        ray_port: The head's GCS port.
        dashboard_host: Address that the dashboard listens on.
        dashboard_port: The dashboard's port.
        dask_port: The standing Dask scheduler's port, at the head.
        dask_workers: One-CPU Dask workers of the standing lease; 0 holds none.
        dask_most: What the lease may grow to while there is work and room.
        state: Folder of `health.json`.
        scratch: Ray's folder of sockets and logs; None is Ray's default.
        cpus: CPUs to give out; None lets Ray count.
        gpus: GPUs to give out; None lets Ray count.
        metadata: The cloud's metadata service, which has notices; None where there is none.
        drain_s: Seconds from a notice to the end of Ray here, idle or not.
    """

    role: Role
    address: str
    head_host: str
    ray_port: int
    dashboard_host: str
    dashboard_port: int
    dask_port: int
    dask_workers: int
    dask_most: int
    state: Path
    scratch: Path | None
    cpus: int | None
    gpus: int | None
    metadata: str | None
    drain_s: int

    @property
    def head(self) -> str:
        """The head's address as Ray takes it, `host:port`."""
        return f"{self.head_host}:{self.ray_port}"


def read(role: Role, variables: Mapping[str, str]) -> Node:
    """Reads what a node is told.

    Args:
        role: `head` or `worker`.
        variables: As the process's environment; infra/README.md lists them.

    Raises:
        BootstrapError: One is missing or no number; or TLS or the token is asked for and a file
            isn't named.
    """
    needed = [
        *("LIFTYARD_NODE_ADDRESS", "LIFTYARD_RAY_PORT", "LIFTYARD_STATE_DIR"),
        *(("LIFTYARD_DASHBOARD_PORT", "LIFTYARD_DASK_PORT") if role == "head" else ()),
        *(("LIFTYARD_HEAD_HOST",) if role == "worker" else ()),
        *secrets_asked(variables),
    ]
    missing = [name for name in needed if not variables.get(name)]
    if missing:
        raise BootstrapError(
            f"{role} needs {', '.join(missing)}: see infra/README.md, «What a node is told»"
        )

    def number(name: str, default: int | None) -> int | None:
        text = variables.get(name, "")
        if not text:
            return default
        if not text.isdecimal():
            raise BootstrapError(f"{name}={text!r}: a number, at least 0, is needed")
        return int(text)

    workers = number("LIFTYARD_DASK_WORKERS", 1) or 0
    cloud = "http://169.254.169.254" if variables.get("LIFTYARD_INSTANCE_ID") else None
    scratch = variables.get("LIFTYARD_SCRATCH")
    return Node(
        role=role,
        address=variables["LIFTYARD_NODE_ADDRESS"],
        head_host=variables.get("LIFTYARD_HEAD_HOST") or variables["LIFTYARD_NODE_ADDRESS"],
        ray_port=number("LIFTYARD_RAY_PORT", None) or 0,
        dashboard_host=variables.get("LIFTYARD_DASHBOARD_HOST", "0.0.0.0"),
        dashboard_port=number("LIFTYARD_DASHBOARD_PORT", 0) or 0,
        dask_port=number("LIFTYARD_DASK_PORT", 0) or 0,
        dask_workers=workers,
        dask_most=max(workers, number("LIFTYARD_DASK_MOST", workers) or 0),
        state=Path(variables["LIFTYARD_STATE_DIR"]),
        scratch=Path(scratch) if scratch else None,
        cpus=number("LIFTYARD_CPUS", None),
        gpus=number("LIFTYARD_GPUS", None),
        metadata=variables.get("LIFTYARD_METADATA_URL") or cloud,
        drain_s=number("LIFTYARD_DRAIN_S", DRAIN_S) or 0,
    )


def secrets_asked(variables: Mapping[str, str]) -> list[str]:
    """Variables that must name a file, since a token or TLS is asked for."""
    token = variables.get("RAY_AUTH_MODE") == "token" and "RAY_AUTH_TOKEN" not in variables
    return [*SECRETS[: 1 if token else 0], *(SECRETS[1:] if tls_on(variables) else ())]


def tls_on(variables: Mapping[str, str]) -> bool:
    """Whether Ray speaks TLS."""
    return variables.get("RAY_USE_TLS", "0").lower() in ("1", "true")
