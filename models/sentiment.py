"""Sentiment of short texts: any Hugging Face encoder, mean pooling and a linear head.

A model is a folder: the encoder as Hugging Face keeps it (`config.json`, `model.safetensors`,
`tokenizer.json`), the head beside it (`head.safetensors`), and `sentiment.json`: labels in order,
how many tokens are read, the rules of hygiene it was trained with, and the encoder it began as.
Knows nothing of how it is trained or scored fast; `logits` is the plain way that others are
compared with.
"""

import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from models.packaged_encoders import PACKAGED, EncoderError, packaged
from models.text import HYGIENE

LABELS = ("negative", "neutral", "positive")
_ABOUT = "sentiment.json"


class SentimentError(ValueError):
    """A folder or a setting isn't what a sentiment model takes; the message says what is."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Sentiment:
    """A sentiment model in memory, on the CPU unless its module was moved.

    Attributes:
        labels: Names of the classes, in the order of the logits.
        max_tokens: Tokens read of a text, special ones among them.
        hygiene: `models.text.HYGIENE` of the rules that its training texts were cleaned by.
        base: Name or folder of the encoder before training.
        module: torch module; `module(input_ids, attention_mask)` gives (n, labels) logits,
            `module.pooled(input_ids, attention_mask)` gives (n, width); ids int64 or int32 (n,
            tokens), the mask (n, tokens) or None where no row is padded. `module.encoder`,
            `module.head`.
        tokenizer: Of the library tokenizers, truncating and not padding.
        pad_id: Id for padding.
        mask_id: Id of the mask token, the baseline of explanations.
    """

    labels: tuple[str, ...]
    max_tokens: int
    hygiene: str
    base: str
    module: Any
    tokenizer: Any
    pad_id: int
    mask_id: int

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One array of ids a text: int32 (tokens,), special tokens included, truncated."""
        return [
            np.array(each.ids, dtype=np.int32)
            for each in self.tokenizer.encode_batch_fast(list(texts))
        ]

    def logits(self, texts: Sequence[str], *, batch_tokens: int = 2048) -> np.ndarray:
        """(n, labels) float32 in the module's own precision, by length, one text a row.

        Args:
            texts: Cleaned by `models.text.clean`.
            batch_tokens: Tokens in a batch at most, padding included.
        """
        return self._rows(self.module, texts, batch_tokens, self.module.head.out_features)

    def embeddings(self, texts: Sequence[str], *, batch_tokens: int = 2048) -> np.ndarray:
        """(n, width) float32: the mean over each text's tokens of the encoder's last states."""
        return self._rows(self.module.pooled, texts, batch_tokens, self.module.head.in_features)

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(n, labels) float32; rows add up to 1."""
        return softmax(self.logits(texts))

    def _rows(
        self, forward: Any, texts: Sequence[str], batch_tokens: int, width: int
    ) -> np.ndarray:
        import torch

        ids = self.tokenize(texts)
        was_training = self.module.training
        self.module.eval()
        device = next(self.module.parameters()).device
        rows: list[np.ndarray] = [np.empty(0)] * len(ids)
        with torch.inference_mode():
            for places in batches([len(each) for each in ids], batch_tokens):
                batch, mask = padded([ids[place] for place in places], self.pad_id)
                tokens = torch.from_numpy(batch).to(device)
                covered = None if mask is None else torch.from_numpy(mask).to(device)
                out = forward(tokens, covered).float().cpu().numpy()
                for place, row in zip(places, out, strict=True):
                    rows[place] = row
        self.module.train(was_training)
        return np.stack(rows) if rows else np.empty((0, width), np.float32)

    def save(self, folder: Path, *, encoder: bool = True) -> None:
        """Writes the folder, aside and then renamed; a model that is there is replaced.

        Args:
            folder: Its parent is there or is made.
            encoder: Whether the encoder's weights are written. A packaged encoder of which only
                the head was trained needs none of them: `load` takes them from its package.

        Raises:
            SentimentError: The encoder would be left out and isn't a packaged one.
            OSError: It can't be written.
        """
        if not encoder and self.base not in PACKAGED:
            raise SentimentError(
                f"encoder {self.base!r} isn't packaged ({', '.join(PACKAGED)}); save it with the "
                "model"
            )
        from safetensors.torch import save_file

        draft = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
        draft.mkdir(parents=True)
        try:
            if encoder:
                with _quiet():
                    self.module.encoder.save_pretrained(str(draft))
            head = {name: each.contiguous() for name, each in self.module.head.state_dict().items()}
            save_file(head, str(draft / "head.safetensors"))
            _transformers_tokenizer(self).save_pretrained(str(draft))
            about = {
                "labels": list(self.labels),
                "max_tokens": self.max_tokens,
                "hygiene": self.hygiene,
                "base": self.base,
            }
            (draft / _ABOUT).write_text(json.dumps(about, indent=2), encoding="utf-8")
            if folder.exists():
                old = folder.with_name(f"{draft.name}.old")
                folder.rename(old)
                draft.rename(folder)
                shutil.rmtree(old)
            else:
                draft.rename(folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def load(folder: Path) -> Sentiment:
    """A model that `save` wrote.

    Raises:
        SentimentError: The folder holds none, or its texts were cleaned by other rules than ours.
        OSError: A file of it can't be read.
    """
    from safetensors.torch import load_file

    if not (folder / _ABOUT).exists():
        raise SentimentError(f"{folder} is no sentiment model: it has no {_ABOUT}")
    about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    if about["hygiene"] != HYGIENE:
        raise SentimentError(
            f"{folder} was trained on texts cleaned by rules {about['hygiene']!r}, and these are "
            f"{HYGIENE!r}; train it again"
        )
    whole = (folder / "config.json").exists()
    model = new(
        str(folder) if whole else about["base"],
        labels=about["labels"],
        max_tokens=about["max_tokens"],
        base=about["base"],
    )
    model.module.head.load_state_dict(load_file(str(folder / "head.safetensors")))
    model.module.eval()
    return model


def new(
    encoder: str,
    *,
    labels: Sequence[str] = LABELS,
    max_tokens: int = 64,
    seed: int = 0,
    base: str | None = None,
) -> Sentiment:
    """An encoder with a head that isn't trained yet, in float32.

    Args:
        encoder: One of `models.packaged_encoders.PACKAGED`, a Hugging Face folder, or a name on
            the hub.
        labels: At least two.
        max_tokens: From 8 to what the encoder has positions for.
        seed: Of the head's weights.
        base: What to record as the encoder's name; None for `encoder`.

    Raises:
        SentimentError: Too few labels, or max_tokens out of range.
        EncoderError: No such encoder, here or on the hub.
    """
    from transformers import AutoModel, AutoTokenizer

    if len(set(labels)) < 2 or len(set(labels)) < len(labels):
        raise SentimentError(f"labels {list(labels)}: give at least two, each once")
    source = str(packaged(encoder)) if encoder in PACKAGED else encoder
    try:
        with _quiet():
            body = AutoModel.from_pretrained(source, dtype="float32")
            kept = AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"encoder {encoder!r} can't be loaded: give one of {', '.join(PACKAGED)}, a Hugging "
            f"Face folder, or a name on its hub ({str(error).splitlines()[0]})"
        ) from error
    if getattr(body, "pooler", None) is not None:
        body.pooler = None
    positions = int(getattr(body.config, "max_position_embeddings", 512))
    if not 8 <= max_tokens <= positions:
        raise SentimentError(f"max_tokens {max_tokens}: from 8 to the encoder's {positions}")
    tokenizer = kept.backend_tokenizer
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    pad, mask = kept.pad_token_id, kept.mask_token_id
    model = Sentiment(
        labels=tuple(labels),
        max_tokens=max_tokens,
        hygiene=HYGIENE,
        base=base or encoder,
        module=_classifier()(body, len(labels), seed),
        tokenizer=tokenizer,
        pad_id=0 if pad is None else pad,
        # An encoder without a mask token: padding says as little.
        mask_id=(0 if pad is None else pad) if mask is None else mask,
    )
    return replace(model, module=model.module.eval())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars, and its list of weights that a folder lacks: the pooler's."""
    from transformers.utils import logging as transformers_logging

    logging: Any = transformers_logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@cache
def _classifier() -> Any:
    """The module's class; made once, since torch is imported only where a model is."""
    import torch
    from torch import nn

    class Classifier(nn.Module):
        """Mean over the tokens of the encoder's last states, then dropout and a linear layer."""

        def __init__(self, encoder: Any, labels: int, seed: int) -> None:
            super().__init__()
            self.encoder = encoder
            self.dropout = nn.Dropout(0.1)
            self.head = nn.Linear(encoder.config.hidden_size, labels)
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                self.head.weight.normal_(0, 0.02, generator=generator)
                self.head.bias.zero_()

        def pooled(
            self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None
        ) -> Any:
            states = self.encoder(
                input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds
            ).last_hidden_state
            if attention_mask is None:
                return states.mean(1)
            weight = attention_mask.to(states.dtype).unsqueeze(-1)
            return (states * weight).sum(1) / weight.sum(1)

        def forward(
            self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None
        ) -> Any:
            pooled = self.pooled(input_ids, attention_mask, inputs_embeds)
            return self.head(self.dropout(pooled))

    return Classifier


def _transformers_tokenizer(model: Sentiment) -> Any:
    """The tokenizer for transformers, so that its own pipelines read the folder too."""
    from transformers import PreTrainedTokenizerFast

    said = {
        "pad_token": model.tokenizer.id_to_token(model.pad_id),
        "mask_token": model.tokenizer.id_to_token(model.mask_id),
    }
    for name, known in (
        ("unk_token", ("[UNK]", "<unk>")),
        ("cls_token", ("[CLS]", "<s>")),
        ("sep_token", ("[SEP]", "</s>")),
    ):
        for each in known:
            if model.tokenizer.token_to_id(each) is not None:
                said[name] = each
    backend: Any = PreTrainedTokenizerFast
    return backend(tokenizer_object=model.tokenizer, model_max_length=model.max_tokens, **said)


def batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of texts by length, longest first, so that little is padded.

    Args:
        lengths: Tokens of each text.
        batch_tokens: Rows times the longest of a batch, at most; a single longer text is a batch.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    start = 0
    while start < len(order):
        rows = max(1, batch_tokens // max(1, lengths[order[start]]))
        yield [int(place) for place in order[start : start + rows]]
        start += rows


def padded(ids: Sequence[np.ndarray], pad_id: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(n, longest) int64 ids and mask; the mask is None where all are equally long."""
    longest = max(len(each) for each in ids)
    if all(len(each) == longest for each in ids):
        return np.stack(ids).astype(np.int64), None
    batch = np.full((len(ids), longest), pad_id, np.int64)
    mask = np.zeros((len(ids), longest), np.int64)
    for row, each in enumerate(ids):
        batch[row, : len(each)] = each
        mask[row, : len(each)] = 1
    return batch, mask


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of logits (n, labels), float32."""
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    found: np.ndarray = shifted / shifted.sum(axis=1, keepdims=True)
    return found
