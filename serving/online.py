"""The latest features of customers, read where they lie: a folder that replicas map into memory.

    FOLDER/current             the name of the version that counts; replaced as a whole
    FOLDER/VERSION/store.json  what it holds
    FOLDER/VERSION/*.arrow     Arrow IPC, one uncompressed batch each, sorted by customer

A file has the rows of one table, so that a customer's rows lie together and a binary search finds
them; only the pages that it touches are read. `jobs.online` writes. Knows nothing of HTTP.
"""

import bisect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from models.features import FeatureError, FeatureSpec, online
from serving.schema import Problem, RequestError

POINTER = "current"
MANIFEST = "store.json"
FEATURES = "features"


class StoreError(OSError):
    """A folder isn't a store; the message names it."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Features that new events may change.

    Attributes:
        name: The declaration's name.
        spec: The declaration.
    """

    name: str
    spec: FeatureSpec


@dataclass(frozen=True, kw_only=True)
class Customer:
    """What is known of one customer.

    Attributes:
        id: As it is stored.
        cutoff: The moment of the features, ISO 8601, UTC; None where they have none.
        features: Values by name.
    """

    id: int | str
    cutoff: str | None
    features: dict[str, Any]


class Table:
    """Rows of customers in a mapped file, sorted by the column `key`."""

    def __init__(self, file: Path, key: str) -> None:
        """Maps the file; its rows stay on disk.

        Raises:
            StoreError: It isn't such a file.
        """
        import pyarrow as pa

        try:
            with pa.memory_map(str(file)) as source:
                self._rows = pa.ipc.open_file(source).read_all().combine_chunks()
            self._keys = self._rows[key]
        except (pa.ArrowException, OSError, KeyError) as error:
            raise StoreError(f"{file} isn't rows by {key!r} ({error}); publish again") from error
        self.columns: list[str] = self._rows.column_names

    def kind(self, column: str) -> str:
        """What a column's values are: "moment", "number", "boolean" or "string"."""
        import pyarrow as pa

        dtype = self._rows.schema.field(column).type
        if pa.types.is_temporal(dtype):
            return "moment"
        if pa.types.is_boolean(dtype):
            return "boolean"
        return "number" if pa.types.is_primitive(dtype) else "string"

    def rows(self, id: int | str) -> list[dict[str, Any]]:
        """The customer's rows, in their order; empty where there are none."""
        keys = self._keys
        n = len(keys)
        start = bisect.bisect_left(range(n), id, key=lambda at: keys[at].as_py())
        end = bisect.bisect_right(range(n), id, lo=start, key=lambda at: keys[at].as_py())
        found: list[dict[str, Any]] = self._rows.slice(start, end - start).to_pylist()
        return found


class Store:
    """One version of a store, open for reading; safe to share between threads."""

    def __init__(self, folder: Path) -> None:
        """Opens a version's folder.

        Raises:
            StoreError: It isn't one.
        """
        try:
            said = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            self.version: str = said["version"]
            self.entity: str = said["entity"]
            self._text: bool = said["text"]
            self._groups = [
                Group(name=each["name"], spec=FeatureSpec.model_validate(each["spec"]))
                for each in said["groups"]
            ]
            files: dict[str, str] = said["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{folder} isn't a version of a store ({error!r})") from error
        self._features = Table(folder / f"{FEATURES}.arrow", self.entity)
        self._tables = {name: Table(folder / file, self.entity) for name, file in files.items()}
        # Here, since compiling takes longer than a request may.
        self._online = {group.name: online(group.spec) for group in self._groups}

    def id(self, said: object) -> int | str | None:
        """A customer's id as it is stored, or None where it can't be one."""
        if self._text:
            return said if isinstance(said, str) else None
        if isinstance(said, bool) or not isinstance(said, (int, str)):
            return None
        try:
            return int(said)
        except ValueError:
            return None

    def customer(self, said: object) -> Customer | None:
        """The customer's latest features, or None where there is no such customer."""
        id = self.id(said)
        rows = [] if id is None else self._features.rows(id)
        if id is None or not rows:
            return None
        row = dict(rows[0])
        row.pop(self.entity)
        cutoff = row.pop("cutoff", None)
        return Customer(
            id=id,
            cutoff=None if cutoff is None else cutoff.isoformat(),
            features={name: _plain(value) for name, value in row.items()},
        )

    def folded(
        self, said: object, events: Mapping[str, Sequence[Mapping[str, Any]]], cutoff: datetime
    ) -> Customer:
        """The customer's features at a moment, with events that the store doesn't have yet.

        The kernel of training computes them anew from all of the customer's events, so that they
        are what training would have made of those, to the last bit.

        Args:
            said: The customer; one without a row yet has the new events only.
            events: By group of features (`GROUP.TABLE` for its streams and attributes), rows with
                the columns that the features read; moments are texts.
            cutoff: The moment; events from it on play no part.

        Raises:
            RequestError: The id can't be one, or a table or column isn't one that features read.
        """
        id = self.id(said)
        if id is None:
            raise RequestError([Problem(field="customer", reason=f"{said!r} can't be an id here")])
        if unknown := sorted(events.keys() - self._tables.keys()):
            known = sorted(self._tables)
            reason = f"not a table that features are made of; there are {known}"
            raise RequestError([Problem(field=name, reason=reason) for name in unknown])
        there = self.customer(id)
        found = {} if there is None else dict(there.features)
        rows = {
            name: [*table.rows(id), *_checked(name, events.get(name, ()), table, self.entity)]
            for name, table in self._tables.items()
        }
        for group in self._groups:
            given = {name: rows[f"{group.name}.{name}"] for name in group.spec.tables}
            try:
                made = self._online[group.name].features(rows[group.name], cutoff, given)
            except (FeatureError, TypeError) as error:
                raise RequestError([Problem(field=group.name, reason=str(error))]) from error
            found |= {name: _plain(value) for name, value in made.items()}
        return Customer(id=id, cutoff=cutoff.isoformat(), features=found)


class Stores:
    """The version of a store that counts, followed as it is replaced."""

    def __init__(self, folder: Path) -> None:
        """Opens what counts now.

        Raises:
            StoreError: There is no store yet, or it can't be read.
        """
        self._folder = folder
        self.now = Store(folder / _current(folder))

    def reload(self) -> None:
        """Opens the version that counts, where it is another; requests keep the one they have.

        Raises:
            StoreError: It can't be read; then the one before goes on.
        """
        name = _current(self._folder)
        if name != self.now.version:
            self.now = Store(self._folder / name)


def moment(text: object) -> datetime:
    """A moment of ISO 8601 as features take it: UTC, without a zone.

    Raises:
        ValueError: It isn't one.
    """
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is not a moment; give a text such as 2026-01-31T12:00:00")
    found = datetime.fromisoformat(text)
    return found if found.tzinfo is None else found.astimezone(UTC).replace(tzinfo=None)


def _current(folder: Path) -> str:
    try:
        return (folder / POINTER).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise StoreError(
            f"{folder} has no online features ({error}); make them with `liftyard publish`"
        ) from error


def _checked(
    name: str, events: Sequence[Mapping[str, Any]], table: Table, entity: str
) -> list[dict[str, Any]]:
    """New events as stored ones are: every column, times as datetimes."""
    columns = set(table.columns) - {entity}
    problems, checked = [], []
    for at, event in enumerate(events):
        given = event.keys() if isinstance(event, dict) else set()
        if given != columns:
            apart = sorted(given ^ columns)
            reason = f"{apart} are missing or unknown; an event has {sorted(columns)}"
            problems.append(Problem(row=at, field=name, reason=reason))
            continue
        row: dict[str, Any] = {}
        for column, value in event.items():
            try:
                row[column] = _typed(table, column, value)
            except (ValueError, TypeError) as error:
                problems.append(Problem(row=at, field=f"{name}.{column}", reason=str(error)))
        checked.append(row)
    if problems:
        raise RequestError(problems)
    return checked


def _typed(table: Table, column: str, value: Any) -> Any:
    kind = table.kind(column)
    if value is None:
        return None
    if kind == "moment":
        return moment(value)
    allowed = {"number": (int, float), "boolean": (bool,), "string": (str,)}[kind]
    if isinstance(value, allowed) and (kind == "boolean" or not isinstance(value, bool)):
        return value
    raise ValueError(f"is {value!r}; give a {kind}, or null where there is none")


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, float) and value != value:
        return None
    return value.isoformat() if isinstance(value, (date, datetime)) else value
