"""Engines that score a sentiment model's tokens fast: how they batch, and those in torch.

Texts of equal length form a batch, so nothing is padded and no mask is computed. OpenVINO's engines
are `models/sentiment_openvino.py`'s, and which to take is `models/sentiment_gate.py`'s.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import polars as pl

from models.sentiment import Sentiment, softmax

BATCH_TOKENS = 1024
BATCH_TOKENS_CUDA = 65_536


class EngineError(ValueError):
    """An engine can't be had as asked; the message says why and what is allowed."""


class Engine(Protocol):
    """What scores tokens."""

    @property
    def name(self) -> str:
        """One of `models.sentiment_gate.ENGINES`, or what `torch_engine` calls it."""

    @property
    def about(self) -> str:
        """What computes, in which precision."""

    def probabilities(self, token_ids: Sequence[np.ndarray]) -> np.ndarray:
        """(n, labels) float32 in the order of the input; rows add up to 1."""


@dataclass(frozen=True, kw_only=True)
class ByLength:
    """Batches of equally long texts, without padding or mask.

    Attributes:
        name: See `Engine`.
        about: See `Engine`.
        labels: How many classes.
        forward: Ids int64 (n, tokens) to logits float32 (n, labels).
        batch_tokens: Tokens in a batch at most; a longer text is a batch.
    """

    name: str
    about: str
    labels: int
    forward: Callable[[np.ndarray], np.ndarray]
    batch_tokens: int = BATCH_TOKENS

    def probabilities(self, token_ids: Sequence[np.ndarray]) -> np.ndarray:
        """See `Engine`."""
        logits = np.empty((len(token_ids), self.labels), np.float32)
        lengths = np.fromiter((len(each) for each in token_ids), np.int64, len(token_ids))
        for places in _equal(lengths, self.batch_tokens):
            batch = np.stack([token_ids[place] for place in places]).astype(np.int64)
            logits[places] = self.forward(batch)
        return softmax(logits) if len(logits) else logits


@dataclass(frozen=True, kw_only=True)
class Deferring:
    """A quick engine, and a surer one for the texts that the quick one is least sure of.

    Attributes:
        name: See `Engine`.
        quick: Scores every text.
        sure: Scores those again whose two likeliest classes are less than `margin` apart.
        margin: A difference of probabilities.
    """

    name: str
    quick: Engine
    sure: Engine
    margin: float

    @property
    def about(self) -> str:
        """See `Engine`."""
        return (
            f"{self.quick.about}; texts whose two likeliest classes are less than "
            f"{self.margin:.3f} apart again by {self.sure.about}"
        )

    def probabilities(self, token_ids: Sequence[np.ndarray]) -> np.ndarray:
        """See `Engine`."""
        found = self.quick.probabilities(token_ids)
        again = np.flatnonzero(margins(found) < self.margin)
        if len(again):
            found[again] = self.sure.probabilities([token_ids[place] for place in again.tolist()])
        return found


@dataclass(frozen=True, kw_only=True)
class Bucketed:
    """Batches for a GPU: padded to the next multiple of `step`, masked, so few shapes are met.

    Attributes:
        name: See `Engine`.
        about: See `Engine`.
        labels: How many classes.
        forward: Ids and mask int64 (n, tokens) to logits float32 (n, labels).
        pad_id: Id for padding.
        batch_tokens: Tokens in a batch at most, padding included.
        step: Lengths are rounded up to multiples of it.
    """

    name: str
    about: str
    labels: int
    forward: Callable[[np.ndarray, np.ndarray], np.ndarray]
    pad_id: int
    batch_tokens: int = BATCH_TOKENS_CUDA
    step: int = 8

    def probabilities(self, token_ids: Sequence[np.ndarray]) -> np.ndarray:
        """See `Engine`."""
        logits = np.empty((len(token_ids), self.labels), np.float32)
        lengths = np.fromiter((len(each) for each in token_ids), np.int64, len(token_ids))
        buckets = -(-lengths // self.step) * self.step
        for places in _equal(buckets, self.batch_tokens):
            batch = np.full((len(places), buckets[places[0]]), self.pad_id, np.int64)
            mask = np.arange(batch.shape[1]) < lengths[places][:, None]
            batch[mask] = np.concatenate([token_ids[place] for place in places])
            logits[places] = self.forward(batch, mask.astype(np.int64))
        return softmax(logits) if len(logits) else logits


def _equal(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Places (int64) of equal lengths, longest first, `batch_tokens` in a batch at most."""
    order = np.argsort(-lengths, kind="stable")
    ends = np.flatnonzero(np.diff(lengths[order])) + 1
    for same in np.split(order, ends) if len(order) else []:
        rows = max(1, batch_tokens // int(lengths[same[0]]))
        for start in range(0, len(same), rows):
            yield same[start : start + rows]


def margins(probabilities: np.ndarray) -> np.ndarray:
    """(n,) the likeliest class's probability less that of the next."""
    ordered = np.sort(probabilities, axis=1)
    found: np.ndarray = ordered[:, -1] - ordered[:, -2]
    return found


def agreement(ours: np.ndarray, reference: np.ndarray) -> float:
    """Share of texts with the same likeliest class; both (n, labels)."""
    return float((ours.argmax(1) == reference.argmax(1)).mean())


def distinct(texts: pl.Series) -> tuple[pl.Series, np.ndarray]:
    """Each text once, in the order met, and for each row its place among them (int64)."""
    named = pl.DataFrame({"text": texts})
    once = named.unique(maintain_order=True).with_row_index("place")
    places = named.join(once, on="text", how="left", maintain_order="left", nulls_equal=True)
    return once["text"], places["place"].to_numpy().astype(np.int64)


# --- torch


def torch_engine(sentiment: Sentiment, precision: str = "fp32") -> Engine:
    """The model as it is in torch on the CPU; in fp32 it is what the others are compared with.

    Args:
        sentiment: Its module is used, not copied.
        precision: "fp32", or "bf16" by autocast.

    Raises:
        EngineError: Another precision.
    """
    if precision not in ("fp32", "bf16"):
        raise EngineError(f"precision {precision!r}: allowed are 'fp32' and 'bf16'")
    import torch

    def forward(ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, precision == "bf16"):
            logits: np.ndarray = sentiment.module(torch.from_numpy(ids), None).float().numpy()
        return logits

    return ByLength(
        name=f"torch {precision}",
        about=f"torch in {precision}",
        labels=len(sentiment.labels),
        forward=forward,
    )


def cuda_engine(sentiment: Sentiment, batch_tokens: int = BATCH_TOKENS_CUDA) -> Engine:
    """bf16 on the first CUDA device, attention by SDPA, lengths in steps of 8, CUDA graphs.

    Args:
        sentiment: Its module is copied.
        batch_tokens: Tokens in a batch at most, padding included.

    Raises:
        EngineError: torch sees no CUDA device.
    """
    import copy

    import torch

    if not torch.cuda.is_available():
        raise EngineError("device 'cuda': torch sees no CUDA device; use --device cpu")
    module = copy.deepcopy(sentiment.module).to("cuda", torch.bfloat16).eval()
    recorded: dict[tuple[int, ...], Callable[[Any, Any], Any]] = {}

    def forward(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        sent = torch.from_numpy(ids), torch.from_numpy(mask)
        with torch.inference_mode():
            # What a length leaves over comes in as many shapes as there are rows: not recorded.
            if len(ids) == batch_tokens // ids.shape[1]:
                work = recorded.get(ids.shape) or recorded.setdefault(
                    ids.shape, _recorded(module, ids.shape)
                )
                logits = work(*sent)
            else:
                logits = module(*(each.to("cuda", non_blocking=True) for each in sent))
            found: np.ndarray = logits.float().cpu().numpy()
        return found

    return Bucketed(
        name="bf16",
        about=f"torch in bf16 on {torch.cuda.get_device_name()}",
        labels=len(sentiment.labels),
        forward=forward,
        pad_id=sentiment.pad_id,
        batch_tokens=batch_tokens,
    )


def _recorded(module: Any, shape: tuple[int, ...]) -> Callable[[Any, Any], Any]:
    """`module` for batches of this shape as a CUDA graph: one launch for all of its kernels.

    What it returns is overwritten by the next call.
    """
    import torch

    ids = torch.zeros(shape, dtype=torch.int64, device="cuda")
    mask = torch.ones_like(ids)
    # Aside first: in their first calls libraries choose kernels and take memory.
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            module(ids, mask)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = module(ids, mask)

    def replay(ids_sent: Any, mask_sent: Any) -> Any:
        ids.copy_(ids_sent)
        mask.copy_(mask_sent)
        graph.replay()
        return logits

    return replay
