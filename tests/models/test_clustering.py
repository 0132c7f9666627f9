"""K-means scored over numbers of clusters."""

import numpy as np
import pytest

from models import clustering
from models.families import VariantError


@pytest.fixture(scope="module")
def data() -> clustering.ClusterData:
    draws = np.random.default_rng(1)
    centers = np.array([[0, 0], [6, 0], [0, 6], [6, 6]])
    x = centers[draws.integers(4, size=800)] + draws.standard_normal((800, 2))
    return clustering.ClusterData(x=x.astype(np.float32), sample=300)


def test_every_score_finds_the_clusters_that_are_there(data: clustering.ClusterData) -> None:
    variants = [{"clusters": k, "seed": seed} for k in range(2, 8) for seed in range(3)]
    found = clustering.fit_pack(variants, data)
    best = max(found, key=lambda each: each.silhouette)
    assert best.variant["clusters"] == 4
    assert min(found, key=lambda each: each.davies_bouldin).variant["clusters"] == 4
    assert best.stability > 0.95 and best.silhouette > 0.5
    assert np.mean([e.stability for e in found if e.variant["clusters"] == 7]) < best.stability


def test_a_variant_scores_the_same_whatever_its_pack(data: clustering.ClusterData) -> None:
    variants = [{"clusters": 5, "seed": 1}, {"clusters": 3, "seed": 2}]
    for variant, packed in zip(variants, clustering.fit_pack(variants, data), strict=True):
        (alone,) = clustering.fit_pack([variant], data)
        assert alone.metrics == packed.metrics
        np.testing.assert_array_equal(alone.centers, packed.centers)


def test_what_cannot_be_clustered_is_told(data: clustering.ClusterData) -> None:
    with pytest.raises(VariantError, match="'clusters' of 'kmeans' is 400; give fewer"):
        clustering.fit_pack([{"clusters": 400}], data)
    with pytest.raises(clustering.ClusterDataError, match="aren't finite"):
        clustering.ClusterData(x=np.full((5, 2), np.nan, dtype=np.float32))
    with pytest.raises(clustering.ClusterDataError, match="4 or more rows of float32"):
        clustering.ClusterData(x=np.zeros((5, 2)))
    without = clustering.ClusterData(x=data.x, resamples=0)
    assert set(clustering.fit_pack([{"clusters": 2}], without)[0].metrics) == {
        "silhouette",
        "davies_bouldin",
    }
