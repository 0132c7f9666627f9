"""Versioned tables on Delta Lake: one directory a table, one atomic commit a write.

Knows nothing of what the columns mean.
"""

from __future__ import annotations

import io
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import polars as pl

PART = "_part"
ROWS_PER_PARTITION = 1_000_000
_TRIES = 5

P = ParamSpec("P")
R = TypeVar("R")


class StorageError(OSError):
    """A table can't be read or written; the message names the table and what to do."""


class StorageConflict(StorageError):
    """Another writer committed to the table first; read it again and redo the work."""


def digest(*parts: object) -> str:
    """32 hexadecimal digits of the parts as text: what a version was made of, to know it by."""
    return blake2b(" ".join(map(str, parts)).encode(), digest_size=16).hexdigest()


def partitions(rows: int) -> int:
    """The number of partitions for `rows`: a power of two, at least 1, about 1M rows each."""
    return 1 << max(0, (max(rows, 1) - 1) // ROWS_PER_PARTITION).bit_length()


def stable_hash(entity: str, dtype: pl.DataType | type[pl.DataType]) -> pl.Expr:
    """The 64-bit hash of a column, the same in every version of Polars.

    Integers go through splitmix64's finaliser in wrapping arithmetic. Anything else is taken as
    text and hashed once a distinct value with blake2b. Null hashes to 0.

    Args:
        entity: The column's name.
        dtype: Its data type; every integer width hashes equal values alike.

    Returns:
        An expression of uint64.
    """
    if not dtype.is_integer():
        return pl.col(entity).cast(pl.String).map_batches(_hash_text, return_dtype=pl.UInt64)
    value = pl.col(entity)
    if dtype.is_signed_integer():
        value = value.cast(pl.Int64).reinterpret(signed=False)
    value = value.cast(pl.UInt64)

    def literal(number: int) -> pl.Expr:
        return pl.lit(number, dtype=pl.UInt64)

    # Polars has no shift: x >> k is a floor division by 2**k.
    value = value + literal(0x9E3779B97F4A7C15)
    value = (value ^ (value // literal(1 << 30))) * literal(0xBF58476D1CE4E5B9)
    value = (value ^ (value // literal(1 << 27))) * literal(0x94D049BB133111EB)
    return (value ^ (value // literal(1 << 31))).fill_null(0)


def _hash_text(values: pl.Series) -> pl.Series:
    distinct = values.drop_nulls().unique()
    hashes = [
        int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")
        for text in distinct
    ]
    mapped = values.replace_strict(
        distinct, pl.Series(hashes, dtype=pl.UInt64), default=None, return_dtype=pl.UInt64
    )
    return mapped.fill_null(0)


def with_partition(frame: pl.LazyFrame, entity: str | None, count: int) -> pl.LazyFrame:
    """Add `_part` (int32): the entity's partition out of `count`, or 0 without an entity."""
    if entity is None:
        return frame.with_columns(pl.lit(0, dtype=pl.Int32).alias(PART))
    dtype = frame.select(entity).collect_schema()[entity]
    part = stable_hash(entity, dtype) % pl.lit(count, dtype=pl.UInt64)
    return frame.with_columns(part.cast(pl.Int32).alias(PART))


def _uri(root: str | Path, name: str) -> str:
    return f"{str(root).rstrip('/')}/{name}"


def exists(root: str | Path, name: str) -> bool:
    """Whether `name` is a table under `root`."""
    from deltalake import DeltaTable

    try:
        return DeltaTable.is_deltatable(_uri(root, name))
    except Exception as error:
        raise _unusable("read", root, name, error) from error


def retried(work: Callable[P, R]) -> Callable[P, R]:
    """Does work again, from its first read on, where its commit met another writer's."""

    @wraps(work)
    def repeated(*args: P.args, **kwargs: P.kwargs) -> R:
        for _ in range(_TRIES - 1):
            try:
                return work(*args, **kwargs)
            except StorageConflict:
                continue
        return work(*args, **kwargs)

    return repeated


def write(
    root: str | Path,
    name: str,
    frame: pl.DataFrame | pl.LazyFrame,
    *,
    mode: Literal["append", "overwrite"],
    onto: int | None,
    metadata: Mapping[str, str],
) -> int:
    """Write `frame` as one atomic commit, partitioned by `_part` where the frame has it.

    Two writers at once can't both build on one version, wherever the table is: the second gets a
    conflict, and its work is to be done again (`retried`).

    Args:
        root: Directory or object-store URL that holds the tables.
        name: The table's name; may hold a slash.
        frame: Any rows.
        mode: "append" adds rows; "overwrite" replaces rows and schema.
        onto: The version that the writer read before; None where there was no table.
        metadata: Kept with the commit.

    Returns:
        The version that this commit made.

    Raises:
        StorageConflict: Another writer has committed since `onto`.
        StorageError: The storage can't be written.
    """
    from deltalake import DeltaTable, write_deltalake

    rows = frame.collect(engine="streaming") if isinstance(frame, pl.LazyFrame) else frame
    with _one_writer(root, name, onto):
        write_deltalake(
            _uri(root, name) if onto is None else DeltaTable(_uri(root, name), version=onto),
            rows,
            mode="error" if onto is None else mode,
            schema_mode="overwrite" if onto is not None and mode == "overwrite" else None,
            partition_by=[PART] if PART in rows.columns else None,
            commit_properties=_commit(onto, metadata),
        )
    return _after(onto)


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A file in a table's folder that is part of no version yet; made by `stage`.

    Attributes:
        path: Under the table's folder.
        part: The partition that it holds.
        rows: How many it holds.
        bytes: Its size.
        schema: Of the table, as Delta Lake's JSON.
    """

    path: str
    part: int
    rows: int
    bytes: int
    schema: str


def stage(root: str | Path, name: str, part: int, frame: pl.DataFrame) -> Staged:
    """Write a partition's rows where `commit` finds them, from any machine that sees `root`.

    A file that is never committed is no part of the table; Delta Lake's vacuum removes it.

    Args:
        root: Directory or object-store URL that holds the tables.
        name: The table's name.
        part: The partition.
        frame: Its rows, without `_part`.

    Raises:
        StorageError: The storage can't be written.
    """
    import fsspec
    from deltalake import Schema

    path = f"{PART}={part}/{secrets.token_hex(16)}.parquet"
    content = io.BytesIO()
    frame.write_parquet(content)
    with_part = frame.clear().with_columns(pl.lit(part, dtype=pl.Int32).alias(PART))
    files, folder = fsspec.url_to_fs(_uri(root, name))
    try:
        if "file" in files.protocol:
            files.makedirs(f"{folder}/{PART}={part}", exist_ok=True)
        files.pipe_file(f"{folder}/{path}", content.getvalue())
    except OSError as error:
        raise _unusable("written", root, name, error) from error
    return Staged(
        path=path,
        part=part,
        rows=frame.height,
        bytes=content.tell(),
        schema=Schema.from_arrow(with_part.to_arrow().schema).to_json(),
    )


def commit(
    root: str | Path,
    name: str,
    staged: Sequence[Staged],
    *,
    mode: Literal["append", "overwrite"],
    onto: int | None,
    metadata: Mapping[str, str],
) -> int:
    """Make staged files a version of the table, in one atomic commit.

    Args:
        root: Directory or object-store URL that holds the tables.
        name: The table's name.
        staged: Files of one schema; none only to add `metadata` to a table that is there.
        mode: As for `write`.
        onto: As for `write`.
        metadata: As for `write`.

    Returns:
        The version that this commit made.

    Raises:
        StorageConflict: Another writer has committed since `onto`.
        StorageError: The storage can't be written.
    """
    from deltalake import DeltaTable, Schema
    from deltalake.transaction import AddAction, create_table_with_add_actions

    now_ms = int(time.time() * 1000)
    added = [
        AddAction(
            path=each.path,
            size=each.bytes,
            partition_values={PART: str(each.part)},
            modification_time=now_ms,
            data_change=True,
            stats=json.dumps({"numRecords": each.rows}),
        )
        for each in staged
    ]
    properties = _commit(onto, metadata)
    with _one_writer(root, name, onto):
        table = None if onto is None else DeltaTable(_uri(root, name), version=onto)
        made = staged or table is None
        schema = Schema.from_json(staged[0].schema) if made else table.schema()  # type: ignore[union-attr]
        if table is None:
            create_table_with_add_actions(
                _uri(root, name), schema, added, partition_by=[PART], commit_properties=properties
            )
        else:
            table.create_write_transaction(
                list(added), mode, schema, [PART], commit_properties=properties
            )
    return _after(onto)


def _after(onto: int | None) -> int:
    return 0 if onto is None else onto + 1


def _commit(onto: int | None, metadata: Mapping[str, str]) -> Any:
    from deltalake import CommitProperties, Transaction

    # Appends don't conflict in Delta Lake, but two writers of one application id do.
    return CommitProperties(
        custom_metadata=dict(metadata),
        app_transactions=[Transaction("liftyard", _after(onto))],
    )


@contextmanager
def _one_writer(root: str | Path, name: str, onto: int | None) -> Iterator[None]:
    from deltalake.exceptions import CommitFailedError

    try:
        yield
    except Exception as error:
        if isinstance(error, CommitFailedError) or (onto is None and exists(root, name)):
            raise StorageConflict(
                f"table {name!r} under {str(root)!r} was written by another run since "
                f"{'it was absent' if onto is None else f'version {onto}'}: {error}; run again"
            ) from error
        raise _unusable("written", root, name, error) from error


def scan(root: str | Path, name: str, version: int | None = None) -> pl.LazyFrame:
    """The table's rows, lazily; the latest version, or the one named.

    Raises:
        StorageError: There is no such table or version.
    """
    try:
        return pl.scan_delta(_uri(root, name), version=version)
    except Exception as error:
        raise _unusable("read", root, name, error) from error


def version(root: str | Path, name: str) -> int:
    """The latest version's number.

    Raises:
        StorageError: There is no such table.
    """
    from deltalake import DeltaTable

    try:
        return int(DeltaTable(_uri(root, name)).version())
    except Exception as error:
        raise _unusable("read", root, name, error) from error


def latest(root: str | Path, name: str) -> int | None:
    """The latest version's number, or None where there is no such table."""
    return version(root, name) if exists(root, name) else None


def metadata(root: str | Path, name: str, version: int) -> dict[str, str]:
    """The custom metadata of the commit that made a version.

    Raises:
        StorageError: There is no such table or version.
    """
    from deltalake import DeltaTable

    try:
        table = DeltaTable(_uri(root, name))
        commit = table.history(table.version() - version + 1)[-1]
    except Exception as error:
        raise _unusable("read", root, name, error) from error
    return {key: value for key, value in commit.items() if isinstance(value, str)}


def _unusable(verb: str, root: str | Path, name: str, error: Exception) -> StorageError:
    return StorageError(
        f"table {name!r} under {str(root)!r} can't be {verb}: {error}; "
        f"name a directory or object-store URL that exists and that this user may use"
    )
