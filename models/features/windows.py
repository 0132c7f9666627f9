"""Where windows begin: moments before cutoffs by hours, days, weeks or calendar months."""

from typing import Any

import numpy as np

Moments = np.ndarray[Any, np.dtype[np.int64]]

HOUR_US = 3_600_000_000
DAY_US = 24 * HOUR_US
_UNITS = {"h": HOUR_US, "d": DAY_US, "w": 7 * DAY_US}


def fixed_us(duration: str) -> int | None:
    """A duration's microseconds; None for months, which differ.

    Args:
        duration: such as "12h", "30d", "4w" or "3mo".
    """
    return None if duration.endswith("mo") else int(duration[:-1]) * _UNITS[duration[-1]]


def starts(cuts: Moments, window: str) -> Moments:
    """The first moment of a window before each cutoff.

    Args:
        cuts: int64, microseconds since 1970.
        window: a duration. Months before the 31st of a shorter month are its last day.
    """
    fixed = fixed_us(window)
    if fixed is not None:
        return cuts - fixed
    moments = cuts.astype("M8[us]")
    months = moments.astype("M8[M]")
    inside = moments - months.astype("M8[us]")
    day, time = inside.astype("m8[D]"), inside - inside.astype("m8[D]")
    earlier = months - int(window.removesuffix("mo"))
    longest = (earlier + 1).astype("M8[D]") - earlier.astype("M8[D]") - 1
    moved = earlier.astype("M8[D]") + np.minimum(day, longest)
    first: Moments = (moved.astype("M8[us]") + time).astype(np.int64)
    return first
