"""Point-in-time features: declared in `spec`, computed by a kernel made for the declaration."""

from models.features.events import FeatureError
from models.features.listing import Feature, describe
from models.features.spec import FeatureSpec, LabelSpec, cutoff_times
from models.features.tables import (
    compile_kernel,
    compute,
    compute_at,
    compute_parts,
    computed_by,
    label,
    online,
)

__all__ = [
    "Feature",
    "FeatureError",
    "FeatureSpec",
    "LabelSpec",
    "compile_kernel",
    "compute",
    "compute_at",
    "compute_parts",
    "computed_by",
    "cutoff_times",
    "describe",
    "label",
    "online",
]
