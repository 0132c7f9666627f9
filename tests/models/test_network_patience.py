"""Networks stopped early, and in bfloat16: against Lightning's own callbacks, packed and alone."""

import itertools
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from models import metrics, network
from models.families import TrainingData, VariantError

SHAPE = {"width": 16, "depth": 2, "epochs": 25, "batch_rows": 64}


@pytest.fixture(scope="module")
def data():
    draws = np.random.default_rng(8)
    x = draws.standard_normal((1400, 6)).astype(np.float32)
    logit = x[:, 0] + x[:, 1] * x[:, 2] - 0.5 * x[:, 3]
    y = (draws.random(1400) < 1 / (1 + np.exp(-logit))).astype(np.int8)
    return TrainingData(x_train=x[:900], y_train=y[:900], x_valid=x[900:], y_valid=y[900:])


@pytest.fixture(scope="module")
def looked_up(data):
    """The same rows, two columns of them codes."""

    def codes(x):
        return np.hstack([x[:, :4], np.digitize(x[:, 4:], [-1, 0, 1]).astype(np.float32)])

    return TrainingData(
        x_train=codes(data.x_train),
        y_train=data.y_train,
        x_valid=codes(data.x_valid),
        y_valid=data.y_valid,
        categories=(0, 0, 0, 0, 4, 4),
    )


def lightning(variant, data, score, folder):
    """One network in torch's layers, by Lightning with its callbacks.

    Returns:
        Validation scores of the best checkpoint, its epoch and the last, and the curve.
    """
    import pytorch_lightning
    from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

    settings = {**network.DEFAULTS, **variant}
    mean, spread = data.x_train.mean(axis=0), data.x_train.std(axis=0)
    x_train, x_valid = (
        torch.from_numpy(((x - mean) / spread).astype(np.float32))
        for x in (data.x_train, data.x_valid)
    )
    y_train = torch.from_numpy(data.y_train.astype(np.float32))
    curve = []

    class Net(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            draws = np.random.default_rng(settings["seed"])
            sizes = [x_train.shape[1], *[settings["width"]] * settings["depth"], 1]
            layers = []
            for i, o in itertools.pairwise(sizes):
                layer = torch.nn.Linear(i, o)
                drawn = (draws.standard_normal((i, o)) * np.sqrt(2 / i)).astype(np.float32)
                layer.weight.data = torch.from_numpy(drawn).T.clone()
                layer.bias.data.zero_()
                layers += [layer, torch.nn.ReLU()]
            self.layers = torch.nn.Sequential(*layers[:-1])

        def training_step(self, batch, at):
            x, y = batch
            logits = self.layers(x)[:, 0]
            return torch.nn.functional.binary_cross_entropy_with_logits(logits, y)

        def validation_step(self, batch, at):
            p = torch.sigmoid(self.layers(batch)[:, 0].double()).numpy()
            curve.append(score(data.y_valid, p))
            self.log("score", torch.tensor(curve[-1], dtype=torch.float64))

        def configure_optimizers(self):
            return torch.optim.AdamW(
                self.parameters(),
                lr=settings["learning_rate"],
                weight_decay=settings["weight_decay"],
            )

    class Batches:
        order = np.random.default_rng(settings["order_seed"])

        def __iter__(self):
            order = self.order.permutation(len(y_train))
            for at in range(0, len(order), settings["batch_rows"]):
                chosen = order[at : at + settings["batch_rows"]]
                yield x_train[chosen], y_train[chosen]

    best = ModelCheckpoint(dirpath=folder, monitor="score", mode="max", filename="{epoch}")
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = Net()
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=settings["epochs"],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            callbacks=[
                EarlyStopping(
                    monitor="score", mode="max", patience=settings["patience"], min_delta=0
                ),
                best,
            ],
        )
        rows = torch.utils.data.DataLoader(x_valid, batch_size=len(x_valid))
        trainer.fit(net, train_dataloaders=Batches(), val_dataloaders=rows)
        kept = torch.load(best.best_model_path)
    net.load_state_dict(kept["state_dict"])
    with torch.no_grad():
        scores = torch.sigmoid(net.layers(x_valid)[:, 0].double()).numpy()
    return scores, kept["epoch"] + 1, trainer.current_epoch, curve


@pytest.mark.parametrize(
    ("metric", "theirs"),
    [("auc", roc_auc_score), ("log_loss", lambda y, p: -log_loss(y, p))],
)
def test_patience_is_early_stopping_with_the_best_checkpoint(
    data: TrainingData, tmp_path: Path, metric: str, theirs: object
) -> None:
    variants = [
        {**SHAPE, "learning_rate": rate, "patience": patience, "seed": seed}
        for rate, patience, seed in ((0.003, 1, 1), (0.01, 3, 2), (0.02, 2, 3), (0.0003, 4, 4))
    ]
    ended = []
    for at, fitted in enumerate(network.fit_pack(variants, data, metric=metric)):
        folder = tmp_path / str(at)
        scores, best, last, curve = lightning(fitted.variant, data, theirs, folder)
        np.testing.assert_allclose(fitted.valid_scores, scores, atol=1e-6)
        # Rows that nearly tie may change places by a last bit.
        np.testing.assert_allclose([value for _, value in fitted.curve], curve, atol=1e-4)
        assert [epoch for epoch, _ in fitted.curve] == list(range(1, last + 1))
        settled = network.settled(fitted.variant, fitted.curve)
        assert settled == {**fitted.variant, "epochs": best, "patience": 0}
        # Those epochs alone, unwatched, are the same network.
        (again,) = network.fit_pack([settled], data)
        np.testing.assert_allclose(again.valid_scores, fitted.valid_scores, atol=1e-6)
        ended.append(last)
    assert len(set(ended)) > 1 and min(ended) < SHAPE["epochs"]


@pytest.mark.parametrize("category_size", [0, 3])
def test_who_leaves_a_pack_changes_none_of_the_others(
    looked_up: TrainingData, category_size: int
) -> None:
    variants = [
        {
            **SHAPE,
            "epochs": 12,
            "category_size": category_size,
            "learning_rate": rate,
            "dropout": share,
            "patience": patience,
            "seed": seed,
        }
        for seed, (rate, share, patience) in enumerate(
            [(0.03, 0.2, 1), (0.003, 0.0, 0), (0.01, 0.3, 2), (0.02, 0.0, 3), (0.003, 0.2, 0)]
        )
    ]
    packed = network.fit_pack(variants, looked_up)
    lengths = [len(each.curve) for each in packed if each.variant["patience"]]
    assert len(set(lengths)) > 1 and max(lengths) < 12
    for variant, fitted in zip(variants, packed, strict=True):
        (alone,) = network.fit_pack([variant], looked_up)
        np.testing.assert_allclose(fitted.valid_scores, alone.valid_scores, atol=1e-6)
        np.testing.assert_allclose(fitted.curve, alone.curve, atol=1e-6)
        best = max(value for _, value in fitted.curve)
        if variant["patience"]:
            auc = metrics.auc(looked_up.y_valid, fitted.valid_scores)
            assert auc == pytest.approx(best, abs=1e-5)


def test_without_patience_a_few_epochs_and_the_last_are_told(data: TrainingData) -> None:
    (fitted,) = network.fit_pack([{**SHAPE, "epochs": 7}], data)
    (short,) = network.fit_pack([{**SHAPE, "epochs": 2}], data)
    assert [epoch for epoch, _ in fitted.curve] == [1, 2, 5, 7]
    assert fitted.curve[-1][1] == metrics.auc(data.y_valid, fitted.valid_scores)
    assert [epoch for epoch, _ in short.curve] == [1, 2]
    np.testing.assert_allclose(short.curve, fitted.curve[:2], atol=1e-6)
    assert network.settled(fitted.variant, fitted.curve) == fitted.variant


def test_one_that_diverges_leaves_and_takes_no_one_along(data: TrainingData) -> None:
    good = {**SHAPE, "epochs": 6, "patience": 3}
    bad = {**good, "learning_rate": 1e30}
    first, lost = network.fit_pack([good, bad], data)
    (alone,) = network.fit_pack([good], data)
    np.testing.assert_allclose(first.valid_scores, alone.valid_scores, atol=1e-6)
    assert not np.isfinite(lost.valid_scores).all()
    assert lost.curve == ()


def test_validation_rows_of_one_class_stop_nothing(data: TrainingData) -> None:
    ones = data.y_valid == 1
    one_class = TrainingData(
        x_train=data.x_train,
        y_train=data.y_train,
        x_valid=data.x_valid[ones],
        y_valid=data.y_valid[ones],
    )
    variant = {**SHAPE, "epochs": 4, "patience": 1}
    (fitted,) = network.fit_pack([variant], one_class)
    (whole,) = network.fit_pack([{**variant, "patience": 0}], data)
    assert fitted.curve == ()
    np.testing.assert_allclose(fitted.valid_scores, whole.valid_scores[ones], atol=1e-6)


@pytest.mark.parametrize("vectors", [{}, {"category_size": 3}, {"number_size": 2, "dropout": 0.1}])
def test_bfloat16_scores_nearly_as_float32_and_keeps_its_weights_in_it(
    looked_up: TrainingData, vectors: dict[str, float]
) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    kept = set()

    def look(optimizer, *_):
        for parameter, state in optimizer.state.items():
            kept.update(each.dtype for each in (parameter, parameter.grad, *state.values()))

    variants = [{**SHAPE, **vectors, "epochs": 4, "seed": seed} for seed in (1, 2)]
    whole = network.fit_pack(variants, looked_up)
    hook = register_optimizer_step_post_hook(look)
    try:
        halves = network.fit_pack(
            [{**each, "precision": "bf16-mixed"} for each in variants], looked_up
        )
    finally:
        hook.remove()
    assert kept == {torch.float32}
    for one, other in zip(whole, halves, strict=True):
        assert (one.ran["precision"], other.ran["precision"]) == ("32", "bf16-mixed")
        aucs = [metrics.auc(looked_up.y_valid, each.valid_scores) for each in (one, other)]
        assert min(aucs) > 0.65
        assert aucs[0] == pytest.approx(aucs[1], abs=1e-2)
        assert np.abs(one.valid_scores - other.valid_scores).max() > 1e-5


def test_precision_is_float32_on_a_cpu_unless_asked_and_others_are_refused(
    data: TrainingData,
) -> None:
    quick = {**SHAPE, "epochs": 1}
    asked = [{**quick, "precision": each} for each in ("auto", "32", 32)]
    auto, *others = network.fit_pack(asked, data)
    for each in others:
        np.testing.assert_array_equal(each.valid_scores, auto.valid_scores)
    for precision in ("bf16", "16-mixed", 16, None):
        with pytest.raises(VariantError, match=r"'precision' of 'network' is .*bf16-mixed"):
            network.fit_pack([{**quick, "precision": precision}], data)
    with pytest.raises(VariantError, match="'patience' of 'network' is -1; give 0 or more"):
        network.fit_pack([{**quick, "patience": -1}], data)
