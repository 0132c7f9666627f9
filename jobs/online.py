"""The latest features of customers, from the features table to the files that replicas read."""

import json
import os
import secrets
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from cluster import storage
from cluster.files import replace_text
from jobs.config import Features, Pipeline
from jobs.features import scan_events, scan_tables, with_lookups
from models.features import compute_at, describe
from models.features.spec import Declaration, FeatureSpec
from serving.online import FEATURES, MANIFEST, POINTER

# Replicas find a new version within seconds; until then they read the one before.
VERSIONS_KEPT = 2


class OnlineError(ValueError):
    """A target's features can't be published; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """What `publish` left.

    Attributes:
        version: Name of the store's version.
        customers: How many have features.
        features: How many each has.
        new: Whether this call made the version.
    """

    version: str
    customers: int
    features: int
    new: bool


def publish(name: str, pipeline: Pipeline, root: str | Path, folder: Path) -> Published:
    """Makes a store of a target's features, at each customer's latest cutoff, and of their events.

    Replicas that read the folder find it whole or not at all.

    Args:
        name: A target whose rows are its features' cutoffs.
        pipeline: Its declaration.
        root: Where tables are stored.
        folder: The store.

    Raises:
        OnlineError: There is no such target, it has rows of its own, or its features are about
            different entities.
        FeatureError: A feature can't be computed online.
        storage.StorageError: A table can't be read.
        OSError: The folder can't be written.
    """
    target = pipeline.targets.get(name)
    if target is None or target.rows is not None:
        fit = [each for each, declared in pipeline.targets.items() if declared.rows is None]
        raise OnlineError(f"target {name!r}: features are published of {fit}, one row a customer")
    groups = {group: pipeline.features[group] for group in target.features}
    first, *others = groups
    entity = groups[first].entity
    if apart := [group for group, each in groups.items() if each.entity != entity]:
        raise OnlineError(f"target {name!r}: {apart} are about other entities than {entity!r}")
    tables = {f"features/{first}"}
    for declared in groups.values():
        tables |= {declared.table, *declared.tables, *(each.table for each in declared.lookups)}
    tables |= {lookup.table for lookup in target.attributes}
    versions = {table: storage.version(root, table) for table in sorted(tables)}
    version = storage.digest(versions, pipeline.model_dump_json())[:16]
    own = [each.name for each in describe(groups[first])]
    frame = (
        storage.scan(root, f"features/{first}", versions[f"features/{first}"])
        .filter(pl.col("cutoff") == pl.col("cutoff").max().over(entity))
        .select(entity, "cutoff", *own)
        .collect()
    )
    for group in others:
        declared = groups[group]
        keys = frame.select(entity, "cutoff")
        near = scan_tables(declared, root, versions, frame.select(entity))
        events = scan_events(declared, root, versions)
        frame = frame.hstack(compute_at(events, declared, keys, tables=near))
    frame = with_lookups(frame.lazy(), target.attributes, root, versions).collect()
    found = Published(version=version, customers=len(frame), features=frame.width - 2, new=True)
    pointer = folder / POINTER
    if pointer.exists() and pointer.read_text(encoding="utf-8").strip() == version:
        return Published(**{**vars(found), "new": False})
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"draft-{secrets.token_hex(4)}"
    draft.mkdir()
    try:
        files: dict[str, str] = {}
        _write(draft / f"{FEATURES}.arrow", frame, entity)
        for group, declared in groups.items():
            for label, rows in _histories(group, declared, root, versions):
                files[label] = f"{len(files)}.arrow"
                _write(draft / files[label], rows, entity)
        said = {
            "version": version,
            "entity": entity,
            "text": frame.schema[entity] == pl.String,
            "files": files,
            "groups": [
                {
                    "name": group,
                    "spec": declared.model_dump(
                        mode="json", include=set(FeatureSpec.model_fields) - {"labels"}
                    ),
                }
                for group, declared in groups.items()
            ],
        }
        (draft / MANIFEST).write_text(json.dumps(said), encoding="utf-8")
        if (folder / version).exists():
            # Of a store that went back to earlier tables.
            shutil.rmtree(draft)
            os.utime(folder / version)
        else:
            draft.rename(folder / version)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    replace_text(pointer, version + "\n")
    made = sorted(
        (each for each in folder.glob(f"*/{MANIFEST}")), key=lambda f: f.parent.stat().st_mtime
    )
    for old in made[:-VERSIONS_KEPT]:
        # Whoever has it mapped keeps it until it lets go.
        shutil.rmtree(old.parent)
    return found


def _histories(
    group: str, declared: Features, root: str | Path, versions: dict[str, int]
) -> Iterable[tuple[str, pl.DataFrame]]:
    """The rows that the group's features are made of, by the label that a request gives them."""
    events = scan_events(declared, root, versions)
    yield group, events.select(declared.entity, *_needed(declared)).collect()
    for table in declared.tables:
        columns: list[str] = []
        for attributes in declared.attributes.values():
            if attributes.table == table:
                columns += [attributes.time, *attributes.columns]
        for stream in declared.streams.values():
            if stream.table == table:
                columns += _needed(stream)
        rows = storage.scan(root, table, versions[table])
        yield (
            f"{group}.{table}",
            rows.select(declared.entity, *dict.fromkeys(columns)).collect(),
        )


def _needed(declared: Declaration) -> list[str]:
    columns = [declared.time, *declared.measures.values(), *declared.distinct.values()]
    columns += [each.column for each in declared.categories.values()]
    columns += [each.column for each in declared.filters]
    return list(dict.fromkeys(columns))


def _write(file: Path, frame: pl.DataFrame, key: str) -> None:
    # Events of the same time count in the order they lie in.
    rows = frame.sort(key, maintain_order=True).rechunk()
    rows.write_ipc(
        file,
        compression="uncompressed",
        compat_level=pl.CompatLevel.oldest(),
        record_batch_size=max(1, rows.height),
    )
