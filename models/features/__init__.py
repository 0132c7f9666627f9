"""Point-in-time features: declared in `spec`, computed in `engine`."""

from models.features.engine import FeatureError, compute, compute_at, label
from models.features.spec import Feature, FeatureSpec, LabelSpec, cutoff_times, describe

__all__ = [
    "Feature",
    "FeatureError",
    "FeatureSpec",
    "LabelSpec",
    "compute",
    "compute_at",
    "cutoff_times",
    "describe",
    "label",
]
