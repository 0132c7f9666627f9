"""Warm Ray actors that train packs: how many there is room for, and where each is.

An actor that holds a share of a GPU trains on that GPU or not at all: where CUDA can't be used it
says so, since XGBoost would go on with the CPU.
"""

import gc
import os
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cluster.device import DeviceError, choose
from jobs.sweep_board import Outcome
from jobs.sweep_packs import Train, fit_pack
from models.families import Fitted, TrainingData, Variant

# What others gave back is free a moment later.
SETTLE_S = 5.0


class SweepError(RuntimeError):
    """The sweep can't go on; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where an actor is.

    Attributes:
        node: Its machine's name.
        device: "cpu" or "cuda".
        gpus: The GPUs that it holds, or holds a share of, by Ray's numbers on that machine.
        lacks: Why it can't use them, or None.
    """

    node: str
    device: str
    gpus: tuple[str, ...]
    lacks: str | None


class Pool:
    """Warm actors; made by `pool`."""

    def __init__(self, actors: Sequence[Any], gpus: float) -> None:
        """Takes what `pool` has started, and the GPUs of each."""
        self.actors, self.gpus = list(actors), gpus
        self.device = "cuda" if gpus else "cpu"
        # Families that each has trained.
        self.at_home: dict[Any, set[str]] = {actor: set() for actor in self.actors}

    def places(self) -> list[Place]:
        """Where each actor is; waits until it is there."""
        import ray

        found: list[Place] = ray.get([actor.place.remote() for actor in self.actors])
        return found


@contextmanager
def pool(workers: int, *, cpus: float = 1, gpus: float = 0) -> Iterator[Pool]:
    """Actors on the connected Ray cluster, for any number of sweeps; ended on exit.

    Args:
        workers: How many at most; fewer where others hold the cluster's CPUs or GPUs, since an
            actor without room would keep its packs waiting. Waits for room for one.
        cpus: CPUs of each, which is also the number of threads that its libraries may use.
        gpus: GPUs of each, or below 1 the share of one that several actors use together; above 0
            boosting, forests and networks train on CUDA.

    Raises:
        SweepError: A number is out of range, or no machine of the cluster holds even one.
    """
    import ray

    if workers < 1 or cpus <= 0 or gpus < 0 or (gpus > 1 and gpus % 1):
        raise SweepError(
            f"workers={workers}, cpus={cpus:g}, gpus={gpus:g}: workers is at least 1, cpus above "
            "0, and gpus 0, a share below 1, or a whole number"
        )
    worker: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=2)(
        _Worker
    )
    room = _room(workers, cpus, gpus)
    device = "cuda" if gpus else "cpu"
    actors = [worker.remote(max(1, int(cpus)), device) for _ in range(room)]
    try:
        yield Pool(actors, gpus)
    finally:
        for actor in actors:
            ray.kill(actor)


def _room(wanted: int, cpus: float, gpus: float) -> int:
    """How many actors the cluster has room for now, at least 1."""
    import ray

    nodes: list[dict[str, Any]] = [
        node["Resources"]
        for node in ray.nodes()  # type: ignore[no-untyped-call]
        if node["Alive"]
    ]
    if not sum(_fitting(node, cpus, gpus) for node in nodes):
        has = "; ".join(f"CPU {n.get('CPU', 0):g}, GPU {n.get('GPU', 0):g}" for n in nodes)
        raise SweepError(
            f"a worker of CPU {cpus:g} and GPU {gpus:g} fits on no machine of the cluster, which "
            f"has: {has}. Ask for smaller workers, or add such a machine"
        )
    deadline = time.monotonic() + SETTLE_S
    while True:
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        room = _fitting(free, cpus, gpus)
        if room >= wanted or time.monotonic() > deadline:
            return max(1, min(room, wanted))
        time.sleep(0.1)


def _fitting(has: dict[str, float], cpus: float, gpus: float) -> int:
    """How many actors fit; a share of a GPU is of one, never of two."""
    by_cpu = _times(has.get("CPU", 0.0), cpus)
    if not gpus:
        return by_cpu
    cards, rest = divmod(has.get("GPU", 0.0), 1)
    by_gpu = _times(cards, gpus) if gpus >= 1 else int(cards) * _times(1, gpus) + _times(rest, gpus)
    return min(by_cpu, by_gpu)


def _times(has: float, each: float) -> int:
    # In Ray's own steps: 0.3 holds 0.1 three times.
    return round(has * 10_000) // max(1, round(each * 10_000))


class _Worker:
    def __init__(self, threads: int, device: str) -> None:
        import ray
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)
        self._device = device
        gpus: list[Any] = ray.get_gpu_ids()
        # Ray has shown this process those alone, so that each library's first GPU is the one.
        found = choose("auto" if device == "cuda" else "cpu", rapids=False)
        self._place = Place(
            node=socket.gethostname(),
            device=device,
            gpus=tuple(str(each) for each in gpus),
            lacks=found.reason if found.kind != device else None,
        )
        self._of: Any = None
        self._data: Any = None
        self._trained_none = True
        # Boosters that may go on, by their packs' numbers.
        self._held: dict[int, dict[str, Any]] = {}

    def place(self) -> Place:
        return self._place

    def train(
        self,
        train: Train,
        pack: list[Variant],
        data: list[Any],
        number: int,
        until: int | None,
        looks: Sequence[int],
        dropped: Sequence[int],
    ) -> list[Outcome]:
        self._require_device()
        rows = self._rows(data)
        for each in dropped:
            self._held.pop(each, None)
        held = self._held.setdefault(number, {})
        outcomes = train(pack, rows, device=self._device, until=until, looks=looks, held=held)
        if self._trained_none:
            # What was imported stays: a full collection needn't walk it again during training.
            gc.freeze()
            self._trained_none = False
        if not held:
            del self._held[number]
        return outcomes

    def fit(self, pack: list[Variant], data: list[Any], metric: str) -> list[Fitted]:
        self._require_device()
        rows: TrainingData = self._rows(data)
        return fit_pack(pack, rows, device=self._device, metric=metric)

    def _require_device(self) -> None:
        if self._place.lacks is not None:
            shown = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
            raise DeviceError(
                f"a worker on {self._place.node} holds a share of GPU "
                f"{', '.join(self._place.gpus) or '(none)'} (CUDA_VISIBLE_DEVICES={shown}) and "
                f"can't use it: {self._place.lacks}. Repair the driver there, start that machine's "
                "Ray with --num-gpus=0, or train with --device cpu"
            )

    def _rows(self, data: list[Any]) -> Any:
        import ray

        if self._of != data[0]:
            self.forget()
            self._of, self._data = data[0], ray.get(data[0])
        return self._data

    def forget(self) -> None:
        """Drops the data and what was made of it."""
        self._of, self._data = None, None
        self._held.clear()
