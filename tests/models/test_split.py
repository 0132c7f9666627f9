from datetime import datetime, timedelta

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.split import SplitError, by_time

START = datetime(2024, 1, 1)
day = st.integers(0, 300)


@given(st.lists(day, max_size=60), st.integers(1, 60), st.integers(0, 150), st.integers(0, 150))
def test_no_label_ends_after_a_later_part_begins(
    days: list[int], horizon: int, before: int, between: int
) -> None:
    ahead = timedelta(days=horizon)
    bounds = {
        "validate": START + timedelta(days=horizon + before),
        "test": START + timedelta(days=2 * horizon + before + between),
    }
    # A row at each part's start, so that none is empty.
    moments = [START, *bounds.values(), *(START + timedelta(days=d) for d in days)]
    parts = by_time(pl.Series(moments), horizon=ahead, **bounds).to_list()
    ends = {"train": bounds["validate"], "validate": bounds["test"]}
    starts = {"train": START, **bounds}
    for moment, part in zip(moments, parts, strict=True):
        if part is None:
            # Purged only where keeping it would leak.
            crossed = [bound for bound in bounds.values() if moment < bound < moment + ahead]
            assert crossed
        else:
            assert starts[part] <= moment
            assert part == "test" or moment + ahead <= ends[part]


def test_an_empty_part_is_refused_with_what_there_is() -> None:
    moments = pl.Series([START, START + timedelta(days=40)])
    with pytest.raises(SplitError, match=r"no row to test: cutoffs go from 2024-01-01.* 30 days"):
        by_time(
            moments,
            horizon=timedelta(days=30),
            validate=START + timedelta(days=35),
            test=START + timedelta(days=80),
        )


def test_validate_must_come_before_test() -> None:
    with pytest.raises(SplitError, match="must be earlier"):
        by_time(pl.Series([START]), horizon=timedelta(1), validate=START, test=START)
