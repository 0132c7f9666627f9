"""Trains many variants on warm Ray actors, a pack at a time, and forgets nothing that finished.

Actors read the data from one place in their node's shared memory and keep what they made of it;
packs share work (`models.families.packs`). Every finished pack is a line group in a journal, so a
killed driver resumes without training it again. A lost actor's pack is repeated. Seeds are in the
variants: scores don't depend on packs' order or on workers, and where boosters are halved they are
compared in groups that the variants' order alone decides.
"""

import heapq
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from models.families import FAMILIES, Fitted, TrainingData, Variant, cost, packs
from models.metrics import auc


class SweepError(RuntimeError):
    """The sweep can't go on; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a variant.

    Attributes:
        variant: Its settings.
        valid_auc: AUC on the validation rows; None where it failed.
        seconds: Training seconds, the pack's shared part split evenly.
        error: Why it failed, or None.
        cpu_s: CPU seconds of the worker, split like `seconds`.
        curve: Rounds and validation AUC, for families that train round by round.
        pruned_at: Rounds after which halving stopped it; `valid_auc` is of then. Else None.
    """

    variant: dict[str, Any]
    valid_auc: float | None
    seconds: float
    error: str | None = None
    cpu_s: float = 0.0
    curve: Sequence[Sequence[float]] = ()
    pruned_at: int | None = None


class Source(Protocol):
    """Where variants come from, a pack at a time."""

    ahead: int | None
    """Packs asked for beyond those told, exactly; None where nothing is learned from outcomes."""

    def ask(self) -> list[Variant] | None:
        """The next pack, or None when there are no more."""

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Takes a pack's outcomes; packs are told in the order in which they were asked."""


@dataclass(frozen=True, kw_only=True)
class Halving:
    """Successive halving of boosters (Jamieson and Talwalkar 2016).

    Attributes:
        rungs: Rounds at which a bracket's packs are compared, ascending.
        keep: Share of a bracket that goes on after each rung, rounded up.
        bracket: Packs in a bracket.
        hyperband: Whether brackets take turns to start at a later rung, the last at none
            (Li and others 2018).
    """

    rungs: tuple[int, ...]
    keep: float = 1 / 3
    bracket: int = 27
    hyperband: bool = False


class Pool:
    """Warm actors; made by `pool`."""

    def __init__(self, actors: Sequence[Any]) -> None:
        self.actors = list(actors)


@contextmanager
def pool(workers: int, *, cpus: float = 1, gpus: float = 0) -> Iterator[Pool]:
    """Actors on the connected Ray cluster, for any number of sweeps; ended on exit.

    Args:
        workers: How many.
        cpus: CPUs of each, which is also the number of threads that its libraries may use.
        gpus: GPUs of each, fractions too; above 0 boosting and networks train on CUDA.
    """
    import ray

    worker: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=-1, max_task_retries=2)(
        _Worker
    )
    device = "cuda" if gpus else "cpu"
    actors = [worker.remote(max(1, int(cpus)), device) for _ in range(workers)]
    try:
        yield Pool(actors)
    finally:
        for actor in actors:
            ray.kill(actor)


def run(
    variants: Sequence[Variant] | Source,
    data: TrainingData,
    *,
    journal: Path,
    workers: int = 1,
    on: Pool | None = None,
    halving: Halving | None = None,
    on_done: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Train the variants that the journal doesn't hold yet, on the connected Ray cluster.

    Args:
        variants: Settings with "family" and seeds; JSON values. Or a source that is asked for
            them and told what came of them.
        data: Encoded rows.
        journal: JSON lines, one a finished variant; made if absent. It belongs to these rows:
            give other data another journal.
        workers: Actors to start, one CPU each, where `on` is None.
        on: Actors that are there.
        halving: Stops boosters that do worse than others of their bracket; None trains all whole.
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
    source = variants if not isinstance(variants, Sequence) else Listed(variants)
    board = _Board(source, done, halving)
    with ExitStack() as stack:
        if board.open:
            on = on or stack.enter_context(pool(workers))
            for outcomes in _train(board, data, on):
                with journal.open("a", encoding="utf-8") as file:
                    file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
                    file.flush()
                    os.fsync(file.fileno())
                on_done(outcomes)
    if isinstance(variants, Sequence):
        return [done[_key(variant)] for variant in variants]
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
    source = variants if not isinstance(variants, Sequence) else Listed(variants)
    board = _Board(source, done, halving)
    if board.open:
        missing = [v for pack in board.packs for v in pack.variants if _key(v) not in done]
        raise SweepError(
            f"{journal} lacks {len(missing)} variants, such as "
            f"{dict(missing[0])}; run the sweep again (--from sweep)"
        )
    if isinstance(variants, Sequence):
        return [done[_key(variant)] for variant in variants]
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
            found |= {_key(each.variant): each for each in ray.get(ready)}
        except ray.exceptions.RayError as error:
            raise SweepError(f"variants that were trained before fail now: {error}") from error
    return [found[_key(variant)] for variant in variants]


class Listed:
    """Variants that are known from the start."""

    ahead: int | None = None

    def __init__(self, variants: Sequence[Variant]) -> None:
        """Packs them.

        Raises:
            VariantError: A variant's family isn't known.
        """
        self._packs = iter(packs(variants))

    def ask(self) -> list[Variant] | None:
        """The next pack."""
        return next(self._packs, None)

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Nothing is learned."""


@dataclass(kw_only=True, eq=False)
class _Pack:
    number: int
    variants: list[Variant]
    # Rounds to stop and be compared at; those still to come.
    rungs: deque[int] = field(default_factory=deque)
    bracket: int | None = None
    # Its curve up to the last rung, while it waits there.
    waits: list[Outcome] | None = None
    outcomes: list[Outcome] | None = None
    actor: Any = None

    @property
    def longest(self) -> int:
        from models.boosting import DEFAULTS

        return int(max(variant.get("rounds", DEFAULTS["rounds"]) for variant in self.variants))


class _Board:
    """Which packs there are, which to train next, and what came of them; knows nothing of Ray."""

    def __init__(self, source: Source, done: dict[str, Outcome], halving: Halving | None) -> None:
        self._source, self._done, self._halving = source, done, halving
        self.rungs = halving.rungs if halving is not None else ()
        self.packs: list[_Pack] = []
        self._brackets: list[list[_Pack]] = []
        self._exhausted = False
        self._ready: list[tuple[tuple[float, int], _Pack]] = []
        self._finished: list[list[Outcome]] = []
        self._going_on: list[_Pack] = []
        # Those that an actor may hold, and need not.
        self.ended: list[_Pack] = []
        self._left = 0
        self.ask()

    @property
    def open(self) -> bool:
        """Whether a pack is still to be trained."""
        return self._left > 0

    def outcomes(self) -> list[Outcome]:
        return [outcome for pack in self.packs for outcome in pack.outcomes or ()]

    def next(self) -> _Pack | None:
        """A pack to start on any actor."""
        return heapq.heappop(self._ready)[1] if self._ready else None

    def finished(self) -> Iterator[list[Outcome]]:
        """Outcomes of packs that ended since the last call."""
        finished, self._finished = self._finished, []
        yield from finished

    def going_on(self) -> Iterator[_Pack]:
        """Packs that passed a rung since the last call, for the actors that hold them."""
        going_on, self._going_on = self._going_on, []
        yield from going_on

    def add(self, pack: _Pack, outcomes: list[Outcome]) -> None:
        """Takes what an actor made of a pack."""
        if any(outcome.pruned_at is not None for outcome in outcomes):
            pack.waits = outcomes
        else:
            self._end(pack, outcomes)
        if pack.bracket is not None:
            self._compare(self._brackets[pack.bracket])

    def ask(self) -> None:
        """Asks the source for as many packs as it gives now."""
        ahead = self._source.ahead
        while not self._exhausted:
            if ahead is not None and len(self.packs) >= ahead:
                # Exactly those: the same seed then asks the same, however many work at it.
                first = self.packs[len(self.packs) - ahead]
                if first.outcomes is None:
                    return
                self._source.tell(first.outcomes)
            asked = self._source.ask()
            if asked is not None:
                self._take(_Pack(number=len(self.packs), variants=asked))
                continue
            self._exhausted = True
            if self._brackets:
                # No one will fill it any more.
                self._compare(self._brackets[-1])

    def _take(self, pack: _Pack) -> None:
        self.packs.append(pack)
        missing = [variant for variant in pack.variants if _key(variant) not in self._done]
        if self._halving is not None and pack.variants[0]["family"] == "boosting":
            self._enter(pack, self._halving)
        if not missing:
            pack.outcomes = [self._done[_key(variant)] for variant in pack.variants]
            return
        self._left += 1
        if pack.bracket is None:
            pack.variants = missing if self._source.ahead is None else pack.variants
        if self._source.ahead is None:
            # The longest first, so that no one waits for it at the end.
            place = (-cost(pack.variants), pack.number)
        else:
            place = (0.0, pack.number)
        heapq.heappush(self._ready, (place, pack))

    def _enter(self, pack: _Pack, halving: Halving) -> None:
        if not self._brackets or len(self._brackets[-1]) == halving.bracket:
            self._brackets.append([])
        pack.bracket = len(self._brackets) - 1
        self._brackets[-1].append(pack)
        skipped = pack.bracket % (len(halving.rungs) + 1) if halving.hyperband else 0
        pack.rungs.extend(rung for rung in halving.rungs[skipped:] if rung < pack.longest)

    def _compare(self, bracket: list[_Pack]) -> None:
        """Once all of a bracket's packs are at a rung: the best go on, the others end there."""
        assert self._halving is not None
        if not self._exhausted and len(bracket) < self._halving.bracket:
            return
        still = [pack for pack in bracket if pack.outcomes is None]
        if not still or any(pack.waits is None for pack in still):
            return
        rung = min(pack.rungs[0] for pack in still)
        # Packs of a sweep that was resumed had their place in this comparison too.
        there = [pack for pack in bracket if _score(pack, rung) is not None]
        there.sort(key=lambda pack: (-(_score(pack, rung) or 0), pack.number))
        kept = there[: math.ceil(len(there) * self._halving.keep)]
        for pack in still:
            assert pack.waits is not None
            if pack in kept:
                pack.rungs.popleft()
                pack.waits = None
                self._going_on.append(pack)
            else:
                self._end(pack, pack.waits)

    def _end(self, pack: _Pack, outcomes: list[Outcome]) -> None:
        pack.outcomes, pack.waits = outcomes, None
        self._left -= 1
        self.ended.append(pack)
        self._done |= {_key(outcome.variant): outcome for outcome in outcomes}
        self._finished.append(outcomes)


def _score(pack: _Pack, rung: int) -> float | None:
    """The best validation AUC up to a rung, of a pack that went on to it and would go further."""
    outcomes = pack.waits or pack.outcomes or []
    curve = max((outcome.curve for outcome in outcomes), key=len, default=())
    if pack.longest <= rung or not any(step == rung for step, _ in curve):
        return None
    return max(value for step, value in curve if step <= rung)


def _train(board: _Board, data: TrainingData, on: Pool) -> Iterator[list[Outcome]]:
    import ray

    # In a list, so that Ray hands over the reference: an actor reads the data once.
    shared = [ray.put(data)]
    running: dict[Any, tuple[Any, _Pack]] = {}
    idle = list(on.actors)
    pinned: dict[Any, deque[_Pack]] = {actor: deque() for actor in idle}
    dropped: dict[Any, list[int]] = {actor: [] for actor in idle}

    def start() -> None:
        for pack in board.going_on():
            # A booster goes on where it is: moved, it wouldn't be the same to the bit.
            pinned[pack.actor].append(pack)
        for pack in board.ended:
            if pack.bracket is not None:
                dropped[pack.actor].append(pack.number)
        board.ended.clear()
        for actor in list(idle):
            pack_or_none = pinned[actor].popleft() if pinned[actor] else board.next()
            if pack_or_none is None:
                continue
            pack = pack_or_none
            idle.remove(actor)
            pack.actor = actor
            until = pack.rungs[0] if pack.rungs else None
            task = actor.train.remote(
                pack.variants, shared, pack.number, until, board.rungs, dropped[actor]
            )
            dropped[actor] = []
            running[task] = (actor, pack)

    while board.open:
        # First what is known to come next; what the source takes time to think of, meanwhile.
        start()
        board.ask()
        start()
        yield from board.finished()
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
        idle.append(actor)
        board.add(pack, outcomes)
        if not board.open:
            board.ask()
    yield from board.finished()
    for actor in on.actors:
        actor.forget.remote()


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
        outcomes = train_pack(pack, rows, device=self._device, until=until, looks=looks, held=held)
        if not held:
            del self._held[number]
        return outcomes

    def fit(self, pack: list[Variant], data: list[Any]) -> list[Fitted]:
        return FAMILIES[str(pack[0]["family"])](pack, self._rows(data), device=self._device)

    def _rows(self, data: list[Any]) -> TrainingData:
        import ray

        if self._of != data[0]:
            self.forget()
            self._of, self._data = data[0], ray.get(data[0])
        rows: TrainingData = self._data
        return rows

    def forget(self) -> None:
        """Drops the data and what was made of it."""
        self._of, self._data = None, None
        self._held.clear()


def train_pack(pack: Sequence[Variant], data: TrainingData, **how: Any) -> list[Outcome]:
    """What an actor makes of a pack; nothing that a variant does wrong is raised.

    A pack that doesn't fit in memory is halved and tried again; one that fails otherwise is tried
    a variant at a time, so that one bad variant doesn't take its pack along.

    Args:
        pack: Variants of one family.
        data: Encoded rows.
        how: For the family: device, until, looks, held.
    """
    started, cpu = time.perf_counter(), time.process_time()
    try:
        fitted = FAMILIES[str(pack[0]["family"])](pack, data, **how)
        scored = [float(auc(data.y_valid, each.valid_scores)) for each in fitted]
    except Exception as error:
        if len(pack) > 1:
            size = len(pack) // 2 if out_of_memory(error) else 1
            parts = [pack[at : at + size] for at in range(0, len(pack), size)]
            return [outcome for part in parts for outcome in train_pack(part, data, **how)]
        return [
            Outcome(
                variant=dict(pack[0]),
                valid_auc=None,
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
            valid_auc=score,
            seconds=each.seconds,
            cpu_s=each.seconds * cpu_share,
            curve=[list(point) for point in each.curve],
            pruned_at=each.pruned_at,
        )
        for each, score in zip(fitted, scored, strict=True)
    ]


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that a device or this machine has no memory left."""
    # By text: torch, XGBoost and cuML each have a class of their own, and may not be installed.
    said = f"{type(error).__name__} {error}".lower()
    return isinstance(error, MemoryError) or any(
        each in said for each in ("outofmemory", "out of memory", "bad_alloc", "memoryallocation")
    )


def _key(variant: Variant) -> str:
    return json.dumps(dict(variant), sort_keys=True)


def _read(journal: Path) -> dict[str, Outcome]:
    if not journal.exists():
        return {}
    done = {}
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        # A driver killed while it wrote leaves half a line; what comes next must not join it.
        aside = journal.with_suffix(".whole")
        aside.write_text("".join(whole), encoding="utf-8")
        aside.replace(journal)
    for line in whole:
        outcome = Outcome(**json.loads(line))
        done[_key(outcome.variant)] = outcome
    return done
