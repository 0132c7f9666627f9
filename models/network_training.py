"""Trains K networks of one shape as one batched product, and watches each on validation rows.

With patience a network keeps the weights of its best epoch, and leaves the pack once it has had so
many epochs without a better one; the others go on with the bits that they would have had.

Suffixes: K networks that still train, B rows of a batch, Q category columns, I and O inputs and
outputs of a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from models.families import TrainingData, VariantError
from models.metrics import METRICS, MetricError
from models.network_inputs import Columns, stacked
from models.network_steps import (
    Batches,
    Dropout,
    first_product,
    first_weights,
    last_product,
    one_thread,
    plain_first_product,
    quiet_lightning,
    stacked_adamw,
)

Precision = Literal["32", "bf16-mixed"]
# By Lightning's names. "auto" is bfloat16 on a GPU that has it, and float32 elsewhere.
PRECISIONS = ("auto", "32", "bf16-mixed")
# Without patience, epochs at which validation is looked at: enough of a curve to read, few enough
# to cost next to nothing. The last one's scores are there anyway.
SPARSE = tuple(place * 10**power for power in range(4) for place in (1, 2, 5))


@dataclass(kw_only=True)
class Trained:
    """One network.

    Attributes:
        layers: Weights (I, O) and biases (1, O), float32.
        vectors: What `Columns.first_values` names, float32.
        curve: Epochs and the validation metric, more is better: of every epoch with patience, and
            of some before the last without.
    """

    layers: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    curve: list[tuple[int, float]] = field(default_factory=list)


def best_epoch(curve: Sequence[Sequence[float]]) -> int:
    """Epochs of the highest point, the first of equals."""
    return int(max(curve, key=lambda point: (point[1], -point[0]))[0])


def precision_on(accelerator: str, asked: str) -> Precision:
    """What runs.

    Args:
        accelerator: "cpu" or "gpu".
        asked: Of `PRECISIONS`.

    Raises:
        VariantError: bfloat16 is asked for, and the GPU hasn't it.
    """
    if asked == "32" or (asked == "auto" and accelerator == "cpu"):
        return "32"
    import torch

    # Torch emulates it on older cards, slower than float32.
    if accelerator == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16-mixed"
    if asked == "auto":
        return "32"
    raise VariantError(
        f"setting 'precision' of 'network' is {asked!r}, and {torch.cuda.get_device_name()} has no "
        "bfloat16; give '32', or 'auto'"
    )


def train(
    settings: Sequence[dict[str, Any]],
    columns: Columns,
    data: TrainingData,
    *,
    accelerator: str,
    precision: Precision,
    metric: str,
) -> list[Trained]:
    """Trains networks that differ only in `models.families.FREE`.

    Args:
        settings: Of `models.network.DEFAULTS`, whole.
        columns: Of the training rows.
        data: Rows to train on, and to watch.
        accelerator: "cpu" or "gpu".
        precision: From `precision_on`. Weights and the optimizer's state are float32 either way.
        metric: Of `models.metrics.METRICS`.

    Returns:
        One a network, in their order.
    """
    import pytorch_lightning
    import torch

    shape = settings[0]
    sizes = [columns.width, *[shape["width"]] * shape["depth"], 1]
    whole = precision == "32"
    first = first_product() if whole else plain_first_product
    last = last_product() if whole and accelerator == "cpu" else torch.bmm
    valid = [torch.from_numpy(each) for each in columns.rows_of(data.x_valid)]
    found = [Trained() for _ in settings]

    class Pack(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            # Positions of the networks that still train.
            self._places = list(range(len(settings)))
            draws = [np.random.default_rng(each["seed"]) for each in settings]
            drawn = [first_weights(each, sizes) for each in draws]
            vectors = [columns.first_values(each, shape["frequency_scale"]) for each in draws]
            self.vectors = torch.nn.ParameterDict(
                {
                    name: torch.stack([torch.from_numpy(each[name]) for each in vectors])
                    for name in vectors[0]
                }
            )
            self.weights, self.biases = (
                torch.nn.ParameterList(
                    torch.stack([torch.from_numpy(net[at][which]) for net in drawn])
                    for at in range(len(sizes) - 1)
                )
                for which in (0, 1)
            )
            self._drop = Dropout(
                [each["dropout"] for each in settings], [each["seed"] for each in settings]
            )

        def forward(self, x_bi: Any, codes_bq: Any = None) -> Any:
            (w_kio, b_k1o), *middle, (w_last, b_last) = zip(self.weights, self.biases, strict=True)
            if columns.plain:
                h_kbo = torch.baddbmm(b_k1o, x_bi.expand(len(w_kio), -1, -1), w_kio)
            else:
                h_kbo = first(b_k1o, w_kio, *stacked(columns, self.vectors, x_bi, codes_bq))
            for w_kio, b_k1o in middle:
                h_kbo = torch.baddbmm(b_k1o, self._passed(h_kbo), w_kio)
            return (last(self._passed(h_kbo), w_last) + b_last)[:, :, 0]

        def _passed(self, h_kbo: Any) -> Any:
            h_kbo = torch.relu(h_kbo)
            return self._drop(h_kbo) if self.training else h_kbo

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            *row, y_b = batch
            # Logits are summed in bfloat16 where that is the precision; the loss never is.
            logits_kb = self(*row).float()
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
            self._adamw = stacked_adamw(
                list(self.parameters()),
                [each["learning_rate"] for each in settings],
                [each["weight_decay"] for each in settings],
            )
            return self._adamw

        def on_train_epoch_end(self) -> None:
            epoch = self.current_epoch + 1
            due = epoch in SPARSE and epoch < shape["epochs"]
            looked_at = [
                k for k, place in enumerate(self._places) if due or settings[place]["patience"]
            ]
            if not looked_at:
                return
            scores_km = self._scores()
            over = [k for k in looked_at if self._look(k, epoch, scores_km[k])]
            if len(over) == len(self._places):
                self.trainer.should_stop = True
            elif over:
                stay = [k for k in range(len(self._places)) if k not in over]
                self._adamw.keep(stay)
                self._drop.keep(stay)
                self._places = [self._places[k] for k in stay]

        def _scores(self) -> np.ndarray:
            """Validation scores, (K, m) float64; in float32 and as batches are, bit for bit."""
            rows, size = [each.to(self.device) for each in valid], shape["batch_rows"]
            self.eval()
            with torch.no_grad():
                logits_km = torch.cat(
                    [
                        self(*(each[at : at + size] for each in rows))
                        for at in range(0, len(data.x_valid), size)
                    ],
                    dim=1,
                )
            self.train()
            return probability(logits_km.cpu().numpy())

        def _look(self, k: int, epoch: int, scores_m: np.ndarray) -> bool:
            """Writes down how a network does; whether it is done."""
            place = self._places[k]
            mine = found[place]
            patience: int = settings[place]["patience"]
            if patience and not np.isfinite(scores_m).all():
                if not mine.layers:
                    self._take(k)
                return True
            try:
                mine.curve.append((epoch, METRICS[metric].score(data.y_valid, scores_m)))
            except MetricError:
                return False  # Validation rows of one class: the caller tells of it.
            if not patience:
                return False
            best = best_epoch(mine.curve)
            if best == epoch:
                self._take(k)
            return epoch - best >= patience

        def _take(self, k: int) -> None:
            mine = found[self._places[k]]
            mine.layers = [
                (w_kio[k].detach().cpu().numpy().copy(), b_k1o[k].detach().cpu().numpy().copy())
                for w_kio, b_k1o in zip(self.weights, self.biases, strict=True)
            ]
            mine.vectors = {
                name: value[k].detach().cpu().numpy().copy() for name, value in self.vectors.items()
            }

        def take_last(self) -> None:
            """Where no epoch was the best, the last one's weights."""
            for k, place in enumerate(self._places):
                if not found[place].layers:
                    self._take(k)

    y = data.y_train.astype(np.float32)
    batches = Batches(
        *columns.rows_of(data.x_train), y, rows=shape["batch_rows"], seed=shape["order_seed"]
    )
    with quiet_lightning(), one_thread():
        trainer = pytorch_lightning.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,
            max_epochs=shape["epochs"],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        pack = Pack()
        trainer.fit(pack, train_dataloaders=batches)
    pack.take_last()
    return found


def probability(logits: np.ndarray) -> np.ndarray:
    """Of float32 logits, float64 of the same shape."""
    # tanh, because exp overflows (with a warning) on a far negative logit.
    scores: np.ndarray = 0.5 * (1 + np.tanh(0.5 * logits.astype(np.float64)))
    return scores
