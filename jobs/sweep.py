"""Trains many variants on warm Ray actors, a pack at a time, and forgets nothing that finished.

All actors of a node read the data from one place in its shared memory; packs share work
(`models.families.packs`). Every finished pack is a line group in a journal, so a killed driver
resumes without training it again. A lost actor's pack is repeated. Seeds are in the variants:
scores don't depend on packs' order or on workers.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from models.families import FAMILIES, TrainingData, Variant, packs
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
    """

    variant: dict[str, Any]
    valid_auc: float | None
    seconds: float
    error: str | None = None


def run(
    variants: Sequence[Variant],
    data: TrainingData,
    *,
    journal: Path,
    workers: int,
    on_done: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Train the variants that the journal doesn't hold yet, on the connected Ray cluster.

    Args:
        variants: Settings with "family" and seeds; JSON values.
        data: Encoded rows.
        journal: JSON lines, one a finished variant; made if absent. It belongs to these rows:
            give other data another journal.
        workers: Actors, one CPU each.
        on_done: Called with the journal's outcomes, then with each finished pack's, for progress
            and for tracking.

    Returns:
        One outcome a variant, in their order.

    Raises:
        SweepError: A pack lost its worker three times.
        VariantError: A variant's family isn't known.
    """
    done = _read(journal)
    open_packs = packs([variant for variant in variants if _key(variant) not in done])
    if done:
        on_done(list(done.values()))
    for outcomes in _train(open_packs, data, workers):
        with journal.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(outcome)) + "\n" for outcome in outcomes)
            file.flush()
            os.fsync(file.fileno())
        done |= {_key(outcome.variant): outcome for outcome in outcomes}
        on_done(outcomes)
    return [done[_key(variant)] for variant in variants]


def outcomes(journal: Path, variants: Sequence[Variant]) -> list[Outcome]:
    """What a finished sweep's journal says of its variants, in their order.

    Raises:
        SweepError: The journal lacks some.
    """
    done = _read(journal)
    missing = [variant for variant in variants if _key(variant) not in done]
    if missing:
        raise SweepError(
            f"{journal} lacks {len(missing)} of {len(variants)} variants, such as "
            f"{dict(missing[0])}; run the sweep again (--from sweep)"
        )
    return [done[_key(variant)] for variant in variants]


def _train(open_packs: list[list[Variant]], data: TrainingData, workers: int) -> Any:
    import ray

    if not open_packs:
        return
    shared = ray.put(data)
    worker: Any = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=2)(_Worker)
    actors = [worker.remote() for _ in range(min(workers, len(open_packs)))]
    running: dict[Any, tuple[Any, list[Variant]]] = {}
    waiting = iter(open_packs)
    try:
        for actor in actors:
            pack = next(waiting)
            running[actor.train.remote(pack, shared)] = (actor, pack)
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            actor, pack = running.pop(ready)
            try:
                outcomes = ray.get(ready)
            except ray.exceptions.RayActorError as error:
                raise SweepError(f"a worker died three times on {dict(pack[0])}") from error
            following = next(waiting, None)
            if following is not None:
                running[actor.train.remote(following, shared)] = (actor, following)
            yield outcomes
    finally:
        for actor in actors:
            ray.kill(actor)


class _Worker:
    def train(self, pack: list[Variant], data: TrainingData) -> list[Outcome]:
        try:
            fitted = FAMILIES[str(pack[0]["family"])](pack, data)
        except Exception as error:
            if len(pack) > 1:
                # One bad variant must not take its pack along.
                return [outcome for variant in pack for outcome in self.train([variant], data)]
            said = f"{type(error).__name__}: {error}"
            return [Outcome(variant=dict(pack[0]), valid_auc=None, seconds=0.0, error=said)]
        return [
            Outcome(
                variant=each.variant,
                valid_auc=float(auc(data.y_valid, each.valid_scores)),
                seconds=each.seconds,
            )
            for each in fitted
        ]


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
