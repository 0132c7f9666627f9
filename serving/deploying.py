"""What is handed to Ray Serve, and in which order, so that no request fails on the way.

The models that share replicas are one application, under "/". One with replicas of its own is a
further one, under "/v1/models/NAME", to which HAProxy hands what comes by that path: such a request
takes no way through the others, and waits in no queue of theirs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serving import haproxy, rates
from serving.engine import deployed, engine
from serving.fleet import DEPLOYMENT
from serving.readiness import wait
from serving.rpc import SERVICER
from serving.server import Server
from serving.settings import Listener, Running, application


def start(listener: Listener, host: str, port: int, grpc_port: int | None) -> None:
    """Starts Serve and its listener on the connected cluster.

    Args:
        listener: Where clients connect.
        host: Where Serve listens; with TLS, HAProxy listens for clients beside that.
        port: See `host`.
        grpc_port: See `host`.
    """
    serving = engine()
    from ray.serve.config import HTTPOptions, gRPCOptions

    grpc = None
    if grpc_port is not None:
        grpc = gRPCOptions(port=grpc_port, grpc_servicer_functions=[SERVICER])

    serving.start(
        proxy_location="HeadOnly",
        http_options=HTTPOptions(host=host, port=port),
        grpc_options=grpc,
        controller_options={"runtime_env": {"env_vars": haproxy.environment(listener)}},
    )


def roll(wanted: Running, deadline: float) -> None:
    """Starts the replicas, or brings them to other settings, and waits until they are ready.

    Args:
        wanted: What is to run.
        deadline: `time.monotonic` to be ready by.

    Raises:
        ServingError: They aren't ready in time, or refuse what is wanted.
    """
    before, alone = deployed(), set(wanted.settings.alone)
    new = sorted(alone - before.keys()) if before else []
    # By their path they are asked only once they answer; until then the others go on.
    starting = {model: f"/-/starting/{model}" for model in new}
    _deploy(wanted, starting)
    for model, path in starting.items():
        wait(wanted, [model], deadline, path=path)
    _deploy(wanted, {model: _path(model) for model in wanted.all})
    wait(wanted, wanted.all, deadline)
    gone = [model for model in before if model is not None and model not in alone]
    for model in gone:
        # The others have it now. What is on its way is still answered, then the replicas end.
        _deploy(before[model], {model: None})
        engine().delete(application(model))
    if wanted.total == 1:
        rates.end()


def _deploy(wanted: Running, paths: Mapping[Any, str | None]) -> None:
    """Hands the models' applications to Ray Serve, each under its path, or under none."""
    targets = [
        engine().RunTarget(
            target=_deployment(wanted, model).bind(wanted.settings, model),
            name=application(model),
            route_prefix=path,
        )
        for model, path in paths.items()
    ]
    if targets:
        engine().run_many(targets, wait_for_applications_running=False)


def _path(model: str | None) -> str:
    return "/" if model is None else f"/v1/models/{model}"


def _deployment(wanted: Running, model: str | None) -> Any:
    serving = engine()
    from ray.serve.config import BackpressureConfig

    limits, replicas = wanted.settings.limits, wanted.all[model]
    gpus = wanted.gpus if model is None else wanted.settings.rollout(model).gpus
    share = {"num_gpus": gpus} if gpus else {}
    deployment = serving.deployment(
        name=DEPLOYMENT,
        num_replicas=replicas,
        max_ongoing_requests=limits.ongoing,
        max_queued_requests=limits.queued,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        ray_actor_options={"num_cpus": wanted.cpus, **share},
        # The next replica before the last one goes, one at a time.
        max_surge_percent=max(1, 100 // replicas),
        user_config=asdict(wanted),
        # Serve makes a record of each request at level INFO, kept or not, in a tenth of a score's
        # time; what is Liftyard's own at that level has its own logger.
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
    )(serving.ingress()(Server))
    # Serve starts a replica anew where this differs, and by itself would do so at every call.
    deployment._version = wanted.code
    return deployment


def code() -> str:
    """Digest of the code that replicas run."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for package in ("cluster", "models", "serving"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
