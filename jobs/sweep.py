"""Trains many variants on warm Ray actors, a pack at a time, and forgets nothing that finished.

Actors read the data from one place in their node's shared memory and keep what they made of it;
packs share work (`models.families.packs`). Every finished pack is a line group in a journal, so a
killed driver resumes without training it again. A lost actor's pack is repeated. Seeds are in the
variants: scores don't depend on packs' order or on workers, and where boosters are halved they are
compared in groups that the variants' order alone decides.
"""

import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from cluster import estimators
from cluster.device import choose
from cluster.files import replace_text
from jobs.sweep_board import LATENCY, Board, Halving, Listed, Outcome, Pack, Source, key
from models import forest
from models.families import FAMILIES, Fitted, TrainingData, Variant, cost, packs
from models.metrics import METRICS

__all__ = [
    "Halving",
    "Listed",
    "Outcome",
    "Pool",
    "Source",
    "SweepError",
    "Train",
    "cluster_pack",
    "fit",
    "outcomes",
    "pool",
    "run",
    "train_pack",
]


# What others gave back is free a moment later.
SETTLE_S = 5.0
# Rows that latency is measured on.
LATENCY_ROWS = 1_000


class SweepError(RuntimeError):
    """The sweep can't go on; the message says why."""


class Train(Protocol):
    """What actors do with a pack; one that can be pickled, and raises for no variant's sake."""

    def __call__(self, pack: Sequence[Variant], data: Any, **how: Any) -> list[Outcome]:
        """One outcome a variant; `how` is device, until, looks and held."""


class Pool:
    """Warm actors; made by `pool`."""

    def __init__(self, actors: Sequence[Any], device: str) -> None:
        self.actors, self.device = list(actors), device
        # Families that each has trained.
        self.at_home: dict[Any, set[str]] = {actor: set() for actor in self.actors}


@contextmanager
def pool(workers: int, *, cpus: float = 1, gpus: float = 0) -> Iterator[Pool]:
    """Actors on the connected Ray cluster, for any number of sweeps; ended on exit.

    Args:
        workers: How many at most; fewer where others hold the cluster's CPUs or GPUs, since an
            actor without room would keep its packs waiting. Waits for room for one.
        cpus: CPUs of each, which is also the number of threads that its libraries may use.
        gpus: GPUs of each, fractions too; above 0 boosting and networks train on CUDA.
    """
    import ray

    worker: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=2)(
        _Worker
    )
    device = "cuda" if gpus else "cpu"
    room = _room(workers, {"CPU": cpus, "GPU": gpus})
    actors = [worker.remote(max(1, int(cpus)), device) for _ in range(room)]
    try:
        yield Pool(actors, device)
    finally:
        for actor in actors:
            ray.kill(actor)


def _room(wanted: int, each: dict[str, float]) -> int:
    """How many actors the cluster has room for now, at least 1."""
    import ray

    deadline = time.monotonic() + SETTLE_S
    while True:
        free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        room = min(int(free.get(name, 0) / need) for name, need in each.items() if need > 0)
        if room >= wanted or time.monotonic() > deadline:
            return max(1, min(room, wanted))
        time.sleep(0.1)


def run(
    variants: Sequence[Variant] | Source,
    data: Any,
    *,
    journal: Path,
    workers: int = 1,
    on: Pool | None = None,
    halving: Halving | None = None,
    limit_s: float | None = None,
    train: Train | None = None,
    on_done: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Train the variants that the journal doesn't hold yet, on the connected Ray cluster.

    Args:
        variants: Settings with "family" and seeds; JSON values. Or a source that is asked for
            them and told what came of them.
        data: Encoded rows (`TrainingData`), or what `train` takes.
        journal: JSON lines, one a finished variant; made if absent. It belongs to these rows:
            give other data another journal.
        workers: Actors to start, one CPU each, where `on` is None.
        on: Actors that are there.
        halving: Stops boosters that do worse than others of their bracket; None trains all whole.
        limit_s: Seconds after which no further pack is started; what then wasn't begun isn't in
            the journal, and isn't returned.
        train: What is done with a pack; None is `train_pack`, which scores by AUC.
        on_done: Called with the journal's outcomes, then with each finished pack's, for progress
            and for tracking.

    Returns:
        One outcome a variant, in their order; of a source, in the order of asking.

    Raises:
        SweepError: A pack lost its worker three times.
        VariantError: A variant's family isn't known.
    """
    done = _read(journal)
    if done:
        on_done(list(done.values()))
    source = variants if not isinstance(variants, Sequence) else Listed(packs(variants))
    board = Board(source, done, halving)
    end = math.inf if limit_s is None else time.monotonic() + limit_s
    with ExitStack() as stack:
        if board.open:
            on = on or stack.enter_context(pool(workers))
            for outcomes in _train(board, data, on, train or train_pack, end):
                with journal.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
                    file.flush()
                    os.fsync(file.fileno())
                on_done(outcomes)
    if isinstance(variants, Sequence):
        return [done[key] for key in map(key, variants) if key in done]
    return board.outcomes()


def outcomes(
    journal: Path, variants: Sequence[Variant] | Source, *, halving: Halving | None = None
) -> list[Outcome]:
    """What a finished sweep's journal says of its variants, in their order.

    Args:
        journal: The sweep's.
        variants: As they were given to `run`; a source is asked and told anew.
        halving: As it was given to `run`.

    Raises:
        SweepError: The journal lacks some.
    """
    done = _read(journal)
    source = variants if not isinstance(variants, Sequence) else Listed(packs(variants))
    board = Board(source, done, halving)
    if board.open:
        missing = [v for pack in board.packs for v in pack.variants if key(v) not in done]
        raise SweepError(
            f"{journal} lacks {len(missing)} variants, such as "
            f"{dict(missing[0])}; run the sweep again (--from sweep)"
        )
    if isinstance(variants, Sequence):
        return [done[key(variant)] for variant in variants]
    return board.outcomes()


def fit(variants: Sequence[Variant], data: TrainingData, *, on: Pool) -> list[Fitted]:
    """Trains variants and brings the models back, in their order.

    Args:
        variants: As for `run`.
        data: Encoded rows.
        on: Actors; each pack goes to the next that is free.

    Raises:
        SweepError: A variant fails, or a pack lost its worker three times.
    """
    import ray

    shared = [ray.put(data)]
    waiting = sorted(packs(variants), key=cost)
    idle = list(on.actors)
    running: dict[Any, Any] = {}
    found: dict[str, Fitted] = {}
    while waiting or running:
        while waiting and idle:
            actor = idle.pop()
            running[actor.fit.remote(waiting.pop(), shared)] = actor
        (ready,), _ = ray.wait(list(running), num_returns=1)
        idle.append(running.pop(ready))
        try:
            found |= {key(each.variant): each for each in ray.get(ready)}
        except ray.exceptions.RayError as error:
            raise SweepError(f"variants that were trained before fail now: {error}") from error
    return [found[key(variant)] for variant in variants]


def _train(board: Board, data: Any, on: Pool, train: Train, end: float) -> Iterator[list[Outcome]]:
    import ray

    # In a list, so that Ray hands over the reference: an actor reads the data once.
    shared = [ray.put(data)]
    running: dict[Any, tuple[Any, Pack]] = {}
    has = dict.fromkeys(on.actors, 0)
    pinned: dict[Any, deque[Pack]] = {actor: deque() for actor in has}
    dropped: dict[Any, list[int]] = {actor: [] for actor in has}

    def start() -> None:
        for each in board.going_on():
            # A booster goes on where it is: moved, it wouldn't be the same to the bit.
            pinned[each.actor].append(each)
        for each in board.ended:
            if each.bracket is not None:
                dropped[each.actor].append(each.number)
        board.ended.clear()
        for actor in has:
            if not has[actor]:
                give(actor)
        for actor in has:
            # A second waits at the actor while there are many, so that it needn't wait for us.
            if has[actor] == 1 and (pinned[actor] or board.waiting > 4 * len(has)):
                give(actor)

    def give(actor: Any) -> None:
        pack = pinned[actor].popleft() if pinned[actor] else board.next(on.at_home[actor])
        if pack is None:
            return
        on.at_home[actor].add(str(pack.variants[0]["family"]))
        has[actor] += 1
        pack.actor = actor
        until = pack.rungs[0] if pack.rungs else None
        task = actor.train.remote(
            train, pack.variants, shared, pack.number, until, board.rungs, dropped[actor]
        )
        dropped[actor] = []
        running[task] = (actor, pack)

    while board.open:
        # First what is known to come next; what the source takes time to think of, meanwhile.
        in_time = time.monotonic() < end
        if in_time:
            start()
            board.ask()
            start()
        yield from board.finished()
        if not running and not in_time:
            board.stop()
            break
        if not running:
            raise SweepError(
                "every pack waits for others: a source that learns must ask for at least as many "
                "packs ahead as a bracket holds"
            )
        (ready,), _ = ray.wait(list(running), num_returns=1)
        actor, pack = running.pop(ready)
        try:
            outcomes = ray.get(ready)
        except ray.exceptions.RayActorError as error:
            raise SweepError(f"a worker died three times on {dict(pack.variants[0])}") from error
        has[actor] -= 1
        board.add(pack, outcomes)
        if not board.open:
            board.ask()
    yield from board.finished()
    ray.get([actor.forget.remote() for actor in on.actors])


class _Worker:
    def __init__(self, threads: int, device: str) -> None:
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)
        self._device = device
        self._of: Any = None
        self._data: Any = None
        # Boosters that may go on, by their packs' numbers.
        self._held: dict[int, dict[str, Any]] = {}

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
        rows = self._rows(data)
        for each in dropped:
            self._held.pop(each, None)
        held = self._held.setdefault(number, {})
        outcomes = train(pack, rows, device=self._device, until=until, looks=looks, held=held)
        if not held:
            del self._held[number]
        return outcomes

    def fit(self, pack: list[Variant], data: list[Any]) -> list[Fitted]:
        rows: TrainingData = self._rows(data)
        return _fit_pack(pack, rows, device=self._device)

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


def _fit_pack(
    pack: Sequence[Variant], data: TrainingData, *, device: str = "cpu", **halved: Any
) -> list[Fitted]:
    family = str(pack[0]["family"])
    if family == "forest" and device == "cuda":
        # What is cuML's and what scikit-learn's is decided in one place, which models don't know.
        return forest.fit_pack(pack, data, factory=partial(estimators.forest, choose("cuda")))
    return FAMILIES[family](pack, data, device=device, **halved)


def train_pack(
    pack: Sequence[Variant],
    data: TrainingData,
    *,
    metric: str = "auc",
    latency: bool = False,
    **how: Any,
) -> list[Outcome]:
    """What an actor makes of a pack; nothing that a variant does wrong is raised.

    A pack that doesn't fit in memory is halved and tried again; one that fails otherwise is tried
    a variant at a time, so that one bad variant doesn't take its pack along.

    Args:
        pack: Variants of one family.
        data: Encoded rows.
        metric: Of `models.metrics.METRICS`, that variants are compared by.
        latency: Whether outcomes have the metric `LATENCY` too.
        how: For the family: device, until, looks, held.
    """
    started, cpu = time.perf_counter(), time.process_time()
    try:
        fitted = _fit_pack(pack, data, metric=metric, **how)
        scored = [METRICS[metric].score(data.y_valid, each.valid_scores) for each in fitted]
    except Exception as error:
        if len(pack) > 1:
            size = len(pack) // 2 if out_of_memory(error) else 1
            parts = [pack[at : at + size] for at in range(0, len(pack), size)]
            return [
                outcome
                for part in parts
                for outcome in train_pack(part, data, metric=metric, latency=latency, **how)
            ]
        return [
            Outcome(
                variant=dict(pack[0]),
                score=None,
                seconds=time.perf_counter() - started,
                error=f"{type(error).__name__}: {error}",
                cpu_s=time.process_time() - cpu,
            )
        ]
    seconds = sum(each.seconds for each in fitted)
    cpu_share = (time.process_time() - cpu) / seconds
    return [
        Outcome(
            variant=each.variant,
            score=score,
            seconds=each.seconds,
            cpu_s=each.seconds * cpu_share,
            curve=[list(point) for point in each.curve],
            pruned_at=each.pruned_at,
            metrics={LATENCY: _latency_us(each, data)} if latency else {},
        )
        for each, score in zip(fitted, scored, strict=True)
    ]


def _latency_us(fitted: Fitted, data: TrainingData) -> float:
    """The quickest of three goes, so that what else the machine does counts little."""
    rows = data.x_valid[:LATENCY_ROWS]
    took = []
    for _ in range(3):
        began = time.perf_counter()
        fitted.predict(rows)
        took.append(time.perf_counter() - began)
    return min(took) / len(rows) * 1e6


def cluster_pack(pack: Sequence[Variant], data: Any, **how: Any) -> list[Outcome]:
    """What an actor makes of k-means variants, by way of `run(..., train=cluster_pack)`.

    Args:
        pack: Variants of `models.clustering`, each its own pack or several.
        data: `models.clustering.ClusterData`.
        how: Nothing of it is used.

    Returns:
        Outcomes whose `metrics` are silhouette, davies_bouldin and stability.
    """
    from models import clustering

    outcomes = []
    for variant in pack:
        cpu = time.process_time()
        try:
            (made,) = clustering.fit_pack([variant], data)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            outcomes.append(Outcome(variant=dict(variant), score=None, seconds=0.0, error=said))
            continue
        outcomes.append(
            Outcome(
                variant=made.variant,
                score=None,
                seconds=made.seconds,
                cpu_s=time.process_time() - cpu,
                metrics=made.metrics,
            )
        )
    return outcomes


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device or this machine has no memory left."""
    # By text: torch, XGBoost and cuML each have a class of their own, and may not be installed.
    said = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(
        each in said for each in ("outofmemory", "out of memory", "bad_alloc", "memoryallocation")
    )


def _read(journal: Path) -> dict[str, Outcome]:
    if not journal.exists():
        return {}
    done = {}
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        # A driver killed while it wrote leaves half a line; what comes next must not join it.
        replace_text(journal, "".join(whole))
    for line in whole:
        outcome = Outcome(**json.loads(line))
        done[key(outcome.variant)] = outcome
    return done
