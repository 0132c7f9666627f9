"""Waits until each replica serves what is wanted, by what each tells of itself."""

import socket
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from models.registry import Registry
from serving.engine import engine
from serving.replica import champions
from serving.settings import Listener, Running, ServingError, Settings, application


def wait(
    wanted: Running, models: Collection[str | None], deadline: float, *, path: str = ""
) -> None:
    """Until each model's version answers at each replica.

    Args:
        wanted: What is to run.
        models: Of which replicas: of a model that is held alone, or None for those that share.
        deadline: `time.monotonic` to be ready by.
        path: Under which one of them is asked.

    Raises:
        ServingError: A version was refused, settings weren't taken on, or it takes too long.
    """
    import httpx

    registry = Registry(wanted.settings.registry)
    url = f"{wanted.direct}{path}/healthz"
    said: str | None = ""
    with httpx.Client(timeout=10.0, trust_env=False) as client:
        while time.monotonic() < deadline:
            said = next(filter(None, (_not_running(wanted, model) for model in models)), None)
            if said is None:
                try:
                    answer = client.get(url)
                except httpx.TransportError as error:
                    said = f"{url} doesn't answer: {error!r}"
                else:
                    said = f"{url} says {answer.status_code}: {answer.text}"
                    # 503 of a service in which something that isn't waited for isn't ready.
                    if answer.status_code in (200, 503) and all(
                        _serve(answer.json()["replicas"], wanted, model, registry)
                        for model in models
                    ):
                        _require_listening(wanted.listener)
                        return
            time.sleep(0.05)
    raise ServingError(f"not ready in time: {said}")


def _not_running(wanted: Running, model: str | None) -> str | None:
    """What Ray Serve lacks of the application; None where all of its replicas run."""
    name = application(model)
    status = engine().status().applications.get(name)
    if status is not None and status.status == "DEPLOY_FAILED":
        raise ServingError(f"{name} failed to start: {status.message.strip()}")
    if status is None or status.status != "RUNNING":
        return f"{name} hasn't started {wanted.all[model]}; are there CPUs left on the cluster?"
    return None


def _serve(
    replicas: Sequence[Mapping[str, Any]], wanted: Running, model: str | None, registry: Registry
) -> bool:
    """Whether the model's replicas are there, and each serves what is wanted."""
    found = [each for each in replicas if each["alone"] == model]
    serve = [_serves(each, wanted.settings, model, registry) for each in found]
    return len(found) == wanted.all[model] and all(serve)


def _require_listening(listener: Listener) -> None:
    # HAProxy listens on all of its addresses or on none.
    host = "127.0.0.1" if listener.host == "0.0.0.0" else listener.host
    try:
        socket.create_connection((host, listener.port), timeout=5).close()
    except OSError as error:
        raise ServingError(f"{listener.url} doesn't answer: {error}") from error


def _serves(
    health: Mapping[str, Any], settings: Settings, model: str | None, registry: Registry
) -> bool:
    if health["settings"] != settings.digest():
        if health["not_applied"] is not None:
            raise ServingError(
                f"the replica keeps its former settings: {health['not_applied']}; correct that, "
                "and apply again"
            )
        return False
    held = settings.held(model)
    names = held if held is not None else sorted(champions(registry))
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
