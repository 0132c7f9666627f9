"""Live views: of a sweep (done, failed, stopped, the best so far), of rows as they are done."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jobs.sweep import Outcome


def bars(console: Console) -> Progress:
    """Bars with description, count and time, and beside each what its field `said` says."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[said]}"),
        console=console,
    )


class SweepView:
    """Takes outcomes as they come; made by `sweep`."""

    def __init__(self, target: str, families: Sequence[str], bars: Progress) -> None:
        self._bars, self._start, self._done = bars, time.monotonic(), 0
        self._total = len(families)
        self._best: dict[str, float] = {}
        self._failed: dict[str, int] = {}
        self._pruned: dict[str, int] = {}
        self._rows = {
            family: bars.add_task(f"{target} {family}", total=families.count(family), said="")
            for family in dict.fromkeys(families)
        }
        self._whole = bars.add_task(target, total=self._total, said="")

    def add(self, outcomes: Sequence[Outcome]) -> None:
        """Shows a finished pack's outcomes."""
        for outcome in outcomes:
            family = str(outcome.variant["family"])
            if outcome.score is None:
                self._failed[family] = self._failed.get(family, 0) + 1
            else:
                self._best[family] = max(self._best.get(family, -math.inf), outcome.score)
            if outcome.pruned_at is not None:
                self._pruned[family] = self._pruned.get(family, 0) + 1
            self._bars.update(self._rows[family], advance=1, said=self._said(family))
        self._done += len(outcomes)
        rate = self._done / max(time.monotonic() - self._start, 1e-9)
        left_s = (self._total - self._done) / rate
        best = f"best {max(self._best.values()):.4f}" if self._best else "none trained yet"
        said = f"{best}, {rate:.1f} variants/s, {left_s:.0f} s left"
        self._bars.update(self._whole, advance=len(outcomes), said=said)

    def _said(self, family: str) -> str:
        best = f"best {self._best[family]:.4f}" if family in self._best else ""
        failed = f" {self._failed[family]} failed" if family in self._failed else ""
        pruned = f" {self._pruned[family]} stopped early" if family in self._pruned else ""
        return best + failed + pruned


@contextmanager
def sweep(target: str, families: Sequence[str], console: Console) -> Iterator[SweepView]:
    """Shows bars by family, and one for the whole, while the block runs.

    Args:
        target: What is predicted.
        families: The family of each variant that will be tried.
        console: Where; without a terminal only the last state is printed.
    """
    with bars(console) as shown:
        yield SweepView(target, families, shown)


@contextmanager
def counted(
    what: str, console: Console
) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A live bar with so many a second and the time left; to be told how many, and those done.

    Args:
        what: Is counted, such as "rows".
        console: Where; without a terminal only the last state is printed.
    """
    with bars(console) as shown:
        bar = shown.add_task("getting ready", total=None, said="")
        state = {"all": 0, "done": 0, "counted": 0, "began": time.monotonic()}

        def start(count: int) -> None:
            state.update(all=count, began=time.monotonic())
            shown.update(bar, description=what, total=count)

        def done(count: int) -> None:
            state["done"] += count
            # What an earlier run had done comes at once, and is no rate.
            passed = time.monotonic() - state["began"]
            if passed > 0.1:
                state["counted"] += count
            rate = state["counted"] / max(passed, 1e-9)
            left = f"{(state['all'] - state['done']) / rate:,.0f} s left" if rate else ""
            shown.update(bar, advance=count, said=f"{rate:,.0f} {what}/s, {left}")

        yield start, done
