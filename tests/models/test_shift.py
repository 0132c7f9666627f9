"""The shift alarm: its statistics against others' code, its behaviour by properties."""

from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from models.shift import Settings, ShiftError, adjusted, alarms, stability, welch

AT = datetime(2026, 3, 1, tzinfo=UTC)
VALUES = st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=60)


def events(entity: str, before: list[float], now: list[float]) -> pl.DataFrame:
    """Values spread over the eight weeks before the last week, and over the last week."""
    times = [AT - timedelta(days=8, minutes=each) for each in range(len(before))]
    times += [AT - timedelta(days=1, minutes=each) for each in range(len(now))]
    return pl.DataFrame({"product": entity, "at": times, "sentiment": [*before, *now]})


def found(frame: pl.DataFrame, **how: object) -> pl.DataFrame:
    return alarms(
        frame,
        entity="product",
        time="at",
        value="sentiment",
        at=AT,
        settings=Settings(**how),  # type: ignore[arg-type]
    )


@settings(deadline=None, max_examples=60)
@given(VALUES, VALUES)
def test_p_values_are_those_of_scipy(before: list[float], now: list[float]) -> None:
    a, b = np.array(before), np.array(now)
    if np.ptp(a) < 1e-3 or np.ptp(b) < 1e-3:
        return
    ours = welch(
        [a.mean()[None], b.mean()[None]],
        [a.var(ddof=1)[None], b.var(ddof=1)[None]],
        [np.array([len(a)]), np.array([len(b)])],
    )
    assert ours[0] == pytest.approx(stats.ttest_ind(a, b, equal_var=False).pvalue, rel=1e-6)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=40))
def test_adjustment_is_that_of_scipy(p: list[float]) -> None:
    expected = stats.false_discovery_control(np.array(p))
    np.testing.assert_allclose(adjusted(np.array(p)), expected, rtol=1e-9)


@settings(deadline=None, max_examples=60)
@given(VALUES, VALUES)
def test_stability_is_symmetric_and_never_negative(before: list[float], now: list[float]) -> None:
    a, b = np.array(before), np.array(now)
    assert stability(a, a, -1, 1) == 0
    assert stability(a, b, -1, 1) >= 0
    if len(a) == len(b):
        assert stability(a, b, -1, 1) == pytest.approx(stability(b, a, -1, 1))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1, 1, width=32), min_size=30, max_size=60), st.randoms())
def test_the_same_values_never_alarm_and_order_does_not_matter(
    values: list[float], random: object
) -> None:
    frame = events("mug", values, values)
    same = found(frame)
    assert same["alarm"].to_list() == [False]
    shuffled = frame.sample(fraction=1, shuffle=True, seed=random.randrange(1000))  # type: ignore[attr-defined]
    assert found(shuffled).equals(same)


def test_an_entity_that_fell_alarms_and_others_do_not() -> None:
    random = np.random.default_rng(7)

    def drawn(mean: float, n: int) -> list[float]:
        return np.clip(random.normal(mean, 0.3, n), -1, 1).tolist()

    frame = pl.concat(
        [
            events("fell", drawn(0.4, 300), drawn(-0.1, 100)),
            *(events(f"same {each}", drawn(0.2, 300), drawn(0.2, 100)) for each in range(20)),
            events("rare", drawn(0.4, 300), [-1.0] * 5),
            events("new", [], drawn(0.1, 50)),
        ]
    )
    table = found(frame).rows_by_key("product", named=True, unique=True)
    assert [name for name, row in table.items() if row["alarm"]] == ["fell"]
    assert table["fell"]["change"] == pytest.approx(-0.5, abs=0.1)
    assert table["fell"]["reason"].startswith("mean fell from 0.3")
    assert table["rare"]["reason"] == "fewer than 30 values: 300 before, 5 now"
    assert table["new"]["p_value"] is None


def test_a_small_change_of_many_is_no_alarm_unless_asked() -> None:
    random = np.random.default_rng(5)
    frame = events(
        "mug", random.normal(0, 0.2, 10_000).tolist(), random.normal(0.05, 0.2, 9_000).tolist()
    )
    row = found(frame).row(0, named=True)
    assert row["p_value"] < 1e-6 and not row["alarm"]
    assert found(frame, change=0.02)["alarm"].to_list() == [True]


def test_a_change_of_shape_alarms_where_the_mean_stays() -> None:
    frame = events("mug", [0.0] * 100, [-1.0, 1.0] * 50)
    row = found(frame).row(0, named=True)
    assert row["change"] == 0 and row["alarm"]
    assert row["reason"].startswith("distribution changed, psi")


def test_nulls_and_times_outside_count_for_nothing() -> None:
    frame = events("mug", [0.1] * 40, [0.2] * 40)
    odd = pl.DataFrame(
        {
            "product": "mug",
            "at": [AT, AT - timedelta(days=100), AT - timedelta(days=1)],
            "sentiment": [-1.0, -1.0, None],
        }
    )
    assert found(pl.concat([frame, odd])).equals(found(frame))


def test_faults_are_told() -> None:
    frame = events("mug", [0.1], [0.2])
    with pytest.raises(ShiftError, match="did you mean 'sentiment'"):
        alarms(frame, entity="product", time="at", value="sentimnt", at=AT)
    with pytest.raises(ShiftError, match="a number and a time"):
        alarms(frame, entity="at", time="product", value="sentiment", at=AT)
    with pytest.raises(ShiftError, match="least 1"):
        Settings(least=1)
