"""The CUDA form on a GPU, over cuDF, against the CPU kernel."""

from datetime import datetime

import numpy as np
import polars as pl
import pytest

from models.features import FeatureSpec, compute
from tests.models.test_features_cuda import DECLARED

pytestmark = pytest.mark.gpu


def test_cudf_equals_the_cpu_kernel() -> None:
    cudf = pytest.importorskip("cudf")
    from models.features import cuda

    rng, n = np.random.default_rng(11), 200_000
    spec = FeatureSpec.model_validate(DECLARED)
    cutoffs = [datetime(2024, month, 1) for month in (2, 3, 4)]
    events = pl.DataFrame(
        {
            "who": pl.format("c{}", pl.Series((rng.random(n) ** 3 * 5_000).astype(np.int64))),
            "ts": pl.Series(rng.integers(1704067200, 1714067200, n) * 1_000_000).cast(
                pl.Datetime("us")
            ),
            "x": rng.normal(5, 9, n).round(2),
            "k": pl.Series(["a", "b", "c", None]).gather(rng.integers(0, 4, n)),
        },
        strict=False,
    ).with_columns(x=pl.when(pl.col("x") > -20).then("x"))
    tables = {
        "exposures": pl.DataFrame(
            {
                "who": pl.format("c{}", pl.Series(rng.integers(0, 6_000, 50_000))),
                "sent": pl.Series(rng.integers(1704067200, 1714067200, 50_000) * 1_000_000).cast(
                    pl.Datetime("us")
                ),
                "eur": rng.normal(1, 1, 50_000),
            }
        ),
        "levels": pl.DataFrame(
            {
                "who": ["c1", "c2"],
                "since": [datetime(2024, 2, 1), datetime(2024, 1, 1)],
                "level": ["at the cutoff", "gold"],
                "points": [1.0, 2.0],
            }
        ),
    }
    cpu = compute(events, spec, cutoffs, labels=True, tables=tables)
    gpu = cuda.compute(cudf.DataFrame.from_arrow(events.to_arrow()), spec, cutoffs, labels=True)
    assert isinstance(gpu, cudf.DataFrame)
    back = gpu.to_pandas()
    assert back["who"].tolist() == cpu["who"].to_list()
    levels = [None if level != level else level for level in back["tier_level"]]
    assert levels == cpu["tier_level"].to_list()
    for name in set(cpu.columns[2:]) - {"tier_level"}:
        np.testing.assert_allclose(
            back[name].to_numpy(), cpu[name].to_numpy(), rtol=1e-6, err_msg=name
        )
