"""A table of events in, a table of features and labels out, partition by partition.

All of an entity's events lie in one partition, so the result is the same in this process and on
any number of Dask workers.
"""

import datetime as dt
import json
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
        computed: Rows that this call computed; fewer than `rows` where only cutoffs were new.
        engine: What computed it.
        compile_s: What compiling the declaration took, or loading what was compiled before.
    """

    version: int
    events: int
    rows: int
    columns: int
    new: bool
    computed: int
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

    Where nothing has changed before the end of what the last call looked at, and the declaration
    has only got more cutoffs, the rows of those are added to the others.

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
    made_of = _digest(versions, declared.model_dump_json())
    events = storage.scan(root, declared.table, versions[declared.table])
    onto = storage.latest(root, target)
    before = {} if onto is None else storage.metadata(root, target, onto)
    new = before.get("made_of") != made_of
    compile_s, computed = 0.0, 0
    if new:
        _check_horizons(name, declared, events)
        # Here, so that workers find it on disk.
        compile_s = compile_kernel(declared, labels=True)
        cutoffs = cutoff_times(declared)
        apart = _digest(
            {table: versions[table] for table in sources if table != declared.table},
            declared.model_dump_json(exclude={"cutoffs"}),
        )
        done = _still_valid(declared, events, before, apart, cutoffs)
        work = partial(
            _partition, declared, str(root), versions, [c for c in cutoffs if c not in done]
        )
        parts = sorted(events.select(storage.PART).unique().collect()[storage.PART])
        frames = (
            map(work, parts) if lease is None else dask_lease.map_partitions(work, parts, lease)
        )
        frame = pl.concat(list(frames))
        computed = frame.height
        version = storage.write(
            root,
            target,
            frame,
            mode="append" if done else "overwrite",
            onto=onto,
            metadata={
                "made_of": made_of,
                "sources": str(versions),
                "apart_from_events": apart,
                "cutoffs": json.dumps([c.isoformat() for c in cutoffs]),
                "past": _past(declared, events, max(cutoffs, default=None)),
            },
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
        computed=computed,
        engine=computed_by(declared) + (f" on {lease.workers} Dask workers" if lease else ""),
        compile_s=compile_s,
    )


def _digest(*parts: object) -> str:
    return blake2b(" ".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def _still_valid(
    declared: Features,
    events: pl.LazyFrame,
    before: dict[str, str],
    apart: str,
    cutoffs: list[dt.datetime],
) -> list[dt.datetime]:
    """The cutoffs whose rows in the table stand as they are; none where any must be made anew."""
    done = [dt.datetime.fromisoformat(c) for c in json.loads(before.get("cutoffs", "[]"))]
    if not done or before.get("apart_from_events") != apart or not set(done) < set(cutoffs):
        return []
    return done if _past(declared, events, max(done)) == before.get("past") else []


def _past(declared: Features, events: pl.LazyFrame, last_cutoff: dt.datetime | None) -> str:
    """A fingerprint of the events that rows up to a cutoff, and their labels, are computed from."""
    if last_cutoff is None:
        return ""
    horizon = max((each.horizon_days for each in declared.labels), default=0)
    until = last_cutoff + dt.timedelta(days=horizon)
    schema = events.collect_schema()
    time = pl.col(declared.time)
    if getattr(schema[declared.time], "time_zone", None) is not None:
        time = time.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    seen = events.filter(time < until).select(
        pl.len(), pl.struct(schema.names()).hash(seed=7).sum().alias("hash")
    )
    return str(seen.collect(engine="streaming").row(0))


def scan_events(declared: Features, root: str | Path, versions: dict[str, int]) -> pl.LazyFrame:
    """The declared events with their lookups, lazily.

    Args:
        declared: The declaration.
        root: Where tables are stored.
        versions: The version to read of each table that the declaration names.
    """
    events = storage.scan(root, declared.table, versions[declared.table])
    return with_lookups(events, declared.lookups, root, versions)


def scan_tables(
    declared: Features, root: str | Path, versions: dict[str, int], entities: pl.DataFrame
) -> dict[str, pl.LazyFrame]:
    """The rows of attributes and streams, by table, of some entities (one column) only."""
    # Their partitions may be others than the events': entities are looked up.
    return {
        name: storage.scan(root, name, versions[name]).join(
            entities.lazy(), on=declared.entity, how="semi"
        )
        for name in declared.tables
    }


def with_lookups(
    rows: pl.LazyFrame, lookups: Iterable[Lookup], root: str | Path, versions: dict[str, int]
) -> pl.LazyFrame:
    """Rows with the columns that each takes from the one row of another table with its key."""
    for lookup in lookups:
        other = storage.scan(root, lookup.table, versions[lookup.table])
        rows = rows.join(
            other.select(lookup.key, *lookup.columns),
            on=lookup.key,
            how="left",
            # Events of the same time count in the order they come in.
            maintain_order="left",
        )
    return rows


def _partition(
    declared: Features,
    root: str,
    versions: dict[str, int],
    cutoffs: list[dt.datetime],
    part: int,
) -> pl.DataFrame:
    events = scan_events(declared, root, versions).filter(pl.col(storage.PART) == part)
    entities = events.select(declared.entity).unique().collect()
    tables = scan_tables(declared, root, versions, entities)
    frame = compute(events, declared, cutoffs, labels=True, tables=tables)
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
