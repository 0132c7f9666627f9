"""From a row as people know it to the probability of 1: an encoder and a trained model together."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from models.encoding import Encoder


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """What is registered, loaded and served.

    Attributes:
        encoder: Fixes the columns, their order and their codes, as in training.
        predict: (n, p) float32 to (n,) float64, the probability of 1; `Fitted.predict`.
    """

    encoder: Encoder
    predict: Callable[[np.ndarray], np.ndarray]

    def score(self, frame: pl.DataFrame) -> np.ndarray:
        """Probability of 1 a row.

        Args:
            frame: n rows with at least the encoder's columns; others are ignored.

        Returns:
            (n,) float64 in [0, 1].

        Raises:
            EncodingError: A column is absent or of another kind than in training.
        """
        return self.predict(self.encoder.transform(frame))

    def save(self, folder: Path) -> None:
        """Writes the scorer to a new folder; `predict` needs to be picklable by cloudpickle.

        Raises:
            OSError: The folder is there, or can't be written.
        """
        import cloudpickle

        folder.mkdir()
        (folder / "encoder.json").write_text(self.encoder.to_json(), encoding="utf-8")
        (folder / "predict.pkl").write_bytes(cloudpickle.dumps(self.predict))

    @classmethod
    def load(cls, folder: Path) -> "Scorer":
        """The scorer that `save` wrote, its scores identical to the bit; runs pickled code.

        Raises:
            OSError: The folder can't be read.
        """
        encoder = Encoder.from_json((folder / "encoder.json").read_text(encoding="utf-8"))
        return cls(encoder=encoder, predict=pickle.loads((folder / "predict.pkl").read_bytes()))
