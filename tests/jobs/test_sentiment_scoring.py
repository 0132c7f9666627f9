"""Scoring files on a real Ray cluster: order, outcomes, killed actors and drivers."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import pytest
import torch
from typer.testing import CliRunner

from cluster import session, storage
from jobs import batches, sentiment_cli, sentiment_scoring
from jobs.batches import BatchesError
from jobs.sentiment_actors import SentimentScoringError
from jobs.sentiment_scoring import score_file
from models import sentiment
from models.text import TextError, clean
from tests import tiny_encoder

# OpenVINO's Python package warns of its own deprecations when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
NEGATIVE, NEUTRAL, POSITIVE = (f"p_{label}" for label in sentiment.LABELS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    made = sentiment.new(str(tiny_encoder.write(folder / "encoder")), max_tokens=16)
    with torch.no_grad():
        made.module.head.weight.mul_(60)
    made.save(folder / "trained")
    return folder / "trained"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    with session.connect(cpus=2):
        yield


@pytest.fixture
def rows() -> pl.DataFrame:
    texts = tiny_encoder.labelled(397)["text"].to_list()
    texts[5], texts[17], texts[40] = None, "   ", "12345 !!"
    return pl.DataFrame(
        {"id": range(397), "text": texts, "product": ["mug", "cup", "tea"] * 132 + ["tea"]}
    )


def score(file: Path | str, out: Path | str, model: Path, cache: Path, **how: Any) -> Any:
    settings = {
        "text_column": "text",
        "storage_root": str(cache / "tables"),
        "work": cache / "work",
        "engine": "fp32",
        "workers": 1,
        "batch_rows": 50,
        **how,
    }
    return score_file(str(file), str(out), model=model, cache=cache, **settings)


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_one_row_a_row_in_order_with_outcomes(
    tmp_path: Path, model: Path, cache: Path, rows: pl.DataFrame, kind: str
) -> None:
    file, out = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    getattr(rows, f"write_{kind}")(file)
    counted: list[int] = []
    done = score(file, out, model, cache, on_done=counted.append)
    found = pl.read_parquet(out) if kind == "parquet" else pl.read_csv(out)
    assert found["id"].to_list() == list(range(397))
    assert found.columns == [
        *rows.columns,
        *("label", "score", NEGATIVE, NEUTRAL, POSITIVE, "sentiment", "outcome"),
    ]
    assert done.rows == sum(counted) == 397 and done.resumed == 0
    assert dict(done.outcomes) == {"ok": 394, "empty": 2, "not_text": 1}
    blank = found.filter(pl.col("outcome") != "ok")
    assert blank["id"].to_list() == [5, 17, 40]
    assert blank["label"].null_count() == blank[POSITIVE].null_count() == 3
    scored = found.filter(pl.col("outcome") == "ok")
    expected = sentiment.load(model).probabilities(
        clean(rows.filter(pl.col("id").is_in(scored["id"].to_list()))["text"])["text"].to_list()
    )
    np.testing.assert_allclose(scored.select(NEGATIVE, NEUTRAL, POSITIVE), expected, atol=1e-4)
    np.testing.assert_allclose(scored["score"], expected.max(axis=1), atol=1e-4)
    assert scored["label"].to_list() == [sentiment.LABELS[each] for each in expected.argmax(1)]
    assert not Path(f"{out}.parts").exists()


@pytest.mark.usefixtures("ray_session")
def test_a_killed_actor_repeats_only_what_it_had(
    tmp_path: Path, model: Path, cache: Path, rows: pl.DataFrame
) -> None:
    file, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    rows.write_parquet(file)
    counted: list[int] = []

    def kill_after_two(count: int) -> None:
        counted.append(count)
        if len(counted) == 2:
            actors = [
                process
                for process in psutil.process_iter(["cmdline"])
                if "ray::_Scorer" in " ".join(process.info["cmdline"] or [])
            ]
            assert actors
            for each in actors:
                os.kill(each.pid, signal.SIGKILL)

    score(file, out, model, cache, on_done=kill_after_two)
    # What the actor had in hand comes again, in any order; nothing comes twice.
    assert sorted(counted) == [47] + [50] * 7
    plain = tmp_path / "plain.parquet"
    score(file, plain, model, cache)
    assert pl.read_parquet(out).equals(pl.read_parquet(plain))


DRIVER = """
import os, signal, sys
from pathlib import Path
from cluster import session
from jobs.sentiment_scoring import score_file
done = []
def die(rows):
    done.append(rows)
    if len(done) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
file, out, model, cache = sys.argv[1:]
with session.connect(cpus=1):
    score_file(file, out, text_column="text", model=Path(model), storage_root=cache,
               work=Path(cache), engine="fp32", workers=1, batch_rows=50, cache=Path(cache),
               on_done=die)
"""


@pytest.mark.usefixtures("ray_session")
def test_a_killed_driver_repeats_nothing_finished(
    tmp_path: Path, model: Path, cache: Path, rows: pl.DataFrame
) -> None:
    file, out = tmp_path / "in.parquet", tmp_path / "out.parquet"
    rows.write_parquet(file)
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, str(file), str(out), str(model), str(cache)],
        cwd=ROOT,
        capture_output=True,
        timeout=120,
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    parts = Path(f"{out}.parts")
    kept = {each.name: each.stat().st_mtime_ns for each in parts.glob("*.parquet")}
    assert len(kept) == 3 and not out.exists()
    # Other settings would mix two runs.
    with pytest.raises(BatchesError, match="with batch_rows 50"):
        score(file, out, model, cache, batch_rows=60)
    kept_then: dict[str, int] = {}

    def look(count: int) -> None:
        kept_then.update({e.name: e.stat().st_mtime_ns for e in parts.glob("*.parquet")})

    counted: list[int] = []
    done = score(file, out, model, cache, on_done=lambda n: (counted.append(n), look(n)))  # type: ignore[func-returns-value]
    assert done.resumed == 150 and counted[0] == 150 and sum(counted) == 397
    assert {name: kept_then[name] for name in kept} == kept
    found = pl.read_parquet(out)
    assert found["id"].to_list() == list(range(397))
    plain = tmp_path / "plain.parquet"
    score(file, plain, model, cache)
    assert found.equals(pl.read_parquet(plain))


@pytest.mark.usefixtures("ray_session")
def test_tables_in_and_out_and_equal_texts_scored_alike(
    tmp_path: Path,
    model: Path,
    cache: Path,
    rows: pl.DataFrame,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = str(tmp_path / "tables")
    twice = storage.with_partition(pl.concat([rows, rows]).lazy(), "product", 4)
    of = {"partitions": "4"}
    storage.write(root, "comments", twice, mode="append", onto=None, metadata=of)
    monkeypatch.setattr(sentiment_scoring, "_STAGED_ROWS", 300)
    done = score(
        "comments", "labelled", model, cache, storage_root=root, engine="bf16", at_least=0.5
    )
    assert done.engine.name == "bf16"
    found = storage.scan(root, "labelled").collect()
    assert found.height == 794
    assert found.group_by("id").agg(pl.col("label").n_unique())["label"].max() == 1
    # Partitioned as its source is, and one version whatever it was staged in.
    told = storage.metadata(root, "labelled", 0)
    assert (told["source"], told["partitions"]) == ("comments", "4")
    assert storage.version(root, "labelled") == 0
    again = storage.with_partition(found.lazy().drop(storage.PART), "product", 4).collect()
    assert again[storage.PART].to_list() == found[storage.PART].to_list()
    # A file's rows lie in one partition; the texts are masked where that is asked.
    file = tmp_path / "in.parquet"
    rows.with_columns(text=pl.lit("@ann: ") + pl.col("text")).write_parquet(file)
    score(file, "labelled", model, cache, storage_root=root, mask=True)
    found = storage.scan(root, "labelled").sort("id").collect()
    assert storage.metadata(root, "labelled", 1)["partitions"] == "1"
    assert set(found[storage.PART]) == {0}
    assert found["text"][0] == f"@user: {rows['text'][0]}"


@pytest.mark.usefixtures("ray_session")
def test_nothing_to_score_and_faults(tmp_path: Path, model: Path, cache: Path) -> None:
    none, out = tmp_path / "none.parquet", tmp_path / "out.parquet"
    pl.DataFrame(schema={"text": pl.String}).write_parquet(none)
    assert score(none, out, model, cache, engine="auto").rows == 0
    assert pl.read_parquet(out).columns[-1] == "outcome"
    blank = tmp_path / "blank.csv"
    pl.DataFrame({"text": [" ", "123"]}).write_csv(blank)
    assert dict(score(blank, out, model, cache, engine="auto").outcomes) == {
        "empty": 1,
        "not_text": 1,
    }
    with pytest.raises(SentimentScoringError, match="did you mean 'text'"):
        score(blank, out, model, cache, text_column="txt")
    odd = tmp_path / "odd.parquet"
    pl.DataFrame({"text": [["a"]], "label": [1]}).write_parquet(odd)
    with pytest.raises(SentimentScoringError, match=r"already has columns \['label'\]"):
        score(odd, out, model, cache)
    pl.DataFrame({"text": [["a"]]}).write_parquet(odd)
    with pytest.raises(TextError, match="not text"):
        score(odd, out, model, cache)
    with pytest.raises(BatchesError, match="no file"):
        score(tmp_path / "absent.csv", out, model, cache)


@pytest.mark.usefixtures("ray_session")
def test_the_command_line(
    tmp_path: Path, model: Path, rows: pl.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file, out = tmp_path / "in.csv", tmp_path / "out.csv"
    rows.write_csv(file)
    asked = ["score", str(file), "--out", str(out), "--model", str(model), "--home", str(tmp_path)]
    ran = CliRunner().invoke(sentiment_cli.app, [*asked, "--text-column", "text", "--workers", "1"])
    assert ran.exit_code == 0, ran.output
    assert "397 rows" in ran.output and "texts/s" in ran.output
    assert pl.read_csv(out).height == 397
    ran = CliRunner().invoke(sentiment_cli.app, [*asked, "--text-column", "nothing"])
    assert ran.exit_code == 1 and "column 'nothing': there are id" in ran.output


def test_batches_are_cut_alike_whatever_the_pieces(rows: pl.DataFrame) -> None:
    pieces = list(batches.cut(rows.lazy(), 50))
    assert [each.height for each in pieces] == [50] * 7 + [47]
    assert pl.concat(pieces).equals(rows)
