"""Cross-validated variants: by way of `sweep.run(..., data=Folds(...), train=train_folds)`."""

from collections.abc import MutableMapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from jobs.sweep_board import Outcome
from jobs.sweep_packs import train_pack
from models.families import Variant
from models.folds import Folds

# Name of a metric of outcomes: the standard deviation of the folds' scores.
SPREAD = "fold_spread"


def train_folds(
    pack: Sequence[Variant],
    data: Folds,
    *,
    held: MutableMapping[Any, Any] | None = None,
    **how: Any,
) -> list[Outcome]:
    """What an actor makes of a pack: trained fold after fold, each time as one pack.

    Args:
        pack: Variants of one family.
        data: The folds.
        held: Boosters that an earlier call stopped, by fold.
        how: As for `jobs.sweep_packs.train_pack`.

    Returns:
        One outcome a variant: scores and curves are means over folds, times are sums, and its
        `metrics` have `SPREAD`. One that fails in a fold has failed.
    """
    held = {} if held is None else held
    by_fold = []
    for fold, rows in enumerate(data.each):
        own = held.pop(fold, {})
        by_fold.append(train_pack(pack, rows, held=own, **how))
        if own:
            held[fold] = own
    return [_joined(outcomes) for outcomes in zip(*by_fold, strict=True)]


def _joined(outcomes: Sequence[Outcome]) -> Outcome:
    said = [f"fold {at}: {each.error}" for at, each in enumerate(outcomes, 1) if each.error]
    scores = [each.score for each in outcomes if each.score is not None]
    variant = outcomes[0].variant
    seconds, cpu_s = sum(o.seconds for o in outcomes), sum(o.cpu_s for o in outcomes)
    if said:
        return Outcome(variant=variant, score=None, seconds=seconds, cpu_s=cpu_s, error=said[0])
    return Outcome(
        variant=variant,
        score=fmean(scores),
        seconds=seconds,
        cpu_s=cpu_s,
        curve=_mean_curve([each.curve for each in outcomes]),
        # A booster may have stopped early in some folds; it goes on in the others.
        pruned_at=next((o.pruned_at for o in outcomes if o.pruned_at is not None), None),
        metrics={
            **{
                name: fmean(each.metrics[name] for each in outcomes) for name in outcomes[0].metrics
            },
            SPREAD: pstdev(scores),
        },
        ran=outcomes[0].ran,
    )


def _mean_curve(curves: Sequence[list[list[float]]]) -> list[list[float]]:
    """At every fold's steps; one that stopped early counts with its last value."""
    if not all(curves):
        return []
    begun = max(curve[0][0] for curve in curves)
    steps = sorted({step for curve in curves for step, _ in curve if step >= begun})
    return [
        [step, fmean([value for at, value in curve if at <= step][-1] for curve in curves)]
        for step in steps
    ]
