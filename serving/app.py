"""The serving application: the registry's champions behind HTTP, on the connected Ray cluster.

    POST /v1/models/{name}/score    {"rows": [{field: value, ...}, ...]} -> model, version, scores
    POST /v1/models/{name}/customers/{id}   scores a customer, with events that are new
    GET  /v1/customers/{id}         a customer's features and scores
    GET  /v1/models                 the cards of what is served
    POST /v1/models/{name}/explain  what each feature adds to a row's score, and reasons in words
    POST /v1/sentiment              texts, labelled; with /explain, what each token adds
    POST /v1/graphql                the same, by GraphQL; and by gRPC, on a port of its own
    GET  /metrics                   for Prometheus
    GET  /healthz                   200 when every model is loaded and has passed its smoke test
    GET  /docs                      the OpenAPI page

HAProxy listens, in front of replicas that hold every model, but for those with replicas of their
own. A champion's or challenger's change in the registry reaches each replica within seconds; one
that fails its smoke test is refused, and the former goes on answering. Loading runs pickled code:
serve only a registry you trust.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster import ports
from models.registry import Registry
from serving import checks, deploying, rates
from serving.access import AccessFiles
from serving.checks import HOSTS
from serving.engine import controller, deployed, engine, running
from serving.gate import Gate
from serving.online import Stores
from serving.readiness import wait
from serving.settings import Limits, Listener, Rollout, Running, ServingError, Settings

__all__ = ["HOSTS", "Applied", "ServingError", "apply", "follow", "running", "serve", "stop"]


def serve(
    tracking_uri: str,
    *,
    host: str = "127.0.0.1",
    port: int,
    models: Sequence[str] | None = None,
    limits: Limits | None = None,
    cpus: float = 1.0,
    refresh_s: float = 2.0,
    timeout_s: float = 60.0,
    access: AccessFiles | None = None,
) -> str:
    """Serves the champions on the connected Ray cluster, until `stop` or the cluster's end.

    Where the application already runs with the same settings, it stays as it is.

    Args:
        tracking_uri: The registry, as `Registry` takes it; the cluster reaches it too.
        host: "127.0.0.1", or "0.0.0.0" for every interface.
        port: Port to listen on.
        models: Which models; None for all that have a champion, now or later (a new name is found
            in ten times `refresh_s`).
        limits: None for the defaults of `Limits`.
        cpus: CPUs that the replica takes of the cluster; scoring is one thread a model.
        refresh_s: Seconds between two looks for new champions.
        timeout_s: Seconds to be ready in.
        access: Keys, policy and audit log, on files that the replica reaches; None lets everyone in
            who reaches the address.

    Returns:
        The base URL, when every model answers.

    Raises:
        AccessError: The keys or the policy can't be used.
        AuditError: The audit log goes on from no whole line.
        ServingError: Ray isn't connected, Serve already runs there with other settings, the port
            is taken, a model has no champion or fails its smoke test, or it isn't ready in time.
            Then nothing is started.
        OSError: The registry can't be read.
    """
    settings = Settings(
        registry=Registry(tracking_uri).uri,
        models=None if models is None else {name: Rollout() for name in models},
        limits=limits or Limits(),
        refresh_s=refresh_s,
        access=None if access is None else access.absolute(),
    )
    listener = Listener(host="127.0.0.1" if host == "localhost" else host, port=port)
    here = running()
    if here is not None:
        wanted = replace(here, settings=settings, listener=listener, cpus=cpus)
        if differences := here.differences(wanted):
            raise ServingError(
                f"Serve already runs on this Ray cluster, at {here.listener.url}, but not with "
                f"these settings ({', '.join(differences)} differ): call serving.app.stop() first, "
                "or ask for what runs (new champions reach it by themselves)"
            )
        # What can't be opened is told here, by its own error.
        Gate.opened(settings)
        wait(here, here.all, time.monotonic() + timeout_s)
        return here.listener.url
    return apply(settings, listener, cpus=cpus, timeout_s=timeout_s).url


@dataclass(frozen=True, kw_only=True)
class Applied:
    """What `apply` did.

    Attributes:
        url: The base URL.
        changed: Dotted names of what it changed, such as `settings.limits.rows`; None where
            nothing ran before.
    """

    url: str
    changed: tuple[str, ...] | None


def apply(
    settings: Settings,
    listener: Listener,
    *,
    replicas: int = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    timeout_s: float = 60.0,
) -> Applied:
    """Brings what the connected cluster serves to these settings, without a failed request.

    Replicas take changed settings on as they run, and more or fewer of them join or go. Where the
    code, `cpus` or `gpus` changed, new replicas take the place of the old ones, each once it is
    ready, for which the cluster needs room for one more.

    Args:
        settings: What is served.
        listener: Where; only `stop` and another start change it.
        replicas: How many hold the models that have none of their own.
        cpus: CPUs that each replica takes of the cluster.
        gpus: GPUs that each of `replicas` takes of the cluster; below 1 a share of one.
        timeout_s: Seconds to be ready in.

    Raises:
        AccessError: The keys or the policy can't be used.
        AuditError: The audit log goes on from no whole line.
        ServingError: As `serve`; also, the listener isn't the one that runs, a version that is
            named isn't there or fails its smoke test, or the cluster hasn't the GPUs. What ran
            before then goes on: of a change, with those of the new settings that hold.
        OSError: The registry, or a file of the settings, can't be read.
    """
    deadline = time.monotonic() + timeout_s
    here = running()
    # What can't be opened is told here, by its own error, before anything is changed.
    Gate.opened(settings)
    if here is None:
        checks.require_files(listener)
        checks.require_address(listener.host, listener.port)
        if listener.grpc_port is not None:
            checks.require_address(listener.host, listener.grpc_port)
    elif here.listener != listener:
        raise ServingError(
            f"Serve listens at {here.listener}, and {listener} is asked for; where it listens, and "
            "TLS, change only with a new start: `liftyard serve FILE --restart`"
        )
    checks.require_versions(settings)
    if settings.store is not None:
        Stores(Path(settings.store))
    # Without TLS, Serve listens where clients connect.
    host, port, grpc_port = listener.host, listener.port, listener.grpc_port
    if here is None and listener.tls is not None:
        host = "127.0.0.1"
        port, inner = ports.free(2)
        grpc_port = None if grpc_port is None else inner
    wanted = Running(
        settings=settings,
        listener=listener,
        replicas=replicas,
        cpus=cpus,
        gpus=gpus,
        direct=f"http://127.0.0.1:{port}" if here is None else here.direct,
        code=deploying.code(),
    )
    checks.require_gpus(wanted)
    if here is None:
        try:
            deploying.start(listener, host, port, grpc_port)
            deploying.roll(wanted, deadline)
        except BaseException:
            stop()
            raise
        return Applied(url=listener.url, changed=None)
    changed = here.differences(wanted)
    # A change that was cut off may have left applications of models that others hold again.
    if changed or deployed().keys() != wanted.all.keys():
        deploying.roll(wanted, deadline)
    else:
        wait(wanted, wanted.all, deadline)
    return Applied(url=listener.url, changed=tuple(changed))


def follow(tracking_uri: str, *, timeout_s: float = 60.0) -> Running | None:
    """Waits until what the cluster serves are the registry's versions of this moment.

    Args:
        tracking_uri: The registry.
        timeout_s: Seconds to wait.

    Returns:
        What it serves with, or None where it serves nothing.

    Raises:
        ServingError: Ray isn't connected, another registry is served, a version is refused, or it
            takes too long.
        OSError: The registry can't be read.
    """
    here = running()
    uri = Registry(tracking_uri).uri
    if here is not None and here.settings.registry != uri:
        raise ServingError(
            f"what runs on this Ray cluster serves {here.settings.registry}, not {uri}: call "
            "serving.app.stop() first, or name that registry"
        )
    if here is not None:
        wait(here, here.all, time.monotonic() + timeout_s)
    return here


def stop() -> None:
    """Ends the application, its listener and Serve on the connected cluster; twice does no harm."""
    import ray

    here = controller() if ray.is_initialized() else None
    if here is not None:
        serving = engine()
        # serve.shutdown alone waits inside the controller until that is killed, for which Ray then
        # prints an error.
        ray.get(here.graceful_shutdown.remote(wait=False))
        deadline = time.monotonic() + 30
        while controller() is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        serving.shutdown()
        rates.end()
