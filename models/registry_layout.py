"""A scorer in MLflow's layout of a python_function model, for MLflow's own tools too."""

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from models.scoring import Scorer


def write(folder: Path, scorer: Scorer, example: pl.DataFrame) -> None:
    """The scorer, its signature and the first five rows of the example.

    Raises:
        EncodingError: The example isn't what the encoder takes.
    """
    from mlflow.models import Model, ModelSignature
    from mlflow.types import ColSpec, DataType, Schema

    columns = scorer.encoder.columns
    scorer.score(example.head(5))
    rows = example.head(5).select(scorer.encoder.feature_names)
    types = {"number": DataType.double, "string": DataType.string, "boolean": DataType.boolean}
    inputs: list[Any] = [
        ColSpec(types[column.kind], column.name, required=False) for column in columns
    ]
    model = Model(
        signature=ModelSignature(inputs=Schema(inputs), outputs=Schema([ColSpec(DataType.double)])),
        saved_input_example_info={
            "artifact_path": "input_example.json",
            "type": "dataframe",
            "pandas_orient": "split",
        },
    )
    model.add_flavor(
        "python_function",
        loader_module="models.registry",
        data="scorer",
        python_version=platform.python_version(),
    )
    model.save(str(folder / "MLmodel"))
    shown = [[None if value != value else value for value in row] for row in rows.rows()]
    # Decimals are numbers to the encoder, not to JSON.
    said = json.dumps({"columns": rows.columns, "data": shown}, ensure_ascii=False, default=float)
    (folder / "input_example.json").write_text(said, encoding="utf-8")
    scorer.save(folder / "scorer")


class PyFunc:
    """What MLflow calls with a pandas frame."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer

    def predict(self, frame: Any, params: Any = None) -> np.ndarray:
        return self._scorer.score(pl.from_pandas(frame))
