"""Point-in-time features: declared in `spec`, computed in `engine`."""

from models.features.engine import FeatureError, compute, label
from models.features.spec import Feature, FeatureSpec, LabelSpec, cutoff_times, describe

__all__ = [
    "Feature",
    "FeatureError",
    "FeatureSpec",
    "LabelSpec",
    "compute",
    "cutoff_times",
    "describe",
    "label",
]
