"""Ingest: one version a change, values told by file and row, partitions that don't move."""

import datetime as dt

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster import storage
from jobs.config_tables import Table
from jobs.ingest import SchemaError, SourceError, ingest

COLUMNS = {"customer": "int64", "amount": "float64"}


def _table(path="in/*.parquet", **more):
    return Table.model_validate(
        {"source": {"path": path}, "columns": COLUMNS, "entity": "customer"} | more
    )


def _file(tmp_path, name, frame):
    (tmp_path / "in").mkdir(exist_ok=True)
    frame.write_parquet(tmp_path / "in" / name)


def _frame(*customers):
    return pl.DataFrame({"customer": customers, "amount": [1.5] * len(customers)})


def _ingest(tmp_path, table):
    return ingest("sales", table, tmp_path / "tables", base=tmp_path)


def test_same_input_makes_no_version_and_a_new_file_appends_its_rows(tmp_path):
    _file(tmp_path, "a.parquet", _frame(1, 2))
    first = _ingest(tmp_path, _table())
    again = _ingest(tmp_path, _table())
    assert (first.version, first.rows, first.new) == (0, 2, True)
    assert (again.version, again.rows, again.new) == (0, 2, False)

    _file(tmp_path, "b.parquet", _frame(3))
    more = _ingest(tmp_path, _table())
    assert (more.version, more.rows, more.new) == (1, 3, True)
    assert storage.scan(tmp_path / "tables", "sales", 0).collect().height == 2


def test_a_changed_or_vanished_file_rewrites(tmp_path):
    _file(tmp_path, "a.parquet", _frame(1, 2))
    _file(tmp_path, "b.parquet", _frame(3))
    _ingest(tmp_path, _table())
    _file(tmp_path, "a.parquet", _frame(9))
    changed = _ingest(tmp_path, _table())
    rows = storage.scan(tmp_path / "tables", "sales").collect()
    assert changed.version == 1
    assert sorted(rows["customer"]) == [3, 9]
    (tmp_path / "in" / "a.parquet").unlink()
    assert (_ingest(tmp_path, _table()).rows, storage.version(tmp_path / "tables", "sales")) == (
        1,
        2,
    )


def test_schema_alarms(tmp_path):
    _file(tmp_path, "a.parquet", _frame(1).with_columns(extra=pl.lit("x")))
    _file(tmp_path, "b.parquet", _frame(2).cast({"amount": pl.Int64}))
    alarms = _ingest(tmp_path, _table()).alarms
    assert [(alarm.kind, alarm.column) for alarm in alarms] == [
        ("appeared", "extra"),
        ("type_changed", "amount"),
    ]
    assert "extra" not in storage.scan(tmp_path / "tables", "sales").collect_schema()

    _file(tmp_path, "c.parquet", _frame(3).rename({"amount": "amuont"}))
    with pytest.raises(SchemaError, match=r"c\.parquet.*'amount'.*did you mean 'amuont'"):
        _ingest(tmp_path, _table())
    assert storage.version(tmp_path / "tables", "sales") == 0


def test_a_csv_value_that_does_not_cast_is_told_with_file_and_row(tmp_path):
    (tmp_path / "sales.csv").write_text("customer;amount;day\n1;2.5;2024-05-01\n2;abc;2024-05-02\n")
    columns = COLUMNS | {"day": "datetime"}
    _ingest(tmp_path, _table("sales.csv", separator=";", columns=columns))
    good, bad = storage.scan(tmp_path / "tables", "sales").sort("customer").collect().to_dicts()
    assert (good["amount"], good["day"]) == (2.5, dt.datetime(2024, 5, 1))
    assert good["_invalid"] is None
    assert bad["amount"] is None
    assert bad["_invalid"].startswith("amount: abc is not float64 (")
    assert bad["_invalid"].endswith("sales.csv, row 3)")


def test_a_fraction_is_not_cut_to_an_integer(tmp_path):
    _file(tmp_path, "a.parquet", pl.DataFrame({"customer": [1.0, 1.5], "amount": [1.0, 1.0]}))
    _ingest(tmp_path, _table())
    rows = storage.scan(tmp_path / "tables", "sales").collect()
    assert sorted(rows["customer"].drop_nulls()) == [1]
    assert rows["_invalid"].null_count() == 1


def test_empty_and_missing_files_are_refused_by_name(tmp_path):
    with pytest.raises(SourceError, match=r"absent\.csv"):
        _ingest(tmp_path, _table("absent.csv"))
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(SourceError, match=r"empty\.csv: the file is empty"):
        _ingest(tmp_path, _table("empty.csv"))
    (tmp_path / "header.csv").write_text("customer,amount\n")
    with pytest.raises(SourceError, match=r"header\.csv: the file is empty"):
        _ingest(tmp_path, _table("header.csv"))


def test_unwritable_storage_is_an_error_for_people(tmp_path):
    _file(tmp_path, "a.parquet", _frame(1))
    (tmp_path / "tables").write_text("a file, not a directory")
    with pytest.raises(storage.StorageError, match=r"'sales'.*tables"):
        _ingest(tmp_path, _table())


def _splitmix64(number):
    mask = (1 << 64) - 1
    z = (number + 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)


def test_the_hash_is_the_published_one():
    frame = pl.DataFrame({"i": [0, 1, -1]}, schema={"i": pl.Int64})
    got = frame.select(storage.stable_hash("i", pl.Int64)).to_series().to_list()
    assert got[0] == 0xE220A8397B1DCDAF  # splitmix64's first output from seed 0
    assert got == [_splitmix64(0), _splitmix64(1), _splitmix64((1 << 64) - 1)]
    words = pl.DataFrame({"s": ["a", "b", None, "a"]})
    text = words.select(storage.stable_hash("s", pl.String)).to_series().to_list()
    assert text == [3405396810240292928, 8453121595177857668, 0, 3405396810240292928]


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    entities=st.one_of(
        st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1),
        st.lists(st.text(max_size=4), min_size=1),
    ),
    power=st.integers(0, 6),
)
def test_every_entity_lies_in_one_partition(entities, power):
    dtype = pl.Int64 if isinstance(entities[0], int) else pl.String
    frame = pl.DataFrame({"e": entities * 2}, schema={"e": dtype})
    parts = storage.with_partition(frame.lazy(), "e", 2**power).collect()
    assert parts.group_by("e").agg(pl.col("_part").n_unique())["_part"].to_list() == [1] * len(
        set(entities)
    )
    assert parts["_part"].is_between(0, 2**power - 1).all()


@pytest.mark.parametrize(
    ("rows", "count"), [(0, 1), (1_000_000, 1), (1_000_001, 2), (3_000_000, 4), (9_000_000, 16)]
)
def test_partition_count_is_a_power_of_two(rows, count):
    assert storage.partitions(rows) == count


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_masked_column_is_stored_without_who_wrote_it(tmp_path, monkeypatch, kind):
    said = ["@ann call +48 601 234 567", "mail ann@shop.pl or see https://shop.pl/a?b=1", None]
    said = pl.DataFrame({"customer": [1, 2, 3], "text": said})
    getattr(said, f"write_{kind}")(tmp_path / f"said.{kind}")
    columns = {"customer": "int64", "text": "string"}
    table = _table(f"said.{kind}", columns=columns, mask=["text"])
    assert _ingest(tmp_path, table).new
    stored = storage.scan(tmp_path / "tables", "sales").sort("customer").collect()
    assert stored["text"].to_list() == ["@user call <phone>", "mail <email> or see http", None]
    kept = b"".join(
        file.read_bytes() for file in (tmp_path / "tables").rglob("*") if file.is_file()
    )
    for secret in (b"ann", b"601", b"shop"):
        assert secret not in kept.replace(str(tmp_path).encode(), b"")
    assert not _ingest(tmp_path, table).new
    # Other rules of masking make another version.
    monkeypatch.setattr("jobs.ingest.HYGIENE", "another")
    assert _ingest(tmp_path, table).version == 1


def test_only_declared_strings_are_masked():
    with pytest.raises(ValueError, match=r"mask names column 'amuont'.*did you mean 'amount'"):
        _table(mask=["amuont"])
    with pytest.raises(ValueError, match="'amount', which is float64; only string columns"):
        _table(mask=["amount"])
