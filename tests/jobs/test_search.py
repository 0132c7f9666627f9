"""Variants drawn from declared spaces."""

from jobs.config import Sweep
from jobs.search import SETTINGS, draw
from models.families import packs

SPACES = Sweep().families


def test_the_default_spaces_draw_at_least_200_distinct_variants_that_pack() -> None:
    variants = draw(SPACES, seed=7)
    distinct = {tuple(sorted(variant.items())) for variant in variants}
    assert len(variants) == len(distinct) >= 200
    assert {variant["family"] for variant in variants} == set(SETTINGS)
    most = sum(space.packs for space in SPACES.values())
    assert len(packs(variants)) <= most


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
    variants = draw(families, seed=1)
    assert {variant["depth"] for variant in variants} == {2, 3, 4}
    assert {variant["rounds"] for variant in variants} == {10, 20}
    assert {variant["l2"] for variant in variants} == {1.5}
    # Six distinct ones are all that the space holds.
    assert len(variants) == 6
