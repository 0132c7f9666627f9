"""The README's own example, run as it stands."""

import re
from pathlib import Path

import numpy as np
import polars as pl
from typer.testing import CliRunner

from cluster import session
from jobs.cli import app

README = Path(__file__).parents[1] / "README.md"


def test_the_pipeline_of_the_readme_runs(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(block.splitlines()) <= 20
    (tmp_path / "shop.yaml").write_text(block)
    random = np.random.default_rng(3)
    orders = pl.DataFrame(
        {
            "customer": random.integers(0, 300, 4_000) ** 2 // 300,
            "at": np.datetime64("2024-10-01", "ms")
            + (random.integers(0, 450 * 86_400, 4_000) * 1_000).astype("timedelta64[ms]"),
            "amount": random.uniform(1, 90, 4_000).round(2),
        }
    )
    orders.write_csv(tmp_path / "orders.csv", datetime_format="%Y-%m-%d %H:%M:%S")
    few = [f"sweep.families.{family}.packs=1" for family in ("boosting", "forest", "network")]
    with session.connect(cpus=2):
        result = CliRunner().invoke(
            app,
            [
                *("run", str(tmp_path / "shop.yaml"), "--home", str(tmp_path / "home")),
                *("--runs", str(tmp_path / "runs")),
                *(word for each in few for word in ("--set", each)),
            ],
        )
    assert result.exit_code == 0, result.output
    assert "lapse_30d" in result.output
