"""Estimators of one signature for the CPU (scikit-learn) and CUDA (cuML).

The one place that imports cuML; its calls follow cuML 26.10. All take float32 arrays (n, p) and
give NumPy arrays, whatever the device. The two libraries draw and stop differently, so results
agree in quality and not bit by bit.
"""

from typing import Any

from cluster.device import Device

# Its search for neighbours takes at most 1023.
CUML_LEAST = 1024


def forest(
    device: Device, *, trees: int, depth: int, min_leaf: int, feature_share: float, seed: int
) -> Any:
    """An untrained random forest classifier, with `fit` and `predict_proba`.

    cuML's forest splits at the edges of at most 128 bins a feature, takes no missing values, and
    doesn't show its trees.

    Args:
        device: From `cluster.device.choose`.
        trees: How many.
        depth: At most so many levels.
        min_leaf: Rows in a leaf at least.
        feature_share: Share of the features tried at a split, above 0 and at most 1.
        seed: Of bootstrap and features.
    """
    if device.kind == "cuda":
        from cuml.ensemble import RandomForestClassifier as CumlForest

        # One stream: the order in which trees end, and with it sums of floats, stays the same.
        return CumlForest(
            n_estimators=trees,
            max_depth=depth,
            min_samples_leaf=min_leaf,
            max_features=float(feature_share),
            random_state=seed,
            n_streams=1,
            output_type="numpy",
        )
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(
        n_estimators=trees,
        max_depth=depth,
        min_samples_leaf=min_leaf,
        # A whole number would be a count of features.
        max_features=float(feature_share),
        random_state=seed,
        n_jobs=1,
    )


def kmeans(
    device: Device, *, clusters: int, seed: int, restarts: int = 1, max_iterations: int = 300
) -> Any:
    """An untrained k-means, with `fit`, `predict`, `cluster_centers_`, `labels_` and `inertia_`.

    Starts from k-means++ (Arthur and Vassilvitskii 2007), on CUDA from its scalable form
    (Bahmani and others 2012).

    Args:
        device: From `cluster.device.choose`.
        clusters: How many.
        seed: Of the starts.
        restarts: Starts; the one of least inertia is kept.
        max_iterations: Of each start at most.
    """
    if device.kind == "cuda":
        from cuml.cluster import KMeans as CumlKMeans

        return CumlKMeans(
            n_clusters=clusters,
            random_state=seed,
            n_init=restarts,
            max_iter=max_iterations,
            init="scalable-k-means++",
            output_type="numpy",
        )
    from sklearn.cluster import KMeans

    return KMeans(
        n_clusters=clusters,
        random_state=seed,
        n_init=restarts,
        max_iter=max_iterations,
        init="k-means++",
    )


def hdbscan(device: Device, *, least: int) -> Any:
    """An untrained HDBSCAN (Campello and others 2015), with `fit` and `labels_`, -1 for outliers.

    A row is in a dense place where `least` rows are near, itself included. There is nothing random
    in it; where distances tie, the two libraries may draw a group's edge differently.

    Args:
        device: From `cluster.device.choose`.
        least: Rows in a group at least, 2 or more; on CUDA at most `CUML_LEAST`.
    """
    if device.kind == "cuda":
        from cuml.cluster import HDBSCAN as CumlHDBSCAN

        return CumlHDBSCAN(
            min_cluster_size=least,
            # The row itself isn't counted by cuML; it is by scikit-learn.
            min_samples=least - 1,
            output_type="numpy",
        )
    from sklearn.cluster import HDBSCAN

    return HDBSCAN(min_cluster_size=least, min_samples=least, copy=True)


def logistic(device: Device, *, strength: float = 1.0, max_iterations: int = 1000) -> Any:
    """An untrained logistic regression with an L2 penalty, with `fit` and `predict_proba`.

    Both minimise the sum of log losses plus `strength` / 2 times the squared coefficients; the
    intercept is free. There is nothing random in it.

    Args:
        device: From `cluster.device.choose`.
        strength: Of the penalty, above 0.
        max_iterations: At most.
    """
    if device.kind == "cuda":
        from cuml.linear_model import LogisticRegression as CumlLogistic

        return CumlLogistic(
            C=1.0 / strength,
            max_iter=max_iterations,
            # The solver minimises the mean loss; so normalised, the penalty is scikit-learn's.
            penalty_normalized=True,
            output_type="numpy",
        )
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=1.0 / strength, max_iter=max_iterations)
