"""Vectors of columns and dropout: packed, alone, and by plain Lightning."""

import itertools
import logging
import pickle
import warnings

import numpy as np
import pytest
import torch

from models import metrics, network
from models.families import TrainingData, TrainingDataError, VariantError

# Three numbers, the last with gaps, and two categories of 4 and 3 values, the last with gaps.
CATEGORIES = (0, 4, 0, 0, 3)
WITH_VECTORS = {"category_size": 3, "number_size": 2, "frequencies": 4, "frequency_scale": 0.3}


@pytest.fixture(scope="module")
def data():
    draws = np.random.default_rng(3)
    x = draws.standard_normal((1500, 5)).astype(np.float32)
    x[:, 1], x[:, 4] = draws.integers(0, 4, 1500), draws.integers(0, 3, 1500)
    logit = np.sin(3 * x[:, 0]) + np.array([1, -1, 2, -2])[x[:, 1].astype(int)] * (x[:, 4] == 1)
    y = (draws.random(1500) < 1 / (1 + np.exp(-2 * logit))).astype(np.int8)
    for column in (3, 4):
        x[draws.random(1500) < 0.1, column] = np.nan
    return TrainingData(
        x_train=x[:1000],
        y_train=y[:1000],
        x_valid=x[1000:],
        y_valid=y[1000:],
        categories=CATEGORIES,
    )


def lightning(variant, data):
    """The same network in torch's own layers, trained by Lightning: its validation scores."""
    import pytorch_lightning

    settings = {**network.DEFAULTS, **variant}
    mean, spread = np.nanmean(data.x_train, axis=0), np.nanstd(data.x_train, axis=0)
    draws = np.random.default_rng(settings["seed"])
    dropped = torch.Generator().manual_seed(settings["seed"])
    d, e, f = settings["number_size"], settings["category_size"], settings["frequencies"]

    def tensor(array):
        return torch.from_numpy(np.asarray(array, dtype=np.float32))

    def rows(x):
        numbers = np.nan_to_num((x - mean) / spread)[:, [0, 2, 3]]
        gaps = np.isnan(x[:, [3]])
        codes = [np.where(np.isnan(x[:, at]), CATEGORIES[at], x[:, at]) for at in (1, 4)]
        return tensor(numbers), tensor(gaps), torch.from_numpy(np.stack(codes, 1)).long()

    class Net(pytorch_lightning.LightningModule):
        def __init__(self):
            super().__init__()
            sizes = [3 * d + 1 + 2 * e, *[settings["width"]] * settings["depth"], 1]
            self.layers = torch.nn.ModuleList()
            for i, o in itertools.pairwise(sizes):
                layer = torch.nn.Linear(i, o)
                layer.weight.data = tensor(draws.standard_normal((i, o)) * np.sqrt(2 / i)).T.clone()
                layer.bias.data.zero_()
                self.layers.append(layer)
            frequencies = draws.standard_normal((3, f)) * settings["frequency_scale"]
            self.frequencies = torch.nn.Parameter(tensor(frequencies))
            weights = (draws.standard_normal((3 * 2 * f, d)) * np.sqrt(2 / f)).reshape(3, 2 * f, d)
            self.number_layers = torch.nn.ModuleList(torch.nn.Linear(2 * f, d) for _ in range(3))
            for layer, weight in zip(self.number_layers, weights, strict=True):
                layer.weight.data = tensor(weight).T.clone()
                layer.bias.data.zero_()
            self.tables = torch.nn.ModuleList()
            for values in (4, 3):
                table = tensor(draws.standard_normal((values + 1, e)))
                table[values] = 0
                self.tables.append(torch.nn.Embedding.from_pretrained(table, freeze=False))

        def forward(self, numbers, gaps, codes):
            angles = [2 * torch.pi * numbers[:, [at]] * self.frequencies[at] for at in range(3)]
            parts = [
                torch.relu(layer(torch.cat([torch.cos(angle), torch.sin(angle)], 1)))
                for layer, angle in zip(self.number_layers, angles, strict=True)
            ]
            looked = [table(codes[:, at]) for at, table in enumerate(self.tables)]
            h = torch.cat([*parts, gaps, *looked], 1)
            for layer in self.layers[:-1]:
                h = torch.relu(layer(h))
                if self.training and settings["dropout"]:
                    drawn = torch.rand(h.shape, generator=dropped)
                    h = h * (drawn >= settings["dropout"]) / (1 - settings["dropout"])
            return self.layers[-1](h)[:, 0]

        def training_step(self, batch, at):
            *row, y = batch
            return torch.nn.functional.binary_cross_entropy_with_logits(self(*row), y)

        def configure_optimizers(self):
            return torch.optim.AdamW(
                self.parameters(),
                lr=settings["learning_rate"],
                weight_decay=settings["weight_decay"],
            )

    class Batches:
        def __init__(self):
            self.order = np.random.default_rng(settings["order_seed"])
            self.tensors = (*rows(data.x_train), tensor(data.y_train))

        def __iter__(self):
            order = self.order.permutation(len(data.y_train))
            for at in range(0, len(order), settings["batch_rows"]):
                chosen = order[at : at + settings["batch_rows"]]
                yield tuple(each[chosen] for each in self.tensors)

    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = Net()
        pytorch_lightning.Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=settings["epochs"],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(net, train_dataloaders=Batches())
    net.eval()
    with torch.no_grad():
        return torch.sigmoid(net(*rows(data.x_valid))).double().numpy()


def variants(shape):
    return [
        {
            **WITH_VECTORS,
            **shape,
            "epochs": 5,
            "batch_rows": 64,
            "learning_rate": rate,
            "weight_decay": decay,
            "dropout": share,
            "seed": seed,
        }
        for rate, decay, share, seed in (
            (0.003, 0.01, 0.0, 1),
            (0.01, 0.1, 0.2, 2),
            (0.003, 0.0, 0.5, 1),
        )
    ]


@pytest.mark.parametrize("depth", [1, 2])
def test_packed_networks_are_what_lightning_trains_alone(data, depth):
    packed = network.fit_pack(variants({"depth": depth}), data)
    found = []
    for fitted in packed:
        theirs = lightning(fitted.variant, data)
        found.append(metrics.auc(data.y_valid, fitted.valid_scores))
        assert abs(found[-1] - metrics.auc(data.y_valid, theirs)) <= 1e-4
        np.testing.assert_allclose(fitted.valid_scores, theirs, atol=2e-4)
    assert max(found) > 0.65
    assert np.abs(packed[0].valid_scores - packed[2].valid_scores).max() > 0.01


@pytest.mark.parametrize("shape", [{}, {"number_size": 0}, {"category_size": 0}])
def test_vectors_in_a_pack_are_those_alone_row_by_row(data, shape):
    packed = network.fit_pack(variants(shape), data)
    for variant, fitted in zip(variants(shape), packed, strict=True):
        (alone,) = network.fit_pack([variant], data)
        np.testing.assert_allclose(fitted.valid_scores, alone.valid_scores, atol=1e-6)
    predict = pickle.loads(pickle.dumps(packed[0].predict))
    np.testing.assert_array_equal(predict(data.x_valid), packed[0].valid_scores)
    each = [predict(row[None])[0] for row in data.x_valid[:40]]
    np.testing.assert_array_equal(each, packed[0].valid_scores[:40])


def test_missing_and_unknown_categories(data):
    (fitted,) = network.fit_pack(variants({})[:1], data)
    x = data.x_valid[:50].copy()
    x[:, 1] = np.nan
    missing = fitted.predict(x)
    for unknown in (4, -1, 99):
        x[:, 1] = unknown
        np.testing.assert_array_equal(fitted.predict(x), missing)
    # No training row lacked that column: it adds nothing. The other's gaps were trained.
    vectors = fitted.predict.args[0]
    owners = vectors.columns.owners_i()
    assert not vectors(x)[:, owners == 1].any()
    x[:, 4] = np.nan
    assert vectors(x)[:, owners == 4].all()


def test_codes_are_numbers_where_nothing_else_is_said(data):
    plain = TrainingData(
        x_train=data.x_train, y_train=data.y_train, x_valid=data.x_valid, y_valid=data.y_valid
    )
    (told,), (untold,) = (network.fit_pack([{"epochs": 1}], each) for each in (data, plain))
    np.testing.assert_array_equal(told.valid_scores, untold.valid_scores)


def test_settings_of_vectors_are_checked(data):
    for setting in ({"dropout": 1.0}, {"dropout": -0.1}, {"category_size": -1}, {"frequencies": 0}):
        (name,) = setting
        with pytest.raises(VariantError, match=f"'{name}' of 'network' is"):
            network.fit_pack([setting], data)
    with pytest.raises(TrainingDataError, match="2 counts for 5 features"):
        TrainingData(
            x_train=data.x_train,
            y_train=data.y_train,
            x_valid=data.x_valid,
            y_valid=data.y_valid,
            categories=(1, 2),
        )
