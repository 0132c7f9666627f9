"""Sweeps on a real Ray cluster: resume, lost workers, failing variants, equal scores."""

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import xgboost

from cluster import session
from jobs import sweep
from jobs.config_sweep import Sweep
from jobs.refit import refit
from jobs.search import Learned
from models import clustering, families
from models.families import Fitted, TrainingData, Variant
from models.metrics import METRICS, auc

VARIANTS = [
    *({"family": "boosting", "rounds": r, "depth": d} for d in (2, 3) for r in (5, 20)),
    *({"family": "forest", "trees": t, "depth": d} for d in (3, 5) for t in (5, 10)),
]


@pytest.fixture(scope="module")
def data() -> TrainingData:
    random = np.random.default_rng(5)
    x = random.normal(size=(1_500, 6)).astype(np.float32)
    y = (x[:, 0] + 0.5 * x[:, 1] ** 2 + random.normal(size=1_500) > 0.5).astype(np.int8)
    return TrainingData(x_train=x[:1000], y_train=y[:1000], x_valid=x[1000:], y_valid=y[1000:])


@pytest.fixture(scope="module")
def pools() -> Iterator[tuple[sweep.Pool, sweep.Pool]]:
    with session.connect(cpus=2), sweep.pool(1, cpus=0.5) as one, sweep.pool(2, cpus=0.5) as two:
        yield one, two


@pytest.fixture
def alone(pools: tuple[sweep.Pool, sweep.Pool]) -> sweep.Pool:
    return pools[0]


@pytest.fixture
def pair(pools: tuple[sweep.Pool, sweep.Pool]) -> sweep.Pool:
    return pools[1]


def scores(outcomes: Sequence[sweep.Outcome]) -> list[float | None]:
    return [outcome.score for outcome in outcomes]


def test_scores_do_not_depend_on_workers(
    tmp_path: Path, data: TrainingData, alone: sweep.Pool, pair: sweep.Pool
) -> None:
    one = sweep.run(VARIANTS, data, journal=tmp_path / "one", on=alone)
    two = sweep.run(VARIANTS, data, journal=tmp_path / "two", on=pair)
    assert scores(one) == scores(two)
    assert [outcome.variant for outcome in one] == VARIANTS
    assert all(score is not None and score > 0.6 for score in scores(one))


def test_another_metric_decides(tmp_path: Path, data: TrainingData, alone: sweep.Pool) -> None:
    from sklearn.metrics import average_precision_score, log_loss

    theirs = {
        "log_loss": lambda y, p: -log_loss(y, p),
        "average_precision": average_precision_score,
    }
    for metric, score in theirs.items():
        train = partial(sweep.train_pack, metric=metric)
        outcomes = sweep.run(VARIANTS, data, journal=tmp_path / metric, on=alone, train=train)
        fitted = sweep.fit(VARIANTS, data, on=alone)
        for outcome, model in zip(outcomes, fitted, strict=True):
            expected = score(data.y_valid, model.predict(data.x_valid))
            assert outcome.score == pytest.approx(expected, rel=1e-6)
            if outcome.curve:
                assert outcome.curve[-1] == [outcome.variant["rounds"], outcome.score]


def test_latency_is_measured_where_it_is_asked_for(data: TrainingData) -> None:
    plain = sweep.train_pack(VARIANTS[4:6], data)
    timed = sweep.train_pack(VARIANTS[4:6], data, latency=True)
    assert [each.metrics for each in plain] == [{}, {}]
    assert all(each.metrics["row_us"] > 0 for each in timed)
    assert scores(timed) == scores(plain)


def test_resume_trains_only_what_is_missing(
    tmp_path: Path, data: TrainingData, alone: sweep.Pool, pair: sweep.Pool
) -> None:
    journal = tmp_path / "journal"
    first = sweep.run(VARIANTS[:3], data, journal=journal, on=alone)
    # A killed driver can leave half a line.
    journal.write_text(journal.read_text() + '{"variant": {"fam')
    trained: list[sweep.Outcome] = []
    every = sweep.run(VARIANTS, data, journal=journal, on=pair, on_done=trained.extend)
    assert len(trained) == len(VARIANTS)
    assert every[:3] == first
    lines = journal.read_text()
    assert sweep.run(VARIANTS, data, journal=journal, on=pair) == every
    assert journal.read_text() == lines


def test_a_killed_worker_repeats_its_pack(
    tmp_path: Path, data: TrainingData, pair: sweep.Pool
) -> None:
    whole = sweep.run(VARIANTS, data, journal=tmp_path / "whole", on=pair)
    killed: list[int] = []
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    def kill_one(outcomes: Sequence[sweep.Outcome]) -> None:
        workers = [
            child
            for child in psutil.Process().children(recursive=True)
            if child.name().startswith("ray::_Worker") and child.pid not in before
        ]
        if workers and not killed:
            killed.append(workers[0].pid)
            os.kill(workers[0].pid, signal.SIGKILL)

    with sweep.pool(2, cpus=0.25) as own:
        hurt = sweep.run(VARIANTS, data, journal=tmp_path / "hurt", on=own, on_done=kill_one)
    assert len(killed) == 1
    assert scores(hurt) == scores(whole)


def test_a_failing_variant_is_told_and_stops_nothing(
    tmp_path: Path, data: TrainingData, alone: sweep.Pool
) -> None:
    bad = {"family": "boosting", "rounds": 0, "depth": 2}
    outcomes = sweep.run([*VARIANTS[:2], bad], data, journal=tmp_path / "journal", on=alone)
    assert outcomes[2].score is None
    assert outcomes[2].error is not None
    assert "rounds" in outcomes[2].error
    assert all(outcome.error is None for outcome in outcomes[:2])


BOOSTERS = [
    {"family": "boosting", "rounds": rounds, "depth": depth, "row_share": 0.8, "seed": seed}
    for depth in (1, 2, 3)
    for seed in (1, 2, 3)
    for rounds in (8, 40)
]
HALVING = sweep.Halving(rungs=(5, 15), keep=0.34, bracket=5)


def told(outcomes: Sequence[sweep.Outcome]) -> list[object]:
    return [(each.variant, each.score, each.pruned_at, each.curve) for each in outcomes]


def test_halving_goes_on_where_it_stopped_and_is_the_same_with_any_workers(
    tmp_path: Path, data: TrainingData, alone: sweep.Pool, pair: sweep.Pool
) -> None:
    whole = sweep.run(BOOSTERS, data, journal=tmp_path / "whole", on=pair)
    one = sweep.run(BOOSTERS, data, journal=tmp_path / "one", on=alone, halving=HALVING)
    two = sweep.run(BOOSTERS, data, journal=tmp_path / "two", on=pair, halving=HALVING)
    assert told(one) == told(two)
    # 9 boosters in brackets of 5 and 4: 2 and 2 pass the first rung, 1 and 1 the second.
    stopped = [each.pruned_at for each in one if each.variant["rounds"] == 40]
    assert sorted(stopped, key=str) == [15, 15, 5, 5, 5, 5, 5, None, None]
    for each, alone in zip(one, whole, strict=True):
        if each.pruned_at is None:
            assert each.score == alone.score


def test_a_variant_costs_what_it_took_up_to_every_rung(
    tmp_path: Path, data: TrainingData, pair: sweep.Pool
) -> None:
    def train(pack: Sequence[Variant], data: TrainingData, **how: Any) -> list[sweep.Outcome]:
        (variant,), done, until = pack, how["held"].pop("done", 0), how["until"]
        rounds = until or variant["rounds"]
        if until:
            how["held"]["done"] = rounds
        return [
            sweep.Outcome(
                variant=dict(variant), score=float(variant["place"]), seconds=float(rounds - done),
                cpu_s=(rounds - done) / 2, curve=[[rounds, variant["place"]]], pruned_at=until,
            )
        ]  # fmt: skip

    variants = [{"family": "boosting", "rounds": 40, "place": place} for place in range(5)]
    ended = sweep.run(
        variants, data, journal=tmp_path / "journal", on=pair, halving=HALVING, train=train
    )
    assert [each.pruned_at for each in ended] == [5, 5, 5, 15, None]
    assert [each.seconds for each in ended] == [5, 5, 5, 15, 40]
    assert [each.cpu_s for each in ended] == [2.5, 2.5, 2.5, 7.5, 20]


def test_a_halved_sweep_resumes_to_the_same_end(
    tmp_path: Path, data: TrainingData, alone: sweep.Pool, pair: sweep.Pool
) -> None:
    journal = tmp_path / "journal"
    whole = sweep.run(BOOSTERS, data, journal=journal, on=pair, halving=HALVING)
    lines = journal.read_text().splitlines(keepends=True)
    for count in (3, 8, 13):
        journal.write_text("".join(lines[:count]))
        again = sweep.run(BOOSTERS, data, journal=journal, on=alone, halving=HALVING)
        assert told(again) == told(whole)
    assert told(sweep.outcomes(journal, BOOSTERS, halving=HALVING)) == told(whole)


def test_hyperband_lets_each_third_bracket_run_whole(
    tmp_path: Path, data: TrainingData, pair: sweep.Pool
) -> None:
    halving = sweep.Halving(rungs=(5, 15), keep=0.34, bracket=3, hyperband=True)
    outcomes = sweep.run(BOOSTERS, data, journal=tmp_path / "journal", on=pair, halving=halving)
    stopped = [each.pruned_at for each in outcomes if each.variant["rounds"] == 40]
    assert sorted(stopped[:3], key=str) == [15, 5, None]
    assert sorted(stopped[3:6], key=str) == [15, None, None]
    assert stopped[6:] == [None] * 3


def learned() -> Learned:
    settings = {
        "rounds": [5, 10],
        "depth": {"min": 1, "max": 4},
        "learning_rate": {"min": 0.02, "max": 0.5},
    }
    space = {"boosting": {"packs": 16, "pack_size": 2, "settings": settings}}
    families = Sweep.model_validate({"families": space, "sampler": "tpe"}).families
    return Learned(families, 3, sampler="tpe", ahead=4)


def test_a_learning_sampler_asks_the_same_with_any_workers_and_resumes(
    tmp_path: Path, data: TrainingData, alone: sweep.Pool, pair: sweep.Pool
) -> None:
    journal = tmp_path / "one"
    one = sweep.run(learned(), data, journal=journal, on=alone)
    assert told(one) == told(sweep.run(learned(), data, journal=tmp_path / "two", on=pair))
    assert len(one) == 32
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:21]))
    assert told(sweep.run(learned(), data, journal=journal, on=pair)) == told(one)
    kept = journal.read_text().splitlines(keepends=True)[:21]
    assert kept == lines[:21]
    assert told(sweep.outcomes(journal, learned())) == told(one)
    journal.write_text("".join(lines[:21]))
    with pytest.raises(sweep.SweepError, match="lacks"):
        sweep.outcomes(journal, learned())


def test_warm_actors_serve_several_sweeps(
    tmp_path: Path, data: TrainingData, alone: sweep.Pool, pair: sweep.Pool
) -> None:
    other = TrainingData(
        x_train=data.x_train[::-1].copy(),
        y_train=1 - data.y_train[::-1],
        x_valid=data.x_valid,
        y_valid=1 - data.y_valid,
    )
    first = sweep.run(VARIANTS, data, journal=tmp_path / "first", on=pair)
    second = sweep.run(VARIANTS, other, journal=tmp_path / "second", on=pair)
    third = sweep.run(VARIANTS, data, journal=tmp_path / "third", on=pair)
    assert scores(first) == scores(third) != scores(second)
    assert scores(second) == scores(sweep.run(VARIANTS, other, journal=tmp_path / "cold", on=alone))


def test_a_pack_that_does_not_fit_in_memory_is_halved(
    data: TrainingData, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def small_memory(
        variants: Sequence[Variant], data: TrainingData, **how: object
    ) -> list[Fitted]:
        sizes.append(len(variants))
        if len(variants) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return families._network(variants, data)

    monkeypatch.setitem(families.FAMILIES, "network", small_memory)
    pack = [{"family": "network", "epochs": 1, "seed": seed} for seed in range(7)]
    outcomes = sweep.train_pack(pack, data)
    assert [outcome.variant for outcome in outcomes] == pack
    assert all(outcome.score is not None for outcome in outcomes)
    assert sizes == [7, 3, 1, 1, 1, 3, 1, 1, 1, 1]


def test_a_variant_whose_scores_are_not_numbers_is_told(data: TrainingData) -> None:
    pack = [{"family": "network", "epochs": 1, "learning_rate": r} for r in (0.003, 1e30)]
    good, bad = sweep.train_pack(pack, data)
    assert good.error is None and good.score is not None
    assert bad.score is None and bad.error is not None and "finite" in bad.error


def test_clusterings_go_through_the_same_actors_and_journal(
    tmp_path: Path, pair: sweep.Pool
) -> None:
    x = np.random.default_rng(4).normal(size=(300, 3)).astype(np.float32)
    rows = clustering.ClusterData(x=x, sample=100, resamples=1)
    variants = [{"family": "kmeans", "clusters": k, "seed": s} for k in (2, 3, 200) for s in (0, 1)]
    packs = [variants[:2], variants[2:4], variants[4:]]
    journal = tmp_path / "journal"
    found = sweep.run(sweep.Listed(packs), rows, journal=journal, on=pair, train=sweep.cluster_pack)
    assert [each.variant for each in found] == variants
    assert all(-1 <= each.metrics["silhouette"] <= 1 for each in found[:4])
    assert all("clusters" in (each.error or "") for each in found[4:])
    expected = clustering.fit_pack(variants[:4], rows)
    assert [each.metrics for each in found[:4]] == [each.metrics for each in expected]
    assert sweep.outcomes(journal, sweep.Listed(packs)) == found
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:3]))
    again = sweep.run(sweep.Listed(packs), rows, journal=journal, on=pair, train=sweep.cluster_pack)
    assert [(each.variant, each.metrics) for each in again] == [
        (each.variant, each.metrics) for each in found
    ]


def test_a_sweep_out_of_time_ends_with_what_it_has(
    tmp_path: Path, data: TrainingData, pair: sweep.Pool
) -> None:
    journal = tmp_path / "journal"
    assert sweep.run(BOOSTERS, data, journal=journal, on=pair, limit_s=0) == []
    whole = sweep.run(BOOSTERS, data, journal=journal, on=pair, limit_s=600)
    assert [each.variant for each in whole] == BOOSTERS


def test_models_are_trained_again_as_they_were(
    tmp_path: Path, data: TrainingData, pair: sweep.Pool
) -> None:
    outcomes = sweep.run(VARIANTS, data, journal=tmp_path / "journal", on=pair)
    fitted = sweep.fit(VARIANTS[::-1], data, on=pair)
    with pytest.raises(sweep.SweepError, match="fail now"):
        sweep.fit([{"family": "boosting", "rounds": 0}], data, on=pair)
    assert [each.variant for each in fitted] == VARIANTS[::-1]
    for each, outcome in zip(fitted, outcomes[::-1], strict=True):
        assert auc(data.y_valid, each.predict(data.x_valid)) == outcome.score


PATIENT = [
    {"family": "boosting", "rounds": 200, "depth": 3, "learning_rate": 0.3, "patience": 20},
    *(
        {"family": "network", "epochs": 20, "learning_rate": 0.02, "patience": patience}
        for patience in (2, 4)
    ),
]


def test_what_patience_chose_is_chosen_again_by_the_same_metric(
    tmp_path: Path, data: TrainingData, pair: sweep.Pool
) -> None:
    train = partial(sweep.train_pack, metric="log_loss")
    outcomes = sweep.run(PATIENT, data, journal=tmp_path / "journal", on=pair, train=train)
    fitted = sweep.fit(PATIENT, data, on=pair, metric="log_loss")
    by_auc = sweep.fit(PATIENT, data, on=pair)
    for outcome, each in zip(outcomes, fitted, strict=True):
        assert outcome.curve == [list(point) for point in each.curve]
        assert outcome.curve[-1][0] < outcome.variant.get("rounds", outcome.variant.get("epochs"))
        scored = METRICS["log_loss"].score(data.y_valid, each.predict(data.x_valid))
        assert outcome.score == scored
        assert scored == pytest.approx(max(value for _, value in outcome.curve), abs=1e-6)
    # AUC goes on rising when the loss doesn't fall any more.
    scores = [METRICS["log_loss"].score(data.y_valid, each.valid_scores) for each in by_auc]
    assert min(own.score - other for own, other in zip(outcomes, scores, strict=True)) >= 0
    assert max(own.score - other for own, other in zip(outcomes, scores, strict=True)) > 1e-3


def test_a_network_that_stopped_is_trained_on_all_rows_for_its_best_epochs(
    data: TrainingData, pair: sweep.Pool
) -> None:
    stopped, whole = PATIENT[1], {"family": "network", "epochs": 2}
    chosen = sweep.fit([stopped, whole], data, on=pair)
    epochs = max(chosen[0].curve, key=lambda point: (point[1], -point[0]))[0]
    assert epochs < len(chosen[0].curve) < 20
    x, y = np.concatenate([data.x_train, data.x_valid]), np.append(data.y_train, data.y_valid)
    every = TrainingData(x_train=x, y_train=y, x_valid=data.x_valid, y_valid=data.y_valid)
    wanted = [{**stopped, "patience": 0, "epochs": epochs}, whole]
    for again, variant in zip(
        refit(chosen, data, fit=partial(sweep.fit, on=pair)), wanted, strict=True
    ):
        (alone,) = families.FAMILIES["network"]([variant], every)
        np.testing.assert_allclose(again.predict(x), alone.predict(x), atol=1e-6)


def test_what_was_chosen_is_trained_on_all_rows(data: TrainingData, pair: sweep.Pool) -> None:
    stopped = {"family": "boosting", "rounds": 300, "depth": 3, "patience": 20}
    forest = {"family": "forest", "trees": 5, "depth": 3}
    chosen = sweep.fit([stopped, forest], data, on=pair)
    again = refit(chosen, data, fit=partial(sweep.fit, on=pair))
    x, y = np.concatenate([data.x_train, data.x_valid]), [*data.y_train, *data.y_valid]
    rounds = max(chosen[0].curve, key=lambda point: (point[1], -point[0]))[0]
    assert rounds < 280
    params = {
        "objective": "binary:logistic",
        "max_depth": 3,
        "learning_rate": 0.1,
        "max_bin": 64,
        "nthread": 1,
        "seed_per_iteration": True,
    }
    alone = xgboost.train(params, xgboost.QuantileDMatrix(x, y, max_bin=64, nthread=1), rounds)
    assert (again[0].predict(x) == alone.predict(xgboost.DMatrix(x))).all()
    whole = TrainingData(x_train=x, y_train=np.array(y), x_valid=x, y_valid=np.array(y))
    (wanted,) = families.FAMILIES["forest"]([forest], whole)
    assert (again[1].predict(x) == wanted.predict(x)).all()


def test_the_mean_of_seeds(data: TrainingData, pair: sweep.Pool) -> None:
    drawn = {"family": "boosting", "rounds": 10, "depth": 3, "row_share": 0.5, "seed": 4}
    certain = {"family": "logistic", "l2": 1.0}
    fit = partial(sweep.fit, on=pair)
    chosen = fit([drawn, certain], data)
    mean, same = refit(chosen, data, fit=fit, seeds=3)
    parts = [
        refit([replace(chosen[0], variant={**drawn, "seed": seed})], data, fit=fit)[0]
        for seed in (4, 1004, 2004)
    ]
    x = data.x_valid
    expected = np.mean([part.predict(x) for part in parts], axis=0)
    np.testing.assert_allclose(mean.predict(x), expected, rtol=1e-12)
    assert np.abs(parts[0].predict(x) - parts[1].predict(x)).max() > 1e-3
    assert (same.predict(x) == refit(chosen[1:], data, fit=fit)[0].predict(x)).all()
