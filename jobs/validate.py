"""A table in, the table without the rows that break its rules out; those go to quarantine.

Knows nothing of source files.
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandera.polars as pandera
import polars as pl
from pandera.errors import SchemaErrors

from cluster import storage
from jobs.config_tables import Table
from jobs.ingest import INVALID

RULE = "_rule"


class ValidationError(ValueError):
    """A table breaks its rules by more than is allowed; the table is left as it was."""


@dataclass(frozen=True, kw_only=True)
class Validated:
    """What validate left.

    Attributes:
        version: Version of the table.
        rows: Rows it has now.
        quarantined: Rows put aside.
        by_rule: How many rows broke each rule.
    """

    version: int
    rows: int
    quarantined: int
    by_rule: dict[str, int]


@storage.retried
def validate(
    name: str,
    table: Table,
    root: str | Path,
    *,
    tables: Mapping[str, Table],
) -> Validated:
    """Move the rows of `name` that break a rule to the table `quarantine/NAME`.

    Every copy of a repeated key fails `unique`, since nothing says which is right. A null fails
    only `not_null`.

    Args:
        name: The table's name.
        table: Its declaration.
        root: Where tables are stored.
        tables: All declarations; a foreign key's table must be among them.

    Raises:
        ValidationError: Too many rows fail, or row count or freshness is out of bounds.
        storage.StorageError: A table can't be read or written.
    """
    version = storage.version(root, name)
    frame = storage.scan(root, name, version).collect()
    failed = _failed(name, frame, _schema(table, root, tables))
    by_rule = {rule: count for rule, rows in failed.items() if (count := int(rows.sum()))}
    # "|" joins, since a rule's own name may hold commas.
    names = [pl.when(rows).then(pl.lit(rule)) for rule, rows in failed.items()]
    joined = pl.concat_str(names, separator="|", ignore_nulls=True) if names else pl.lit("")
    flagged = frame.with_columns(joined.alias(RULE))
    bad = flagged.filter(pl.col(RULE) != "")
    good = flagged.filter(pl.col(RULE) == "").drop(RULE)
    _check_share(name, table, flagged.height, bad, by_rule)
    _check_rows(name, table, good.height)
    _check_freshness(name, table, good)
    if bad.height:
        kept = storage.metadata(root, name, version)
        own = ("files", "declaration", "partitions", "types", "alarms")
        _quarantine(name, root, bad, version)
        version = storage.write(
            root,
            name,
            good,
            mode="overwrite",
            onto=version,
            metadata={key: kept[key] for key in own if key in kept}
            | {"quarantined": str(bad.height)},
        )
    return Validated(version=version, rows=good.height, quarantined=bad.height, by_rule=by_rule)


def _schema(table: Table, root: str | Path, tables: Mapping[str, Table]) -> pandera.DataFrameSchema:
    """The table's rules as a pandera schema; a check's name is its rule's."""
    rules = table.rules
    checks: dict[str, list[pandera.Check]] = {column: [] for column in table.columns}
    wide: list[pandera.Check] = []
    for column in table.columns:
        # Ingest has made the types; `_invalid` tells the values that it couldn't.
        wrong = pl.col(INVALID).str.contains(rf"(?m)^{re.escape(column)}: ").fill_null(False)
        wide.append(_check(f"type:{column}", ~wrong))
        if column not in rules.nullable:
            wide.append(_check(f"not_null:{column}", pl.col(column).is_not_null() | wrong))
    for columns in rules.unique:
        full = pl.all_horizontal(pl.col(columns).is_not_null())
        repeated = pl.struct(columns).is_duplicated()
        wide.append(_check(f"unique:{','.join(columns)}", ~(repeated & full)))
    for column, bounds in rules.ranges.items():
        rule = f"range:{column}"
        if bounds.min is not None:
            checks[column].append(pandera.Check.ge(bounds.min, name=rule))
        if bounds.max is not None:
            checks[column].append(pandera.Check.le(bounds.max, name=rule))
    for column, values in rules.allowed.items():
        checks[column].append(pandera.Check.isin(values, name=f"allowed:{column}"))
    for column, target in rules.foreign_keys.items():
        other, key = target.split(".", 1)
        if other not in tables:
            raise ValidationError(
                f"foreign key {column!r} names table {other!r}; declared: {', '.join(tables)}"
            )
        keys = storage.scan(root, other).select(key).unique().collect()[key].drop_nulls()
        known = pl.col(column).is_in(keys.implode()) | pl.col(column).is_null()
        wide.append(_check(f"foreign_key:{column}", known))
    by_column = {name: pandera.Column(nullable=True, checks=own) for name, own in checks.items()}
    return pandera.DataFrameSchema(by_column, checks=wide)


def _check(rule: str, holds: pl.Expr) -> pandera.Check:
    return pandera.Check(lambda data: data.lazyframe.select(holds), name=rule)


def _failed(
    name: str, frame: pl.DataFrame, schema: pandera.DataFrameSchema
) -> dict[str, pl.Series]:
    """By rule, in which rows it is broken."""
    try:
        schema.validate(frame, lazy=True)
    except SchemaErrors as broken:
        failed: dict[str, pl.Series] = {}
        for error in broken.schema_errors:
            rule = str(error.check.name)
            if error.check_output is None:
                raise ValidationError(
                    f"table {name!r}: rule {rule!r} doesn't fit its column's type: "
                    f"{str(error).splitlines()[0]}; "
                    f"ranges, allowed and foreign_keys take values of the column's type. The "
                    f"table is left as it was"
                ) from error
            rows = ~error.check_output.to_series().fill_null(True)
            # Both sides of a range are one rule.
            failed[rule] = rows | failed[rule] if rule in failed else rows
        return failed
    return {}


def _check_share(
    name: str, table: Table, rows: int, bad: pl.DataFrame, by_rule: dict[str, int]
) -> None:
    share = bad.height / rows if rows else 0.0
    if share <= table.max_quarantine_share:
        return
    lines = [
        f"table {name!r}: {bad.height} of {rows} rows ({share:.2%}) break a rule; allowed: "
        f"{table.max_quarantine_share:.2%}. The table is left as it was. Mend the source, or "
        f"raise max_quarantine_share"
    ]
    for rule, count in by_rule.items():
        lines.append(f"  {rule}: {count} rows, such as")
        failing = bad.filter(pl.col(RULE).str.split("|").list.contains(rule)).head(5)
        lines += [f"    {row}" for row in failing.drop(RULE, storage.PART).to_dicts()]
    raise ValidationError("\n".join(lines))


def _check_rows(name: str, table: Table, rows: int) -> None:
    bounds = table.rules.rows
    low = bounds.min is not None and rows < bounds.min
    if low or (bounds.max is not None and rows > bounds.max):
        raise ValidationError(
            f"table {name!r}: {rows} rows after quarantine; allowed: at least "
            f"{bounds.min or 0}, at most {'any' if bounds.max is None else bounds.max}"
        )


def _check_freshness(name: str, table: Table, good: pl.DataFrame) -> None:
    rule = table.rules.freshness
    if rule is None:
        return
    newest: Any = good[rule.column].max()
    now = dt.datetime.now(dt.UTC).replace(tzinfo=None)
    if rule.as_of is not None:
        now = dt.datetime.combine(rule.as_of, dt.time())
    if isinstance(newest, dt.date) and not isinstance(newest, dt.datetime):
        newest = dt.datetime.combine(newest, dt.time())
    if newest is None or now - newest > dt.timedelta(days=rule.max_age_days):
        raise ValidationError(
            f"table {name!r}: the newest {rule.column} is {newest}; allowed: at most "
            f"{rule.max_age_days:g} days before {now}"
        )


def _quarantine(name: str, root: str | Path, bad: pl.DataFrame, version: int) -> None:
    target = f"quarantine/{name}"
    rows = bad.drop(storage.PART).with_columns(pl.lit(version, dtype=pl.Int64).alias("_version"))
    mode = "overwrite"
    onto = storage.latest(root, target)
    if onto is not None:
        before = storage.metadata(root, target, onto)
        if before.get("table_version") == str(version):
            return  # A run that died before its rewrite has put these rows here.
        # A changed declaration starts the table anew; the versions before stay readable.
        if storage.scan(root, target).collect_schema() == rows.schema:
            mode = "append"
    storage.write(
        root, target, rows, mode="append" if mode == "append" else "overwrite", onto=onto,
        metadata={"table_version": str(version)},
    )  # fmt: skip
