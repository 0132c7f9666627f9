"""A registry with one champion, `lapse`, of one feature."""

from pathlib import Path

import numpy as np
import polars as pl

from models.encoding import Encoder
from models.families import FAMILIES, TrainingData
from models.registry import Registry
from models.scoring import Scorer

FRAME = pl.DataFrame({"spend": [1.5, None, -3.0, 8.0] * 20})


def champion(folder: Path) -> Registry:
    """Trains the model and promotes it, in a registry in `folder`."""
    encoder = Encoder.fit(FRAME, FRAME.columns)
    x = encoder.transform(FRAME)
    y = (np.arange(len(x)) % 4 == 3).astype(np.int8)
    data = TrainingData(x_train=x, y_train=y, x_valid=x, y_valid=y)
    (fitted,) = FAMILIES["boosting"]([{"family": "boosting", "rounds": 3}], data)
    registry = Registry(f"sqlite:///{folder}/mlflow.db")
    registry.register(
        "lapse",
        Scorer(encoder=encoder, predict=fitted.predict),
        example=FRAME[:2],
        family="boosting",
        variant={},
        features=[{"name": "spend", "kind": "number", "description": "", "unit": ""}],
        metrics={},
        data_version="training/test@1",
        seed=1,
        git_revision="0" * 40,
    )
    registry.promote("lapse", 1)
    return registry
