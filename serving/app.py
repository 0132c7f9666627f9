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

HAProxy listens, in front of one replica that holds every model. A champion's or challenger's change
in the registry reaches the replica within seconds; one that fails its smoke test is refused, and
the former goes on answering. Loading runs pickled code: serve only a registry you trust.
"""

import hashlib
import logging
import socket
import ssl
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cluster import ports
from models.registry import Registry
from models.registry_connection import RegistryError
from serving import haproxy
from serving.access import AccessFiles
from serving.gate import Gate
from serving.online import Stores
from serving.replica import champions
from serving.rpc import SERVICER
from serving.server import Server
from serving.settings import Limits, Listener, Rollout, Running, ServingError, Settings

APPLICATION = "liftyard"

HOSTS = ("127.0.0.1", "0.0.0.0")

log = logging.getLogger("ray.serve")


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
        _wait_until_ready(here, time.monotonic() + timeout_s)
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
    settings: Settings, listener: Listener, *, cpus: float = 1.0, timeout_s: float = 60.0
) -> Applied:
    """Brings what the connected cluster serves to these settings, without a failed request.

    Replicas take changed settings on as they run. Where the code or `cpus` changed, a new replica
    takes the place of the old one once it is ready, for which the cluster needs CPUs for both.

    Args:
        settings: What is served.
        listener: Where; only `stop` and another start change it.
        cpus: CPUs that the replica takes of the cluster.
        timeout_s: Seconds to be ready in.

    Raises:
        AccessError: The keys or the policy can't be used.
        AuditError: The audit log goes on from no whole line.
        ServingError: As `serve`; also, the listener isn't the one that runs, or a version that is
            named isn't there or fails its smoke test. What ran before then goes on: of a change,
            with those of the new settings that hold.
        OSError: The registry, or a file of the settings, can't be read.
    """
    started = time.monotonic()
    here = running()
    # What can't be opened is told here, by its own error, before anything is changed.
    Gate.opened(settings)
    if here is None:
        _require_files(listener)
        _require_address(listener.host, listener.port)
        if listener.grpc_port is not None:
            _require_address(listener.host, listener.grpc_port)
    _require_versions(settings)
    if settings.store is not None:
        Stores(Path(settings.store))
    if here is None:
        # Without TLS, Serve listens where clients connect.
        host, port, grpc_port = listener.host, listener.port, listener.grpc_port
        if listener.tls is not None:
            host = "127.0.0.1"
            port, inner = ports.free(2)
            grpc_port = None if grpc_port is None else inner
        wanted = Running(
            settings=settings,
            listener=listener,
            cpus=cpus,
            direct=f"http://127.0.0.1:{port}",
            code=_code(),
        )
        try:
            _start(listener, host, port, grpc_port)
            _deploy(wanted)
            _wait_until_ready(wanted, started + timeout_s)
        except BaseException:
            stop()
            raise
        return Applied(url=listener.url, changed=None)
    if here.listener != listener:
        raise ServingError(
            f"Serve listens at {here.listener}, and {listener} is asked for; where it listens, and "
            "TLS, change only with a new start: `liftyard serve FILE --restart`"
        )
    wanted = replace(here, settings=settings, cpus=cpus, code=_code())
    changed = here.differences(wanted)
    if changed:
        _deploy(wanted)
    _wait_until_ready(wanted, started + timeout_s)
    return Applied(url=listener.url, changed=tuple(changed))


def running() -> Running | None:
    """What the connected cluster serves with; None where it serves nothing.

    Raises:
        ServingError: Ray isn't connected, or Serve there runs something else.
    """
    import ray

    if not ray.is_initialized():
        raise ServingError("Ray isn't connected; call this inside cluster.session.connect()")
    controller = _controller()
    if controller is None:
        return None
    found = ray.get(controller.get_serve_instance_details.remote())["applications"]
    try:
        deployment = found[APPLICATION]["deployments"]["Server"]
        return Running.from_dict(deployment["deployment_config"]["user_config"])
    except (KeyError, TypeError, ValidationError) as error:
        raise ServingError(
            f"Serve already runs on this Ray cluster, but not Liftyard ({sorted(found)}): call "
            "serving.app.stop() first"
        ) from error


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
        _wait_until_ready(here, time.monotonic() + timeout_s)
    return here


def stop() -> None:
    """Ends the application, its listener and Serve on the connected cluster; twice does no harm."""
    import ray

    controller = _controller() if ray.is_initialized() else None
    if controller is not None:
        engine = _engine()
        # serve.shutdown alone waits inside the controller until that is killed, for which Ray then
        # prints an error.
        ray.get(controller.graceful_shutdown.remote(wait=False))
        deadline = time.monotonic() + 30
        while _controller() is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        engine.shutdown()


def _start(listener: Listener, host: str, port: int, grpc_port: int | None) -> None:
    """Starts Serve and its listener."""
    engine = _engine()
    from ray.serve.config import HTTPOptions, gRPCOptions

    grpc = None
    if grpc_port is not None:
        grpc = gRPCOptions(port=grpc_port, grpc_servicer_functions=[SERVICER])

    engine.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=host, port=port),
        grpc_options=grpc,
        controller_options={"runtime_env": {"env_vars": haproxy.environment(listener)}},
    )


def _deploy(wanted: Running) -> None:
    """Starts the replica, or brings it to other settings."""
    engine = _engine()
    from ray.serve.config import BackpressureConfig

    limits = wanted.settings.limits
    deployment = engine.deployment(
        name="Server",
        num_replicas=1,
        max_ongoing_requests=limits.ongoing,
        max_queued_requests=limits.queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        ray_actor_options={"num_cpus": wanted.cpus},
        # The next replica before the last one goes.
        max_surge_percent=100,
        user_config=asdict(wanted),
        logging_config={"enable_access_log": False},
    )(engine.ingress()(Server))
    # Serve starts a replica anew where this differs, and by itself would do so at every call.
    deployment._version = wanted.code
    target = engine.RunTarget(
        target=deployment.bind(wanted.settings), name=APPLICATION, route_prefix="/"
    )
    engine.run_many([target], wait_for_applications_running=False)


def _code() -> str:
    """Digest of the code that replicas run."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for package in ("cluster", "models", "serving"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _require_versions(settings: Settings) -> None:
    """What is named is there."""
    registry = Registry(settings.registry)
    there = champions(registry)
    named = settings.models
    for name, rollout in (named or {}).items():
        if rollout.version is not None:
            try:
                registry.card(name, rollout.version)
            except RegistryError as error:
                raise ServingError(f"models.{name}.version: {error}") from error
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


def _require_files(listener: Listener) -> None:
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


def _require_address(host: str, port: int) -> None:
    """Two listeners of Ray share a port without a word, and then answer 404 at random."""
    if host not in HOSTS or not 1 <= port <= 65_535:
        raise ServingError(
            f"can't listen on {host}:{port}: allowed are the hosts {HOSTS} (HAProxy reaches the "
            "replica by loopback) and the ports 1 to 65535"
        )
    with socket.socket() as probe:
        # Else a connection closed a minute ago counts as a listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServingError(
                f"can't listen on {host}:{port} ({error.strerror}); choose another port, or end "
                "what holds it"
            ) from error


def _engine() -> Any:
    """`ray.serve`, imported without the warning that its own classes cause."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message="Using extra keyword arguments on `Field`",
            category=DeprecationWarning,
        )
        from ray import serve as engine
    # Serve's notes on its own progress; what goes wrong is in the errors raised here.
    log.setLevel(logging.WARNING)
    return engine


def _controller() -> Any:
    """Serve's controller on the connected cluster, or None."""
    import ray

    _engine()
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None


def _wait_until_ready(wanted: Running, deadline: float) -> None:
    """Until each model's version answers; one that was refused, or a time-out, is an error."""
    import httpx

    engine = _engine()
    registry = Registry(wanted.settings.registry)
    said = "the application hasn't started; are there CPUs left on the cluster?"
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            status = engine.status().applications.get(APPLICATION)
            if status is not None and status.status == "DEPLOY_FAILED":
                raise ServingError(f"the application failed to start: {status.message.strip()}")
            if status is not None and status.status == "RUNNING":
                try:
                    answer = client.get(f"{wanted.direct}/healthz")
                except httpx.TransportError as error:
                    said = f"{wanted.direct} doesn't answer: {error!r}"
                else:
                    said = f"/healthz says {answer.status_code}: {answer.text}"
                    if answer.status_code in (200, 503) and _serves(
                        answer.json(), wanted.settings, registry
                    ):
                        _require_listening(wanted.listener)
                        return
            time.sleep(0.05)
    raise ServingError(f"not ready in time: {said}")


def _require_listening(listener: Listener) -> None:
    # HAProxy listens on all of its addresses or on none.
    host = "127.0.0.1" if listener.host == "0.0.0.0" else listener.host
    try:
        socket.create_connection((host, listener.port), timeout=5).close()
    except OSError as error:
        raise ServingError(f"{listener.url} doesn't answer: {error}") from error


def _serves(health: dict[str, Any], settings: Settings, registry: Registry) -> bool:
    if health["settings"] != settings.digest():
        if health["not_applied"] is not None:
            raise ServingError(
                f"the replica keeps its former settings: {health['not_applied']}; correct that, "
                "and apply again"
            )
        return False
    names = list(settings.models) if settings.models is not None else sorted(champions(registry))
    refused = {name: why for name, why in health["refused"].items() if name in names}
    if refused:
        raise ServingError(
            f"models were refused: {refused}; what answers is {health['models']}: promote or "
            "roll back to a version that passes"
        )
    return all(
        version is not None and health["models"].get(name) == version
        for name, version in ((name, _version(name, settings, registry)) for name in names)
    )


def _version(name: str, settings: Settings, registry: Registry) -> int | None:
    if (pinned := settings.rollout(name).version) is not None:
        return pinned
    card = registry.champion(name)
    return None if card is None else card.version
