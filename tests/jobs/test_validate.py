"""Validation: which rows go, under which rule's name, and when the table is left as it was."""

import datetime as dt

import polars as pl
import pytest

from cluster import storage
from jobs.config_tables import Table
from jobs.ingest import ingest
from jobs.validate import ValidationError, validate

COLUMNS = {"id": "int64", "shop": "string", "amount": "float64", "day": "date"}
ROWS = """\
id,shop,amount,day
1,a,5,2024-05-01
2,a,-1,2024-05-01
3,b,,2024-05-01
4,c,5,2024-05-01
5,a,abc,2024-05-01
6,b,5,2024-05-01
6,b,5,2024-05-01
7,x,5,2024-05-01
8,b,200,2024-05-02
"""
RULES = {
    "unique": [["id"]],
    "ranges": {"amount": {"min": 0, "max": 100}},
    "allowed": {"shop": ["a", "b", "c"]},
    "foreign_keys": {"shop": "shops.shop"},
}


def _tables(tmp_path, rules=RULES, share=1.0):
    (tmp_path / "sales.csv").write_text(ROWS)
    (tmp_path / "shops.csv").write_text("shop\na\nb\nx\n")
    sales = {"source": {"path": "sales.csv"}, "columns": COLUMNS, "entity": "id", "rules": rules}
    shops = {"source": {"path": "shops.csv"}, "columns": {"shop": "string"}}
    tables = {
        "sales": Table.model_validate(sales | {"max_quarantine_share": share}),
        "shops": Table.model_validate(shops),
    }
    for name, table in tables.items():
        ingest(name, table, tmp_path / "tables", base=tmp_path)
    return tables


def _validate(tmp_path, tables):
    return validate("sales", tables["sales"], tmp_path / "tables", tables=tables)


def test_failing_rows_go_to_quarantine_under_their_rules_names(tmp_path):
    tables, root = _tables(tmp_path), tmp_path / "tables"
    done = _validate(tmp_path, tables)
    assert done.by_rule == {
        "type:amount": 1,
        "not_null:amount": 1,
        "range:amount": 2,
        "allowed:shop": 1,
        "unique:id": 2,
        "foreign_key:shop": 1,
    }
    assert (done.version, done.rows, done.quarantined) == (1, 1, 8)
    assert storage.scan(root, "sales").collect()["id"].to_list() == [1]
    aside = storage.scan(root, "quarantine/sales").collect()
    assert dict(aside.select("id", "_rule").iter_rows()) == {
        2: "range:amount",
        3: "not_null:amount",
        4: "foreign_key:shop",
        5: "type:amount",
        6: "unique:id",
        7: "allowed:shop",
        8: "range:amount",
    }
    assert aside["_version"].unique().to_list() == [0]

    # Neither step does anything a second time.
    assert _validate(tmp_path, tables).version == 1
    assert not ingest("sales", tables["sales"], root, base=tmp_path).new


def test_a_row_that_breaks_two_rules_names_both(tmp_path):
    rules = RULES | {"ranges": {"amount": {"min": 6, "max": 300}}}
    _validate(tmp_path, _tables(tmp_path, rules))
    aside = storage.scan(tmp_path / "tables", "quarantine/sales").filter(pl.col("id") == 4)
    assert aside.collect()["_rule"].to_list() == ["range:amount|foreign_key:shop"]


def test_over_the_share_stops_with_examples_and_leaves_the_table(tmp_path):
    tables = _tables(tmp_path, share=0.5)
    with pytest.raises(ValidationError) as caught:
        _validate(tmp_path, tables)
    assert "8 of 9 rows" in str(caught.value)
    assert "range:amount: 2 rows" in str(caught.value)
    assert "'amount': -1.0" in str(caught.value)
    assert storage.version(tmp_path / "tables", "sales") == 0
    assert not storage.exists(tmp_path / "tables", "quarantine/sales")


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"rows": {"min": 5}}, "1 rows after quarantine; allowed: at least 5"),
        (
            {"freshness": {"column": "day", "max_age_days": 2, "as_of": dt.date(2024, 5, 9)}},
            "the newest day is 2024-05-01",
        ),
    ],
)
def test_too_few_or_stale_rows_stop(tmp_path, rule, said):
    with pytest.raises(ValidationError, match=said):
        _validate(tmp_path, _tables(tmp_path, RULES | rule))
    assert storage.version(tmp_path / "tables", "sales") == 0


def test_a_rule_of_another_type_than_its_column_is_told(tmp_path):
    rules = {"allowed": {"amount": ["cheap"]}}
    with pytest.raises(ValidationError, match="'sales': rule 'allowed:amount' doesn't fit"):
        _validate(tmp_path, _tables(tmp_path, rules))
