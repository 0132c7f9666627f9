"""What the sweep is measured against: Ray Tune, FLAML, and Optuna with XGBoost.

Each trains what ours trains by the library's own calls: plain XGBoost, scikit-learn's forest on
the same bins, a plain Lightning module with the same first weights and the same batches.
"""

import logging
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from models import boosting, forest, network, network_inputs, network_steps
from models.families import TrainingData, Variant, completed
from models.metrics import auc


def train_alone(variant: Variant, data: TrainingData, made: dict[str, Any]) -> float:
    """Validation AUC of a variant by the library's own calls; `made` keeps binned rows."""
    settings = {name: v for name, v in variant.items() if name != "family"}
    if variant["family"] == "boosting":
        scores = _xgboost(completed("boosting", settings, boosting.DEFAULTS), data, made)
    elif variant["family"] == "forest":
        scores = _forest(completed("forest", settings, forest.DEFAULTS), data, made)
    else:
        scores = _lightning(completed("network", settings, network.DEFAULTS), data, made)
    return auc(data.y_valid, scores)


def xgboost_params(settings: Variant) -> dict[str, Any]:
    """XGBoost's names of the settings, as a plain user would give them."""
    return {
        "objective": "binary:logistic",
        "tree_method": "hist",
        "nthread": 1,
        "max_bin": 64,
        "seed_per_iteration": True,
        "seed": settings["seed"],
        "max_depth": settings["depth"],
        "learning_rate": settings["learning_rate"],
        "min_child_weight": settings["min_child_weight"],
        "lambda": settings["l2"],
        "subsample": settings["row_share"],
        "colsample_bytree": settings["feature_share"],
    }


def matrices(data: TrainingData, made: dict[str, Any]) -> tuple[Any, Any]:
    """The rows as XGBoost takes them, binned once."""
    import xgboost

    if "xgboost" not in made:
        train = xgboost.QuantileDMatrix(data.x_train, data.y_train, max_bin=64, nthread=1)
        made["xgboost"] = train, xgboost.DMatrix(data.x_valid, nthread=1)
    pair: tuple[Any, Any] = made["xgboost"]
    return pair


def _xgboost(settings: Variant, data: TrainingData, made: dict[str, Any]) -> np.ndarray:
    import xgboost

    train, valid = matrices(data, made)
    booster = xgboost.train(xgboost_params(settings), train, settings["rounds"])
    return np.asarray(booster.predict(valid), dtype=np.float64)


def _forest(settings: Variant, data: TrainingData, made: dict[str, Any]) -> np.ndarray:
    from sklearn.ensemble import RandomForestClassifier

    if "forest" not in made:
        made["forest"] = forest.binned(data)
    _, train, valid = made["forest"]
    model = RandomForestClassifier(
        settings["trees"],
        max_depth=settings["depth"],
        min_samples_leaf=settings["min_leaf"],
        max_features=settings["feature_share"],
        random_state=settings["seed"],
        n_jobs=1,
    )
    return np.asarray(model.fit(train, data.y_train).predict_proba(valid)[:, 1])


def _lightning(settings: Variant, data: TrainingData, made: dict[str, Any]) -> np.ndarray:
    import pytorch_lightning
    import torch

    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if "network" not in made:
        scaling = network_inputs.scaling_of(data.x_train)
        made["network"] = [network_inputs.scaled(scaling, x) for x in (data.x_train, data.x_valid)]
    x_train, x_valid = made["network"]
    sizes = [x_train.shape[1], *[settings["width"]] * settings["depth"], 1]
    layers: list[torch.nn.Module] = []
    for w, b in network_steps.first_weights(np.random.default_rng(settings["seed"]), sizes):
        layer = torch.nn.Linear(*w.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(w.T.copy()))
            layer.bias.copy_(torch.from_numpy(b[0]))
        layers += [layer, torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers[:-1])

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, at: int) -> Any:
            x, y = batch
            return torch.nn.functional.binary_cross_entropy_with_logits(self.net(x)[:, 0], y)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(
                self.parameters(),
                lr=settings["learning_rate"],
                weight_decay=settings["weight_decay"],
            )

    trainer = pytorch_lightning.Trainer(
        accelerator="cpu",
        max_epochs=settings["epochs"],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    y_train = data.y_train.astype(np.float32)
    batches = network_steps.Batches(x_train, y_train, rows=settings["batch_rows"], seed=0)
    trainer.fit(Module(), train_dataloaders=batches)
    with torch.no_grad():
        scores: np.ndarray = torch.sigmoid(net(torch.from_numpy(x_valid)))[:, 0].double().numpy()
    return scores


def tune(
    variants: Sequence[Variant],
    data: TrainingData,
    *,
    workers: int,
    mlflow_uri: str | None,
    how: str,
    rungs: Sequence[int] = (),
) -> tuple[float, list[float | None]]:
    """Wall seconds and AUC a variant under Ray Tune, on the connected cluster.

    Args:
        variants: In the grid's order.
        data: Shared through Ray's object store.
        workers: Trials at a time, one CPU each.
        mlflow_uri: Where its MLflow callback writes; None switches all loggers off.
        how: "default", a function trainable as the documentation starts; "reuse", a class
            trainable with reused actors; "asha", that with ASHA at `rungs`.
        rungs: Rounds.
    """
    os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] = "1" if how != "default" else "0"
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"
    from ray import tune as ray_tune
    from ray.tune.schedulers import ASHAScheduler

    # With loggers off it says of each trial that it finds no log.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)

    class Reused(ray_tune.Trainable):
        def setup(self, config: dict[str, Any], data: Any = None) -> None:
            self.data, self.made = data, getattr(self, "made", {})
            self.reset_config(config)

        def reset_config(self, new_config: dict[str, Any]) -> bool:
            self.variant, self.booster, self.rounds = new_config["variant"], None, 0
            return True

        def step(self) -> dict[str, Any]:
            if not rungs:
                return {"auc": train_alone(self.variant, self.data, self.made), "done": True}
            import xgboost

            train, valid = matrices(self.data, self.made)
            settings = completed("boosting", self.variant, boosting.DEFAULTS)
            if self.booster is None:
                self.booster = xgboost.Booster(xgboost_params(settings), cache=[train])
            stop = next((r for r in rungs if r > self.rounds), settings["rounds"])
            stop = min(stop, settings["rounds"])
            while self.rounds < stop:
                self.booster.update(train, self.rounds)
                self.rounds += 1
            score = auc(self.data.y_valid, self.booster.predict(valid))
            done = self.rounds == settings["rounds"]
            return {"auc": score, "rounds": self.rounds, "done": done}

        def save_checkpoint(self, folder: str) -> None:
            return None

    def started(config: dict[str, Any], data: Any = None) -> None:
        ray_tune.report({"auc": train_alone(config["variant"], data, {})})

    callbacks = []
    if mlflow_uri is not None:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        callbacks = [MLflowLoggerCallback(tracking_uri=mlflow_uri, experiment_name="tune")]
    scheduler = None
    if how == "asha":
        last = max(int(v["rounds"]) for v in variants)
        scheduler = ASHAScheduler(
            time_attr="rounds", max_t=last, grace_period=rungs[0], reduction_factor=3
        )
    trainable: Any = started if how == "default" else Reused
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        results = ray_tune.Tuner(
            ray_tune.with_resources(ray_tune.with_parameters(trainable, data=data), {"cpu": 1}),
            param_space={"variant": ray_tune.grid_search([dict(v) for v in variants])},
            tune_config=ray_tune.TuneConfig(
                metric="auc",
                mode="max",
                scheduler=scheduler,
                max_concurrent_trials=workers,
                reuse_actors=None if how == "default" else True,
            ),
            run_config=ray_tune.RunConfig(
                storage_path=folder,
                callbacks=callbacks,
                verbose=0,
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False)
                if how == "reuse"
                else ray_tune.CheckpointConfig(),
            ),
        ).fit()
        wall_s = time.perf_counter() - began
    found = {
        repr(sorted(r.config["variant"].items())): (r.metrics or {}).get("auc") for r in results
    }
    return wall_s, [found[repr(sorted(dict(v).items()))] for v in variants]


def flaml(data: TrainingData, x_test: np.ndarray, *, limit_s: float, seed: int) -> np.ndarray:
    """Test scores of FLAML's AutoML at its defaults, on a thread a CPU.

    It gets training and validation rows together, splits them as it likes, and trains its choice on
    all of them: given validation rows of their own, it would leave them out at the end.
    """
    from flaml import AutoML

    warnings.filterwarnings("ignore")
    model = AutoML()
    model.fit(
        np.concatenate([data.x_train, data.x_valid]),
        np.concatenate([data.y_train, data.y_valid]),
        task="classification",
        metric="roc_auc",
        time_budget=limit_s,
        seed=seed,
        n_jobs=os.cpu_count(),
        verbose=0,
    )
    return np.asarray(model.predict_proba(x_test)[:, 1])


def optuna_xgboost(
    data: TrainingData, x_test: np.ndarray, *, limit_s: float, seed: int
) -> np.ndarray:
    """Test scores of Optuna's TPE over XGBoost with early stopping, one trial at a time."""
    import optuna
    import xgboost

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    train = xgboost.QuantileDMatrix(data.x_train, data.y_train)
    valid = xgboost.QuantileDMatrix(data.x_valid, data.y_valid, ref=train)
    best: dict[str, Any] = {"auc": -1.0}

    def objective(trial: Any) -> float:
        params = {
            "objective": "binary:logistic",
            "eval_metric": "auc",
            "nthread": os.cpu_count(),
            "seed": seed,
            "max_depth": trial.suggest_int("max_depth", 2, 8),
            "learning_rate": trial.suggest_float("learning_rate", 0.01, 0.3, log=True),
            "min_child_weight": trial.suggest_float("min_child_weight", 1, 30, log=True),
            "lambda": trial.suggest_float("lambda", 0.1, 30, log=True),
            "subsample": trial.suggest_float("subsample", 0.5, 1),
            "colsample_bytree": trial.suggest_float("colsample_bytree", 0.3, 1),
        }
        booster = xgboost.train(
            params, train, 500, evals=[(valid, "v")], early_stopping_rounds=20, verbose_eval=False
        )
        if booster.best_score > best["auc"]:
            best.update(auc=booster.best_score, booster=booster, rounds=booster.best_iteration + 1)
        return float(booster.best_score)

    sampler = optuna.samplers.TPESampler(seed=seed)
    optuna.create_study(direction="maximize", sampler=sampler).optimize(objective, timeout=limit_s)
    matrix = xgboost.DMatrix(x_test)
    scores = best["booster"].predict(matrix, iteration_range=(0, best["rounds"]))
    return np.asarray(scores, dtype=np.float64)
