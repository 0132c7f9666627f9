"""Which engine scores: the quickest whose labels agree with torch's in float32 on a sample.

The quantised engine defers: where its two likeliest classes are close, the text is scored again in
bf16, since that is where its labels differ (a cascade, as in Viola and Jones 2001). Knows nothing
of files of texts or of how work is distributed.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from models.naming import suggestion
from models.sentiment import Sentiment
from models.sentiment_engines import (
    Deferring,
    Engine,
    EngineError,
    agreement,
    margins,
    torch_engine,
)
from models.sentiment_openvino import Converted, Graph, has_bf16, openvino_engine

ENGINES = ("auto", "fp32", "bf16", "int8")
# Of the sample, what the ranges of activations are measured on; the rest is for agreement.
CALIBRATION_TEXTS = 300
# An agreement of fewer texts says little.
GATE_TEXTS = 200
# Of the disagreement allowed, what deferring may leave on the sample that its margin comes from.
_LEFT = 0.5
# An engine that scores more texts than this twice is slower than bf16 alone.
_DEFERRED_AT_MOST = 0.4


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
