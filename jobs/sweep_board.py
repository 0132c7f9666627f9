"""Which of a sweep's packs come next, which go on, and what came of them.

Knows nothing of Ray or of files: `jobs.sweep` asks it what to train and tells it what came out.
"""

import heapq
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from models.families import FAMILIES, Variant, cost

# Name of a metric of outcomes: microseconds that a row's score takes, in a batch on one CPU.
LATENCY = "row_us"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a variant.

    Attributes:
        variant: Its settings.
        score: The sweep's metric on the validation rows, a loss with its sign turned: more is
            better. None where it failed.
        seconds: Training seconds, the pack's shared part split evenly.
        error: Why it failed, or None.
        cpu_s: CPU seconds of the worker, split like `seconds`.
        curve: Rounds or epochs and score, for families that train so.
        pruned_at: Rounds after which halving stopped it; `score` is of then. Else None.
        metrics: Other scores by name, of work that isn't scored by AUC.
        ran: How it was trained: "device" and, of networks, "precision".
    """

    variant: dict[str, Any]
    score: float | None
    seconds: float
    error: str | None = None
    cpu_s: float = 0.0
    curve: list[list[float]] = field(default_factory=list)
    pruned_at: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    ran: dict[str, str] = field(default_factory=dict)


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


class Listed:
    """Packs that are known from the start."""

    ahead: int | None = None

    def __init__(self, packs: Iterable[list[Variant]]) -> None:
        """Takes packs as they are; `models.families.packs` makes some."""
        self._packs = iter(packs)

    def ask(self) -> list[Variant] | None:
        """The next pack."""
        return next(self._packs, None)

    def tell(self, outcomes: Sequence[Outcome]) -> None:
        """Nothing is learned."""


@dataclass(kw_only=True, eq=False)
class Pack:
    """Variants that share work, and where they stand."""

    number: int
    asked: list[Variant]
    # Those to train: a journal may hold the others.
    variants: list[Variant]
    # Rounds to stop and be compared at; those still to come.
    rungs: deque[int] = field(default_factory=deque)
    bracket: int | None = None
    # Its curve up to the last rung, while it waits there.
    waits: list[Outcome] | None = None
    # What it had waited with at the rung that it passed last: what it has cost up to there.
    passed: Sequence[Outcome] = ()
    outcomes: list[Outcome] | None = None
    actor: Any = None

    @property
    def longest(self) -> int:
        """Rounds of its longest booster."""
        from models.boosting import DEFAULTS

        return int(max(variant.get("rounds", DEFAULTS["rounds"]) for variant in self.variants))


class Board:
    """A sweep's packs, from asked to ended."""

    def __init__(self, source: Source, done: dict[str, Outcome], halving: Halving | None) -> None:
        """Asks for the first packs.

        Args:
            source: Where they come from.
            done: Outcomes by `key`, which aren't trained again; those that come are added.
            halving: As for `jobs.sweep.run`.
        """
        self._source, self._done, self._halving = source, done, halving
        self.rungs = halving.rungs if halving is not None else ()
        self.packs: list[Pack] = []
        self._brackets: list[list[Pack]] = []
        self._exhausted = False
        # By family, the next first.
        self._ready: dict[str, list[tuple[tuple[float, int], Pack]]] = {}
        self._begun: set[str] = set()
        self._finished: list[list[Outcome]] = []
        self._going_on: list[Pack] = []
        # Those that an actor may hold, and need not.
        self.ended: list[Pack] = []
        self._left = 0
        self.ask()

    @property
    def open(self) -> bool:
        """Whether a pack is still to be trained."""
        return self._left > 0

    def outcomes(self) -> list[Outcome]:
        """Those there are, in the order of asking."""
        ended = [pack for pack in self.packs if pack.outcomes is not None]
        return [self._done[key(variant)] for pack in ended for variant in pack.asked]

    @property
    def waiting(self) -> int:
        """How many packs no actor has yet."""
        return sum(map(len, self._ready.values()))

    def next(self, at_home: Set[str]) -> Pack | None:
        """A pack to start.

        Args:
            at_home: Families that the actor has trained before. They come first, and then those
                that no actor has: what a family imports takes an actor seconds.
        """
        ready = {family: heap for family, heap in self._ready.items() if heap}
        for wanted in (at_home, ready.keys() - self._begun, ready.keys()):
            if families := ready.keys() & wanted:
                family = min(families, key=lambda family: ready[family][0][0])
                self._begun.add(family)
                return heapq.heappop(ready[family])[1]
        return None

    def finished(self) -> Iterator[list[Outcome]]:
        """Outcomes of packs that ended since the last call."""
        finished, self._finished = self._finished, []
        yield from finished

    def going_on(self) -> Iterator[Pack]:
        """Packs that passed a rung since the last call, for the actors that hold them."""
        going_on, self._going_on = self._going_on, []
        yield from going_on

    def add(self, pack: Pack, outcomes: list[Outcome]) -> None:
        """Takes what an actor made of a pack."""
        for at, before in enumerate(pack.passed):
            seconds, cpu_s = (
                outcomes[at].seconds + before.seconds,
                outcomes[at].cpu_s + before.cpu_s,
            )
            outcomes[at] = replace(outcomes[at], seconds=seconds, cpu_s=cpu_s)
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
                self._take(Pack(number=len(self.packs), asked=asked, variants=asked))
                continue
            self._exhausted = True
            if self._brackets:
                # No one will fill it any more.
                self._compare(self._brackets[-1])

    def _take(self, pack: Pack) -> None:
        self.packs.append(pack)
        missing = [variant for variant in pack.variants if key(variant) not in self._done]
        if self._halving is not None and pack.variants[0]["family"] == "boosting":
            self._enter(pack, self._halving)
        if not missing:
            pack.outcomes = [self._done[key(variant)] for variant in pack.variants]
            return
        self._left += 1
        if pack.bracket is None:
            pack.variants = missing if self._source.ahead is None else pack.variants
        if self._source.ahead is None:
            # The longest first, so that no one waits for it at the end.
            known = pack.variants[0]["family"] in FAMILIES
            place = (-cost(pack.variants) if known else 0.0, pack.number)
        else:
            place = (0.0, pack.number)
        family = str(pack.variants[0]["family"])
        heapq.heappush(self._ready.setdefault(family, []), (place, pack))

    def _enter(self, pack: Pack, halving: Halving) -> None:
        if not self._brackets or len(self._brackets[-1]) == halving.bracket:
            self._brackets.append([])
        pack.bracket = len(self._brackets) - 1
        self._brackets[-1].append(pack)
        skipped = pack.bracket % (len(halving.rungs) + 1) if halving.hyperband else 0
        pack.rungs.extend(rung for rung in halving.rungs[skipped:] if rung < pack.longest)

    def _compare(self, bracket: list[Pack]) -> None:
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
                pack.passed, pack.waits = pack.waits, None
                self._going_on.append(pack)
            else:
                self._end(pack, pack.waits)

    def stop(self) -> None:
        """Ends the packs that wait at a rung there; no more will be compared."""
        for pack in self.packs:
            if pack.waits is not None:
                self._end(pack, pack.waits)

    def _end(self, pack: Pack, outcomes: list[Outcome]) -> None:
        pack.outcomes, pack.waits = outcomes, None
        self._left -= 1
        self.ended.append(pack)
        self._done |= {key(outcome.variant): outcome for outcome in outcomes}
        self._finished.append(outcomes)


def _score(pack: Pack, rung: int) -> float | None:
    """The best validation AUC up to a rung, of a pack that went on to it and would go further."""
    outcomes = pack.waits or pack.outcomes or []
    curve = max((outcome.curve for outcome in outcomes), key=len, default=())
    if pack.longest <= rung or not any(step == rung for step, _ in curve):
        return None
    return max(value for step, value in curve if step <= rung)


def key(variant: Variant) -> str:
    """What tells a variant from others, also in a journal."""
    return json.dumps(dict(variant), sort_keys=True)
