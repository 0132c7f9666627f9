"""Ray Serve on the connected cluster: what it runs, and how it is told."""

import logging
import warnings
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from serving.fleet import DEPLOYMENT
from serving.settings import APPLICATION, Running, ServingError

log = logging.getLogger("ray.serve")


def engine() -> Any:
    """`ray.serve`, imported without the warning that its own classes cause."""
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            message="Using extra keyword arguments on `Field`",
            category=DeprecationWarning,
        )
        from ray import serve
    # Serve's notes on its own progress; what goes wrong is in the errors raised here.
    log.setLevel(logging.WARNING)
    return serve


def controller() -> Any:
    """Serve's controller on the connected cluster, or None."""
    import ray

    engine()
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    try:
        return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:
        return None


def running() -> Running | None:
    """What the connected cluster serves with; None where it serves nothing.

    Raises:
        ServingError: Ray isn't connected, or Serve there runs something else.
    """
    told = deployed()
    if None not in told and controller() is not None:
        raise _foreign(told)
    return told.get(None)


def deployed() -> dict[str | None, Running]:
    """What each application was told, by the model that it holds alone; None for the shared.

    Raises:
        ServingError: Ray isn't connected, or Serve there runs something else.
    """
    import ray

    if not ray.is_initialized():
        raise ServingError("Ray isn't connected; call this inside cluster.session.connect()")
    here = controller()
    if here is None:
        return {}
    found = ray.get(here.get_serve_instance_details.remote())["applications"]
    try:
        return {
            _alone(name): Running.from_dict(
                each["deployments"][DEPLOYMENT]["deployment_config"]["user_config"]
            )
            for name, each in found.items()
        }
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        raise _foreign(found) from error


def _alone(name: str) -> str | None:
    if name == APPLICATION:
        return None
    if not name.startswith(f"{APPLICATION}-"):
        raise ValueError(name)
    return name.removeprefix(f"{APPLICATION}-")


def _foreign(found: Mapping[Any, Any]) -> ServingError:
    return ServingError(
        f"Serve already runs on this Ray cluster, but not Liftyard ({list(found)}): call "
        "serving.app.stop() first"
    )
