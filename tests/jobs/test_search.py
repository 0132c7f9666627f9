"""Variants drawn from declared spaces."""

import importlib.util

import pytest
from pydantic import ValidationError

from jobs.config_sweep import Sweep
from jobs.search import SETTINGS, Learned, SearchError, draw, most, variants
from jobs.sweep import Outcome
from models.families import Variant, packs

SPACES = Sweep().families


def test_the_default_spaces_draw_at_least_200_distinct_variants_that_pack() -> None:
    found = draw(SPACES, seed=7)
    distinct = {tuple(sorted(variant.items())) for variant in found}
    assert len(found) == len(distinct) >= 200
    assert {variant["family"] for variant in found} == set(SETTINGS)
    at_most = sum(space.packs for space in SPACES.values())
    assert len(packs(found)) <= at_most


def test_a_seed_draws_the_same_and_another_seed_others() -> None:
    assert draw(SPACES, seed=7) == draw(SPACES, seed=7)
    assert draw(SPACES, seed=7) != draw(SPACES, seed=8)


def test_settings_stay_in_their_space() -> None:
    families = Sweep.model_validate(
        {
            "families": {
                "boosting": {
                    "packs": 30,
                    "pack_size": 2,
                    "settings": {"rounds": [10, 20], "depth": {"min": 2, "max": 4}, "l2": 1.5},
                }
            }
        }
    ).families
    found = draw(families, seed=1)
    assert {variant["depth"] for variant in found} == {2, 3, 4}
    assert {variant["rounds"] for variant in found} == {10, 20}
    assert {variant["l2"] for variant in found} == {1.5}
    # Six distinct ones are all that the space holds.
    assert len(found) == 6


def test_words_are_drawn_and_patience_is_each_network_s_own() -> None:
    settings = {"patience": [1, 2], "precision": ["32", "bf16-mixed"], "learning_rate": 0.01}
    space = {"network": {"packs": 20, "pack_size": 2, "settings": settings}}
    for sampler in ("random", "grid"):
        declared = Sweep.model_validate({"families": space, "sampler": sampler}).families
        found = draw(declared, 3, sampler)
        assert {each["precision"] for each in found} == {"32", "bf16-mixed"}
        assert sorted(len(pack) for pack in packs(found)) == [2, 2]
        for pack in packs(found):
            assert {each["patience"] for each in pack} == {1, 2}


def test_a_grid_is_every_combination_and_takes_no_ranges() -> None:
    settings = {"trees": [5, 10], "depth": [3, 4, 5], "min_leaf": 2}
    space = {"forest": {"packs": 1, "pack_size": 1, "settings": settings}}
    found = draw(Sweep.model_validate({"families": space, "sampler": "grid"}).families, 3, "grid")
    assert {(each["trees"], each["depth"]) for each in found} == {
        (trees, depth) for trees in (5, 10) for depth in (3, 4, 5)
    }
    assert all((each["seed"], each["min_leaf"]) == (3, 2) for each in found)
    assert len(packs(found)) == 3
    with pytest.raises(ValidationError, match="'depth' of 'forest' is a range"):
        Sweep.model_validate({"sampler": "grid", "families": {"forest": None}})


def outcomes(pack: list[Variant]) -> list[Outcome]:
    """The best is at depth 5 and a rate of 0.1."""
    return [
        Outcome(
            variant=dict(each),
            score=0.9 - abs(each["depth"] - 5) / 20 - abs(each["learning_rate"] - 0.1),
            seconds=1.0,
        )
        for each in pack
    ]


def learned(sampler: str) -> list[list[Variant]]:
    settings = {
        "rounds": [50, 100],
        "depth": {"min": 1, "max": 10},
        "learning_rate": {"min": 0.01, "max": 1.0, "log": True},
    }
    space = {"boosting": {"packs": 30, "pack_size": 2, "settings": settings}}
    source = Learned(
        Sweep.model_validate({"families": space}).families, 1, sampler=sampler, ahead=3
    )
    asked: list[list[Variant]] = []
    while (pack := source.ask()) is not None:
        asked.append(pack)
        if len(asked) >= 3:
            source.tell(outcomes(asked[len(asked) - 3]))
    return asked


def test_tpe_learns_and_asks_the_same_twice() -> None:
    asked = learned("tpe")
    assert asked == learned("tpe")
    assert len(asked) == 30
    for pack in asked:
        assert [each["rounds"] for each in pack] == [50, 100]
        assert len({(each["depth"], each["learning_rate"]) for each in pack}) == 1
    scores = [outcomes(pack)[0].score or 0 for pack in asked]
    assert sum(scores[20:]) / 10 > sum(scores[:10]) / 10 + 0.05


def test_cmaes_learns_where_it_is_installed() -> None:
    if importlib.util.find_spec("cmaes") is None:
        with pytest.raises(SearchError, match="pip install cmaes"):
            learned("cmaes")
        return
    assert learned("cmaes") == learned("cmaes")


def test_a_failed_variant_teaches_nothing_and_stops_nothing() -> None:
    source = Learned(SPACES, 1, sampler="tpe", ahead=1)
    pack = source.ask()
    assert pack is not None
    source.tell(
        [Outcome(variant=dict(each), score=None, seconds=0.0, error="NaN") for each in pack]
    )
    assert source.ask() is not None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"sampler": "random", "halving": {"rungs": [60, 20]}}, "ascending"),
        ({"sampler": "tpe", "ahead": 4, "halving": {"rungs": [20]}}, "raise ahead or lower"),
        ({"sampler": "bayes"}, "'random', 'grid', 'tpe' or 'cmaes'"),
    ],
)
def test_what_does_not_fit_is_refused(said: dict[str, object], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        Sweep.model_validate(said)


def test_a_sweep_says_how_many_it_may_try() -> None:
    assert len(most(SPACES, 7, "random")) == len(draw(SPACES, 7))
    assert len(most(SPACES, 7, "tpe")) == 224
    assert isinstance(variants(Sweep.model_validate({"sampler": "tpe"}), 7), Learned)
    assert variants(Sweep(), 7) == draw(SPACES, 7)
