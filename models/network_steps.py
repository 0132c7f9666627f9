"""What a training step of packed networks is made of: batches, dropout, products, AdamW.

On a CPU each has the bits of what `torch` does for one network alone. Knows nothing of settings or
of when training ends (`models/network_training.py`).

Suffixes: K networks, B rows of a batch, I and O inputs and outputs of a layer.
"""

import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np


@contextmanager
def quiet_lightning() -> Iterator[None]:
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
def one_thread() -> Iterator[None]:
    """Keeps torch to the one CPU that a worker has; layers this small gain nothing from more."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Batches:
    """Shuffled batches, in an order that only the seed and the epoch decide.

    Not a DataLoader: the rows are in memory already, so workers would only add copies.
    """

    def __init__(self, *arrays: np.ndarray, rows: int, seed: int) -> None:
        """Takes arrays of as many rows each, to be given out `rows` at a time."""
        import torch

        self._tensors = [torch.from_numpy(each) for each in arrays]
        self._rows = rows
        self._order = np.random.default_rng(seed)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self._tensors[0]) // self._rows)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """An epoch."""
        order = self._order.permutation(len(self._tensors[0]))
        for at in range(0, len(order), self._rows):
            chosen = order[at : at + self._rows]
            yield tuple(each[chosen] for each in self._tensors)


class Dropout:
    """Drops a share of what each network's layer gives, by draws of that network alone."""

    def __init__(self, shares: Sequence[float], seeds: Sequence[int]) -> None:
        """Takes each network's share, 0 to below 1, and seed."""
        import torch

        # On the CPU, so that a GPU drops the same.
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._each = list(zip(shares, draws, strict=True))

    def keep(self, places: Sequence[int]) -> None:
        """Goes on with the networks at these places alone."""
        self._each = [self._each[place] for place in places]

    def __call__(self, h_kbo: Any) -> Any:
        """What is left, scaled so that the mean stays."""
        import torch

        if not any(share for share, _ in self._each):
            return h_kbo
        kept_kbo = torch.ones(h_kbo.shape)
        for kept_bo, (share, draws) in zip(kept_kbo, self._each, strict=True):
            if share:
                drawn = torch.rand(kept_bo.shape, generator=draws)
                kept_bo.copy_((drawn >= share) / (1 - share))
        return h_kbo * kept_kbo.to(h_kbo.device)


def first_product() -> Any:
    """The first layer of inputs of which only some are trained: `(b_k1o, w_kio, fixed_bi, h_kbi)`.

    A gradient for what is fixed would be most of a step's work, and thrown away.
    """
    import torch

    class First(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, b_k1o: Any, w_kio: Any, fixed_bi: Any, trained_kbi: Any) -> Any:
            h_kbi = _beside(fixed_bi, trained_kbi)
            ctx.save_for_backward(h_kbi, w_kio)
            ctx.fixed = fixed_bi.shape[1]
            return torch.baddbmm(b_k1o, h_kbi, w_kio)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            h_kbi, w_kio = ctx.saved_tensors
            (g_kbo,) = gradients
            return (
                g_kbo.sum(dim=1, keepdim=True),
                torch.bmm(h_kbi.mT, g_kbo),
                None,
                torch.bmm(g_kbo, w_kio[:, ctx.fixed :].mT),
            )

    return First.apply


def plain_first_product(b_k1o: Any, w_kio: Any, fixed_bi: Any, trained_kbi: Any) -> Any:
    """The same by torch's own gradients, which autocast can follow."""
    import torch

    return torch.baddbmm(b_k1o, _beside(fixed_bi, trained_kbi), w_kio)


def _beside(fixed_bi: Any, trained_kbi: Any) -> Any:
    import torch

    return torch.cat([fixed_bi.expand(len(trained_kbi), -1, -1), trained_kbi], dim=2)


def last_product() -> Any:
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


def stacked_adamw(
    parameters: list[Any], learning_rates: Sequence[float], weight_decays: Sequence[float]
) -> Any:
    """AdamW over parameters (K, ., .), with a learning rate and a weight decay for each k.

    Its `keep(places)` goes on with the networks at those places alone, parameters included.
    """
    import torch

    beta1, beta2, eps = 0.9, 0.999, 1e-8

    class StackedAdamW(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__(parameters, {})
            self._steps = 0
            self._rates = np.array(learning_rates)
            self._decays = np.array(weight_decays)
            self._keep_k11 = self._column(1 - self._rates * self._decays)

        def _column(self, values_k: np.ndarray) -> Any:
            # Rounded once, from float64, as a lone optimizer's numbers are.
            first = parameters[0]
            return torch.tensor(values_k, dtype=first.dtype, device=first.device).view(-1, 1, 1)

        def keep(self, places: Sequence[int]) -> None:
            chosen = list(places)
            for parameter in parameters:
                parameter.data, parameter.grad = parameter.data[chosen], None
                state = self.state[parameter]
                state |= {name: value[chosen] for name, value in state.items()}
            self._rates, self._decays = self._rates[chosen], self._decays[chosen]
            self._keep_k11 = self._column(1 - self._rates * self._decays)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            with torch.enable_grad():
                loss = closure() if closure is not None else None
            self._steps += 1
            step_k11 = self._column(-self._rates / (1 - beta1**self._steps))
            unbias = (1 - beta2**self._steps) ** 0.5
            for parameter in parameters:
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


def first_weights(
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
