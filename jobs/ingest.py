"""Source files in, a versioned table of the declared columns out; unchanged files change nothing.

Knows nothing of the rules that rows must hold: a value that isn't of its type is left null here,
told in `_invalid`, and judged by jobs/validate.py.
"""

from __future__ import annotations

import glob
import importlib.util
import json
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import polars as pl

from cluster import frames, storage
from cluster.device import Device, choose
from jobs.config_tables import Table
from models.naming import suggestion
from models.text import HYGIENE, masked

# URLs that Polars reads itself, lazily.
_POLARS_READS = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https", "file")

_CPU = choose("cpu")

INVALID = "_invalid"
DTYPES: dict[str, pl.DataType] = {
    "int32": pl.Int32(),
    "int64": pl.Int64(),
    "float32": pl.Float32(),
    "float64": pl.Float64(),
    "string": pl.String(),
    "bool": pl.Boolean(),
    "date": pl.Date(),
    "datetime": pl.Datetime("us"),
}


class SourceError(ValueError):
    """A source file is missing, empty or can't be read; the message names it."""


class SchemaError(ValueError):
    """A declared column has vanished from a source file."""


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """A change of a source's schema that ingest went on from."""

    kind: Literal["appeared", "type_changed"]
    file: str
    column: str
    detail: str

    def __str__(self) -> str:
        what = "has appeared, of type" if self.kind == "appeared" else "has changed its type,"
        return f"{self.file}: column {self.column!r} {what} {self.detail}"


@dataclass(frozen=True, kw_only=True)
class Ingested:
    """What ingest left.

    Attributes:
        version: Version of the table.
        rows: Its rows.
        partitions: Its partitions.
        new: Whether this call made the version.
        alarms: Changes of the sources' schema.
        ran: What read the files; None where nothing had changed.
    """

    version: int
    rows: int
    partitions: int
    new: bool
    alarms: tuple[Alarm, ...]
    ran: frames.Ran | None = None


@storage.retried
def ingest(
    name: str, table: Table, root: str | Path, *, base: Path, device: Device = _CPU
) -> Ingested:
    """Bring the table `name` up to its source files in at most one commit.

    Same files and declaration: no commit. Only new files: their rows are appended. A changed or
    vanished file or a changed declaration: the table is rewritten.

    Args:
        name: The table's name.
        table: Its declaration.
        root: Where tables are stored.
        base: What relative source paths are relative to.
        device: Where to read and cast them; the CPU does what a GPU can't.

    Raises:
        SourceError: A file is missing, empty or unreadable.
        SchemaError: A declared column has vanished.
        storage.StorageError: The storage can't be used.
    """
    files = _files(name, table, base)
    prints = {file: _fingerprint(file) for file in files}
    # Where masking's rules have changed, what they masked is made anew.
    declared = storage.digest(table.model_dump_json(), *([HYGIENE] if table.mask else []))
    onto = storage.latest(root, name)
    before = {} if onto is None else storage.metadata(root, name, onto)
    known: dict[str, list[int | str]] = json.loads(before.get("files", "{}"))
    same = before.get("declaration") == declared and all(
        prints.get(file) == seen for file, seen in known.items()
    )
    if same and len(known) == len(prints):
        rows = int(storage.scan(root, name).select(pl.len()).collect().item())
        return Ingested(
            version=storage.version(root, name),
            rows=rows,
            partitions=int(before["partitions"]),
            new=False,
            alarms=tuple(Alarm(**alarm) for alarm in json.loads(before["alarms"])),
        )

    alarms: list[Alarm] = []
    types: dict[str, str] = json.loads(before.get("types", "{}"))
    read = [_normalised(f, table, alarms, types) for f in files if not (same and f in known)]
    frame, ran = frames.collect(pl.concat(read), device, or_cpu=True)
    # Appended rows keep the first commit's count, or an entity would lie in two partitions.
    count = int(before["partitions"]) if same else storage.partitions(frame.height)
    count = count if table.entity is not None else 1
    version = storage.write(
        root,
        name,
        storage.with_partition(frame.lazy(), table.entity, count),
        mode="append" if same else "overwrite",
        onto=onto,
        metadata={
            "files": json.dumps(prints),
            "declaration": declared,
            "partitions": str(count),
            "types": json.dumps(types),
            "alarms": json.dumps([asdict(alarm) for alarm in alarms]),
        },
    )
    rows = int(storage.scan(root, name).select(pl.len()).collect().item())
    return Ingested(
        version=version, rows=rows, partitions=count, new=True, alarms=tuple(alarms), ran=ran
    )


def _files(name: str, table: Table, base: Path) -> list[str]:
    source = table.source
    if source.package is not None:
        spec = importlib.util.find_spec(source.package)
        if spec is None or not spec.submodule_search_locations:
            raise SourceError(
                f"table {name!r}: package {source.package!r} is not installed; install it"
            )
        pattern = str(Path(spec.submodule_search_locations[0]) / source.path)
    elif "://" in source.path:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(source.path)
        found = [str(filesystem.unstrip_protocol(file)) for file in filesystem.glob(path)]
        if not found:
            raise SourceError(f"table {name!r}: no file at {source.path!r}; check source.path")
        return sorted(found)
    else:
        pattern = str(base / source.path)
    found = sorted(file for file in glob.glob(pattern, recursive=True) if Path(file).is_file())
    if not found:
        raise SourceError(f"table {name!r}: no file at {pattern!r}; check source.path")
    return found


def _fingerprint(file: str) -> list[int | str]:
    """Size in bytes and blake2b of the content; an empty file is refused."""
    import fsspec

    digest, size = blake2b(digest_size=16), 0
    try:
        with fsspec.open(file, "rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
                size += len(chunk)
    except OSError as error:
        raise SourceError(f"{file}: can't be read: {error}") from error
    if size == 0:
        raise SourceError(f"{file}: the file is empty; remove it or send it again")
    return [size, digest.hexdigest()]


def _readable(file: str) -> str | bytes:
    """What Polars scans: its own name for the file, or the content where it has none."""
    if "://" not in file or file.split("://")[0] in _POLARS_READS:
        return file
    import fsspec

    with fsspec.open(file, "rb") as stream:
        content: bytes = stream.read()
    return content


def _normalised(
    file: str, table: Table, alarms: list[Alarm], types: dict[str, str]
) -> pl.LazyFrame:
    """The file's rows as the declared columns and `_invalid`; adds to `alarms` and `types`."""
    try:
        source = _readable(file)
        if table.kind == "csv":
            frame = pl.scan_csv(
                source, separator=table.separator, infer_schema=False, glob=False,
                row_index_name="_row", row_index_offset=2,
            )  # fmt: skip
        else:
            frame = pl.scan_parquet(source, glob=False)
        schema = frame.collect_schema()
        empty = frame.head(1).collect().is_empty()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise SourceError(f"{file}: not readable as {table.kind}: {error}") from error
    present = [column for column in schema if column != "_row"]
    for column in table.columns:
        if column not in schema:
            raise SchemaError(
                f"{file}: column {column!r} has vanished; the columns there are: "
                f"{', '.join(present)}{suggestion(column, present)}"
            )
    if empty:
        raise SourceError(f"{file}: the file is empty: it has columns but no rows")
    for column in present:
        if column not in table.columns:
            alarms.append(
                Alarm(kind="appeared", file=file, column=column, detail=str(schema[column]))
            )
            continue
        seen, now = types.get(column), str(schema[column])
        if seen is not None and seen != now:
            detail = f"was {seen}, is {now}"
            alarms.append(Alarm(kind="type_changed", file=file, column=column, detail=detail))
        types[column] = now

    # Header is row 1, as a spreadsheet shows it.
    row = pl.format(", row {}", pl.col("_row")) if table.kind == "csv" else pl.lit("")
    values, invalid = [], []
    for column, dtype in table.columns.items():
        raw = pl.col(column)
        if schema[column].is_float():
            raw = raw.fill_nan(None)
        value = _cast(raw, schema[column], dtype)
        values.append((masked(value) if column in table.mask else value).alias(column))
        if schema[column] != DTYPES[dtype]:
            text = raw.cast(pl.String).str.replace_all("\n", " ", literal=True)
            said = pl.format(
                "{}: {} is not {} ({}{})", pl.lit(column), text, pl.lit(dtype), pl.lit(file), row
            )
            invalid.append(pl.when(raw.is_not_null() & value.is_null()).then(said))
    told = pl.concat_str(invalid, separator="\n", ignore_nulls=True) if invalid else pl.lit("")
    return frame.select(*values, pl.when(told != "").then(told).alias(INVALID))


def _cast(raw: pl.Expr, source: pl.DataType, dtype: str) -> pl.Expr:
    """`raw` as `dtype`, null where the value has no exact counterpart."""
    target = DTYPES[dtype]
    if isinstance(source, pl.String):
        text = raw.str.strip_chars()
        if dtype == "string":
            return raw
        if dtype == "bool":
            words = {"true": True, "false": False, "1": True, "0": False}
            return text.str.to_lowercase().replace_strict(
                words, default=None, return_dtype=pl.Boolean
            )
        if dtype == "date":
            return text.str.to_date("%Y-%m-%d", strict=False)
        if dtype == "datetime":
            forms = [f"%Y-%m-%d{gap}%H:%M:%S%.f{zone}" for gap in " T" for zone in ("", "Z")]
            moments = [text.str.to_datetime(form, strict=False, time_unit="us") for form in forms]
            day = text.str.to_date("%Y-%m-%d", strict=False).cast(target)
            return pl.coalesce(*(m.dt.replace_time_zone(None) for m in moments), day)
        number = text.cast(target, strict=False)
        return number.fill_nan(None) if target.is_float() else number
    if isinstance(source, pl.Datetime) and source.time_zone is not None:
        raw = raw.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
    value = raw.cast(target, strict=False)
    if source.is_float() and target.is_integer():
        # A cast would cut 1.5 to 1 in silence.
        return pl.when(raw == raw.round(0)).then(value)
    return value
