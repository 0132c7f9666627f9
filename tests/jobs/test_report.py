"""The report's page against the files of a run's folder that it was made of."""

import json
import math
import os
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from jobs import report

RUN_ID = "20261124T175709-6727ab"
VOID = {"meta", "link", "img", "br", "hr", "input"}
FEATURES = [
    {
        "feature": f"purchases_sum_amount_{days}d_{place}",
        "description": f"amount spent, {days} days, {place}",
        "unit": "dollars",
        "importance": 0.2 / (place + 1),
    }
    for place, days in enumerate([7, 30, 90, 365] * 6)
]


class Page(HTMLParser):
    """What the tests look at: text, tables as rows of cells, ids, references, nesting."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.rows: list[list[str]] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.labels: list[str] = []
        self._open: list[str] = []
        self._cell: list[str] | None = None
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self._cell = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.references.append(value or "")
            if tag == "svg" and name == "aria-label":
                self.labels.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag in ("td", "th"):
            assert self._cell is not None
            self.rows[-1].append(" ".join("".join(self._cell).split()))
            self._cell = None

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            return
        self.words.append(data)
        if self._cell is not None:
            self._cell.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def row(self, *first: str) -> list[str]:
        """The one row that begins with these cells."""
        (found,) = [row for row in self.rows if row[: len(first)] == list(first)]
        return found


def variants(count: int) -> list[dict[str, Any]]:
    """Journal lines of three families; every 25th variant fails."""
    draw = random.Random(3)
    lines: list[dict[str, Any]] = []
    for place in range(count):
        family = ("boosting", "forest", "network")[place % 3]
        settings: dict[str, Any]
        if family == "boosting":
            settings = {
                "rounds": draw.choice([50, 100, 200, 400, 800]),
                "depth": draw.choice([2, 3, 4, 6, 8]),
                "learning_rate": 10 ** draw.uniform(-2.3, -0.5),
                "row_share": draw.choice([0.6, 0.8, 1.0]),
                "seed": 7,
            }
            auc = 0.74 - 0.02 * math.log10(settings["learning_rate"] / 0.05) ** 2
            auc -= 0.004 * settings["depth"]
        elif family == "forest":
            settings = {
                "trees": draw.choice([50, 100, 200, 400]),
                "depth": draw.choice([4, 8, 12, 16]),
                "min_leaf": draw.choice([1, 5, 20, 80]),
                "feature_share": draw.choice([0.2, 0.4, 0.6]),
                "seed": 7,
            }
            auc = 0.70 + 0.01 * math.log10(settings["min_leaf"])
        else:
            settings = {
                "width": draw.choice([16, 32, 64]),
                "depth": draw.choice([1, 2]),
                "learning_rate": 10 ** draw.uniform(-4, -1.5),
                "weight_decay": 10 ** draw.uniform(-5, -1),
                "seed": place,
            }
            auc = 0.69 - 0.03 * abs(math.log10(settings["learning_rate"]) + 2.7)
        failed = place % 25 == 24
        lines.append(
            {
                "variant": {"family": family, **settings},
                "score": None if failed else auc + draw.gauss(0, 0.004),
                "seconds": draw.uniform(0.02, 0.4),
                "error": f"VariantError: no rows at {place}" if failed else None,
            }
        )
    return lines


def curve(power: float) -> dict[str, Any]:
    share = [place / 100 for place in range(101)]
    bins = [(place + 0.5) / 10 for place in range(10)]
    return {
        "lift": {"share": share, "gain": [each**power for each in share]},
        "calibration": {
            "predicted": [0.4 * each for each in bins],
            "observed": [0.4 * each ** (3 * power) for each in bins],
            "count": [341 + place for place in range(10)],
        },
    }


def evaluation() -> dict[str, Any]:
    curves = {"champion": curve(0.45), "baseline": curve(0.6)}
    return {"curves": curves, "importance": FEATURES, "positives": 0.1834}


def steps() -> list[dict[str, Any]]:
    def step(name: str, seconds: float, rows: tuple[int, int], engine: str, **detail: Any) -> Any:
        return {
            "name": name,
            "seconds": seconds,
            "rows_in": rows[0],
            "rows_out": rows[1],
            "engine": engine,
            "device": "cpu",
            "detail": detail,
        }

    transactions = {"version": 4, "rows": 1469307, "partitions": 2, "new": True}
    alarm = "Alarm(kind='appeared', file='a.csv', column='colour', detail='String')"
    kept = {"version": 5, "rows": 1464471, "quarantined": 4836}
    return [
        step(
            "ingest",
            15.619,
            (1561638, 1561638),
            "polars-streaming",
            transactions=transactions | {"alarms": [alarm]},
            products={"version": 0, "rows": 92331, "partitions": 1, "new": False, "alarms": []},
        ),
        step(
            "validate",
            3.535,
            (1561638, 1556802),
            "polars-streaming",
            transactions=kept | {"by_rule": {"foreign_key:product_id": 4836}},
            products={"version": 0, "rows": 92331, "quarantined": 0, "by_rule": {}},
        ),
        step(
            "features",
            1.294,
            (1464471, 21577),
            "polars on 2 Dask workers",
            purchases={
                "version": 3,
                "events": 1464471,
                "rows": 21577,
                "columns": 91,
                "new": True,
                "engine": "polars on 2 Dask workers",
            },
        ),
        step(
            "training",
            0.75,
            (28166, 28166),
            "polars",
            lapse_30d={
                "version": 3,
                "rows": 20577,
                "features": 105,
                "positives": 0.15799,
                "split": {"train": 12001},
                "new": True,
                "engine": "polars",
            },
        ),
        step("sweep", 71.25, (21577, 400), "ray", lapse_30d={"metric": "auc"}),
        step("register", 4.013, (2, 2), "mlflow"),
    ]


def target() -> dict[str, Any]:
    return {
        "variants": 200,
        "failed": 8,
        "family": "boosting",
        "variant": {"family": "boosting", "rounds": 400, "depth": 2, "learning_rate": 0.0512345678},
        "valid_score": 0.74321,
        "test_auc": 0.73456,
        "test_average_precision": 0.41237,
        "test_log_loss": 0.40321,
        "test_brier": 0.12987,
        "top_decile_lift": 3.21098,
        "baseline": {
            "auc": 0.70119,
            "average_precision": 0.38765,
            "log_loss": 0.40011,
            "brier": 0.13345,
            "top_decile_lift": 2.87654,
        },
        "model_version": 12,
        "promoted": False,
        "reason": "test AUC 0.7346 is not above the champion's 0.7350",
        "data_version": "training/lapse_30d@3",
        "split": {"train": 12001, "validate": 3002, "test": 3415, "purged": 2100, "unknown": 59},
    }


def make(folder: Path, *, names: tuple[str, ...] = ("lapse_30d",), count: int = 200) -> Path:
    """A finished run's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    summary(folder, targets={name: target() for name in names})
    for name in names:
        journal = "".join(json.dumps(line) + "\n" for line in variants(count))
        (folder / f"sweep-{name}.jsonl").write_text(journal)
        (folder / f"evaluation-{name}.json").write_text(json.dumps(evaluation()))
    return folder


def summary(folder: Path, **changes: Any) -> None:
    content = {
        "run_id": RUN_ID,
        "pipeline": "complete_journey",
        "seed": 7,
        "git_revision": "28147b7330f289f037aa9dd1e8fa1f9f223c5850",
        "status": "finished",
        "steps": steps(),
        "serve_url": "http://127.0.0.1:8000",
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.json").write_text(json.dumps(content))


def read(folder: Path) -> Page:
    path = report.write(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return read(make(tmp_path_factory.mktemp("runs") / RUN_ID))


def test_head_and_steps(page: Page) -> None:
    for told in (
        "complete_journey",
        RUN_ID,
        "finished",
        "2026-11-24 17:57:09 UTC",
        "28147b7330f289f037aa9dd1e8fa1f9f223c5850",
        "http://127.0.0.1:8000",
    ):
        assert told in page.text
    assert page.row("ingest") == [
        "ingest", "15.619", "", "1,561,638", "1,561,638", "polars-streaming", "cpu",
    ]  # fmt: skip
    assert page.row("features", "1.294")[-2] == "polars on 2 Dask workers"


def test_data_quality(page: Page) -> None:
    assert page.row("transactions", "1,469,307") == [
        "transactions", "1,469,307", "4", "yes", "1", "4,836", "1,464,471", "5",
    ]  # fmt: skip
    assert page.row("products")[3:6] == ["no", "0", "0"]
    assert page.row("transactions", "foreign_key:product_id")[2] == "4,836"
    assert "column='colour'" in page.text
    assert page.row("purchases") == [
        "purchases", "3", "1,464,471", "21,577", "91", "polars on 2 Dask workers",
    ]  # fmt: skip
    assert page.row("lapse_30d") == ["lapse_30d", "3", "20,577", "105", "0.1580", "polars"]


def test_champion_beside_baseline(page: Page) -> None:
    assert page.row("AUC (more is better)")[1:] == ["0.7346", "0.7012", "champion"]
    assert page.row("average precision (more is better)")[1:] == ["0.4124", "0.3876", "champion"]
    assert page.row("log loss (less is better)")[1:] == ["0.4032", "0.4001", "baseline"]
    assert page.row("Brier score (less is better)")[1:] == ["0.1299", "0.1335", "champion"]
    assert page.row("lift in the top decile (more is better)")[1:3] == ["3.2110", "2.8765"]
    assert page.row("12,001") == ["12,001", "3,002", "3,415", "2,100", "59"]
    assert "no: test AUC 0.7346 is not above the champion's 0.7350" in page.text
    assert "training/lapse_30d@3" in page.text
    assert "0.1834" in page.text


def test_curves_have_their_numbers_in_tables(page: Page) -> None:
    gains = [f"{0.1**0.45:.4f}", f"{0.1**0.6:.4f}"]
    assert page.row("0.1000", gains[0]) == ["0.1000", gains[0], "0.1000", gains[1]]
    bins = [row for row in page.rows if row[:1] == ["0.0200"]]
    assert bins == [["0.0200", f"{0.4 * 0.05**power:.4f}", "341"] for power in (1.35, 1.8)]
    assert any(f"{0.1**0.45:.4f} of the positives" in label for label in page.labels)


def test_sweep(page: Page) -> None:
    lines = variants(200)
    finished = [line["score"] for line in lines if line["error"] is None]
    assert any(f"AUC of {max(finished):.4f}" in label for label in page.labels)
    for line in lines:
        if line["error"] is not None:
            (row,) = [row for row in page.rows if row[-1:] == [line["error"]]]
            assert row[1] == line["variant"]["family"]
    for family in ("boosting", "forest", "network"):
        assert any(f"variants of {family} across" in label for label in page.labels)
        mine = [line for line in lines if line["variant"]["family"] == family]
        good = [line["score"] for line in mine if line["error"] is None]
        row = page.row(family, str(len(good)))
        assert row[2:4] == [str(len(mine) - len(good)), f"{max(good):.4f}"]
    every = [row for row in page.rows if len(row) == 8 and row[0].isdigit()]
    assert len(every) == len(finished)
    # min_leaf drives the made-up scores of the forests, trees doesn't.
    assert float(page.row("min_leaf")[1]) > 0.4
    assert float(page.row("trees")[1]) < 0.2


def test_importance_is_cut_at_twenty(page: Page) -> None:
    for feature in FEATURES[:20]:
        row = page.row(feature["feature"])
        assert row[1] == f"{feature['importance']:.4f}"
        assert row[3:] == [feature["description"], "dollars"]
    assert FEATURES[20]["feature"] not in page.text
    assert "20 of 24 features" in page.text


def test_page_stands_alone_and_is_small(tmp_path: Path) -> None:
    names = ("lapse_30d", "campaign_response")
    folder = make(tmp_path / RUN_ID, names=names, count=400)
    page = read(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert len(html.encode()) < 2_000_000
    assert len(page.references) > 10
    # Only places in the page itself, each of which is there.
    assert {reference[0] for reference in page.references} == {"#"}
    assert {reference[1:] for reference in page.references} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert "@import" not in html
    assert "url(http" not in html
    assert page.tags.count("svg") == len(page.labels) == 2 * (3 + 3)
    assert os.listdir(folder).count("report.html") == 1


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = "</svg><script>alert('$x_1$')</script>&\"--> 特征"
    folder = tmp_path / RUN_ID
    summary(
        folder,
        pipeline=evil,
        serve_url=f"javascript:{evil}",
        targets={"x": target() | {"reason": evil, "variant": {"family": evil, evil: evil}}},
    )
    lines = [
        {"variant": {"family": evil, evil: value}, "score": auc, "seconds": 1, "error": None}
        for value, auc in ((evil, 0.6), ("$\\frac$", 0.7), ("b", 0.65))
    ]
    lines.append(lines[0] | {"score": None, "error": evil})
    (folder / "sweep-x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = evaluation()
    told["importance"] = [
        {"feature": evil, "description": evil, "unit": evil, "importance": 0.5},
    ]
    (folder / "evaluation-x.json").write_text(json.dumps(told))
    page = read(folder)
    assert "script" not in page.tags
    assert page.row(evil, "0.5000")[3:] == [evil, evil]
    assert page.row("4")[-1] == evil
    assert page.text.count("<script>alert('$x_1$')</script>") > 8
    assert all(reference.startswith("#") for reference in page.references)
    assert "svg" in page.tags


def test_run_that_stopped_early_shows_what_there_is(tmp_path: Path) -> None:
    folder = tmp_path / RUN_ID
    summary(folder, status="failed", steps=[], serve_url=None)
    page = read(folder)
    assert "No step finished." in page.text
    assert "No table was ingested." in page.text
    assert f"--resume {RUN_ID}" in page.text
    assert "not served" in page.text

    summary(folder, status="failed", steps=steps()[:1])
    page = read(folder)
    assert page.row("transactions")[-1] == "not validated"
    assert "Not validated." in page.text

    # What jobs.runs writes before there are targets has neither of these keys.
    content = json.loads((folder / "summary.json").read_text())
    del content["serve_url"]
    (folder / "summary.json").write_text(json.dumps(content | {"status": "interrupted"}))
    journal = "".join(json.dumps(line) + "\n" for line in variants(9))
    (folder / "sweep-lapse_30d.jsonl").write_text(journal + '{"variant": {"fam')
    page = read(folder)
    assert "This run is interrupted" in page.text
    assert "No champion for this target" in page.text
    assert any("9 of 9 variants finished" in label for label in page.labels)

    summary(folder, targets={"lapse_30d": target()})
    assert "evaluation-lapse_30d.json isn't in the run's folder" in read(folder).text


@pytest.mark.parametrize("scores", [[None, None], [0.7], [0.7, 0.7, 0.7], [math.nan, 0.6]])
def test_odd_sweeps(tmp_path: Path, scores: list[float | None]) -> None:
    folder = make(tmp_path / RUN_ID)
    lines = [
        {
            "variant": {"family": "forest", "trees": 10 * (place + 1), "flag": place % 2 == 0},
            "score": score,
            "seconds": 0.1,
            "error": "ValueError: no" if score is None else None,
        }
        for place, score in enumerate(scores)
    ]
    journal = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "sweep-lapse_30d.jsonl").write_text(journal)
    page = read(folder)
    good = [score for score in scores if score is not None and not math.isnan(score)]
    row = page.row("forest", str(len(good)))
    assert row[2] == str(len(scores) - len(good))
    if any(score is not None and math.isnan(score) for score in scores):
        assert "its validation score is nan" in page.text


def test_pareto_front(tmp_path: Path) -> None:
    folder = make(tmp_path / RUN_ID)
    lines = [
        {
            "variant": {"family": family, "size": size},
            "score": score,
            "seconds": 0.1,
            "error": None,
            "metrics": {"row_us": cost},
        }
        for family, size, cost, score in (
            ("boosting", 1, 2.0, 0.7),
            ("boosting", 2, 4.0, 0.8),
            ("boosting", 3, 5.0, 0.75),
            ("forest", 4, 4.0, 0.79),
            ("forest", 5, 9.0, 0.9),
        )
    ]
    journal = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "sweep-lapse_30d.jsonl").write_text(journal)
    page = read(folder)
    assert [row for row in page.rows if row[-1] in ("size 1", "size 2", "size 5")] == [
        ["2.00", "0.7000", "boosting", "size 1"],
        ["4.00", "0.8000", "boosting", "size 2"],
        ["9.00", "0.9000", "forest", "size 5"],
    ]
    assert any("3 are on the front" in label for label in page.labels)


def test_explained_is_epsilon_squared() -> None:
    # By hand: SS_total 10, SS_within 2 over 2 groups of 2, so (10 - 2 - 1 * 2 / 2) / 10.
    two = report.explained("depth", [1, 1, 2, 2], [0.0, 2.0, 2.0 + 2**0.5, 4.0 + 2**0.5])
    total = 4 + (2 + 2**0.5) ** 2
    assert two.share == pytest.approx((total - 4 - 4 / 2) / total)
    assert two.groups == 2
    assert report.explained("seed", [1, 2, 3], [0.1, 0.2, 0.3]).share is None
    assert report.explained("depth", [1, 1, 2], [0.5, 0.5, 0.5]).share is None
    assert report.explained("depth", [1, 2, 1, 2], [0.1, 0.1, 0.3, 0.3]).share == 0
    many = report.explained("rate", list(range(100)), [place / 100 for place in range(100)])
    assert many.groups == 5
    assert many.share is not None
    assert many.share > 0.9


def test_page_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = make(tmp_path / RUN_ID)
    report.write(folder)
    with (folder / "report.html").open(encoding="utf-8") as before:
        summary(folder, pipeline="another")
        report.write(folder)
        # The open file is the old page still: it wasn't written over.
        assert "complete_journey" in before.read()
    assert "another" in (folder / "report.html").read_text(encoding="utf-8")

    whole = (folder / "report.html").read_bytes()
    (folder / "evaluation-lapse_30d.json").write_text("{")
    with pytest.raises(report.ReportError, match=r"evaluation-lapse_30d\.json: not JSON"):
        report.write(folder)
    assert (folder / "report.html").read_bytes() == whole
    assert not list(folder.glob("report.html.*"))


def test_a_page_that_cannot_be_put_in_place_leaves_nothing(tmp_path: Path) -> None:
    folder = make(tmp_path / RUN_ID)
    (folder / "report.html").mkdir()
    with pytest.raises(OSError, match=r"report\.html"):
        report.write(folder)
    assert not list(folder.glob("report.html.*"))


def test_folder_without_summary_is_told_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(report.ReportError, match="liftyard run PIPELINE"):
        report.write(tmp_path / "absent")
    summary(tmp_path / RUN_ID)
    with pytest.raises(report.ReportError, match=f"Runs in it: {RUN_ID}"):
        report.write(tmp_path)
    (tmp_path / "summary.json").write_text('{"run_id": "x"}')
    with pytest.raises(report.ReportError, match="no 'pipeline' in it"):
        report.write(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    folder = make(tmp_path / RUN_ID)
    told = evaluation()
    told["curves"]["baseline"]["lift"]["gain"].pop()
    (folder / "evaluation-lapse_30d.json").write_text(json.dumps(told))
    with pytest.raises(report.ReportError, match=r"curves\.baseline\.lift"):
        report.write(folder)
    make(folder)
    (folder / "sweep-lapse_30d.jsonl").write_text("{}{\n")
    with pytest.raises(report.ReportError, match=r"sweep-lapse_30d\.jsonl, line 1"):
        report.write(folder)
    make(folder)
    summary(folder, steps=[{"name": "ingest"}])
    with pytest.raises(report.ReportError, match="aren't what this version's steps write"):
        report.write(folder)
