import numpy as np
import pytest
import torch

from models import sentiment
from models.sentiment_explain import ExplanationError, explain, fidelity, html, rank_correlation
from models.sentiment_schedule import Settings
from models.sentiment_training import fit
from tests import tiny_encoder

# Several threads on so small a model wait for each other most of the time.
torch.set_num_threads(1)

TEXT = "my coffee is awful and the parcel is blue"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> sentiment.Sentiment:
    folder = tmp_path_factory.mktemp("explained")
    new = sentiment.new(str(tiny_encoder.write(folder / "encoder")), max_tokens=16)
    settings = Settings(
        epochs=6.0, batch=16, learning_rate=5e-3, precision="fp32", freeze_words=False
    )
    return fit(new, tiny_encoder.labelled(240), None, settings, folder=folder / "fit").model


def test_the_parts_add_up_and_the_deciding_word_is_first(model: sentiment.Sentiment) -> None:
    found = explain(model, TEXT)
    assert found.label == "negative"
    assert found.completeness_error is not None
    assert found.completeness_error <= 0.05
    assert max(found.parts, key=lambda part: part.value).text == "awful"
    assert "".join(TEXT[part.start : part.end] for part in found.parts) == TEXT.replace(" ", "")
    ids = np.array([model.tokenizer.encode(TEXT).ids])
    masked = ids.copy()
    masked[0, 1:-1] = model.mask_id
    with torch.no_grad():
        logits = model.module(torch.from_numpy(np.concatenate([ids, masked]))).numpy()
    place = model.labels.index("negative")
    total = sum(part.value for part in found.parts)
    assert total == pytest.approx(logits[0, place] - logits[1, place], rel=0.05)


def test_more_points_are_taken_until_the_parts_add_up(model: sentiment.Sentiment) -> None:
    found = explain(model, TEXT, steps=1, tolerance=0.01)
    assert found.steps > 1
    assert found.completeness_error is not None
    assert found.completeness_error <= 0.01
    with pytest.raises(ExplanationError, match=r"add up to .* with 128 points"):
        explain(model, TEXT, tolerance=-1.0)


def test_occlusion_is_one_token_at_a_time_with_its_fidelity(model: sentiment.Sentiment) -> None:
    found = explain(model, TEXT, method="occlusion", label="negative")
    whole = model.logits([TEXT])[0]
    without = model.logits([TEXT.replace("awful", "[MASK]")])[0]
    place = model.labels.index("negative")
    awful = next(part for part in found.parts if part.text == "awful")
    assert awful.value == pytest.approx(whole[place] - without[place], abs=1e-4)
    gradients = explain(model, TEXT, label="negative")
    assert found.fidelity == rank_correlation(found.parts, gradients.parts)
    assert rank_correlation(gradients.parts, gradients.parts) == pytest.approx(1.0)
    assert -1 <= fidelity(model, [TEXT, "great coffee", "box"]) <= 1


def test_html_escapes_what_users_wrote(model: sentiment.Sentiment) -> None:
    text = 'great <script>alert("x")</script> coffee & box'
    page = html([explain(model, text)])
    assert "<script>" not in page
    assert "&lt;" in page
    assert "&amp;" in page
    assert page.count("<span ") == len(explain(model, text).parts)


def test_what_cannot_be_explained_says_why(model: sentiment.Sentiment) -> None:
    with pytest.raises(ExplanationError, match="no token"):
        explain(model, "")
    with pytest.raises(ExplanationError, match=r"did you mean 'occlusion'\?"):
        explain(model, TEXT, method="oclusion")
    with pytest.raises(ExplanationError, match=r"did you mean 'positive'\?"):
        explain(model, TEXT, label="positiv")
