"""A target's training set: its rows with features, attributes, label and part, as one table.

The table `training/NAME` holds the features, the label `_label` (0, 1, or null where it isn't known
yet) and when it is known, `_known`, the part `_split` ("train", "validate", "test", or null where
the row is left out), `_cutoff`, what tells the row, and its number `_row`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from cluster import dask_lease, storage
from jobs.config import Features, Pipeline, Target
from jobs.features import engine, scan_events, scan_tables, with_lookups
from models import split
from models.encoding import Encoder
from models.families import TrainingData
from models.features import compute_at, describe
from models.folds import Folds

LABEL, SPLIT, CUTOFF, KNOWN, ROW = "_label", "_split", "_cutoff", "_known", "_row"
_TIME = pl.Datetime("us")


class TrainingError(ValueError):
    """A training set can't be made of these rows; the message says what they hold."""


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """What `assemble` left.

    Attributes:
        version: Version of the Delta table `training/NAME`.
        rows: All rows.
        features: How many features.
        positives: Share of 1 among the rows with a known label.
        split: Rows by part; also those `purged`, and those whose label is `unknown`.
        new: Whether this call made the version.
        engine: What computed it.
    """

    version: int
    rows: int
    features: int
    positives: float
    split: dict[str, int]
    new: bool
    engine: str


@dataclass(frozen=True, kw_only=True)
class FeatureColumn:
    """A feature as people read it: a name, what it is, and the unit of its values."""

    name: str
    description: str
    unit: str


def feature_columns(target: Target, pipeline: Pipeline) -> list[FeatureColumn]:
    """The target's features, in the order of the table's columns."""
    found = [
        FeatureColumn(name=each.name, description=each.description, unit=each.unit)
        for group in target.features
        for each in describe(pipeline.features[group])
    ]
    own = [(target.rows.table, name) for name in target.rows.columns] if target.rows else []
    looked_up = [(lookup.table, name) for lookup in target.attributes for name in lookup.columns]
    return found + [
        FeatureColumn(name=name, description=f"{name} of {table}", unit="")
        for table, name in [*own, *looked_up]
    ]


@storage.retried
def assemble(
    name: str,
    pipeline: Pipeline,
    root: str | Path,
    *,
    lease: dask_lease.Workers | None = None,
) -> Assembled:
    """Bring the table `training/NAME` up to its sources in at most one commit.

    Args:
        name: The target's name.
        pipeline: The declaration.
        root: Where tables are stored; `features/NAME` is there where the target takes its rows.
        lease: Dask workers to compute features on; None computes them here.

    Raises:
        TrainingError: No row's label is known, or all are the same.
        SplitError: A part would be empty.
        FeatureError: The events don't fit a declaration.
        storage.StorageError: A table can't be read or written.
    """
    target = pipeline.targets[name]
    versions = {source: storage.version(root, source) for source in _sources(target, pipeline)}
    groups = " ".join(pipeline.features[group].model_dump_json() for group in target.features)
    made_of = storage.digest(versions, pipeline.seed, target.model_dump_json(), groups, KNOWN)
    table = f"training/{name}"
    onto = storage.latest(root, table)
    before = {} if onto is None else storage.metadata(root, table, onto)
    if onto is not None and before.get("made_of") == made_of:
        return Assembled(**json.loads(before["assembled"]), version=onto, new=False)

    frame = _rows(target, pipeline, root, versions)
    for place, group in enumerate(target.features):
        if target.rows is None and place == 0:
            continue
        declared = pipeline.features[group]
        frame = frame.hstack(_features(declared, frame, root, versions, lease))
    frame = with_lookups(frame.lazy(), target.attributes, root, versions).collect()
    frame = _labelled(name, target, pipeline, frame, root, versions)
    frame = frame.with_columns(_parts(target, pipeline.seed, frame))
    features = [column.name for column in feature_columns(target, pipeline)]
    count = frame[SPLIT].value_counts().drop_nulls()
    unknown = frame[LABEL].null_count()
    made = {
        "rows": frame.height,
        "features": len(features),
        "positives": float(frame[LABEL].mean()),  # type: ignore[arg-type]
        "split": {
            **{part: int(n) for part, n in sorted(count.rows())},
            "purged": frame[SPLIT].null_count() - unknown,
            "unknown": unknown,
        },
        "engine": engine((pipeline.features[group] for group in target.features), lease),
    }
    told = [column for column in told_by(target, pipeline) if column not in features]
    version = storage.write(
        root,
        table,
        frame.with_row_index(ROW).select(*told, CUTOFF, LABEL, KNOWN, SPLIT, *features, ROW),
        mode="overwrite",
        onto=onto,
        metadata={"made_of": made_of, "assembled": json.dumps(made), "sources": str(versions)},
    )
    return Assembled(**made, version=version, new=True)  # type: ignore[arg-type]


def load(name: str, root: str | Path, version: int) -> pl.DataFrame:
    """The rows of `training/NAME` that are in a part, by their number.

    Raises:
        storage.StorageError: There is no such table or version.
    """
    rows = storage.scan(root, f"training/{name}", version).filter(pl.col(SPLIT).is_not_null())
    return rows.sort(ROW).collect()


@dataclass(frozen=True, kw_only=True)
class Matrices:
    """A training set's rows as the families take them.

    Attributes:
        encoder: Fitted on the rows that train.
        x: By part, (n, p) float32, NaN where missing.
        y: By part, (n,) int8.
    """

    encoder: Encoder
    x: dict[str, np.ndarray]
    y: dict[str, np.ndarray]

    @property
    def training_data(self) -> TrainingData:
        """The rows that train and validate."""
        return TrainingData(
            x_train=self.x["train"],
            y_train=self.y["train"],
            x_valid=self.x["validate"],
            y_valid=self.y["validate"],
            categories=self.encoder.categories,
        )


def encode(frame: pl.DataFrame, features: Sequence[str]) -> Matrices:
    """Encode each part of a training set.

    Args:
        frame: From `load`.
        features: Columns, in the order of the matrix.

    Raises:
        EncodingError: A feature has a type with no encoding.
        TrainingDataError: A value is infinite, or the rows that train have one class only.
    """
    parts = {part: frame.filter(pl.col(SPLIT) == part) for part in split.PARTS}
    encoder = Encoder.fit(parts["train"], features)
    return Matrices(
        encoder=encoder,
        x={part: encoder.transform(rows) for part, rows in parts.items()},
        y={part: rows[LABEL].to_numpy().astype(np.int8) for part, rows in parts.items()},
    )


def folds(
    target: Target, frame: pl.DataFrame, matrices: Matrices, *, count: int, seed: int
) -> Folds:
    """Folds of the rows that train, by time where the target's parts are.

    Args:
        target: The declaration.
        frame: From `load`.
        matrices: The same rows, encoded.
        count: How many, 2 or more.
        seed: Of the draw, where they are drawn.

    Raises:
        SplitError: The rows are too few, or too few times.
        TrainingDataError: A fold lacks a class.
    """
    rows = frame.filter(pl.col(SPLIT) == "train")
    parts = (
        split.folds_drawn(rows[LABEL], folds=count, seed=seed)
        if target.split.validate_from is None
        else split.folds_by_time(rows[CUTOFF], known=rows[KNOWN], folds=count)
    )
    return Folds(
        x=matrices.x["train"],
        y=matrices.y["train"],
        parts=parts,
        categories=matrices.encoder.categories,
    )


def _sources(target: Target, pipeline: Pipeline) -> list[str]:
    groups = [pipeline.features[group] for group in target.features]
    lookups = [*target.attributes, *(lookup for group in groups for lookup in group.lookups)]
    found = [table for group in groups for table in (group.table, *group.tables)]
    if target.rows is None:
        found.append(f"features/{target.features[0]}")
    else:
        found.append(target.rows.table)
        lookups += target.rows.lookups
    found += [lookup.table for lookup in lookups]
    if target.label.event is not None:
        found.append(target.label.event)
    return sorted(set(found))


def told_by(target: Target, pipeline: Pipeline) -> list[str]:
    """The columns that tell one row from another."""
    entities = [pipeline.features[group].entity for group in target.features]
    entities += [lookup.key for lookup in target.attributes]
    return list(dict.fromkeys([*entities, *target.label.keys]))


def _rows(
    target: Target, pipeline: Pipeline, root: str | Path, versions: dict[str, int]
) -> pl.DataFrame:
    """The rows, sorted, with `_cutoff` (null where there is none)."""
    if target.rows is None:
        source = f"features/{target.features[0]}"
        frame = storage.scan(root, source, versions[source]).rename({"cutoff": CUTOFF}).collect()
        return frame.drop(storage.PART).sort(pipeline.features[target.features[0]].entity, CUTOFF)
    rows = target.rows
    lazy = with_lookups(
        storage.scan(root, rows.table, versions[rows.table]), rows.lookups, root, versions
    )
    cutoff = pl.col(rows.cutoff).cast(_TIME) if rows.cutoff else pl.lit(None, dtype=_TIME)
    frame = lazy.drop(storage.PART).with_columns(cutoff.alias(CUTOFF)).collect()
    # Files are read in any order, and a drawn split must not depend on it.
    return frame.sort(frame.columns, nulls_last=True)


def _features(
    declared: Features,
    frame: pl.DataFrame,
    root: str | Path,
    versions: dict[str, int],
    lease: dask_lease.Workers | None,
) -> pl.DataFrame:
    """The group's features at each row's own cutoff, in the rows' order."""
    keys = frame.select(declared.entity, cutoff=CUTOFF).with_row_index("_place")
    count = int(storage.metadata(root, declared.table, versions[declared.table])["partitions"])
    parted = storage.with_partition(keys.lazy(), declared.entity, count).collect()
    work = partial(_part_features, declared, str(root), versions)
    parts = [rows for _, rows in parted.group_by(storage.PART, maintain_order=True)]
    whole: pl.DataFrame = pl.concat(list(dask_lease.map_partitions(work, parts, lease)))
    return whole.sort("_place").drop("_place")


def _part_features(
    declared: Features, root: str, versions: dict[str, int], rows: pl.DataFrame
) -> pl.DataFrame:
    part = rows[storage.PART][0]
    events = scan_events(declared, root, versions).filter(pl.col(storage.PART) == part)
    entities = rows.select(declared.entity).unique()
    tables = scan_tables(declared, root, versions, entities)
    return rows.select("_place").hstack(compute_at(events, declared, rows, tables=tables))


def _labelled(
    name: str,
    target: Target,
    pipeline: Pipeline,
    frame: pl.DataFrame,
    root: str | Path,
    versions: dict[str, int],
) -> pl.DataFrame:
    """With `_label` and `_known`, when the label is known."""
    label = target.label
    if label.feature is not None:
        (spec,) = (
            each
            for each in pipeline.features[target.features[0]].labels
            if each.name == label.feature
        )
        value = (pl.col(label.feature) > 0).cast(pl.Int8)
        known = pl.col(CUTOFF) + pl.duration(days=spec.horizon_days)
    elif label.column is not None:
        value, known = (pl.col(label.column) == label.positive).cast(pl.Int8), pl.col(CUTOFF)
    else:
        assert label.event is not None and label.time is not None and label.until is not None
        events = storage.scan(root, label.event, versions[label.event])
        last = events.select(pl.col(label.time).max()).collect().item()
        times = events.select(*label.keys, _time=pl.col(label.time).cast(_TIME))
        until = pl.col(label.until).cast(_TIME)
        hits = (
            frame.lazy()
            .select(*label.keys, CUTOFF, until.alias(KNOWN))
            .join(times, on=label.keys)
            .filter((pl.col("_time") >= pl.col(CUTOFF)) & (pl.col("_time") <= pl.col(KNOWN)))
            .select(*label.keys, CUTOFF, _hit=pl.lit(1, dtype=pl.Int8))
            .unique()
            .collect()
        )
        frame = frame.join(hits, on=[*label.keys, CUTOFF], how="left", maintain_order="left")
        value, known = pl.when(until <= last).then(pl.col("_hit").fill_null(0)), until
    frame = frame.with_columns(value.alias(LABEL), known.alias(KNOWN))
    classes = frame[LABEL].drop_nulls().unique()
    if classes.len() < 2:
        raise TrainingError(
            f"targets.{name}: the label is {classes.to_list() or 'unknown'} in all "
            f"{frame.height} rows; both 0 and 1 are needed: check the label and the rows"
        )
    return frame


def _parts(target: Target, seed: int, frame: pl.DataFrame) -> pl.Series:
    """`_split` of each row; null where the label isn't known."""
    known = frame.with_row_index("_place").filter(pl.col(LABEL).is_not_null())
    how = target.split
    if how.validate_from is not None and how.test_from is not None:
        parts = split.by_time(
            known[CUTOFF], known=known[KNOWN], validate=how.validate_from, test=how.test_from
        )
    else:
        assert how.validate_share is not None and how.test_share is not None
        parts = split.stratified(
            known[LABEL], validate_share=how.validate_share, test_share=how.test_share, seed=seed
        )
    placed = pl.Series(SPLIT, [None] * frame.height, dtype=pl.String)
    parted: pl.Series = placed.scatter(known["_place"], parts)
    return parted
