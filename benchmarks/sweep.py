"""Many variants on warm actors, against Ray Tune, FLAML and Optuna.

    python -m benchmarks.sweep --json FILE [--part mixed] [--variants 5000] [--scale 1]

UCI Bank Marketing without `duration` from ../shared/data, or rows of the same shape where that is
absent. Both sides train the same variants on the same rows in one run, on one Ray cluster, with
the same number of workers; `same_scores` compares what came out. `ratio_*` are the peer's wall
seconds over ours, starting actors included, and the means over repeats that take turns. Ray's
workers, ours and Tune's, run at the niceness of this process and not at Ray's 15, since FLAML and
Optuna work in this process: beside other work theirs would be other CPUs than ours. `--part`
runs one of: overhead, mixed, default, reuse, asha, automl, flat, driver; a file that is there
keeps the other parts' keys. `--scale` shrinks the number of variants and repeats.

FLAML is not in the lock: `pip install --no-deps --target FOLDER flaml lightgbm`, and name FOLDER
in LIFTYARD_PEERS. Without it `auc_flaml` is null, with the reason.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import polars as pl

from benchmarks import sweep_peers
from cluster import session
from jobs import sweep
from jobs.config_sweep import Sweep
from jobs.refit import refit
from jobs.search import Learned, draw
from models import ensemble
from models.encoding import Encoder
from models.families import TrainingData, Variant
from models.metrics import auc
from models.registry import Registry
from models.registry_sweeps import Trial

BANK = Path(__file__).parents[2] / "shared/data/bank_marketing/bank-additional-full.csv.gz"
TREES = {
    "depth": {"min": 3, "max": 6},
    "learning_rate": {"min": 0.03, "max": 0.3, "log": True},
    "min_child_weight": {"min": 1.0, "max": 30.0, "log": True},
    "l2": {"min": 0.1, "max": 30.0, "log": True},
    "row_share": {"min": 0.5, "max": 1.0},
    "feature_share": {"min": 0.3, "max": 1.0},
}


def rows(seed: int = 7) -> tuple[TrainingData, np.ndarray, np.ndarray]:
    """Training and validation rows, and the test rows and their targets: 60, 20 and 20 %."""
    frame = _bank() if BANK.exists() else _synthetic()
    y = (frame["y"] == "yes").to_numpy().astype(np.int8)
    features = [name for name in frame.columns if name != "y"]
    part = np.random.default_rng(seed).permutation(y.size) * 5 // y.size
    encoder = Encoder.fit(frame.filter(pl.Series(part < 3)), features)
    x = encoder.transform(frame)
    data = TrainingData(
        x_train=x[part < 3], y_train=y[part < 3], x_valid=x[part == 3], y_valid=y[part == 3]
    )
    return data, x[part == 4], y[part == 4]


def _bank() -> pl.DataFrame:
    return pl.read_csv(BANK, separator=";", infer_schema_length=None).drop("duration")


def _synthetic() -> pl.DataFrame:
    draws = np.random.default_rng(1)
    x = draws.standard_normal((41_188, 19)).round(2)
    logit = x[:, 0] + x[:, 1] * x[:, 2] - 3
    y = np.where(draws.random(len(x)) < 1 / (1 + np.exp(-logit)), "yes", "no")
    return pl.DataFrame(x, [f"x{at}" for at in range(19)]).with_columns(y=y)


def drawn(boosting: int = 0, forests: int = 0, networks: int = 0) -> list[Variant]:
    """Variants as a user would sweep them; counts are multiples of 10, 10 and 30.

    A pack's boosters and forests differ in size, ten sizes each: what packs have to share decides
    the ratio to engines that share nothing.
    """
    families: dict[str, Any] = {}
    if boosting:
        settings = {**TREES, "rounds": list(range(20, 201, 20))}
        families["boosting"] = {"packs": boosting // 10, "pack_size": 10, "settings": settings}
    if forests:
        settings = {
            "trees": list(range(10, 101, 10)),
            "depth": {"min": 4, "max": 12},
            "min_leaf": {"min": 2, "max": 50, "log": True},
            "feature_share": {"min": 0.2, "max": 0.8},
        }
        families["forest"] = {"packs": forests // 10, "pack_size": 10, "settings": settings}
    if networks:
        settings = {
            "width": [16, 32],
            "depth": [1, 2],
            "epochs": 4,
            "batch_rows": 64,
            "learning_rate": {"min": 0.0003, "max": 0.002, "log": True},
            "weight_decay": {"min": 0.001, "max": 1.0, "log": True},
        }
        families["network"] = {"packs": networks // 30, "pack_size": 30, "settings": settings}
    return draw(Sweep.model_validate({"families": families}).families, 7)


def unlike(count: int, rounds: int = 200) -> list[Variant]:
    """Boosting variants of which no two share work."""
    settings = {**TREES, "rounds": rounds}
    space = {"boosting": {"packs": count, "pack_size": 1, "settings": settings}}
    return draw(Sweep.model_validate({"families": space}).families, 11)


def ours(
    variants: Sequence[Variant], data: TrainingData, *, workers: int, tracked: bool, **how: Any
) -> tuple[float, list[sweep.Outcome], float]:
    """Wall seconds from nothing started, outcomes, and CPU seconds of driver and workers."""
    with tempfile.TemporaryDirectory() as folder:
        registry = Registry(f"sqlite:///{folder}/mlflow.db") if tracked else None
        cpu, began = _cpu_s(), time.perf_counter()
        if registry is None:
            found = sweep.run(
                variants, data, journal=Path(folder) / "journal", workers=workers, **how
            )
        else:
            with registry.sweep("sweep", run_name="ours", params={}, tags={}) as log:
                found = sweep.run(
                    variants,
                    data,
                    journal=Path(folder) / "journal",
                    workers=workers,
                    on_done=lambda outcomes: log.add([_trial(each) for each in outcomes]),
                    **how,
                )
        return time.perf_counter() - began, found, _cpu_s() - cpu


def _trial(outcome: sweep.Outcome) -> Trial:
    return Trial(
        variant=outcome.variant,
        metrics={} if outcome.score is None else {"valid_auc": outcome.score},
        seconds=outcome.seconds,
        error=outcome.error,
        seed=7,
        cpu_s=outcome.cpu_s,
        curve=outcome.curve,
    )


def _cpu_s() -> float:
    """CPU seconds so far of this process and of the actors that are alive."""
    import psutil

    here = psutil.Process()
    total = 0.0
    for process in [here, *here.children(recursive=True)]:
        try:
            if process == here or process.name().startswith("ray::_Worker"):
                used = process.cpu_times()
                total += used.user + used.system
        except psutil.NoSuchProcess:
            continue
    return total


def overhead(data: TrainingData, workers: int, scale: float) -> dict[str, Any]:
    """What a variant costs beyond its training, with actors that are warm, full tracking on."""
    variants = unlike(max(20, int(120 * scale)))
    with sweep.pool(workers) as warm:
        ours(unlike(workers * 2, 10), data, workers=workers, tracked=True, on=warm)
        wall_s, found, cpu_s = ours(variants, data, workers=workers, tracked=True, on=warm)
    trained = sum(each.seconds for each in found)
    return {
        "overhead_ms": (wall_s * workers - trained) / len(found) * 1000,
        "overhead_cpu_ms": (cpu_s - sum(each.cpu_s for each in found)) / len(found) * 1000,
        "cpu_efficiency": sum(each.cpu_s for each in found) / cpu_s,
        "overhead_variants": len(found),
        "overhead_wall_s": wall_s,
    }


def mixed(data: TrainingData, workers: int, scale: float) -> dict[str, Any]:
    """Boosting, forests and networks, both sides tracked in MLflow on SQLite."""
    sizes = ((120, 10), (60, 10), (120, 30))
    variants = drawn(*(max(pack, int(count * scale) // pack * pack) for count, pack in sizes))
    wall_s, found, _ = ours(variants, data, workers=workers, tracked=True)
    with tempfile.TemporaryDirectory() as folder:
        uri = f"sqlite:///{folder}/mlflow.db"
        Registry(uri)
        tune_s, theirs = sweep_peers.tune(
            variants, data, workers=workers, mlflow_uri=uri, how="reuse"
        )
    gaps: dict[str, float] = {}
    for each, score in zip(found, theirs, strict=True):
        family = str(each.variant["family"])
        gap = np.inf if score is None else abs((each.score or 0) - score)
        gaps[family] = max(gaps.get(family, 0.0), float(gap))
    return {
        "ratio_tune": tune_s / wall_s,
        "ratio_tune_variants": len(variants),
        "ratio_tune_ours_s": wall_s,
        "ratio_tune_theirs_s": tune_s,
        "same_scores": all(
            gap <= (1e-4 if family == "network" else 0) for family, gap in gaps.items()
        ),
        "largest_gap_auc": gaps,
    }


def default(data: TrainingData, workers: int, scale: float) -> dict[str, Any]:
    """Boosting, Tune as its documentation starts: a function, a process a trial, its loggers."""
    variants = unlike(max(6, int(48 * scale)))
    wall_s, found, _ = ours(variants, data, workers=workers, tracked=False)
    tune_s, theirs = sweep_peers.tune(
        variants, data, workers=workers, mlflow_uri=None, how="default"
    )
    return {
        "ratio_tune_default": tune_s / wall_s,
        "ratio_tune_default_variants": len(variants),
        "same_scores_default": theirs == [each.score for each in found],
    }


def reuse(data: TrainingData, workers: int, scale: float) -> dict[str, Any]:
    """Boosting, Tune with reused actors that keep the binned rows, loggers off."""
    variants = unlike(max(20, int(200 * scale)))
    pairs = []
    same = True
    for repeat in range(3):
        sides: dict[str, Callable[[], tuple[float, list[float | None]]]] = {
            "ours": lambda: _scores(ours(variants, data, workers=workers, tracked=False)),
            "theirs": lambda: sweep_peers.tune(
                variants, data, workers=workers, mlflow_uri=None, how="reuse"
            ),
        }
        order = list(sides) if repeat % 2 == 0 else list(sides)[::-1]
        walls = {side: sides[side]() for side in order}
        same = same and walls["ours"][1] == walls["theirs"][1]
        pairs.append((walls["ours"][0], walls["theirs"][0]))
    return {
        "ratio_tune_reuse": mean(theirs / own for own, theirs in pairs),
        "ratio_tune_reuse_each": [theirs / own for own, theirs in pairs],
        "ratio_tune_reuse_variants": len(variants),
        "same_scores_reuse": same,
    }


def _scores(ran: tuple[float, list[sweep.Outcome], float]) -> tuple[float, list[float | None]]:
    return ran[0], [each.score for each in ran[1]]


def asha(data: TrainingData, workers: int, scale: float) -> dict[str, Any]:
    """Boosting, successive halving on both sides at 20 and 60 of 200 rounds, a third kept."""
    variants = unlike(max(27, int(200 * scale)))
    pairs, best = [], []
    halving = sweep.Halving(rungs=(20, 60), keep=1 / 3, bracket=27)
    for repeat in range(3):
        sides: dict[str, Callable[[], tuple[float, list[float | None]]]] = {
            "ours": lambda: _scores(
                ours(variants, data, workers=workers, tracked=False, halving=halving)
            ),
            "theirs": lambda: sweep_peers.tune(
                variants, data, workers=workers, mlflow_uri=None, how="asha", rungs=(20, 60)
            ),
        }
        order = list(sides) if repeat % 2 == 0 else list(sides)[::-1]
        walls = {side: sides[side]() for side in order}
        pairs.append((walls["ours"][0], walls["theirs"][0]))
        best.append([max(s for s in walls[side][1] if s is not None) for side in sides])
    return {
        "ratio_tune_asha": mean(theirs / own for own, theirs in pairs),
        "ratio_tune_asha_each": [theirs / own for own, theirs in pairs],
        "ratio_tune_asha_variants": len(variants),
        "asha_best_auc_ours": mean(own for own, _ in best),
        "asha_best_auc_theirs": mean(theirs for _, theirs in best),
    }


def automl(workers: int, seeds: int, limit_s: float) -> dict[str, Any]:
    """Test AUC at equal wall time over splits that all share."""
    peers = os.environ.get("LIFTYARD_PEERS")
    reason = None
    if peers:
        sys.path.append(peers)
    try:
        import flaml  # noqa: F401
    except ImportError as error:
        reason = f"{error}; name a folder that has it in LIFTYARD_PEERS"
    sides: dict[str, Callable[..., np.ndarray]] = {
        "ours": partial(_ours_in, workers=workers),
        "flaml": sweep_peers.flaml,
        "optuna_xgboost": sweep_peers.optuna_xgboost,
    }
    if reason is not None:
        del sides["flaml"]
    found: dict[str, list[float]] = {side: [] for side in sides}
    took: dict[str, list[float]] = {side: [] for side in sides}
    for seed in range(seeds):
        data, x_test, y_test = rows(seed)
        for side, scores_of in sides.items():
            began = time.perf_counter()
            scores = scores_of(data, x_test, limit_s=limit_s, seed=seed)
            took[side].append(time.perf_counter() - began)
            found[side].append(auc(y_test, scores))
        print(f"  seed {seed}: " + ", ".join(f"{side} {found[side][-1]:.5f}" for side in sides))
    return {
        "auc_ours": mean(found["ours"]),
        "auc_flaml": mean(found["flaml"]) if reason is None else None,
        "auc_flaml_skipped": reason,
        "auc_optuna_xgboost": mean(found["optuna_xgboost"]),
        "auc_each": found,
        "auc_seconds": limit_s,
        "auc_wall_s": {side: mean(each) for side, each in took.items()},
        "auc_seeds": seeds,
    }


def _ours_in(
    data: TrainingData, x_test: np.ndarray, *, workers: int, limit_s: float, seed: int
) -> np.ndarray:
    """Test scores of an ensemble of the best, with all that it takes inside the time.

    Its models are trained on validation's rows too at the end, as FLAML's is.
    """
    end = time.monotonic() + limit_s
    space = {
        "boosting": {
            "packs": 400,
            "pack_size": 1,
            "settings": {
                **TREES,
                "depth": 0,
                "leaves": {"min": 8, "max": 128, "log": True},
                "max_bin": 256,
                "learning_rate": {"min": 0.02, "max": 0.2, "log": True},
                "min_child_weight": {"min": 0.01, "max": 20.0, "log": True},
                "l2": {"min": 0.01, "max": 30.0, "log": True},
                "rounds": 600,
                "patience": 40,
            },
        },
        "forest": {
            "packs": 8,
            "pack_size": 1,
            "settings": {
                "trees": 100,
                "depth": {"min": 6, "max": 14},
                "min_leaf": {"min": 2, "max": 30, "log": True},
                "feature_share": {"min": 0.1, "max": 0.6},
            },
        },
    }
    source = Learned(
        Sweep.model_validate({"families": space}).families, seed, sampler="tpe", ahead=4
    )
    with tempfile.TemporaryDirectory() as folder, sweep.pool(workers) as warm:
        found = sweep.run(
            source, data, journal=Path(folder) / "journal", on=warm, limit_s=limit_s * 0.7
        )
        found = [each for each in found if each.score is not None]
        found.sort(key=lambda each: -(each.score or 0))
        best, spent = [], 0.0
        for each in found:
            # As many as can be trained again as they were in half of what is left of the time; in
            # the rest, those that are chosen are trained on validation's rows too.
            spent += 1.2 * each.seconds / workers
            if best and (len(best) == 16 or spent > 0.5 * (end - time.monotonic())):
                break
            best.append(each.variant)
        fitted = sweep.fit(best, data, on=warm)
        weights = ensemble.greedy(data.y_valid, [each.valid_scores for each in fitted])
        chosen = [each for each, weight in zip(fitted, weights, strict=True) if weight]
        once = 1.5 * sum(each.seconds for each in chosen) / workers
        seeds = min(8, max(1, int(0.8 * (end - time.monotonic()) / once)))
        final = refit(chosen, data, fit=partial(sweep.fit, on=warm), seeds=seeds)
    scores = ensemble.mean([each.predict(x_test) for each in final], [w for w in weights if w])
    print(
        f"  {len(found)} variants, {len(best)} again, {len(chosen)} averaged by {seeds} seeds, "
        f"{time.monotonic() - end:+.1f} s"
    )
    return scores


def flat(data: TrainingData, workers: int, most: int) -> dict[str, Any]:
    """The overhead and the driver's memory at 300 variants and at `most`."""
    import psutil

    made: dict[str, Any] = {}
    with sweep.pool(workers) as warm:
        ours(unlike(workers * 2, 2), data, workers=workers, tracked=True, on=warm)
        for count in (300, most):
            wall_s, found, _ = ours(unlike(count, 4), data, workers=workers, tracked=True, on=warm)
            trained = sum(each.seconds for each in found)
            made[f"flat_{count}_overhead_ms"] = (wall_s * workers - trained) / count * 1000
            made[f"flat_{count}_rss_mb"] = psutil.Process().memory_info().rss / 1e6
    made["flat_ratio"] = made[f"flat_{most}_overhead_ms"] / made["flat_300_overhead_ms"]
    return made


def nothing(pack: Sequence[Variant], data: Any, **how: Any) -> list[sweep.Outcome]:
    """Variants that take no time."""
    return [sweep.Outcome(variant=dict(variant), score=0.5, seconds=0.0) for variant in pack]


def driver(workers: int, actors: int = 64) -> dict[str, Any]:
    """Variants a second that one driver hands out, takes back and writes down, by size of pack."""
    made: dict[str, Any] = {"driver_workers": actors}
    with sweep.pool(actors, cpus=workers / actors / 2) as warm, tempfile.TemporaryDirectory() as to:
        for size, count in ((1, 4_000), (16, 32_000), (64, 64_000)):
            variants: list[Variant] = [{"family": "nothing", "place": at} for at in range(count)]
            packs = [variants[at : at + size] for at in range(0, count, size)]
            first = [[{"family": "nothing", "place": -at}] for at in range(1, actors * 2)]
            for name, what in (("first", first), (str(size), packs)):
                began = time.perf_counter()
                sweep.run(
                    sweep.Listed(what),
                    None,
                    journal=Path(to) / f"{size}-{name}",
                    on=warm,
                    train=nothing,
                )
                wall_s = time.perf_counter() - began
            made[f"driver_variants_per_s_packs_of_{size}"] = count / wall_s
    return made


def main() -> None:
    """Reads the command line, runs the parts and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parts = ("overhead", "mixed", "default", "reuse", "asha", "automl", "flat", "driver")
    parser.add_argument("--part", choices=parts, action="append")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--variants", type=int, default=5_000, help="of the part `flat`")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=5, help="of the part `automl`")
    parser.add_argument("--seconds", type=float, default=60, help="of the part `automl`")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    data, _, _ = rows()
    made: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    made |= {
        "date": datetime.now(UTC).date().isoformat(),
        "data": BANK.name if BANK.exists() else "synthetic",
        "workers": args.workers,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "versions": {
            name: version(name) for name in ("ray", "xgboost", "scikit-learn", "torch", "mlflow")
        },
    }
    work: dict[str, Callable[[], dict[str, Any]]] = {
        "overhead": lambda: overhead(data, args.workers, args.scale),
        "reuse": lambda: reuse(data, args.workers, args.scale),
        "asha": lambda: asha(data, args.workers, args.scale),
        "default": lambda: default(data, args.workers, args.scale),
        "mixed": lambda: mixed(data, args.workers, args.scale),
        "automl": lambda: automl(args.workers, args.seeds, args.seconds),
        "flat": lambda: flat(data, args.workers, args.variants),
        "driver": lambda: driver(args.workers),
    }
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112, Ray's spelling
    with session.connect(cpus=args.workers):
        for part in args.part or work:
            print(part, flush=True)
            found = work[part]()
            found[f"{part}_load_before"] = os.getloadavg()[0]
            print(json.dumps(found, indent=1), flush=True)
            made |= found
            aside = args.json.with_suffix(".new")
            aside.write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
            aside.replace(args.json)


if __name__ == "__main__":
    main()
