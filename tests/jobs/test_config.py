"""Pipeline files: what is read, and that an error names file, line, value and what is allowed."""

from pathlib import Path

import pytest

from jobs.pipeline_file import ConfigError, load

GOOD = """\
name: demo
seed: 7
tables:
  sales:
    source: {path: "sales/*.csv"}
    entity: customer
    columns:
      customer: int64
      amount: float64
    rules:
      ranges:
        amount: {min: 0}
"""


def _load(tmp_path: Path, text: str):
    path = tmp_path / "pipeline.yaml"
    path.write_text(text)
    return load(path)


def test_reads_a_pipeline(tmp_path):
    table = _load(tmp_path, GOOD).tables["sales"]
    assert table.kind == "csv"
    assert table.rules.ranges["amount"].min == 0
    assert table.max_quarantine_share == 0.01


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("entity:", "entitty:", 6, "did you mean 'entity'"),
        ("amount: float64", "amount: flot64", 9, "did you mean 'float64'"),
        ("seed: 7", "seed: many", 2, "got 'many'"),
        ("{min: 0}", "{mim: 0}", 12, "did you mean 'min'"),
        ("entity: customer", "entity: custmer", 4, "did you mean 'customer'"),
        ("seed: 7", "seed: [7", 3, "not YAML"),
        ("name: demo\n", "", 1, "missing"),
    ],
)
def test_an_error_names_file_line_and_fix(tmp_path, old, new, line, said):
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, GOOD.replace(old, new))
    assert f"pipeline.yaml:{line}:" in str(caught.value)
    assert said in str(caught.value)


def test_a_foreign_key_must_name_a_declared_column(tmp_path):
    text = GOOD + "      foreign_keys: {customer: sales.custommer}\n"
    with pytest.raises(ConfigError, match=r"did you mean 'sales.customer'"):
        _load(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.yaml"):
        load(tmp_path / "absent.yaml")
