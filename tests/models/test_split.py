from datetime import datetime, timedelta

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.split import SplitError, by_time, stratified

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
    known = pl.Series(moments) + ahead
    parts = by_time(pl.Series(moments), known=known, **bounds).to_list()
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
    with pytest.raises(
        SplitError, match=r"no row to test: cutoffs go from 2024-01-01.* 2024-03-11"
    ):
        by_time(
            moments,
            known=moments + timedelta(days=30),
            validate=START + timedelta(days=35),
            test=START + timedelta(days=80),
        )


def test_validate_must_come_before_test() -> None:
    with pytest.raises(SplitError, match="must be earlier"):
        by_time(pl.Series([START]), known=pl.Series([START]), validate=START, test=START)


@given(st.integers(20, 200), st.integers(20, 200), st.integers(0, 9))
def test_each_part_has_the_classes_shares(zeros: int, ones: int, seed: int) -> None:
    labels = pl.Series([0] * zeros + [1] * ones)
    parts = stratified(labels, validate_share=0.2, test_share=0.3, seed=seed)
    for part, share in (("train", 0.5), ("validate", 0.2), ("test", 0.3)):
        for value, count in ((0, zeros), (1, ones)):
            assert abs(((parts == part) & (labels == value)).sum() - share * count) <= 1
    again = stratified(labels, validate_share=0.2, test_share=0.3, seed=seed)
    assert parts.equals(again)


def test_too_few_rows_to_draw_from_are_refused() -> None:
    with pytest.raises(SplitError, match="no row to validate among 3"):
        stratified(pl.Series([0, 0, 1]), validate_share=0.1, test_share=0.4, seed=1)
