"""Room on the Ray cluster for Dask's workers: a bundle each, all that are asked for or none."""

from dataclasses import dataclass
from typing import Any


class LeaseError(ValueError):
    """The cluster can't give what was asked; the message names both."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What a worker holds; memory is reserved, and 0 sets no limit."""

    cpus: float
    gpus: float
    memory_bytes: int

    def bundle(self) -> dict[str, float]:
        """As Ray takes it."""
        asked = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory_bytes)}
        return {name: amount for name, amount in asked.items() if amount > 0}


def strategy(group: Any, index: int) -> Any:
    """What schedules an actor into a bundle of the group."""
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    return PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=index
    )


def require_free(size: Size, workers: int) -> None:
    """Refuses, as LeaseError, so many workers more than others leave room for."""
    _check_room(size, workers, _resources()[1])


def place(size: Size, workers: int, timeout_s: float) -> Any:
    """Reserves `workers` bundles together, or refuses (LeaseError) and leaves none reserved."""
    import ray

    _check_room(size, workers, _resources()[0])
    group = ray.util.placement_group([size.bundle()] * workers, strategy="PACK")
    if not group.wait(timeout_s):
        ray.util.remove_placement_group(group)
        raise _refusal(size, workers)
    return group


def place_singly(size: Size, workers: int, timeout_s: float) -> list[Any]:
    """Reserves a group for each worker; all of them or none."""
    import ray

    groups: list[Any] = []
    try:
        for _ in range(workers):
            groups.append(place(size, 1, timeout_s))
    except LeaseError:
        for group in groups:
            ray.util.remove_placement_group(group)
        raise
    return groups


def _resources() -> tuple[dict[str, float], dict[str, float]]:
    """What the whole cluster has, and what of it is free."""
    import ray

    ray_: Any = ray
    return ray_.cluster_resources(), ray_.available_resources()


def _check_room(size: Size, workers: int, room: dict[str, float]) -> None:
    bundle = size.bundle()
    if any(amount * workers > room.get(name, 0.0) for name, amount in bundle.items()):
        raise _refusal(size, workers)


def _refusal(size: Size, workers: int) -> LeaseError:
    total, free = _resources()

    def say(amounts: dict[str, float]) -> str:
        return ", ".join(f"{name} {amounts.get(name, 0.0):g}" for name in ("CPU", "GPU", "memory"))

    return LeaseError(
        f"asked for {workers} workers of {say(size.bundle())} each; the cluster has "
        f"{say(total)}, free {say(free)} (memory in bytes): "
        "ask for fewer or smaller workers, or wait until others give theirs back"
    )
