"""What a sentiment training may say, in a file of its own or within a pipeline's.

Knows nothing of how it runs (`jobs/sentiment.py`).
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.estimators import CUML_LEAST
from models.sentiment import LABELS
from models.sentiment_schedule import Settings


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Texts(_Model):
    """A file of labelled texts: CSV or TSV (gzipped too), or Parquet.

    `labels` maps what the file says to the model's labels; a value that it doesn't name is as it
    stands. `language` gives all of them one, where detection isn't wanted.
    `group` names a column whose equal values stay on one side when texts are held out: for texts
    that say the same, such as translations.
    """

    path: str = Field(min_length=1)
    separator: str = Field(default=",", min_length=1, max_length=1)
    text: str = "text"
    label: str = "label"
    labels: dict[str, str] = {}
    language: Literal["en", "pl", "other"] | None = None
    group: str | None = None


class Topics(_Model):
    """How the texts are grouped: k-means' `groups`, or HDBSCAN's smallest group, `least`."""

    method: Literal["kmeans", "hdbscan"] = "kmeans"
    groups: int = Field(default=8, ge=2)
    least: int = Field(default=10, ge=2)


class Variants(_Model):
    """What a sweep tries: every combination of these, chosen by validation macro-F1."""

    learning_rate: list[float] = []
    epochs: list[float] = []
    smoothing: list[float] = []
    layer_decay: list[float] = []


class SentimentTraining(_Model):
    """One training, from labelled texts to a registered model.

    `mode` "head" trains a logistic regression on the encoder's embeddings, in seconds; "full"
    fine-tunes all of it. Texts are held out by their hash (or their
    group's), so that equal texts are on one side.
    """

    name: str = Field(default="sentiment", min_length=1)
    texts: list[Texts] = Field(min_length=1)
    encoder: str = "multilingual-e5-small"
    labels: list[str] = Field(default=list(LABELS), min_length=2)
    mode: Literal["full", "head"] = "full"
    max_tokens: int = Field(default=64, ge=8)
    test_share: float = Field(default=0.2, gt=0, lt=0.9)
    valid_share: float = Field(default=0.1, gt=0, lt=0.9)
    seed: int = Field(default=0, ge=0)

    epochs: float = Field(default=Settings.epochs, gt=0)
    batch: int = Field(default=Settings.batch, ge=1)
    learning_rate: float = Field(default=Settings.learning_rate, gt=0)
    layer_decay: float = Field(default=Settings.layer_decay, gt=0, le=1)
    warm_up: float = Field(default=Settings.warm_up, ge=0, lt=1)
    weight_decay: float = Field(default=Settings.weight_decay, ge=0)
    smoothing: float = Field(default=Settings.smoothing, ge=0, lt=1)
    class_weights: bool = Settings.class_weights
    freeze_words: bool = Settings.freeze_words
    precision: Literal["bf16", "fp32"] = Settings.precision
    checks: int = Field(default=Settings.checks, ge=1)
    choose_by: Literal["macro_recall", "macro_f1"] = Settings.choose_by
    patience: int | None = Field(default=Settings.patience, ge=1)
    checkpoint_steps: int = Field(default=Settings.checkpoint_steps, ge=1)

    workers: int = Field(default=1, ge=1)
    cpus: int = Field(default=1, ge=1)
    gpus: float = Field(default=0, ge=0)
    sweep: Variants | None = None
    topics: Topics = Topics()

    @model_validator(mode="after")
    def _agree(self) -> SentimentTraining:
        if len(set(self.labels)) < len(self.labels):
            raise ValueError(f"labels {self.labels}: give each once")
        if self.test_share + self.valid_share >= 0.9:
            raise ValueError(
                f"test_share {self.test_share} and valid_share {self.valid_share} leave less than "
                "a tenth to train on; give less"
            )
        if self.sweep is not None and self.mode == "head":
            raise ValueError("sweep varies fine-tuning; leave it out, or give mode: full")
        if self.gpus and self.topics.method == "hdbscan" and self.topics.least > CUML_LEAST:
            raise ValueError(
                f"topics.least {self.topics.least}: HDBSCAN on a GPU takes at most {CUML_LEAST}; "
                "give less, or leave gpus out"
            )
        if self.workers > 1 and self.mode == "head":
            raise ValueError(f"workers {self.workers}: mode head takes one; leave workers out")
        return self

    def settings(self, **other: Any) -> Settings:
        """How to fine-tune, with `other` in place of what this says."""
        said = {name: getattr(self, name) for name in vars(Settings())}
        return Settings(**{**said, **other})
