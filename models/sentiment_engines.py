"""Runs a sentiment model fast: engines of other precisions, each held to the labels of fp32.

Texts of equal length form a batch, so nothing is padded and no mask is computed. `choose` takes the
quickest engine whose labels agree with those of torch in float32 on a sample. The quantised engine
defers: where its two likeliest classes are close, the text is scored again in bf16, since that is
where its labels differ (a cascade, as in Viola and Jones 2001). Dynamic int8 isn't offered: it
agreed in 95 to 96 % of texts. Knows nothing of files of texts or of how work is distributed.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import polars as pl

from models.naming import suggestion
from models.sentiment import Sentiment, softmax

ENGINES = ("auto", "fp32", "bf16", "int8")
# Of the sample, what the ranges of activations are measured on; the rest is for agreement.
CALIBRATION_TEXTS = 300
# An agreement of fewer texts says little.
GATE_TEXTS = 200
BATCH_TOKENS = 1024
BATCH_TOKENS_CUDA = 65_536
# Of the disagreement allowed, what deferring may leave on the sample that its margin comes from.
_LEFT = 0.5
# An engine that scores more texts than this twice is slower than bf16 alone.
_DEFERRED_AT_MOST = 0.4


class EngineError(ValueError):
    """An engine can't be had as asked; the message says why and what is allowed."""


class Engine(Protocol):
    """What scores tokens."""

    @property
    def name(self) -> str:
        """One of `ENGINES`, or what `torch_engine` calls it."""

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


def cuda_engine(sentiment: Sentiment) -> Engine:
    """bf16 on the first CUDA device, attention by SDPA, lengths in steps of 8.

    Raises:
        EngineError: torch sees no CUDA device.
    """
    import copy

    import torch

    if not torch.cuda.is_available():
        raise EngineError("device 'cuda': torch sees no CUDA device; use --device cpu")
    module = copy.deepcopy(sentiment.module).to("cuda", torch.bfloat16).eval()

    def forward(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            on_card = (torch.from_numpy(each).to("cuda", non_blocking=True) for each in (ids, mask))
            logits: np.ndarray = module(*on_card).float().cpu().numpy()
        return logits

    return Bucketed(
        name="bf16",
        about=f"torch in bf16 on {torch.cuda.get_device_name()}",
        labels=len(sentiment.labels),
        forward=forward,
        pad_id=sentiment.pad_id,
    )


# --- OpenVINO


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A model as OpenVINO keeps it, in memory: it can be sent to other processes and nodes."""

    xml: bytes
    weights: bytes


def has_bf16() -> bool:
    """Whether this CPU multiplies bf16 (AVX512_BF16 or AMX)."""
    import openvino

    found: list[str] = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "BF16" in found


def openvino_engine(name: str, graph: Graph, *, threads: int = 1) -> Engine:
    """An engine of a graph; bf16 for what isn't float32 by name or int8 by the graph.

    Args:
        name: "fp32", "bf16" or "int8".
        graph: Of `Converted`.
        threads: CPU threads. Two processes of one thread are quicker than one of two.
    """
    import openvino

    precision = "f32" if name == "fp32" or not has_bf16() else "bf16"
    core = openvino.Core()
    compiled = core.compile_model(
        core.read_model(graph.xml, graph.weights),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "INFERENCE_PRECISION_HINT": precision,
            # Each process would pin its threads to the same first cores: half the speed for two.
            "ENABLE_CPU_PINNING": False,
            # What is kept for a shape of batch, per layer, else 5,000: gigabytes after many texts.
            "CPU_RUNTIME_CACHE_CAPACITY": 256,
        },
    )
    request = compiled.create_infer_request()
    shown = {"fp32": "f32", "bf16": precision, "int8": f"int8 and {precision}"}[name]
    without = (
        "" if name == "fp32" or precision == "bf16" else " (this CPU has no AVX512_BF16 or AMX)"
    )

    def forward(ids: np.ndarray) -> np.ndarray:
        logits: np.ndarray = request.infer([ids], share_inputs=True)[0]
        return logits

    return ByLength(
        name=name,
        about=f"OpenVINO in {shown}{without}",
        labels=int(compiled.outputs[0].partial_shape[1].get_length()),
        forward=forward,
    )


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A model's graphs, kept on disk by the digest of what they were made of.

    Attributes:
        sentiment: The model.
        cache: Folder; may be shared by processes.
    """

    sentiment: Sentiment
    cache: Path

    @cached_property
    def digest(self) -> str:
        """Of the weights, the tokenizer, and the versions that convert."""
        made = hashlib.blake2b(digest_size=16)
        for name, tensor in sorted(self.sentiment.module.state_dict().items()):
            made.update(name.encode())
            made.update(tensor.detach().float().numpy().tobytes())
        made.update(self.sentiment.tokenizer.to_str().encode())
        made.update(f"{version('openvino')} {version('nncf')} 1".encode())
        return made.hexdigest()

    def plain(self) -> Graph:
        """In float32; `openvino_engine` computes it in bf16 too."""
        return self._kept(f"{self.digest}-plain", self._convert)

    def quantised(self, calibration: Sequence[np.ndarray]) -> Graph:
        """Weights and the inputs of matrix products in int8, their ranges from `calibration`.

        Static post-training quantisation by NNCF with its settings for transformers (smooth
        quantisation, Xiao et al. 2023; bias correction).

        Args:
            calibration: Ids of typical texts.
        """
        of = hashlib.blake2b(b"".join(each.tobytes() for each in calibration), digest_size=8)
        return self._kept(
            f"{self.digest}-int8-{of.hexdigest()}", lambda: self._quantise(calibration)
        )

    def _convert(self) -> Any:
        import openvino
        import torch

        class Unmasked(torch.nn.Module):
            def __init__(self, module: Any) -> None:
                super().__init__()
                self.module = module

            def forward(self, input_ids: Any) -> Any:
                return self.module(input_ids, None)

        example = torch.ones((2, 8), dtype=torch.int64)
        return openvino.convert_model(
            Unmasked(self.sentiment.module).eval(),
            example_input=example,
            input=[openvino.PartialShape([-1, -1])],
        )

    def _quantise(self, calibration: Sequence[np.ndarray]) -> Any:
        import logging

        import nncf
        import openvino

        nncf.set_log_level(logging.ERROR)
        plain = self.plain()
        return nncf.quantize(
            openvino.Core().read_model(plain.xml, plain.weights),
            nncf.Dataset([each[None].astype(np.int64) for each in calibration]),
            model_type=nncf.ModelType.TRANSFORMER,
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(calibration),
        )

    def _kept(self, key: str, make: Callable[[], Any]) -> Graph:
        folder = self.cache / key
        if not folder.exists():
            import openvino

            draft = self.cache / f"{key}.{secrets.token_hex(4)}"
            draft.mkdir(parents=True)
            try:
                with _silent():
                    openvino.save_model(make(), draft / "model.xml", compress_to_fp16=False)
                try:
                    draft.rename(folder)
                except OSError:
                    # Another process was faster, with the same content.
                    if not folder.exists():
                        raise
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return Graph(
            xml=(folder / "model.xml").read_bytes(), weights=(folder / "model.bin").read_bytes()
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Without the tracer's warnings and NNCF's bars, which go to a console of its own."""
    import contextlib
    import io
    import warnings

    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield


# --- the gate


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """Which engine was taken, and why.

    Attributes:
        name: The engine's.
        reason: In words.
        agreement: By engine tried, the share of the sample's texts with fp32's label.
        refused: By engine not taken, why.
        margin: Below it the int8 engine defers; None for others.
        deferred: The share of the sample that it deferred; None for others.
    """

    name: str
    reason: str
    agreement: Mapping[str, float]
    refused: Mapping[str, str]
    margin: float | None = None
    deferred: float | None = None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that makes an engine again in another process, without torch.

    Attributes:
        name: "fp32", "bf16" or "int8".
        graphs: The one that scores and, for int8, the one that it defers to.
        margin: See `Chosen`.
    """

    name: str
    graphs: tuple[Graph, ...]
    margin: float | None = None

    def engine(self, *, threads: int = 1) -> Engine:
        """The engine."""
        first = openvino_engine(self.name, self.graphs[0], threads=threads)
        if self.margin is None:
            return first
        sure = openvino_engine("bf16", self.graphs[1], threads=threads)
        return Deferring(name=self.name, quick=first, sure=sure, margin=self.margin)


def default_cache() -> Path:
    """Where converted models are kept: XDG_CACHE_HOME or ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "liftyard" / "sentiment-engines"


def choose(
    sentiment: Sentiment,
    sample_texts: Sequence[str],
    *,
    wanted: str = "auto",
    at_least: float = 0.998,
    cache: Path | None = None,
    threads: int = 1,
) -> tuple[Engine, Chosen]:
    """The quickest CPU engine whose labels agree with fp32's; see `recipe`, which decides."""
    made, chosen = recipe(sentiment, sample_texts, wanted=wanted, at_least=at_least, cache=cache)
    return made.engine(threads=threads), chosen


def recipe(
    sentiment: Sentiment,
    sample_texts: Sequence[str],
    *,
    wanted: str = "auto",
    at_least: float = 0.998,
    cache: Path | None = None,
) -> tuple[Recipe, Chosen]:
    """Decides which engine to take, by its agreement with torch in fp32 on a sample.

    The first 300 texts measure the ranges for int8, the others the agreement. What was decided is
    kept beside the graphs, so that the same sample and model are not tried twice.

    Args:
        sentiment: The model.
        sample_texts: Cleaned texts, typical of those to be scored; 1,500 are enough.
        wanted: "auto" tries int8, then bf16; "bf16" and "int8" try only that one. Whichever is
            refused, "fp32" is taken.
        at_least: Share of equal labels that an engine needs, above 0 and at most 1.
        cache: Folder for converted models; None for `default_cache`.

    Raises:
        EngineError: Another name or share, or no text.
        OSError: The cache can't be written.
    """
    if wanted not in ENGINES:
        raise EngineError(
            f"engine {wanted!r}: allowed are {', '.join(ENGINES)}{suggestion(wanted, ENGINES)}"
        )
    if not 0 < at_least <= 1:
        raise EngineError(f"agreement {at_least}: a share above 0 and at most 1")
    converted = Converted(sentiment=sentiment, cache=cache or default_cache())
    plain = Recipe(name="fp32", graphs=(converted.plain(),))
    if wanted == "fp32":
        return plain, Chosen(name="fp32", reason="fp32 was asked for", agreement={}, refused={})
    if not sample_texts:
        raise EngineError(f"engine {wanted!r} needs texts to be compared on; there is none")
    ids = sentiment.tokenize(sample_texts)
    chosen = _kept_choice(converted, ids, wanted, at_least)
    if chosen.name == "fp32":
        return plain, chosen
    if chosen.name == "bf16":
        return Recipe(name="bf16", graphs=plain.graphs), chosen
    graphs = (converted.quantised(ids[:CALIBRATION_TEXTS]), *plain.graphs)
    return Recipe(name="int8", graphs=graphs, margin=chosen.margin), chosen


def _kept_choice(
    converted: Converted, ids: Sequence[np.ndarray], wanted: str, at_least: float
) -> Chosen:
    of = hashlib.blake2b(f"{wanted} {at_least} {has_bf16()} {len(ids)}".encode(), digest_size=8)
    for each in ids:
        of.update(each.tobytes() + b";")
    file = converted.cache / f"{converted.digest}-{of.hexdigest()}.json"
    if file.exists():
        return Chosen(**json.loads(file.read_text(encoding="utf-8")))
    chosen = _tried(converted, ids, wanted, at_least)
    draft = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    draft.write_text(json.dumps(asdict(chosen)), encoding="utf-8")
    draft.replace(file)
    return chosen


def _tried(converted: Converted, ids: Sequence[np.ndarray], wanted: str, at_least: float) -> Chosen:
    calibration, rest = ids[:CALIBRATION_TEXTS], ids[CALIBRATION_TEXTS:]
    refused: dict[str, str] = {}
    # A small sample is compared whole; int8 then has no texts of its own, and isn't tried.
    enough = len(rest) >= GATE_TEXTS
    compared = rest if enough else ids
    reference = torch_engine(converted.sentiment).probabilities(compared)
    bf16 = openvino_engine("bf16", converted.plain())
    sure = bf16.probabilities(compared)
    shares = {"bf16": agreement(sure, reference)}
    if wanted in ("auto", "int8") and not enough:
        refused["int8"] = (
            f"{len(ids)} sample texts, and calibrating takes {CALIBRATION_TEXTS + GATE_TEXTS}"
        )
    elif wanted in ("auto", "int8"):
        quick = openvino_engine("int8", converted.quantised(calibration))
        found = quick.probabilities(compared)
        shares["int8 without deferring"] = agreement(found, reference)
        margin = deferral(found, sure, reference, at_least)
        deferred = margins(found) < margin
        found[deferred] = sure[deferred]
        shares["int8"] = agreement(found, reference)
        share = float(deferred.mean())
        if shares["int8"] < at_least:
            refused["int8"] = _too_low(shares["int8"], at_least)
        elif share > _DEFERRED_AT_MOST and wanted == "auto":
            refused["int8"] = f"{share:.0%} of the texts would be scored twice"
        else:
            about = Deferring(name="int8", quick=quick, sure=bf16, margin=margin).about
            return Chosen(
                name="int8",
                reason=f"{about} ({share:.1%} of them): labels equal fp32's in "
                f"{shares['int8']:.2%} of {len(compared)} texts, at least {at_least:.2%} asked",
                agreement=shares,
                refused=refused,
                margin=margin,
                deferred=share,
            )
    if wanted == "auto" or wanted == "bf16":
        if shares["bf16"] >= at_least:
            return Chosen(
                name="bf16",
                reason=f"{bf16.about}: labels equal fp32's in {shares['bf16']:.2%} of "
                f"{len(compared)} texts, at least {at_least:.2%} asked",
                agreement=shares,
                refused=refused,
            )
        refused["bf16"] = _too_low(shares["bf16"], at_least)
    said = "; ".join(f"{name} refused: {why}" for name, why in refused.items())
    return Chosen(name="fp32", reason=f"OpenVINO in f32; {said}", agreement=shares, refused=refused)


def _too_low(share: float, at_least: float) -> str:
    return f"labels equal fp32's in {share:.2%} of the sample, at least {at_least:.2%} asked"


def deferral(quick: np.ndarray, sure: np.ndarray, reference: np.ndarray, at_least: float) -> float:
    """The smallest margin below which to defer, so that half of the allowed disagreement is left.

    Half, since the margin is chosen on the texts that it is then judged by.

    Args:
        quick: Probabilities (n, labels) of the quick engine.
        sure: Those of the engine that it defers to.
        reference: Those of fp32.
        at_least: Share of equal labels that is asked.

    Returns:
        0 where nothing needs deferring; above 1 where all texts do.
    """
    apart = margins(quick)
    order = np.argsort(apart, kind="stable")
    label = reference.argmax(1)
    quick_wrong = (quick.argmax(1) != label)[order].astype(np.int64)
    sure_wrong = (sure.argmax(1) != label)[order].astype(np.int64)
    # Wrong labels left when the k least sure texts are deferred, k = 0 to n.
    left = np.concatenate([[0], np.cumsum(sure_wrong)]) + np.concatenate(
        [np.cumsum(quick_wrong[::-1])[::-1], [0]]
    )
    fits = np.flatnonzero(left <= _LEFT * (1 - at_least) * len(apart))
    at = int(fits[0]) if len(fits) else int(left.argmin())
    if at == 0:
        return 0.0
    return float(apart[order[at]]) if at < len(apart) else 2.0
