"""The Ray session: a cluster started here, or one attached to.

Knows nothing of what runs on it. Token authentication is on, since whoever reaches a Ray port
runs code as its user. An embedded cluster goes by a loopback address, but Ray's own servers still
listen on every interface: the token, and a firewall, keep others out.
"""

import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class SessionError(ValueError):
    """A session can't be opened as asked; the message says what to do."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """What a caller holds of a Ray cluster.

    Attributes:
        address: The address of the cluster's head, `host:port`.
        started: Whether this session started the cluster, and so ends it.
        cpus: CPUs of the whole cluster.
        gpus: GPUs of the whole cluster.
    """

    address: str
    started: bool
    cpus: float
    gpus: float


@contextmanager
def connect(*, address: str | None = None, cpus: int | None = None) -> Iterator[Session]:
    """Opens a Ray session; on exit shuts down only what it started.

    If this process already has a Ray connection, that one is used and left running.

    Args:
        address: A running cluster, `host:port`; None starts an embedded one, by a loopback address.
        cpus: CPUs of an embedded cluster; None takes all of the machine's.

    Yields:
        The session.

    Raises:
        SessionError: `cpus` doesn't fit, Ray here is another cluster than `address`, or there
            is no token to attach with.
    """
    if cpus is not None and (cpus < 1 or address is not None):
        raise SessionError(
            f"cpus={cpus} with address={address!r}: cpus sizes an embedded cluster and is at "
            "least 1; leave out cpus to attach, or address to start one here"
        )
    # Ray's zero-GPU tasks then keep CUDA_VISIBLE_DEVICES, and it doesn't warn of the change.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address is not None and address not in ("auto", here):
            raise SessionError(
                f"address={address!r}, but this process is already connected to {here!r}: "
                "leave the other session first, or leave out address to use it"
            )
        yield _describe(started=False)
        return
    authenticate(make=address is None)
    in_main = threading.current_thread() is threading.main_thread()
    on_term = signal.getsignal(signal.SIGTERM) if in_main else None
    if address is None:
        # "local" and not None: RAY_ADDRESS in the environment would otherwise win.
        ray.init(
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
            configure_logging=False,
            _node_ip_address=loopback(),
        )
    else:
        ray.init(address=address, log_to_driver=False, configure_logging=False)
    if on_term is not None:
        # Ray has put its own in, which exits without a word to the caller.
        signal.signal(signal.SIGTERM, on_term)
    try:
        yield _describe(started=address is None)
    finally:
        # Of a cluster attached to, this ends the connection and not the cluster.
        ray.shutdown()


def loopback() -> str:
    """The loopback address that a Ray node of this machine goes by."""
    # Ray replaces 127.0.0.1 by the address the network sees; other loopback addresses it keeps,
    # and only Linux answers on them unasked.
    return "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"


def _describe(*, started: bool) -> Session:
    import ray

    total = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return Session(
        address=ray.get_runtime_context().gcs_address,
        started=started,
        cpus=total.get("CPU", 0.0),
        gpus=total.get("GPU", 0.0),
    )


def authenticate(*, make: bool) -> None:
    """Turns token authentication on in this process, unless the environment says otherwise.

    Args:
        make: Whether to make a token where there is none.

    Raises:
        SessionError: There is no token, and none is to be made.
    """
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode == "token" and "RAY_AUTH_TOKEN" not in os.environ:
        default = str(Path.home() / ".ray" / "auth_token")
        path = Path(os.environ.setdefault("RAY_AUTH_TOKEN_PATH", default))
        if make:
            _make_token(path)
        elif not path.exists():
            raise SessionError(
                f"no token at {path}: copy the cluster's token there with mode 0600, or name "
                "its file in RAY_AUTH_TOKEN_PATH, or set RAY_AUTH_MODE=disabled if the "
                "cluster takes none"
            )
        path.chmod(0o600)
    # Ray reads both variables once, at import; an earlier `import ray` would miss ours.
    from ray import _raylet

    native: Any = _raylet
    native.Config.initialize("")
    native.AuthenticationTokenLoader.instance().reset_cache()


def _make_token(path: Path) -> None:
    """Writes a random token to `path` with mode 0600, unless there is one."""
    if path.exists():
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        # A link appears whole and never replaces the token of a process that was faster.
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
