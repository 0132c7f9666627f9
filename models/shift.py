"""Tells when sentiment, or any bounded number, has shifted: a window against the time before it.

Two measures, since either alone misleads. Welch's t test (Welch 1947) says whether the difference
of means can be chance; over many entities its p-values are adjusted by Benjamini and Hochberg's
step-up (1995), so that of the alarms only the declared share is expected to be false. The size of
the difference says whether it matters: with many texts a change of nothing is significant. The
population stability index (Siddiqi 2006) sees a change of shape that leaves the mean where it was.
It too is above 0 by chance, the more so the fewer values: without a shift, index / (1/n0 + 1/n1)
is about chi-squared with one degree of freedom less than there are bins (Yurdakul and Naranjo
2020), and that p-value, adjusted likewise, has to be small as well. Knows nothing of what the
number means.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import numpy as np
import polars as pl

from models.naming import suggestion

# Siddiqi's rule of thumb: below 0.1 nothing, above 0.25 a shift.
PSI_SHIFT = 0.25
_BINS = 10


class ShiftError(ValueError):
    """A setting or a column isn't as it must be; the message says what is."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """When to alarm.

    Attributes:
        window: The time that is judged.
        reference: The time before it that it is compared with.
        least: Values that each of the two needs.
        change: Difference of means, in the value's own unit, that matters.
        false_share: Share of false alarms among the alarms, by means and by shapes each.
        psi: Population stability index that is an alarm of its own, where it isn't chance.
        low: The least value there can be.
        high: The greatest.
    """

    window: timedelta = timedelta(days=7)
    reference: timedelta = timedelta(days=56)
    least: int = 30
    change: float = 0.1
    false_share: float = 0.01
    psi: float = PSI_SHIFT
    low: float = -1.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if min(self.window, self.reference) <= timedelta(0):
            raise ShiftError("window and reference are times above 0")
        if self.least < 2 or self.change < 0 or self.psi <= 0 or not 0 < self.false_share < 1:
            raise ShiftError(
                f"least {self.least}, change {self.change}, psi {self.psi}, false_share "
                f"{self.false_share}: least is 2 or more, change isn't negative, psi is above 0, "
                "false_share between 0 and 1"
            )
        if self.low >= self.high:
            raise ShiftError(f"low {self.low}, high {self.high}: low is below high")


def welch(
    means: Sequence[np.ndarray], variances: Sequence[np.ndarray], counts: Sequence[np.ndarray]
) -> np.ndarray:
    """Two-sided p-values that two means are equal: t = (m1 - m0) / sqrt(v0/n0 + v1/n1).

    Degrees of freedom by Welch and Satterthwaite. Where neither side varies, 1 if the means are
    equal and 0 if not.

    Args:
        means: Two arrays (k,).
        variances: Two arrays (k,), unbiased.
        counts: Two arrays (k,), each at least 2.

    Returns:
        (k,) float64.
    """
    from scipy import stats

    parts = [v / n for v, n in zip(variances, counts, strict=True)]
    error = parts[0] + parts[1]
    difference = np.abs(means[1] - means[0])
    # A variance this small, of numbers of this size, is the rounding of a sum.
    still = np.sqrt(error) <= 1e-12 * np.maximum(1.0, np.abs(means[0]) + np.abs(means[1]))
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = error**2 / sum(part**2 / (n - 1) for part, n in zip(parts, counts, strict=True))
        p = 2 * stats.t.sf(difference / np.sqrt(error), freedom)
    found: np.ndarray = np.where(still, np.where(difference <= 1e-9, 1.0, 0.0), p)
    return found


def adjusted(p: np.ndarray) -> np.ndarray:
    """Benjamini and Hochberg's adjusted p-values (k,), in the order of the input."""
    if not len(p):
        return p
    order = np.argsort(p)
    scaled = p[order] * len(p) / np.arange(1, len(p) + 1)
    out = np.empty(len(p))
    out[order] = np.minimum(np.minimum.accumulate(scaled[::-1])[::-1], 1.0)
    return out


def stability(reference: np.ndarray, current: np.ndarray, low: float, high: float) -> float:
    """Population stability index: the sum over 10 equal bins of (q - p) ln(q / p).

    Half a value is added to each bin, so that an empty one isn't infinite.

    Args:
        reference: Values before, at least one.
        current: Values now, at least one.
        low: Bins begin here; lower values count in the first.
        high: Bins end here; higher values count in the last.
    """
    shares = []
    for values in (reference, current):
        counts, _ = np.histogram(np.clip(values, low, high), _BINS, (low, high))
        shares.append((counts + 0.5) / (len(values) + 0.5 * _BINS))
    p, q = shares
    return float(((q - p) * np.log(q / p)).sum())


def by_chance(psi: np.ndarray, before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """p-values (k,) of indices (k,) where nothing shifted, of `before` and `now` values (k,)."""
    from scipy import stats

    found: np.ndarray = stats.chi2.sf(psi / (1 / before + 1 / now), _BINS - 1)
    return found


def alarms(
    frame: pl.DataFrame,
    *,
    entity: str,
    time: str,
    value: str,
    at: datetime,
    settings: Settings | None = None,
) -> pl.DataFrame:
    """Each entity's window before `at`, compared with its reference before that.

    Args:
        frame: One row a value; rows whose value or time is null count for nothing.
        entity: Column by which rows are grouped, such as a product.
        time: Column of times.
        value: Column of numbers.
        at: The window's end, not in it.
        settings: None for the defaults.

    Returns:
        One row an entity with rows in either time, by entity: `n_before`, `n_now`, `mean_before`,
        `mean_now`, `change`, `p_value` (adjusted over the entities), `psi`, `alarm` (boolean) and
        `reason`. Where a side has fewer values than `least`, there is no alarm, the p-value and the
        index are null and the reason says so.

    Raises:
        ShiftError: A column is absent or of another kind.
    """
    kept = settings or Settings()
    for name in (entity, time, value):
        if name not in frame.columns:
            raise ShiftError(
                f"no column {name!r}: there are {', '.join(frame.columns)}"
                f"{suggestion(name, frame.columns)}"
            )
    if not frame[value].dtype.is_numeric() or not frame[time].dtype.is_temporal():
        raise ShiftError(
            f"{value!r} is {frame[value].dtype} and {time!r} is {frame[time].dtype}: a number and "
            "a time are needed"
        )
    begins = at - kept.window
    rows = frame.select(
        entity=pl.col(entity), value=pl.col(value).cast(pl.Float64), time=pl.col(time)
    ).filter(
        pl.col("value").is_finite()
        & (pl.col("time") >= begins - kept.reference)
        & (pl.col("time") < at)
    )
    now = pl.col("time") >= begins
    # A column of the caller's may be called like one of ours.
    found = (
        rows.group_by("entity")
        .agg(
            before=pl.col("value").filter(~now).sort(),
            now=pl.col("value").filter(now).sort(),
        )
        .sort("entity")
        .with_columns(
            n_before=pl.col("before").list.len(),
            n_now=pl.col("now").list.len(),
            mean_before=pl.col("before").list.mean(),
            mean_now=pl.col("now").list.mean(),
        )
        .with_columns(change=pl.col("mean_now") - pl.col("mean_before"))
    )
    enough = found.select(pl.min_horizontal("n_before", "n_now") >= kept.least).to_series()
    judged = found.filter(enough)
    p = adjusted(
        welch(
            [judged["mean_before"].to_numpy(), judged["mean_now"].to_numpy()],
            [judged[side].list.var().to_numpy() for side in ("before", "now")],
            [judged["n_before"].to_numpy(), judged["n_now"].to_numpy()],
        )
    )
    psi = [
        stability(np.asarray(before), np.asarray(now), kept.low, kept.high)
        for before, now in judged.select("before", "now").iter_rows()
    ]
    judged = judged.with_columns(
        p_value=pl.Series(p, dtype=pl.Float64),
        psi=pl.Series(psi, dtype=pl.Float64),
        p_shape=pl.Series(
            adjusted(
                by_chance(np.array(psi), judged["n_before"].to_numpy(), judged["n_now"].to_numpy())
            ),
            dtype=pl.Float64,
        ),
    )
    moved = (pl.col("p_value") <= kept.false_share) & (pl.col("change").abs() >= kept.change)
    reshaped = (pl.col("p_shape") <= kept.false_share) & (pl.col("psi") >= kept.psi)
    verdict = (
        pl.when(moved)
        .then(
            pl.format(
                "mean {} from {}",
                pl.when(pl.col("change") < 0).then(pl.lit("fell")).otherwise(pl.lit("rose")),
                pl.format("{} to {}", pl.col("mean_before").round(3), pl.col("mean_now").round(3)),
            )
        )
        .when(reshaped)
        .then(pl.format("distribution changed, psi {}", pl.col("psi").round(3)))
        .otherwise(pl.lit("no shift"))
    )
    judged = judged.with_columns(alarm=moved | reshaped, reason=verdict).drop("p_shape")
    rest = found.filter(~enough).with_columns(
        p_value=pl.lit(None, pl.Float64),
        psi=pl.lit(None, pl.Float64),
        alarm=pl.lit(False),
        reason=pl.format(
            f"fewer than {kept.least} values: {{}} before, {{}} now", "n_before", "n_now"
        ),
    )
    both = pl.concat([judged, rest]).drop("before", "now").sort("entity")
    return both.rename({"entity": entity})
