"""What a pipeline file may say.

Knows nothing of YAML (`jobs/pipeline_file.py`), or of how tables are read or stored.
"""

from __future__ import annotations

import datetime as dt

from pydantic import BaseModel, ConfigDict, Field, model_validator

from jobs.config_sweep import Sweep
from jobs.config_tables import Dtype, Scalar, Table
from jobs.sentiment_config import SentimentTraining
from models.features import FeatureSpec, describe
from models.naming import suggestion


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lookup(_Model):
    """Columns that each event takes from the one row of `table` with the same `key`."""

    table: str
    key: str
    columns: list[str] = Field(min_length=1)


class Features(FeatureSpec):
    """Features and labels of the events in `table`; the keys beside its own are FeatureSpec's."""

    table: str
    lookups: tuple[Lookup, ...] = ()


class Rows(_Model):
    """A target's rows, where they are a table's own and not its features' cutoffs.

    `cutoff` names the time of each row; features come from before it. `columns` are features
    themselves.
    """

    table: str
    lookups: tuple[Lookup, ...] = ()
    cutoff: str | None = None
    columns: list[str] = []


class Label(_Model):
    """What is to be predicted, 0 or 1: one of three ways.

    `feature`: a label that the target's features declare. `column`: whether a column of the rows
    equals `positive`. `event`: whether a row of that table has the same `keys`, and its `time` in
    [the row's cutoff, the row's `until`]; unknown where the events don't reach `until`.
    """

    feature: str | None = None
    column: str | None = None
    positive: Scalar | None = None
    event: str | None = None
    keys: list[str] = []
    time: str | None = None
    until: str | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Label:
        ways = {
            "feature": (self.feature, ()),
            "column": (self.column, ("positive",)),
            "event": (self.event, ("keys", "time", "until")),
        }
        given = [way for way, (value, _) in ways.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"a label gives {given}; give exactly one of {', '.join(ways)}")
        for way, (_, needs) in ways.items():
            for key in needs:
                there = getattr(self, key) not in (None, [])
                if there != (way == given[0]):
                    raise ValueError(
                        f"a label by {given[0]!r} "
                        + (f"takes no {key!r}" if there else f"needs {key!r} as well")
                    )
        return self


class Split(_Model):
    """Which rows train, validate and test: by time, or drawn with each class's share kept."""

    validate_from: dt.datetime | None = None
    test_from: dt.datetime | None = None
    validate_share: float | None = Field(default=None, gt=0, lt=1)
    test_share: float | None = Field(default=None, gt=0, lt=1)

    @model_validator(mode="after")
    def _one_way(self) -> Split:
        given = [key for key, value in self if value is not None]
        if given not in (["validate_from", "test_from"], ["validate_share", "test_share"]):
            raise ValueError(
                f"a split gives {given}; give validate_from and test_from, or validate_share "
                "and test_share"
            )
        held_out = (self.validate_share or 0) + (self.test_share or 0)
        if held_out >= 1:
            raise ValueError(
                f"validate_share and test_share add up to {held_out:g}; leave rows to train on"
            )
        return self


class Target(_Model):
    """One thing to predict: its rows, features, label, split, and a baseline to beat.

    `features` name groups of `Pipeline.features`; without `rows` the first one's table gives rows
    and cutoffs. `attributes` are columns looked up by the entity. `baseline` lists features for a
    logistic regression that the report shows beside the champion.
    """

    features: list[str] = []
    rows: Rows | None = None
    attributes: tuple[Lookup, ...] = ()
    label: Label
    split: Split
    baseline: list[str] = []


class Scores(_Model):
    """A table's column of texts to be scored, and where a shift is looked for.

    With `time`, the last week's sentiment is compared with the eight weeks before it
    (`models.shift`), for each value of each column of `by`.
    """

    text: str
    time: str | None = None
    by: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _text_alone(cls, said: object) -> object:
        return {"text": said} if isinstance(said, str) else said

    @model_validator(mode="after")
    def _by_needs_time(self) -> Scores:
        if bool(self.by) != (self.time is not None):
            raise ValueError(f"time {self.time!r} and by {self.by}: give both, or neither")
        return self


class Sentiment(SentimentTraining):
    """A sentiment training, and the tables that its champion scores.

    `scores` maps a table to its column of texts, or to `Scores`. Its rows, with what was told of
    each, are the table `TABLE_sentiment`, which features may be of: the column `sentiment`, from -1
    to 1, is the probability of positive less that of negative.
    """

    scores: dict[str, Scores] = Field(default_factory=dict)

    @property
    def training(self) -> SentimentTraining:
        """The training alone."""
        return SentimentTraining.model_validate(self.model_dump(exclude={"scores"}))


class Pipeline(_Model):
    """A pipeline: tables, features, targets, sentiment, and the seed of everything drawn."""

    name: str = Field(min_length=1)
    seed: int = Field(ge=0)
    tables: dict[str, Table] = Field(min_length=1)
    features: dict[str, Features] = {}
    targets: dict[str, Target] = {}
    sweep: Sweep = Field(default_factory=Sweep)
    sentiment: Sentiment | None = None

    def columns(self, where: str, table: str, lookups: tuple[Lookup, ...] = ()) -> list[str]:
        """Columns of a table with its lookups; refuses names that aren't declared."""
        known = self._readable
        if table not in known:
            raise ValueError(
                f"{where} names table {table!r}; declared: {', '.join(known)}"
                f"{suggestion(table, list(known))}"
            )
        there = list(known[table].columns)
        for lookup in lookups:
            self._require(where, [lookup.key], there)
            other = self.columns(where, lookup.table)
            self._require(where, [lookup.key, *lookup.columns], other, f" of {lookup.table!r}")
            there += lookup.columns
        return there

    @property
    def _readable(self) -> dict[str, Table]:
        """The tables that features may be of: those declared, and those scored."""
        found = dict(self.tables)
        if self.sentiment is None:
            return found
        told: dict[str, Dtype] = {"label": "string", "score": "float64", "sentiment": "float64"}
        told |= {f"p_{label}": "float64" for label in self.sentiment.labels}
        for name in self.sentiment.scores:
            base = self.tables[name]
            columns = {**base.columns, **told, "outcome": "string"}
            found[f"{name}_sentiment"] = base.model_copy(update={"columns": columns})
        return found

    def _require(self, where: str, names: list[str], there: list[str], of: str = "") -> None:
        for name in names:
            if name not in there:
                raise ValueError(
                    f"{where} names column {name!r}{of}; declared: {', '.join(there)}"
                    f"{suggestion(name, there)}"
                )

    @model_validator(mode="after")
    def _scored_texts_are_there(self) -> Pipeline:
        for table, scores in (self.sentiment.scores if self.sentiment else {}).items():
            where = f"sentiment.scores.{table}"
            if table not in self.tables:
                raise ValueError(
                    f"{where}: no such table; declared: {', '.join(self.tables)}"
                    f"{suggestion(table, list(self.tables))}"
                )
            named = [scores.text, *([scores.time] if scores.time else []), *scores.by]
            self._require(where, named, list(self.tables[table].columns))
        return self

    @model_validator(mode="after")
    def _features_fit_their_tables(self) -> Pipeline:
        for name, features in self.features.items():
            where = f"features.{name}"
            there = self.columns(where, features.table, features.lookups)
            self._require(where, [features.entity, features.time], there)
            for feature in describe(features):
                if feature.table is None:
                    self._require(where, list(feature.columns), there)
                else:
                    other = self.columns(where, feature.table)
                    wanted = [features.entity, *feature.columns]
                    self._require(where, wanted, other, f" of {feature.table!r}")
            if self._readable[features.table].entity != features.entity:
                raise ValueError(
                    f"features.{name} has entity {features.entity!r}, and table "
                    f"{features.table!r} is partitioned by "
                    f"{self._readable[features.table].entity!r}; give both the same entity"
                )
        return self

    @model_validator(mode="after")
    def _targets_fit_their_tables(self) -> Pipeline:
        for name, target in self.targets.items():
            where, rows, label = f"targets.{name}", target.rows, target.label
            for group in target.features:
                if group not in self.features:
                    raise ValueError(
                        f"{where}.features names {group!r}; declared: {', '.join(self.features)}"
                        f"{suggestion(group, list(self.features))}"
                    )
            groups = [self.features[group] for group in target.features]
            if rows is None:
                if not groups or groups[0].cutoffs == []:
                    raise ValueError(
                        f"{where} has neither rows nor features with cutoffs to take them from; "
                        "add rows, or name features that declare cutoffs first"
                    )
                there: list[str] = [groups[0].entity]
                cutoff: str | None = "cutoff"
            else:
                there, cutoff = self.columns(where, rows.table, rows.lookups), rows.cutoff
                self._require(where, [*rows.columns, *([cutoff] if cutoff else [])], there)
            self._require(where, [group.entity for group in groups], there)
            if groups and cutoff is None:
                raise ValueError(f"{where}.rows needs a cutoff: features come from before it")
            if target.split.validate_from is not None and cutoff is None:
                raise ValueError(f"{where}.split goes by time, and its rows have no cutoff")
            taken = [*(rows.columns if rows else ())]
            for lookup in target.attributes:
                self._require(where, [lookup.key], there)
                other = self.columns(where, lookup.table)
                self._require(where, [lookup.key, *lookup.columns], other, f" of {lookup.table!r}")
                taken += lookup.columns
            taken += [feature.name for group in groups for feature in describe(group)]
            if twice := sorted({each for each in taken if taken.count(each) > 1}):
                raise ValueError(f"{where}: features named more than once: {twice}; rename some")
            if not taken:
                raise ValueError(f"{where} has no feature; name features, attributes or columns")
            self._require(f"{where}.baseline", target.baseline, taken)
            self._label_fits(where, label, target, there)
        return self

    def _label_fits(self, where: str, label: Label, target: Target, there: list[str]) -> None:
        if label.feature is not None:
            if target.rows is not None:
                raise ValueError(f"{where}: rows of their own take a label by column or by event")
            known = [each.name for each in self.features[target.features[0]].labels]
            if label.feature not in known:
                raise ValueError(
                    f"{where}.label names {label.feature!r}; {target.features[0]} declares "
                    f"{', '.join(known) or 'none'}{suggestion(label.feature, known)}"
                )
        elif target.rows is None:
            raise ValueError(f"{where}: a label by column or event needs rows")
        elif label.column is not None:
            self._require(f"{where}.label", [label.column], there)
        else:
            assert label.event is not None and label.time is not None and label.until is not None
            events = self.columns(f"{where}.label", label.event)
            self._require(f"{where}.label", [*label.keys, label.until], there)
            self._require(f"{where}.label", [*label.keys, label.time], events)

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
