"""The shop's customers in a store of online features, and a model of these."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from cluster.device import choose
from jobs import online
from jobs.config import Pipeline
from jobs.features import build
from jobs.ingest import ingest
from jobs.pipeline_file import load
from models.encoding import Encoder
from models.families import FAMILIES, TrainingData
from models.features import compute
from models.registry import Registry
from models.scoring import Scorer
from tests.jobs import shop


@dataclass(frozen=True, kw_only=True)
class Place:
    """A shop's tables, a model of its features, and their store."""

    folder: Path
    pipeline: Pipeline
    registry: Registry
    names: list[str]

    @property
    def tables(self) -> Path:
        return self.folder / "tables"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def events(self) -> pl.DataFrame:
        return pl.read_parquet(self.folder / "orders.parquet")


def make(folder: Path) -> Place:
    """Ingests the shop, publishes its features, and promotes a model of them."""
    pipeline = load(shop.make(folder))
    for name, table in pipeline.tables.items():
        ingest(name, table, folder / "tables", base=folder, device=choose("cpu"))
    build("buys", pipeline.features["buys"], folder / "tables")
    published = online.publish("lapse", pipeline, folder / "tables", folder / "store")
    # Those with an order before the last cutoff; counts and sums of two windows, recency, region.
    assert (published.new, published.features) == (True, 6)
    again = online.publish("lapse", pipeline, folder / "tables", folder / "store")
    assert (again.new, again.version) == (False, published.version)

    features = compute(pl.read_parquet(folder / "orders.parquet"), pipeline.features["buys"])
    names = [name for name in features.columns if name not in ("customer", "cutoff")]
    frame = features.select(names)
    encoder = Encoder.fit(frame, names)
    x = encoder.transform(frame)
    y = (np.arange(len(x)) % 4 == 3).astype(np.int8)
    data = TrainingData(x_train=x, y_train=y, x_valid=x, y_valid=y)
    (fitted,) = FAMILIES["boosting"]([{"family": "boosting", "rounds": 5, "depth": 2}], data)
    registry = Registry(f"sqlite:///{folder}/mlflow.db")
    registry.register(
        "lapse",
        Scorer(encoder=encoder, predict=fitted.predict),
        example=frame[:2],
        family="boosting",
        variant={},
        features=[{"name": n, "kind": "number", "description": "", "unit": ""} for n in names],
        metrics={},
        data_version="training/lapse@1",
        seed=1,
        git_revision="0" * 40,
    )
    registry.promote("lapse", 1)
    return Place(folder=folder, pipeline=pipeline, registry=registry, names=names)
