"""Pipeline files: what is read, and that an error names file, line, value and what is allowed."""

from pathlib import Path

import pytest

from jobs.pipeline_file import ConfigError, load
from tests.jobs import shop

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


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("features: [buys]\n    attributes", "features: [buy]\n    attributes",
         r"targets.lapse.features names 'buy'.*did you mean 'buys'"),
        ("label: {feature: lapse_10d}", "label: {feature: lapse_9d}",
         r"targets.lapse.label names 'lapse_9d'.*did you mean 'lapse_10d'"),
        ("label: {feature: lapse_10d}", "label: {column: region}",
         r":36: targets.lapse.label: a label by 'column' needs 'positive' as well"),
        ("columns: [region]", "columns: [regoin]", r"column 'regoin' of 'people'.*'region'"),
        ("cutoff: sent", "cutoff: snt", r"targets.answers names column 'snt'.*'sent'"),
        ("until: ends", "until: end", r"targets.answers.label names column 'end'.*'ends'"),
        ("{validate_from: 2024-04-01, test_from: 2024-04-15}", "{validate_from: 2024-04-01}",
         r":37: targets.lapse.split: a split gives \['validate_from'\]"),
        ("baseline: [buys_recency_days, ", "baseline: [recency, ",
         r"targets.lapse.baseline names column 'recency'"),
        ("boosting: {packs: 2,", "bosting: {packs: 2,", r"family 'bosting'.*'boosting'"),
        ("trees: [5, 10], depth: 3", "tree: [5, 10]", r"'tree' isn't a setting of 'forest'"),
        ("network: {packs: 1,", "network: {packs: 0,", r"sweep.families.network.packs: got 0"),
        ("sweep:\n", "sweep:\n  folds: 1\n", r"folds 1: give 2 or more, or 0"),
        ("sweep:\n", "sweep:\n  gpus: 1.5\n", r"gpus 1.5: give a share of one GPU, or a whole"),
        ("trees: [5, 10], depth: 3", "trees: [5, some]", r"'trees' of 'forest' is 'some'; give"),
        ("settings: {width: 8,", "settings: {precision: bf16, width: 8,",
         r"'precision' of 'network' is 'bf16'; allowed: auto, 32, bf16-mixed"),
    ],
)  # fmt: skip
def test_a_target_or_sweep_that_does_not_fit_is_told(
    tmp_path: Path, old: str, new: str, said: str
) -> None:
    file = tmp_path / "shop.yaml"
    assert shop.PIPELINE.count(old) == 1
    file.write_text(shop.PIPELINE.replace(old, new))
    with pytest.raises(ConfigError, match=said):
        load(file)


def test_an_override_replaces_what_the_file_says(tmp_path: Path) -> None:
    file = tmp_path / "shop.yaml"
    file.write_text(shop.PIPELINE)
    overrides = ["seed=11", "sweep.families.forest.settings.trees=[7]", "tables.new.entity=x"]
    declared = load(file, overrides[:2])
    assert declared.seed == 11
    assert declared.sweep.families["forest"].settings["trees"] == [7]
    with pytest.raises(ConfigError, match=r"tables.new.source: this key is missing"):
        load(file, overrides)
    with pytest.raises(ConfigError, match="give KEY=VALUE"):
        load(file, ["seed"])
    with pytest.raises(ConfigError, match="neither a mapping nor a list"):
        load(file, ["name.first=3"])
