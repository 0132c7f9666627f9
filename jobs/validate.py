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

import polars as pl

from cluster import frames, storage
from cluster.device import Device
from jobs.config import Table
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
        ran: What checked the rules.
    """

    version: int
    rows: int
    quarantined: int
    by_rule: dict[str, int]
    ran: frames.Ran


@storage.retried
def validate(
    name: str,
    table: Table,
    root: str | Path,
    *,
    tables: Mapping[str, Table],
    device: Device,
) -> Validated:
    """Move the rows of `name` that break a rule to the table `quarantine/NAME`.

    Every copy of a repeated key fails `unique`, since nothing says which is right. A null fails
    only `not_null`.

    Args:
        name: The table's name.
        table: Its declaration.
        root: Where tables are stored.
        tables: All declarations; a foreign key's table must be among them.
        device: Where to check the rules.

    Raises:
        ValidationError: Too many rows fail, or row count or freshness is out of bounds.
        storage.StorageError: A table can't be read or written.
    """
    version = storage.version(root, name)
    failures = _failures(table, root, tables)
    names = [
        pl.when(failed.fill_null(False)).then(pl.lit(rule)) for rule, failed in failures.items()
    ]
    # "|" joins, since a rule's own name may hold commas.
    joined = pl.concat_str(names, separator="|", ignore_nulls=True) if names else pl.lit("")
    try:
        plan = storage.scan(root, name, version).with_columns(joined.alias(RULE))
        flagged, ran = frames.collect(plan, device, or_cpu=True)
    except pl.exceptions.PolarsError as error:
        raise ValidationError(
            f"table {name!r}: a rule doesn't fit its column's type: {error}; ranges, allowed and "
            f"foreign_keys take values of the column's type. The table is left as it was"
        ) from error
    bad = flagged.filter(pl.col(RULE) != "")
    good = flagged.filter(pl.col(RULE) == "").drop(RULE)
    by_rule = {
        rule: count
        for rule in failures
        if (count := int(bad[RULE].str.split("|").list.contains(rule).sum())) > 0
    }
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
    return Validated(
        version=version, rows=good.height, quarantined=bad.height, by_rule=by_rule, ran=ran
    )


def _failures(table: Table, root: str | Path, tables: Mapping[str, Table]) -> dict[str, pl.Expr]:
    """By rule name, the boolean expression that is true where a row fails it."""
    rules, failures = table.rules, {}
    for column in table.columns:
        wrong = pl.col(INVALID).str.contains(rf"(?m)^{re.escape(column)}: ")
        failures[f"type:{column}"] = wrong
        if column not in rules.nullable:
            failures[f"not_null:{column}"] = pl.col(column).is_null() & ~wrong.fill_null(False)
    for column, bounds in rules.ranges.items():
        sides = []
        if bounds.min is not None:
            sides.append(pl.col(column) < bounds.min)
        if bounds.max is not None:
            sides.append(pl.col(column) > bounds.max)
        if sides:
            failures[f"range:{column}"] = pl.any_horizontal(sides)
    for column, values in rules.allowed.items():
        failures[f"allowed:{column}"] = ~pl.col(column).is_in(values)
    for columns in rules.unique:
        full = pl.all_horizontal(pl.col(columns).is_not_null())
        failures[f"unique:{','.join(columns)}"] = pl.struct(columns).is_duplicated() & full
    for column, target in rules.foreign_keys.items():
        other, key = target.split(".", 1)
        if other not in tables:
            raise ValidationError(
                f"foreign key {column!r} names table {other!r}; declared: {', '.join(tables)}"
            )
        keys = storage.scan(root, other).select(key).unique().collect()[key].drop_nulls()
        failures[f"foreign_key:{column}"] = ~pl.col(column).is_in(keys.implode())
    return failures


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
