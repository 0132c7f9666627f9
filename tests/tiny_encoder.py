"""A random BERT of two layers and a few words, written as a Hugging Face folder."""

import random
from collections.abc import Sequence
from pathlib import Path

import polars as pl

GOOD, BAD, PLAIN = (
    ("great", "lovely", "happy", "perfect", "wonderful"),
    ("awful", "broken", "angry", "useless", "terrible"),
    ("box", "monday", "store", "invoice", "blue"),
)
FILLER = ("the", "parcel", "app", "is", "my", "coffee", "and", "price", "team", "this")


def write(folder: Path, *, words: Sequence[str] = (*GOOD, *BAD, *PLAIN, *FILLER)) -> Path:
    """The folder: config, weights and a tokenizer that knows these words."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    known = {word: place for place, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, special, strict=True))
    ).save_pretrained(str(folder))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(known),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        initializer_range=0.05,
    )
    BertModel(config).save_pretrained(str(folder))
    return folder


def labelled(rows: int, *, seed: int = 0) -> pl.DataFrame:
    """Texts whose label one word decides: text, label, language."""
    draw = random.Random(seed)
    kinds = {"positive": GOOD, "negative": BAD, "neutral": PLAIN}
    labels = [draw.choice(list(kinds)) for _ in range(rows)]
    texts = []
    for label in labels:
        words = [draw.choice(FILLER) for _ in range(draw.randint(1, 8))]
        words.insert(draw.randint(0, len(words)), draw.choice(kinds[label]))
        texts.append(" ".join(words))
    return pl.DataFrame({"text": texts, "label": labels, "language": ["en"] * rows})
