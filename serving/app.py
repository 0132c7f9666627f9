"""The serving application: the registry's champions behind HTTP, on the connected Ray cluster.

    POST /v1/models/{name}/score    {"rows": [{field: value, ...}, ...]} -> model, version, scores
    GET  /v1/models                 the cards of what is served
    POST /v1/models/{name}/explain  what each feature adds to a row's score, and reasons in words
    GET  /metrics                   for Prometheus
    GET  /healthz                   200 when every model is loaded and has passed its smoke test
    GET  /docs                      the OpenAPI page

HAProxy listens, in front of one replica that holds every model. A champion's change in the
registry reaches the replica within seconds; one that fails its smoke test is refused, and the
former goes on answering. Loading runs pickled code: serve only a registry you trust.
"""

import logging
import socket
import time
import warnings
from collections.abc import Sequence
from typing import Any

from models.registry import Registry
from serving import haproxy
from serving.access import AccessFiles
from serving.gate import Gate
from serving.replica import Server, champions
from serving.settings import Limits, ServingError, Settings

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
    import ray

    engine = _engine()
    from ray.serve.config import BackpressureConfig, HTTPOptions

    if not ray.is_initialized():
        raise ServingError("Ray isn't connected; call serve inside cluster.session.connect()")
    started = time.monotonic()
    host = "127.0.0.1" if host == "localhost" else host
    url = f"http://{host}:{port}"
    registry = Registry(tracking_uri)
    settings = Settings(
        registry=registry.uri,
        models=None if models is None else tuple(models),
        limits=limits or Limits(),
        refresh_s=refresh_s,
        access=None if access is None else access.absolute(),
    )
    # What can't be opened is told here, by its own error.
    Gate(settings)
    if _controller() is not None:
        _require_same(url, settings)
        names = _require_champions(registry, models)
        _wait_until_ready(url, registry, names, started + timeout_s)
        return url
    _require_address(host, port)
    names = _require_champions(registry, models)
    deployment = engine.deployment(
        name="Server",
        num_replicas=1,
        max_ongoing_requests=settings.limits.ongoing,
        max_queued_requests=settings.limits.queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        ray_actor_options={"num_cpus": cpus},
        logging_config={"enable_access_log": False},
    )(engine.ingress()(Server))
    try:
        engine.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=host, port=port),
            controller_options={"runtime_env": {"env_vars": haproxy.environment()}},
        )
        engine.run_many(
            [
                engine.RunTarget(
                    target=deployment.bind(settings),
                    name=APPLICATION,
                    route_prefix="/",
                )
            ],
            wait_for_applications_running=False,
        )
        _wait_until_ready(url, registry, names, started + timeout_s)
    except BaseException:
        stop()
        raise
    return url


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


def _require_champions(registry: Registry, models: Sequence[str] | None) -> list[str]:
    """The names to serve."""
    there = champions(registry)
    missing = [name for name in models or () if name not in there]
    if missing or not there or (models is not None and not models):
        what = f"models {missing} have no champion" if missing else "there is nothing to serve"
        raise ServingError(
            f"{what} in {registry.uri}; there are champions of {sorted(there)}: "
            "register and promote a version, or name others"
        )
    return sorted(there if models is None else models)


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


def _require_same(url: str, settings: Settings) -> None:
    """What already runs on this cluster is what is asked for."""
    import httpx

    try:
        answer = httpx.get(f"{url}/healthz", timeout=5.0, trust_env=False).json()
    except (httpx.TransportError, ValueError) as error:
        answer = {"settings": f"none ({error!r})"}
    if answer.get("settings") != settings.digest():
        raise ServingError(
            f"Serve already runs on this Ray cluster, but at {url} not with these settings: call "
            "serving.app.stop() first, or ask for what runs (new champions reach it by themselves)"
        )


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
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None


def _wait_until_ready(url: str, registry: Registry, names: Sequence[str], deadline: float) -> None:
    """Until each model's champion answers; one that was refused, or a time-out, is an error."""
    import httpx

    engine = _engine()
    said = "the application hasn't started; are there CPUs left on the cluster?"
    with httpx.Client(timeout=5.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            status = engine.status().applications.get(APPLICATION)
            if status is not None and status.status == "DEPLOY_FAILED":
                raise ServingError(f"the application failed to start: {status.message.strip()}")
            if status is not None and status.status == "RUNNING":
                try:
                    answer = client.get(f"{url}/healthz")
                except httpx.TransportError as error:
                    said = f"{url} doesn't answer: {error!r}"
                else:
                    said = f"/healthz says {answer.status_code}: {answer.text}"
                    if answer.status_code in (200, 503) and _serves(answer.json(), registry, names):
                        return
            time.sleep(0.05)
    raise ServingError(f"not ready in time: {said}")


def _serves(health: dict[str, Any], registry: Registry, names: Sequence[str]) -> bool:
    refused = {name: why for name, why in health["refused"].items() if name in names}
    if refused:
        raise ServingError(
            f"models were refused: {refused}; what answers is {health['models']}: promote or "
            "roll back to a version that passes"
        )
    champions = {name: registry.champion(name) for name in names}
    return all(
        card is not None and health["models"].get(name) == card.version
        for name, card in champions.items()
    )
