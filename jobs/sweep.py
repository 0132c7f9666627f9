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
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.device import DeviceError
from cluster.files import replace_text
from jobs.sweep_actors import Pool, SweepError, pool
from jobs.sweep_board import Board, Halving, Listed, Outcome, Pack, Source, key
from jobs.sweep_packs import Train, cluster_pack, train_pack
from models.families import Fitted, TrainingData, Variant, cost, packs

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
        SweepError: A pack lost its worker three times, or a worker can't use its GPU.
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


def fit(
    variants: Sequence[Variant], data: TrainingData, *, on: Pool, metric: str = "auc"
) -> list[Fitted]:
    """Trains variants and brings the models back, in their order.

    Args:
        variants: As for `run`.
        data: Encoded rows.
        on: Actors; each pack goes to the next that is free.
        metric: Of `models.metrics.METRICS`, that patience goes by: the sweep's, for what it chose.

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
            running[actor.fit.remote(waiting.pop(), shared, metric)] = actor
        (ready,), _ = ray.wait(list(running), num_returns=1)
        idle.append(running.pop(ready))
        try:
            found |= {key(each.variant): each for each in ray.get(ready)}
        except ray.exceptions.RayError as error:
            said = getattr(error, "cause", None) or error
            raise SweepError(f"variants that were trained before fail now: {said}") from error
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
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, DeviceError):
                raise SweepError(str(error.cause)) from None
            raise
        has[actor] -= 1
        board.add(pack, outcomes)
        if not board.open:
            board.ask()
    yield from board.finished()
    ray.get([actor.forget.remote() for actor in on.actors])


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
