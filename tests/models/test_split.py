from datetime import datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import TimeSeriesSplit

from models.split import SplitError, by_time, folds_by_time, folds_drawn, stratified

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


@settings(deadline=None)
@given(st.integers(6, 80), st.integers(2, 5))
def test_folds_by_time_are_scikit_learns_where_times_differ(rows: int, folds: int) -> None:
    moments = pl.Series([START + timedelta(days=d) for d in range(rows)])
    theirs = TimeSeriesSplit(folds).split(np.zeros(rows))
    for ours, expected in zip(
        folds_by_time(moments, known=moments, folds=folds), theirs, strict=True
    ):
        for one, other in zip(ours, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@given(st.lists(day, min_size=12, max_size=60, unique=True), st.integers(0, 40))
def test_no_fold_trains_on_a_label_that_ends_after_its_start(days: list[int], horizon: int) -> None:
    # Each day twice: rows of one cutoff stay together.
    moments = pl.Series([START + timedelta(days=d) for d in [*days, *days]])
    known = moments + timedelta(days=horizon)
    try:
        parts = folds_by_time(moments, known=known, folds=3)
    except SplitError as error:
        assert "no row trains" in str(error)
        return
    seen: set[datetime] = set()
    for train, scored in parts:
        start = moments[scored].min()
        early = (moments < start).to_numpy()
        assert set(train) == set(np.flatnonzero(early & (known <= start).to_numpy()))
        assert not seen & set(moments[scored])
        seen |= set(moments[scored])
    assert moments.max() in seen


@given(st.lists(st.integers(0, 1), min_size=20, max_size=80), st.integers(2, 4), st.integers(0, 9))
def test_drawn_folds_share_each_class_and_score_each_row_once(
    labels: list[int], folds: int, seed: int
) -> None:
    y = np.array([*labels, *[0, 1] * 4])
    parts = folds_drawn(pl.Series(y), folds=folds, seed=seed)
    assert sorted(np.concatenate([scored for _, scored in parts])) == list(range(y.size))
    for train, scored in parts:
        assert sorted([*train, *scored]) == list(range(y.size))
        for value in (0, 1):
            assert abs((y[scored] == value).sum() - (y == value).sum() / folds) < 1


def test_folds_that_rows_do_not_give_are_refused() -> None:
    moments = pl.Series([START, START + timedelta(days=1)] * 10)
    with pytest.raises(SplitError, match=r"with 2 cutoffs.*fewer folds, or 0"):
        folds_by_time(moments, known=moments, folds=3)
    with pytest.raises(SplitError, match="2 training rows have the label 1, fewer than 3"):
        folds_drawn(pl.Series([0, 0, 0, 0, 1, 1]), folds=3, seed=0)
