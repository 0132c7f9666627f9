"""Small neural networks (MLP): K of one shape train as one batched product.

A network of a few thousand weights leaves most of a step to overhead; stacked along a leading
axis K, the pack pays that overhead once. All see the same batches in the same order, and each
keeps its own learning rate, weight decay, dropout and seed. What the first layer takes of a row is
`models/network_inputs.py`'s.

Suffixes: K networks, B rows of a batch, I and O inputs and outputs of a layer.
"""

import itertools
import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from models.families import (
    FREE,
    Fitted,
    TrainingData,
    Variant,
    VariantError,
    alike,
    completed,
    require_above_zero,
    require_at_least,
)
from models.network_inputs import (
    Columns,
    Scaling,
    Vectors,
    columns_of,
    scaled,
    stacked,
)

DEFAULTS: dict[str, Any] = {
    "width": 32,
    "depth": 2,
    "epochs": 10,
    "batch_rows": 256,
    "order_seed": 0,
    "learning_rate": 0.003,
    "weight_decay": 0.01,
    "dropout": 0.0,
    "category_size": 0,
    "number_size": 0,
    "frequencies": 16,
    "frequency_scale": 0.1,
    "positive_weight": 1.0,
    "seed": 0,
}


def fit_pack(
    variants: Sequence[Variant], data: TrainingData, *, accelerator: str = "cpu"
) -> list[Fitted]:
    """Trains each variant, equal to training it alone up to float32 rounding.

    Args:
        variants: Settings out of `DEFAULTS`; "seed" draws the first weights and what is dropped,
            "order_seed" the order of the rows, "depth" counts hidden layers. "dropout" is the
            share of a hidden layer's outputs left out at each step. "category_size" and
            "number_size" are the sizes of a column's vector, 0 for none; a number's is made of
            "frequencies" that are drawn with the standard deviation "frequency_scale".
        data: Rows to train on and to score.
        accelerator: Lightning's name of the device, "cpu" or "gpu".

    Returns:
        One `Fitted` a variant, in their order; `predict` runs in numpy on the CPU.

    Raises:
        VariantError: A setting isn't known or out of range.
    """
    settings = [completed("network", variant, DEFAULTS) for variant in variants]
    for each in settings:
        counts = ("width", "depth", "epochs", "batch_rows", "frequencies")
        require_at_least("network", each, counts, 1)
        sizes = ("category_size", "number_size")
        require_at_least("network", each, ("weight_decay", "seed", "order_seed", *sizes), 0)
        require_at_least("network", each, ("dropout",), 0)
        require_above_zero("network", each, ("learning_rate", "positive_weight", "frequency_scale"))
        if each["dropout"] >= 1:
            raise VariantError(
                f"setting 'dropout' of 'network' is {each['dropout']!r}; give a share below 1"
            )

    fitted: dict[int, Fitted] = {}
    for places in alike(settings, FREE["network"]):
        started = time.perf_counter()
        shape = settings[places[0]]
        columns = columns_of(
            data.x_train,
            data.categories,
            **{name: shape[name] for name in ("category_size", "number_size", "frequencies")},
        )
        layers, vectors = _train([settings[place] for place in places], columns, data, accelerator)
        training_s = time.perf_counter() - started
        for k, place in enumerate(places):
            started = time.perf_counter()
            # Copied, so that a pickled variant doesn't carry the whole pack.
            own = tuple((w_kio[k].copy(), b_k1o[k].copy()) for w_kio, b_k1o in layers)
            trained = {name: value[k] for name, value in vectors.items()}
            predict = (
                partial(predict_layers, columns.scaling, own)
                if columns.plain
                else partial(predict_vectors, Vectors.of(columns, trained, data.x_train), own)
            )
            scores = predict(data.x_valid)
            fitted[place] = Fitted(
                variant=dict(variants[place]),
                valid_scores=scores,
                seconds=training_s / len(places) + time.perf_counter() - started,
                predict=predict,
            )
    return [fitted[place] for place in range(len(settings))]


def _train(
    settings: Sequence[dict[str, Any]], columns: Columns, data: TrainingData, accelerator: str
) -> tuple[list[tuple[np.ndarray, np.ndarray]], dict[str, np.ndarray]]:
    """Weights (K, I, O) and biases (K, 1, O) of each layer, and of vectors (K, ., .); float32."""
    import pytorch_lightning
    import torch

    shape = settings[0]
    sizes = [columns.width, *[shape["width"]] * shape["depth"], 1]
    last = _last_product() if accelerator == "cpu" else torch.bmm

    class Pack(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            draws = [np.random.default_rng(each["seed"]) for each in settings]
            drawn = [_first_weights(each, sizes) for each in draws]
            vectors = [columns.first_values(each, shape["frequency_scale"]) for each in draws]
            self.vectors = torch.nn.ParameterDict(
                {
                    name: torch.stack([torch.from_numpy(each[name]) for each in vectors])
                    for name in vectors[0]
                }
            )
            self.weights = torch.nn.ParameterList(
                torch.stack([torch.from_numpy(net[at][0]) for net in drawn])
                for at in range(len(sizes) - 1)
            )
            self.biases = torch.nn.ParameterList(
                torch.stack([torch.from_numpy(net[at][1]) for net in drawn])
                for at in range(len(sizes) - 1)
            )

        def forward(self, x_bi: Any, codes_bq: Any = None) -> Any:
            if columns.plain:
                h_kbi = x_bi.expand(len(settings), -1, -1)
            else:
                h_kbi = stacked(columns, self.vectors, x_bi, codes_bq)
            for at, (w_kio, b_k1o) in enumerate(zip(self.weights, self.biases, strict=True)):
                if at > 0:
                    h_kbi = drop(torch.relu(h_kbi))
                if at == len(sizes) - 2:
                    return (last(h_kbi, w_kio) + b_k1o)[:, :, 0]
                h_kbi = torch.baddbmm(b_k1o, h_kbi, w_kio)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            *row, y_b = batch
            logits_kb = self(*row)
            # Mean over rows, sum over networks: each one's gradient is that of its own loss.
            if len(y_b) == shape["batch_rows"]:
                return self._loss(logits_kb, y_b.expand_as(logits_kb), "none").mean(dim=1).sum()
            # An epoch's last rows one network at a time: where rows don't fill a processor's
            # vectors, the bits of a sigmoid depend on what lies beside it.
            return sum(self._loss(logits_b, y_b) for logits_b in logits_kb)

        def _loss(self, logits: Any, y: Any, reduction: str = "mean") -> Any:
            weight = torch.tensor(float(shape["positive_weight"]), device=y.device)
            return torch.nn.functional.binary_cross_entropy_with_logits(
                logits, y, pos_weight=weight, reduction=reduction
            )

        def configure_optimizers(self) -> Any:
            return _stacked_adamw(
                list(self.parameters()),
                [each["learning_rate"] for each in settings],
                [each["weight_decay"] for each in settings],
            )

    drop = _Dropout([each["dropout"] for each in settings], [each["seed"] for each in settings])
    row = [columns.numbers_of(data.x_train)]
    if columns.categories.size:
        row.append(columns.codes_of(data.x_train))
    y = data.y_train.astype(np.float32)
    batches = _Batches(*row, y, rows=shape["batch_rows"], seed=shape["order_seed"])
    with _quiet_lightning(), _one_thread():
        trainer = pytorch_lightning.Trainer(
            accelerator=accelerator,
            devices=1,
            max_epochs=shape["epochs"],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        pack = Pack()
        trainer.fit(pack, train_dataloaders=batches)
    layers = [
        (w_kio.detach().cpu().numpy(), b_k1o.detach().cpu().numpy())
        for w_kio, b_k1o in zip(pack.weights, pack.biases, strict=True)
    ]
    return layers, {name: value.detach().cpu().numpy() for name, value in pack.vectors.items()}


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Silences what Lightning says at every fit and no one can act on."""
    # By `info`, the devices found and that the last epoch was reached.
    talk = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    level = talk.level
    talk.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # Lightning 2.6 calls a torch class that torch 2.13 deprecates.
            warnings.filterwarnings(
                "ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning
            )
            # The caller chose the CPU on a machine with a GPU.
            warnings.filterwarnings("ignore", message="GPU available but not used")
            yield
    finally:
        talk.setLevel(level)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps torch to the one CPU that a worker has; layers this small gain nothing from more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Batches:
    """Shuffled batches, in an order that only the seed and the epoch decide.

    Not a DataLoader: the rows are in memory already, so workers would only add copies.
    """

    def __init__(self, *arrays: np.ndarray, rows: int, seed: int) -> None:
        import torch

        self._tensors = [torch.from_numpy(each) for each in arrays]
        self._rows = rows
        self._order = np.random.default_rng(seed)

    def __len__(self) -> int:
        return -(-len(self._tensors[0]) // self._rows)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        order = self._order.permutation(len(self._tensors[0]))
        for at in range(0, len(order), self._rows):
            chosen = order[at : at + self._rows]
            yield tuple(each[chosen] for each in self._tensors)


class _Dropout:
    """Drops a share of what each network's layer gives, by draws of that network alone."""

    def __init__(self, shares: Sequence[float], seeds: Sequence[int]) -> None:
        import torch

        self._shares = shares
        # On the CPU, so that a GPU drops the same.
        self._draws = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, h_kbo: Any) -> Any:
        import torch

        if not any(self._shares):
            return h_kbo
        kept_kbo = torch.ones(h_kbo.shape)
        for kept_bo, share, draws in zip(kept_kbo, self._shares, self._draws, strict=True):
            if share:
                drawn = torch.rand(kept_bo.shape, generator=draws)
                kept_bo.copy_((drawn >= share) / (1 - share))
        return h_kbo * kept_kbo.to(h_kbo.device)


def _last_product() -> Any:
    """Products of (K, B, I) with (K, I, 1) that add up as `torch.nn.Linear` with one output does.

    A batched product adds in another order there, and nowhere else: with this one, packed networks
    on a CPU have the bits of ones that are trained alone.
    """
    import torch

    class Last(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, h_kbi: Any, w_ki1: Any) -> Any:
            ctx.save_for_backward(h_kbi, w_ki1)
            out_kb = h_kbi.new_empty(h_kbi.shape[:2])
            for h_bi, w_i, out_b in zip(h_kbi, w_ki1[:, :, 0], out_kb, strict=True):
                torch.mv(h_bi, w_i, out=out_b)
            return out_kb.unsqueeze(2)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            h_kbi, w_ki1 = ctx.saved_tensors
            (g_kb1,) = gradients
            return torch.bmm(g_kb1, w_ki1.mT), torch.bmm(h_kbi.mT, g_kb1)

    return Last.apply


def _stacked_adamw(
    parameters: list[Any], learning_rates: Sequence[float], weight_decays: Sequence[float]
) -> Any:
    """AdamW over parameters (K, ., .), with a learning rate and a weight decay for each k."""
    import torch

    beta1, beta2, eps = 0.9, 0.999, 1e-8

    class StackedAdamW(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(parameters, {})
            self._steps = 0
            self._rates = np.array(learning_rates)
            self._keep_k11 = self._column(1 - self._rates * np.array(weight_decays))

        def _column(self, values_k: np.ndarray) -> Any:
            # Rounded once, from float64, as a lone optimizer's numbers are.
            first = parameters[0]
            return torch.tensor(values_k, dtype=first.dtype, device=first.device).view(-1, 1, 1)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = closure() if closure is not None else None
            self._steps += 1
            step_k11 = self._column(-self._rates / (1 - beta1**self._steps))
            unbias = (1 - beta2**self._steps) ** 0.5
            for parameter in self.param_groups[0]["params"]:
                state = self.state[parameter]
                if not state:
                    state["mean"] = torch.zeros_like(parameter)
                    state["square"] = torch.zeros_like(parameter)
                gradient = parameter.grad
                # Operation by operation what torch.optim.AdamW does, so that the bits are its.
                parameter.mul_(self._keep_k11)
                state["mean"].lerp_(gradient, 1 - beta1)
                state["square"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
                scale = state["square"].sqrt().div_(unbias).add_(eps)
                parameter.add_((step_k11 * state["mean"]).div_(scale))
            return loss

    return StackedAdamW()


def _first_weights(
    draws: np.random.Generator, sizes: Sequence[int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Weights (I, O) by He's rule and zero biases (1, O)."""
    return [
        (
            (draws.standard_normal((i, o)) * np.sqrt(2 / i)).astype(np.float32),
            np.zeros((1, o), dtype=np.float32),
        )
        for i, o in itertools.pairwise(sizes)
    ]


def predict_layers(
    scaling: Scaling, layers: Sequence[tuple[np.ndarray, np.ndarray]], x: np.ndarray
) -> np.ndarray:
    """Probability of 1 a row, (n,) float64, from layers of weights (I, O) and biases (1, O)."""
    return _probability(scaled(scaling, x), layers)


def predict_vectors(
    vectors: Vectors, layers: Sequence[tuple[np.ndarray, np.ndarray]], x: np.ndarray
) -> np.ndarray:
    """The same of a network whose columns have vectors."""
    return _probability(vectors(x), layers)


def _probability(h: np.ndarray, layers: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    for at, (w_io, b_1o) in enumerate(layers):
        # Not a matrix product: BLAS sums in an order that depends on the other rows, and a row
        # must score the same alone as among others.
        h = np.einsum("bi,io->bo", h if at == 0 else np.maximum(h, 0), w_io) + b_1o
    # tanh, because exp overflows (with a warning) on a far negative logit.
    scores: np.ndarray = 0.5 * (1 + np.tanh(0.5 * h[:, 0].astype(np.float64)))
    return scores


# The name by which models that are registered already were pickled.
_predict = predict_layers
