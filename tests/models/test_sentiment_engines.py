"""Engines on a tiny random encoder: equal to fp32, order kept, refused where they disagree."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from models import sentiment
from models import sentiment_engines as engines
from models import sentiment_gate as gate
from models import sentiment_openvino as ov
from tests import tiny_encoder

# OpenVINO's Python package warns of its own deprecations when it is imported.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> sentiment.Sentiment:
    folder = tiny_encoder.write(tmp_path_factory.mktemp("encoder"))
    made = sentiment.new(str(folder), max_tokens=16)
    # Wide apart, as a trained head's logits are.
    with torch.no_grad():
        made.module.head.weight.mul_(60)
    return made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return tiny_encoder.labelled(600)["text"].to_list()


@pytest.fixture(scope="module")
def reference(model: sentiment.Sentiment, texts: list[str]) -> np.ndarray:
    return model.probabilities(texts)


def test_the_reference_engine_is_the_model(
    model: sentiment.Sentiment, texts: list[str], reference: np.ndarray
) -> None:
    found = engines.torch_engine(model).probabilities(model.tokenize(texts))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, reference, atol=1e-5)


@pytest.mark.parametrize(("name", "near"), [("fp32", 1e-5), ("bf16", 0.1)])
def test_openvino_is_near_fp32_in_input_order(
    model: sentiment.Sentiment,
    cache: Path,
    texts: list[str],
    reference: np.ndarray,
    name: str,
    near: float,
) -> None:
    graph = ov.Converted(sentiment=model, cache=cache).plain()
    engine = ov.openvino_engine(name, graph)
    ids = model.tokenize(texts)
    assert len({len(each) for each in ids}) > 1
    found = engine.probabilities(ids)
    np.testing.assert_allclose(found, reference, atol=near)
    np.testing.assert_allclose(engine.probabilities(ids[::-1])[::-1], found, atol=near)
    assert engine.probabilities([]).shape == (0, 3)


def test_torch_bf16_is_near_and_other_precisions_are_refused(
    model: sentiment.Sentiment, texts: list[str], reference: np.ndarray
) -> None:
    found = engines.torch_engine(model, "bf16").probabilities(model.tokenize(texts))
    np.testing.assert_allclose(found, reference, atol=0.1)
    with pytest.raises(engines.EngineError, match="'fp32' and 'bf16'"):
        engines.torch_engine(model, "int8")


def test_int8_agrees_as_declared_once_it_defers(
    model: sentiment.Sentiment, cache: Path, texts: list[str]
) -> None:
    sample = pl.Series(texts).unique(maintain_order=True).to_list()
    assert len(sample) >= gate.CALIBRATION_TEXTS + gate.GATE_TEXTS
    engine, chosen = gate.choose(model, sample, wanted="int8", at_least=0.9, cache=cache)
    assert chosen.name == engine.name == "int8", chosen
    assert chosen.agreement["int8"] >= 0.9
    assert chosen.agreement["int8"] >= chosen.agreement["int8 without deferring"]
    rest = sample[gate.CALIBRATION_TEXTS :]
    found = engine.probabilities(model.tokenize(rest))
    assert engines.agreement(found, model.probabilities(rest)) >= 0.9
    # The same choice again comes from the disk, with the same graphs.
    made = {each.name: each.stat().st_mtime_ns for each in cache.iterdir()}
    again = gate.recipe(model, sample, wanted="int8", at_least=0.9, cache=cache)[1]
    assert again == chosen
    assert {each.name: each.stat().st_mtime_ns for each in cache.iterdir()} == made


def test_an_engine_that_disagrees_is_refused_and_fp32_taken(
    model: sentiment.Sentiment, cache: Path, texts: list[str]
) -> None:
    # A head that looks along the direction in which texts differ least: rounding decides there.
    embedded = model.embeddings(texts)
    least = torch.from_numpy(np.linalg.eigh(np.cov(embedded.T))[1][:, 0].astype(np.float32))
    middle = torch.from_numpy(embedded.mean(axis=0))
    with torch.no_grad():
        kept = model.module.head.weight.clone(), model.module.head.bias.clone()
        sides = torch.tensor([[1.0], [-1.0], [0.0]])
        model.module.head.weight.copy_(sides * least)
        model.module.head.bias.copy_(-(model.module.head.weight @ middle))
    try:
        sample = list(dict.fromkeys(texts))[:250]
        engine, chosen = gate.choose(model, sample, at_least=1.0, cache=cache)
        assert chosen.name == engine.name == "fp32"
        assert chosen.agreement["bf16"] < 1
        assert set(chosen.refused) == {"int8", "bf16"}
        assert "250 sample texts" in chosen.refused["int8"]
        assert "bf16 refused: labels equal fp32's in" in chosen.reason
    finally:
        with torch.no_grad():
            model.module.head.weight.copy_(kept[0])
            model.module.head.bias.copy_(kept[1])


def test_other_weights_make_other_graphs(
    model: sentiment.Sentiment, tmp_path: Path, texts: list[str]
) -> None:
    first = ov.Converted(sentiment=model, cache=tmp_path)
    first.plain()
    with torch.no_grad():
        model.module.head.bias[0] += 1
    try:
        other = ov.Converted(sentiment=model, cache=tmp_path)
        assert other.digest != first.digest
        found = ov.openvino_engine("fp32", other.plain()).probabilities(model.tokenize(texts))
        np.testing.assert_allclose(found, model.probabilities(texts), atol=1e-5)
    finally:
        with torch.no_grad():
            model.module.head.bias[0] -= 1
    assert len(list(tmp_path.iterdir())) == 2


def test_deferral_takes_the_least_margin_that_leaves_half_of_what_is_allowed() -> None:
    # Margins 0.1 to 0.9; the quick engine is wrong at 0.1 and 0.2.
    apart = np.arange(1, 10) / 10
    quick = np.stack([0.5 + apart / 2, 0.5 - apart / 2], axis=1)
    reference = quick.copy()
    reference[:2] = reference[:2, ::-1]
    assert gate.deferral(quick, reference, reference, 0.99) == pytest.approx(0.3)
    # Two of nine may differ: half of that is one, so the text at 0.2 may stay wrong.
    assert gate.deferral(quick, reference, reference, 1 - 2 / 9) == pytest.approx(0.2)
    assert gate.deferral(quick, quick, quick, 1.0) == 0
    everything = gate.deferral(quick, reference, quick[:, ::-1], 0.99)
    assert (engines.margins(quick) < everything).sum() in (0, 2, 9)


def test_a_gpu_batch_is_padded_masked_and_put_back_in_order() -> None:
    def forward(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        assert ids.shape[1] % 8 == 0 and (ids[mask == 0] == 9).all()
        total = (ids * mask).sum(axis=1)
        return np.stack([total, -total], axis=1).astype(np.float32)

    engine = engines.Bucketed(
        name="bf16", about="", labels=2, forward=forward, pad_id=9, batch_tokens=32
    )
    ids = [np.full(n, 1, np.int32) for n in (3, 12, 8, 1, 20, 7)]
    totals = np.array([3, 12, 8, 1, 20, 7])
    expected = sentiment.softmax(np.stack([totals, -totals], axis=1).astype(np.float32))
    np.testing.assert_allclose(engine.probabilities(ids), expected)


@pytest.mark.gpu
def test_cuda_agrees_with_fp32(
    model: sentiment.Sentiment, texts: list[str], reference: np.ndarray
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    # So few tokens that batches are whole, and are recorded; then they are played again.
    engine = engines.cuda_engine(model, batch_tokens=64)
    for _ in range(2):
        found = engine.probabilities(model.tokenize(texts))
        np.testing.assert_allclose(found, reference, atol=0.1)


def test_distinct_texts_and_their_places() -> None:
    once, places = engines.distinct(pl.Series(["b", "a", "b", "b", "c"]))
    assert once.to_list() == ["b", "a", "c"]
    assert places.tolist() == [0, 1, 0, 0, 2]


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"wanted": "int4"}, "did you mean 'int8'"),
        ({"at_least": 1.5}, "a share above 0"),
        ({"wanted": "bf16"}, "needs texts"),
    ],
)
def test_faults_are_told(
    model: sentiment.Sentiment, cache: Path, how: dict[str, object], said: str
) -> None:
    with pytest.raises(engines.EngineError, match=said):
        gate.recipe(model, [], cache=cache, **how)  # type: ignore[arg-type]
