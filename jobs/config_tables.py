"""What a pipeline file may say of its tables: where they are, their columns and rules."""

from __future__ import annotations

import datetime as dt
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from models.naming import suggestion

Dtype = Literal["int32", "int64", "float32", "float64", "string", "bool", "date", "datetime"]
Scalar = bool | int | float | dt.datetime | dt.date | str


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Model):
    """Where a table's files are: a path, glob or URL, or a file inside an installed package."""

    path: str = Field(min_length=1)
    package: str | None = None


class Bounds(_Model):
    """Inclusive bounds; an absent side is open."""

    min: Scalar | None = None
    max: Scalar | None = None


class RowBounds(_Model):
    """Inclusive bounds on the number of rows."""

    min: int | None = Field(default=None, ge=0)
    max: int | None = Field(default=None, ge=0)


class Freshness(_Model):
    """The newest value of `column` may be at most `max_age_days` older than `as_of` (UTC)."""

    column: str
    max_age_days: float = Field(ge=0)
    as_of: dt.date | None = None


class Rules(_Model):
    """What rows must hold; a column not in `nullable` may have no nulls."""

    nullable: list[str] = []
    unique: list[list[str]] = []
    ranges: dict[str, Bounds] = {}
    allowed: dict[str, list[Scalar]] = {}
    foreign_keys: dict[str, str] = {}
    rows: RowBounds = RowBounds()
    freshness: Freshness | None = None


class Table(_Model):
    """One table: its source, its columns and the rules its rows must hold.

    `mask` names string columns in which user names, e-mails, phone numbers and web addresses are
    masked before anything is stored.
    """

    source: Source
    format: Literal["parquet", "csv"] | None = None
    separator: str = Field(default=",", min_length=1, max_length=1)
    columns: dict[str, Dtype] = Field(min_length=1)
    entity: str | None = None
    mask: list[str] = []
    rules: Rules = Rules()
    max_quarantine_share: float = Field(default=0.01, ge=0, le=1)

    @field_validator("columns")
    @classmethod
    def _columns_are_free(cls, columns: dict[str, Dtype]) -> dict[str, Dtype]:
        for column in columns:
            if column.startswith("_"):
                raise ValueError(f"column {column!r}: names that begin with '_' are Liftyard's own")
        return columns

    @model_validator(mode="after")
    def _names_exist(self) -> Table:
        rules = self.rules
        named = [("entity", self.entity)] if self.entity is not None else []
        named += [("mask", c) for c in self.mask]
        named += [("rules.nullable", c) for c in rules.nullable]
        named += [("rules.unique", c) for columns in rules.unique for c in columns]
        for rule in ("ranges", "allowed", "foreign_keys"):
            named += [(f"rules.{rule}", c) for c in getattr(rules, rule)]
        if rules.freshness is not None:
            named.append(("rules.freshness.column", rules.freshness.column))
        for where, column in named:
            if column not in self.columns:
                names = list(self.columns)
                raise ValueError(
                    f"{where} names column {column!r}; declared: {', '.join(names)}"
                    f"{suggestion(column, names)}"
                )
        for column in self.mask:
            if self.columns[column] != "string":
                raise ValueError(
                    f"mask names column {column!r}, which is {self.columns[column]}; "
                    "only string columns are masked"
                )
        return self

    @property
    def kind(self) -> str:
        """The declared format, or the one its suffix says: parquet unless `.csv`."""
        suffix = re.search(r"\.(csv|tsv)(\.gz)?$", self.source.path)
        return self.format or ("csv" if suffix else "parquet")
