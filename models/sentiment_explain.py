"""Which words made a text's sentiment: integrated gradients, and occlusion beside it.

Integrated gradients (Sundararajan, Taly, Yan 2017) from the text with each word masked to the text
itself: the parts add up to the difference of the two logits, which is checked for every text.
Occlusion masks one token at a time; it is faster and less faithful, so that it comes with its rank
correlation to integrated gradients. Attention isn't offered: it doesn't explain a decision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import numpy as np

from models.naming import suggestion
from models.sentiment import Sentiment, softmax

METHODS = ("integrated_gradients", "occlusion")
_MOST_STEPS = 128
# Below this many logits between text and baseline, an error relative to it says little.
_LEAST_DIFFERENCE = 0.1


class ExplanationError(ValueError):
    """A text can't be explained; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """A token's share of a decision.

    Attributes:
        text: As it stands in the explained text.
        start: Its first character's place.
        end: After its last character.
        value: Logits that it adds to the label's; below 0 it speaks against.
    """

    text: str
    start: int
    end: int
    value: float


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Why a text got a label.

    Attributes:
        text: As it was scored, cleaned.
        label: The explained one.
        probability: Of the label.
        method: Out of `METHODS`.
        parts: In the text's order; special tokens left out.
        completeness_error: Integrated gradients: how far the parts' sum is from the difference
            between text and baseline, relative to it (0.01 is one per cent). None for occlusion.
        steps: Points of the integral; forward passes of occlusion.
        fidelity: Occlusion: rank correlation of its values with those of integrated gradients,
            from -1 to 1; None where not measured.
    """

    text: str
    label: str
    probability: float
    method: Literal["integrated_gradients", "occlusion"]
    parts: tuple[Part, ...]
    completeness_error: float | None
    steps: int
    fidelity: float | None = None


def explain(
    model: Sentiment,
    text: str,
    *,
    label: str | None = None,
    method: str = "integrated_gradients",
    steps: int = 16,
    tolerance: float = 0.05,
) -> Explanation:
    """Explains one text.

    Args:
        model: Any device; in evaluation mode.
        text: Cleaned by `models.text.clean`.
        label: Which to explain; None for the most likely one.
        method: Out of `METHODS`; with "occlusion" its fidelity is measured too.
        steps: Points of the integral (Gauss and Legendre's); doubled until the parts add up.
        tolerance: Highest completeness error.

    Raises:
        ExplanationError: The text has no token, the method or label isn't known, or the parts
            don't add up with 128 points.
    """
    if method not in METHODS:
        raise ExplanationError(
            f"method {method!r}; allowed: {', '.join(METHODS)}{suggestion(method, METHODS)}"
        )
    if label is not None and label not in model.labels:
        raise ExplanationError(
            f"label {label!r}; allowed: {', '.join(model.labels)}{suggestion(label, model.labels)}"
        )
    gradients = _integrated_gradients(model, text, label, steps, tolerance)
    if method == "integrated_gradients":
        return gradients
    occluded = _occlusion(model, text, gradients.label)
    return Explanation(
        **{**vars(occluded), "fidelity": rank_correlation(occluded.parts, gradients.parts)}
    )


def _integrated_gradients(
    model: Sentiment, text: str, label: str | None, steps: int, tolerance: float
) -> Explanation:
    import torch

    ids, places, spans = _tokens(model, text)
    device = next(model.module.parameters()).device
    tokens = torch.tensor(ids, device=device).unsqueeze(0)
    masked = tokens.clone()
    masked[0, places] = model.mask_id
    embed = model.module.encoder.get_input_embeddings()
    with torch.no_grad():
        end, start = embed(tokens), embed(masked)
        logits = model.module(None, None, torch.cat([end, start])).float().cpu().numpy()
    chosen = int(logits[0].argmax()) if label is None else model.labels.index(label)
    difference = float(logits[0, chosen] - logits[1, chosen])
    while True:
        at, weights = _points(steps)
        line = start + torch.tensor(at, device=device).view(-1, 1, 1) * (end - start)
        line.requires_grad_(True)
        out = model.module(None, None, line)[:, chosen].sum()
        (slopes,) = torch.autograd.grad(out, line)
        mean = (slopes * torch.tensor(weights, device=device).view(-1, 1, 1)).sum(0)
        values = ((end - start)[0] * mean).sum(-1).detach().float().cpu().numpy()
        error = abs(float(values.sum()) - difference) / max(abs(difference), _LEAST_DIFFERENCE)
        if error <= tolerance:
            break
        if steps >= _MOST_STEPS:
            raise ExplanationError(
                f"the parts of {text[:60]!r} add up to {values.sum():.3f} and should to "
                f"{difference:.3f} logits, with {steps} points; ask for occlusion instead, or "
                f"allow more than tolerance={tolerance}"
            )
        steps *= 2
    return Explanation(
        text=text,
        label=model.labels[chosen],
        probability=float(softmax(logits[:1])[0, chosen]),
        method="integrated_gradients",
        parts=_valued(text, spans, values[places]),
        completeness_error=error,
        steps=steps,
    )


def _points(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Places in (0, 1) and weights that add up to 1; exact for polynomials below 2 * steps."""
    at, weights = np.polynomial.legendre.leggauss(steps)
    return ((at + 1) / 2).astype(np.float32), (weights / 2).astype(np.float32)


def _occlusion(model: Sentiment, text: str, label: str, rows: int = 64) -> Explanation:
    import torch

    ids, places, spans = _tokens(model, text)
    chosen = model.labels.index(label)
    variants = np.tile(np.array(ids), (len(places) + 1, 1))
    variants[np.arange(1, len(variants)), places] = model.mask_id
    device = next(model.module.parameters()).device
    with torch.inference_mode():
        # All are of one length, so that none needs a mask.
        logits = np.concatenate(
            [
                model.module(torch.from_numpy(variants[at : at + rows]).to(device)).float().cpu()
                for at in range(0, len(variants), rows)
            ]
        )
    return Explanation(
        text=text,
        label=label,
        probability=float(softmax(logits[:1])[0, chosen]),
        method="occlusion",
        parts=_valued(text, spans, logits[0, chosen] - logits[1:, chosen]),
        completeness_error=None,
        steps=len(variants),
    )


def _tokens(model: Sentiment, text: str) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """Ids, the places of those that aren't special, and their characters in the text."""
    encoded: Any = model.tokenizer.encode(text)
    places = [at for at, special in enumerate(encoded.special_tokens_mask) if not special]
    if not places:
        raise ExplanationError(f"text {text!r} has no token to explain; give a text with words")
    return encoded.ids, places, [encoded.offsets[at] for at in places]


def _valued(text: str, spans: Sequence[tuple[int, int]], values: np.ndarray) -> tuple[Part, ...]:
    return tuple(
        Part(text=text[start:end], start=start, end=end, value=value)
        for (start, end), value in zip(spans, values.tolist(), strict=True)
    )


def rank_correlation(one: Sequence[Part], other: Sequence[Part]) -> float:
    """Spearman's, of the values of two explanations of one text; 1.0 for a single token."""
    from scipy.stats import rankdata

    if len(one) < 2:
        return 1.0
    a, b = (rankdata([part.value for part in parts]) for parts in (one, other))
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else 0.0


def fidelity(model: Sentiment, texts: Sequence[str]) -> float:
    """The mean rank correlation of occlusion with integrated gradients, over texts."""
    found = [explain(model, text, method="occlusion").fidelity for text in texts]
    return float(np.mean([each for each in found if each is not None]))


def html(explanations: Sequence[Explanation]) -> str:
    """A fragment of HTML: each text with its tokens shaded, green for the label, red against.

    What users wrote is escaped; nothing of it is markup.
    """
    return "\n".join(_one(explanation) for explanation in explanations)


def _one(explanation: Explanation) -> str:
    most = max((abs(part.value) for part in explanation.parts), default=0.0) or 1.0
    pieces, at = [], 0
    for part in explanation.parts:
        pieces.append(escape(explanation.text[at : part.start]))
        colour = "46,125,50" if part.value >= 0 else "198,40,40"
        pieces.append(
            f'<span style="background:rgba({colour},{0.75 * abs(part.value) / most:.2f})" '
            f'title="{part.value:+.3f}">{escape(explanation.text[part.start : part.end])}</span>'
        )
        at = max(at, part.end)
    pieces.append(escape(explanation.text[at:]))
    if explanation.completeness_error is not None:
        checked = f"completeness error {explanation.completeness_error:.1%}"
    elif explanation.fidelity is not None:
        checked = f"rank correlation with integrated gradients {explanation.fidelity:.2f}"
    else:
        checked = "fidelity not measured"
    method = explanation.method.replace("_", " ")
    return (
        f'<p class="explanation"><b>{escape(explanation.label)}</b> '
        f"{explanation.probability:.0%}: {''.join(pieces)} <small>({method}, {checked})</small></p>"
    )
