"""The CUDA form on numba's simulator, over pandas and NumPy, against the CPU kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path

CHECK = """
import json, sys
import numpy as np, pandas as pd, polars as pl
from datetime import datetime, timedelta
from models.features import FeatureError, FeatureSpec, compute, cuda

spec = FeatureSpec.model_validate(json.loads(sys.argv[1]))
cutoffs = [datetime(2024, 2, 1), datetime(2024, 2, 2), datetime(2024, 5, 1)]
rng = np.random.default_rng(11)
n = 400
hours = rng.integers(0, 24 * 120, n)
events = pl.DataFrame(
    {
        "who": pl.Series(["p", "q", "r", "s"]).gather((rng.random(n) ** 3 * 4).astype(int)),
        "ts": [datetime(2024, 1, 1) + timedelta(hours=int(h)) for h in hours],
        "x": [round(float(v), 2) if v < 15 else None for v in rng.normal(5, 9, n)],
        "k": pl.Series(["a", "b", "c", None]).gather(rng.integers(0, 4, n)),
    }
)
tables = {
    "exposures": pl.DataFrame(
        {
            "who": pl.Series(["r", "p", "z", "q"]).gather(rng.integers(0, 4, 90)),
            "sent": [datetime(2024, 1, 1) + timedelta(days=i % 85) for i in range(90)],
            "eur": rng.normal(1, 1, 90),
        }
    ),
    "levels": pl.DataFrame(
        {
            "who": ["z", "s", "p", "p", "p", "q"],
            "since": [datetime(2024, m, d) for m, d in
                      ((1, 1), (4, 30), (2, 1), (1, 9), (1, 9), (5, 1))],
            "level": ["other", "late", "at the cutoff", "first", "second", "at the cutoff"],
            "points": [1.0, 2.0, 3.0, 4.0, None, 6.0],
        }
    ),
}
cpu = compute(events, spec, cutoffs, labels=True, tables=tables)
frames = {name: table.to_pandas() for name, table in tables.items()}
gpu = cuda.compute(events.to_pandas(), spec, cutoffs, labels=True, tables=frames, xp=np)
assert cpu["tier_level"].null_count() not in (0, cpu.height)
assert isinstance(gpu, pd.DataFrame) and list(gpu.columns) == cpu.columns
assert gpu["who"].tolist() == cpu["who"].to_list()
assert (gpu["cutoff"].to_numpy() == cpu["cutoff"].to_numpy()).all()
exact = close = 0
for name in cpu.columns[2:]:
    mine, theirs = gpu[name].to_numpy(), cpu[name].to_numpy()
    if name == "tier_level":
        assert [None if v != v else v for v in gpu[name]] == cpu[name].to_list()
        exact += 1
        continue
    assert mine.dtype == theirs.dtype, name
    if "decayed" in name:
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, err_msg=name)
        close += 1
    else:
        np.testing.assert_array_equal(mine, theirs, err_msg=name)
        exact += 1
try:
    cuda.compute(events.to_pandas().assign(x=1e200), spec, cutoffs, tables=frames, xp=np)
except FeatureError as error:
    refused = str(error)
print(json.dumps({"rows": cpu.height, "exact": exact, "close": close, "refused": refused}))
"""
DECLARED = {
    "entity": "who",
    "time": "ts",
    "name": "buys",
    "measures": {"amount": "x"},
    "categories": {"kind": {"column": "k", "values": ["b", "a", "never"]}},
    "distinct": {"kinds": "k", "amounts": "x"},
    "windows": ["7d", "1mo"],
    "aggregations": [
        *("count", "sum", "mean", "min", "max", "std", "distinct", "first", "last", "slope")
    ],
    "lifetime": [
        *("sum", "std", "max", "distinct"),
        *("recency", "tenure", "gap_mean", "gap_std", "gap_max", "overdue"),
    ],
    "trends": [["7d", "1mo"]],
    "filters": [
        {"name": "returns", "column": "x", "below": 0},
        {"name": "as", "column": "k", "equals": "a"},
    ],
    "decays": ["5d"],
    "last_events": [2],
    "rfm": {"recency": [2, 20], "frequency": [2, 5], "monetary": [0, 100.5]},
    "streams": {
        "sent": {
            "table": "exposures",
            "time": "sent",
            "measures": {"cost": "eur"},
            "windows": ["7d", "1mo"],
            "aggregations": ["count", "sum", "std"],
            "lifetime": ["recency", "gap_mean"],
        }
    },
    "attributes": {"tier": {"table": "levels", "time": "since", "columns": ["level", "points"]}},
    "labels": [
        {"name": "lapse", "none": "10d"},
        {"name": "spend", "sum": "30d", "measure": "amount"},
    ],
}


def test_the_cuda_form_equals_the_cpu_kernel_bit_for_bit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, json.dumps(DECLARED)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["refused"].startswith("400 finite values of 'x' are beyond")
    assert found["rows"] == 12
    assert (found["exact"], found["close"]) == (62, 2)
