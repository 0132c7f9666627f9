"""A table of events in, a table of features and labels out, partition by partition.

All of an entity's events lie in one partition, so the result is the same in this process and on
any number of Dask workers.
"""

import datetime as dt
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path

import polars as pl

from cluster import dask_lease, storage
from jobs.config import Features, Lookup
from models.features import compile_kernel, compute, computed_by, cutoff_times


class HorizonError(ValueError):
    """A label looks further ahead than the events go."""


@dataclass(frozen=True, kw_only=True)
class Built:
    """What `build` left.

    Attributes:
        version: Version of the Delta table `features/NAME`.
        events: Rows of the events table.
        rows: One an entity and cutoff.
        columns: Features and labels.
        new: Whether this call made the version.
        engine: What computed it.
        compile_s: What compiling the declaration took, or loading what was compiled before.
    """

    version: int
    events: int
    rows: int
    columns: int
    new: bool
    engine: str
    compile_s: float


@storage.retried
def build(
    name: str,
    declared: Features,
    root: str | Path,
    *,
    lease: dask_lease.Lease | dask_lease.Standing | None = None,
) -> Built:
    """Bring the table `features/NAME` up to its events in at most one commit.

    Args:
        name: The features' name.
        declared: Their declaration.
        root: Where tables are stored.
        lease: Dask workers to spread the partitions over; None computes them here, in turn.

    Raises:
        HorizonError: A label's horizon at the last cutoff ends after the last event.
        FeatureError: The events don't fit the declaration.
        storage.StorageError: A table can't be read or written.
    """
    target = f"features/{name}"
    sources = [declared.table, *(lookup.table for lookup in declared.lookups), *declared.tables]
    versions = {source: storage.version(root, source) for source in sources}
    made_of = blake2b(f"{versions} {declared.model_dump_json()}".encode(), digest_size=16)
    events = storage.scan(root, declared.table, versions[declared.table])
    onto = storage.latest(root, target)
    new = onto is None or storage.metadata(root, target, onto).get("made_of") != made_of.hexdigest()
    compile_s = 0.0
    if new:
        _check_horizons(name, declared, events)
        # Here, so that workers find it on disk.
        compile_s = compile_kernel(declared, labels=True)
        parts = sorted(events.select(storage.PART).unique().collect()[storage.PART])
        work = partial(_partition, declared, str(root), versions)
        frames = (
            map(work, parts) if lease is None else dask_lease.map_partitions(work, parts, lease)
        )
        version = storage.write(
            root,
            target,
            pl.concat(list(frames)),
            mode="overwrite",
            onto=onto,
            metadata={"made_of": made_of.hexdigest(), "sources": str(versions)},
        )
    else:
        assert onto is not None
        version = onto
    table = storage.scan(root, target, version)
    count = pl.len()
    return Built(
        version=version,
        events=int(events.select(count).collect().item()),
        rows=int(table.select(count).collect().item()),
        # Beside the entity, the cutoff and the partition.
        columns=len(table.collect_schema()) - 3,
        new=new,
        engine=computed_by(declared) + (f" on {lease.workers} Dask workers" if lease else ""),
        compile_s=compile_s,
    )


def scan_events(declared: Features, root: str | Path, versions: dict[str, int]) -> pl.LazyFrame:
    """The declared events with their lookups, lazily.

    Args:
        declared: The declaration.
        root: Where tables are stored.
        versions: The version to read of each table that the declaration names.
    """
    events = storage.scan(root, declared.table, versions[declared.table])
    return with_lookups(events, declared.lookups, root, versions)


def with_lookups(
    rows: pl.LazyFrame, lookups: Iterable[Lookup], root: str | Path, versions: dict[str, int]
) -> pl.LazyFrame:
    """Rows with the columns that each takes from the one row of another table with its key."""
    for lookup in lookups:
        other = storage.scan(root, lookup.table, versions[lookup.table])
        rows = rows.join(other.select(lookup.key, *lookup.columns), on=lookup.key, how="left")
    return rows


def _partition(declared: Features, root: str, versions: dict[str, int], part: int) -> pl.DataFrame:
    events = scan_events(declared, root, versions).filter(pl.col(storage.PART) == part)
    # The partitions of other tables may be others: their entities are looked up.
    entities = events.select(declared.entity).unique().collect().lazy()
    tables = {
        name: storage.scan(root, name, versions[name]).join(
            entities, on=declared.entity, how="semi"
        )
        for name in declared.tables
    }
    frame = compute(events, declared, labels=True, tables=tables)
    return frame.with_columns(pl.lit(part, dtype=pl.Int32).alias(storage.PART))


def _check_horizons(name: str, declared: Features, events: pl.LazyFrame) -> None:
    last_event = events.select(pl.col(declared.time).max()).collect().item()
    last_cutoff = max(cutoff_times(declared), default=None)
    if last_event is None or last_cutoff is None:
        return
    for each in declared.labels:
        horizon = dt.timedelta(days=each.horizon_days)
        if last_cutoff + horizon > last_event:
            raise HorizonError(
                f"features.{name}: label {each.name!r} looks {horizon.days} days ahead, and the "
                f"events end at {last_event}: the last cutoff is {last_cutoff}; end the cutoffs "
                f"at {last_event - horizon} or before"
            )
