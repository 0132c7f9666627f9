"""A table of events in, a table of features and labels out, partition by partition.

All of an entity's events lie in one partition, so the result is the same in this process and on
any number of Dask workers.
"""

import datetime as dt
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
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
    lease: dask_lease.Workers | None = None,
) -> Built:
    """Bring the table `features/NAME` up to its events in at most one commit.

    Computes the rows of those cutoffs whose past has changed, or that are new; the others stand.

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
    made_of = storage.digest(versions, declared.model_dump_json())
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
        apart = storage.digest(
            {table: versions[table] for table in sources if table != declared.table},
            declared.model_dump_json(exclude={"cutoffs"}),
            # An entity's partition depends on how many there are.
            storage.metadata(root, declared.table, versions[declared.table]).get("partitions"),
        )
        pasts = _pasts(declared, events, cutoffs)
        earlier = json.loads(before.get("pasts", "{}"))
        kept = [c for c in cutoffs if earlier.get(c.isoformat()) == pasts[c.isoformat()]]
        if before.get("apart_from_events") != apart:
            kept = []
        # Rows that stand are left where they are, unless others beside them must go.
        appends = bool(kept) and len(kept) == len(earlier)
        asked = [c for c in cutoffs if c not in kept]
        standing = [] if appends else kept
        work = partial(_partition, target, declared, str(root), versions, asked, onto, standing)
        parts = sorted(events.select(storage.PART).unique().collect()[storage.PART]) or [0]
        made = list(dask_lease.map_partitions(work, parts if asked or standing else [], lease))
        computed = sum(rows for _, rows in made)
        version = storage.commit(
            root,
            target,
            [staged for staged, _ in made],
            mode="append" if appends else "overwrite",
            onto=onto,
            metadata={
                "made_of": made_of,
                "sources": str(versions),
                "apart_from_events": apart,
                "pasts": json.dumps(pasts),
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
        engine=engine([declared], lease),
        compile_s=compile_s,
    )


def engine(groups: Iterable[Features], lease: dask_lease.Workers | None) -> str:
    """What computes the groups, and where: `kernel on 2 Dask workers`."""
    computed = ", ".join(sorted({computed_by(group) for group in groups} or {"polars"}))
    return computed + (f" on {lease.workers} Dask workers" if lease else "")


def _pasts(declared: Features, events: pl.LazyFrame, cutoffs: list[dt.datetime]) -> dict[str, str]:
    """By cutoff, a fingerprint of the events that its rows and their labels are computed from."""
    horizon = max((each.horizon_days for each in declared.labels), default=0)
    ordered = sorted(cutoffs)
    untils = [cutoff + dt.timedelta(days=horizon) for cutoff in ordered]
    schema = events.collect_schema()
    time = pl.col(declared.time).cast(pl.Datetime("us"))
    if getattr(schema[declared.time], "time_zone", None) is not None:
        time = pl.col(declared.time).dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    # Each event is hashed once: it is in the past of every cutoff from its own on.
    first_that_sees_it = pl.lit(pl.Series(untils, dtype=pl.Datetime("us"))).search_sorted(
        time, side="right"
    )
    seen = (
        events.group_by(first_that_sees_it.alias("first"))
        .agg(pl.len().alias("rows"), pl.struct(schema.names()).hash(seed=7).sum().alias("hash"))
        .collect(engine="streaming")
    )
    new = {first: (rows, hashed) for first, rows, hashed in seen.iter_rows()}
    found, count, total = {}, 0, 0
    for place, cutoff in enumerate(ordered):
        rows, hashed = new.get(place, (0, 0))
        count, total = count + rows, (total + hashed) % (1 << 64)
        found[cutoff.isoformat()] = f"{count} {total:016x}"
    return found


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
    target: str,
    declared: Features,
    root: str,
    versions: dict[str, int],
    cutoffs: list[dt.datetime],
    onto: int | None,
    standing: list[dt.datetime],
    part: int,
) -> tuple[storage.Staged, int]:
    """Writes a partition: rows computed at some cutoffs, those of others as they stand."""
    frames = []
    if standing:
        here = storage.scan(root, target, onto).filter(
            pl.col(storage.PART) == part, pl.col("cutoff").is_in(standing)
        )
        frames.append(here.drop(storage.PART).collect())
    if cutoffs:
        events = scan_events(declared, root, versions).filter(pl.col(storage.PART) == part)
        entities = events.select(declared.entity).unique().collect()
        tables = scan_tables(declared, root, versions, entities)
        frames.append(compute(events, declared, cutoffs, labels=True, tables=tables))
    computed = frames[-1].height if cutoffs else 0
    frame = pl.concat(frames).sort(declared.entity, "cutoff")
    return storage.stage(root, target, part, frame), computed


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
