"""The pipeline file: what its YAML may say, and errors that name the line that says otherwise.

Knows nothing of how tables are read or stored.
"""

from __future__ import annotations

import datetime as dt
import difflib
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from models.features import FeatureSpec

Dtype = Literal["int32", "int64", "float32", "float64", "string", "bool", "date", "datetime"]
Scalar = bool | int | float | dt.datetime | dt.date | str


class ConfigError(ValueError):
    """A pipeline file says something that isn't allowed; the message names file and line."""


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


def suggestion(value: object, allowed: list[str]) -> str:
    """ " Did you mean …?" where something allowed is close, else nothing."""
    close = difflib.get_close_matches(str(value), allowed, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class Table(_Model):
    """One table: its source, its columns and the rules its rows must hold."""

    source: Source
    format: Literal["parquet", "csv"] | None = None
    separator: str = Field(default=",", min_length=1, max_length=1)
    columns: dict[str, Dtype] = Field(min_length=1)
    entity: str | None = None
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
        return self

    @property
    def kind(self) -> str:
        """The declared format, or the one its suffix says: parquet unless `.csv`."""
        suffix = re.search(r"\.(csv|tsv)(\.gz)?$", self.source.path)
        return self.format or ("csv" if suffix else "parquet")


class Lookup(_Model):
    """Columns that each event takes from the one row of `table` with the same `key`."""

    table: str
    key: str
    columns: list[str] = Field(min_length=1)


class Features(FeatureSpec):
    """Features and labels of the events in `table`; the keys beside its own are FeatureSpec's."""

    table: str
    lookups: tuple[Lookup, ...] = ()


class Pipeline(_Model):
    """A pipeline: its tables, their features, and the seed of everything drawn."""

    name: str = Field(min_length=1)
    seed: int
    tables: dict[str, Table] = Field(min_length=1)
    features: dict[str, Features] = {}

    @model_validator(mode="after")
    def _feature_columns_exist(self) -> Pipeline:
        for name, features in self.features.items():
            wanted = [(features.table, [features.entity, features.time])]
            wanted += [(lookup.table, [lookup.key, *lookup.columns]) for lookup in features.lookups]
            for table, columns in wanted:
                if table not in self.tables:
                    raise ValueError(
                        f"features.{name} names table {table!r}; declared: "
                        f"{', '.join(self.tables)}{suggestion(table, list(self.tables))}"
                    )
                there = list(self.tables[table].columns)
                for column in columns:
                    if column not in there:
                        raise ValueError(
                            f"features.{name} names column {column!r} of table {table!r}; "
                            f"declared: {', '.join(there)}{suggestion(column, there)}"
                        )
            if self.tables[features.table].entity != features.entity:
                raise ValueError(
                    f"features.{name} has entity {features.entity!r}, and table "
                    f"{features.table!r} is partitioned by "
                    f"{self.tables[features.table].entity!r}; give both the same entity"
                )
        return self

    @model_validator(mode="after")
    def _foreign_keys_exist(self) -> Pipeline:
        known = [
            f"{name}.{column}" for name, table in self.tables.items() for column in table.columns
        ]
        for name, table in self.tables.items():
            for column, target in table.rules.foreign_keys.items():
                if target not in known:
                    raise ValueError(
                        f"tables.{name}.rules.foreign_keys.{column} names {target!r}; "
                        f"a foreign key is TABLE.COLUMN of a declared table"
                        f"{suggestion(target, known)}"
                    )
        return self


def load(path: str | Path) -> Pipeline:
    """Read and check a pipeline file.

    Raises:
        ConfigError: The file can't be read, isn't YAML, or says something that isn't allowed.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read ({error}); name a YAML file") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}:{line}: not YAML: {getattr(error, 'problem', error)}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: a value can't be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path}:1: got {values!r}; allowed: a mapping with name, seed, tables")
    try:
        return Pipeline.model_validate(values)
    except ValidationError as error:
        lines = []
        for problem in error.errors():
            loc = problem["loc"]
            lines.append(f"{path}:{_line(root, loc)}: {'.'.join(map(str, loc))}: {_say(problem)}")
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def _line(node: yaml.Node | None, loc: tuple[int | str, ...]) -> int:
    """The 1-based line of the deepest node on `loc`; a key's own line in a mapping."""
    line = node.start_mark.line + 1 if node is not None else 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            pair = next((p for p in node.value if p[0].value == str(part)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1 if node is not None else line
        else:
            break
    return line


def _say(problem: Any) -> str:
    kind, loc, value = problem["type"], problem["loc"], problem["input"]
    if kind == "extra_forbidden":
        fields = _fields(loc[:-1])
        return f"unknown key {loc[-1]!r}; allowed: {', '.join(fields)}{suggestion(loc[-1], fields)}"
    if kind == "missing":
        return "this key is missing; add it"
    if kind == "value_error":
        return str(problem["ctx"]["error"])
    if kind == "literal_error":
        options = re.findall(r"'([^']*)'", problem["ctx"]["expected"])
        return f"got {value!r}; allowed: {', '.join(options)}{suggestion(value, options)}"
    return f"got {value!r}; {problem['msg']}"


def _fields(loc: tuple[int | str, ...]) -> list[str]:
    """The keys allowed in the mapping at `loc`."""
    path = [str(part) for part in loc]
    if not path:
        return list(Pipeline.model_fields)
    model: type[BaseModel] = Table
    if path[0] == "features":
        model = Lookup if "lookups" in path[2:] else Features
    elif "source" in path[2:]:
        model = Source
    elif "ranges" in path[2:]:
        model = Bounds
    elif path[3:] == ["rows"]:
        model = RowBounds
    elif path[3:] == ["freshness"]:
        model = Freshness
    elif path[2:] == ["rules"]:
        model = Rules
    return list(model.model_fields)
