"""What is refused before anything starts: versions, files, addresses and GPUs that aren't there."""

import ssl
from typing import Any

from cluster import ports
from models.registry import Registry
from models.registry_connection import RegistryError
from serving.replica import champions
from serving.settings import Listener, Running, ServingError, Settings

HOSTS = ("127.0.0.1", "0.0.0.0")


def require_versions(settings: Settings) -> None:
    """What is named is there."""
    registry = Registry(settings.registry)
    there = champions(registry)
    named = settings.models
    for name, rollout in (named or {}).items():
        if rollout.version is not None:
            try:
                registry.card(name, rollout.version)
            except RegistryError as error:
                key = ("models", name, "version")
                raise ServingError(f"models.{name}.version: {error}", key=key) from error
    missing = [
        name
        for name, rollout in (named or {}).items()
        if rollout.version is None and name not in there
    ]
    if missing or (named is None and not there) or (named is not None and not named):
        what = f"models {missing} have no champion" if missing else "there is nothing to serve"
        raise ServingError(
            f"{what} in {registry.uri}; there are champions of {sorted(there)}: "
            "register and promote a version, or name others"
        )


def require_files(listener: Listener) -> None:
    """The certificate and its key fit; HAProxy says so only in its log."""
    if listener.tls is None:
        return
    tls = listener.tls
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(tls.certificate, tls.key, password=lambda: "")
        if tls.clients_ca is not None:
            context.load_verify_locations(tls.clients_ca)
    except OSError as error:
        raise ServingError(
            f"tls: {tls} can't be used ({error}); give PEM files, the key without a passphrase"
        ) from error


def require_address(host: str, port: int) -> None:
    """Two listeners of Ray share a port without a word, and then answer 404 at random."""
    if host not in HOSTS or not 1 <= port <= 65_535:
        raise ServingError(
            f"can't listen on {host}:{port}: allowed are the hosts {HOSTS} (HAProxy reaches the "
            "replica by loopback) and the ports 1 to 65535"
        )
    if (why := ports.held(port, host)) is not None:
        raise ServingError(
            f"can't listen on {host}:{port} ({why}); choose another port, or end what holds it"
        )


def require_gpus(wanted: Running) -> None:
    """The connected cluster has the GPUs that are asked for."""
    import ray

    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    gpus = [node["Resources"].get("GPU", 0.0) for node in nodes if node["Alive"]]
    largest, there = max(gpus, default=0.0), sum(gpus)
    asked: list[tuple[tuple[str, ...], float, int]] = [(("gpus",), wanted.gpus, wanted.replicas)]
    for name, rollout in wanted.settings.alone.items():
        asked.append((("models", name, "gpus"), rollout.gpus, rollout.replicas or 0))
    for key, each, _ in asked:
        if each > largest:
            has = f"nodes with {largest:g} at most" if largest else "no GPU"
            raise ServingError(
                f"{'.'.join(key)}: {each:g} is asked for, and the cluster has {has}; leave it out "
                "to score on CPUs, or serve on a cluster with GPUs (`liftyard env`)",
                key=key,
            )
    total = sum(each * replicas for _, each, replicas in asked)
    if total > there:
        key = next(key for key, each, _ in asked if each)
        raise ServingError(
            f"{'.'.join(key)}: the replicas take {total:g} GPUs in all, and the cluster has "
            f"{there:g}; give each a smaller share, or ask for fewer replicas",
            key=key,
        )
