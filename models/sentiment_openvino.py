"""A sentiment model in OpenVINO: converted and quantised once, kept on disk, run in a precision.

Dynamic int8 isn't offered: it agreed with fp32 in 95 to 96 % of texts.
"""

import hashlib
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from models.sentiment import Sentiment
from models.sentiment_engines import ByLength, Engine


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
