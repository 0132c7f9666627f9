from functools import partial

import numpy as np
import pytest

from cluster import estimators
from cluster.device import choose
from models.topics import TopicError, topics

WORDS = {"delivery": "parcel courier late", "taste": "coffee bitter cup", "app": "login screen app"}


def corpus(each: int = 30) -> tuple[list[str], np.ndarray, list[str], list[str]]:
    """Texts of three topics in two languages, with embeddings that are apart by both."""
    draw = np.random.default_rng(0)
    texts, rows, labels, languages = [], [], [], []
    for at, words in enumerate(WORDS.values()):
        for number in range(each + 10 * at):
            language = number % 2
            texts.append(
                " ".join(draw.permutation([*words.split(), "bardzo" if language else "the"]))
            )
            centre = np.zeros(16)
            centre[at] = 1.0
            centre[8 + language] = 4.0
            rows.append(centre + 0.05 * draw.standard_normal(16))
            labels.append("negative" if at == 0 else "positive")
            languages.append(("en", "pl")[language])
    return texts, np.array(rows, np.float32), labels, languages


@pytest.mark.parametrize("method", ["kmeans", "hdbscan"])
def test_topics_are_found_across_languages_and_named(method: str) -> None:
    texts, x, labels, languages = corpus()
    numbers, found = topics(
        texts, x, labels=labels, languages=languages, method=method, groups=3, least=8
    )
    kept = [topic for topic in found if topic.number >= 0]
    assert [topic.rows for topic in kept] == [50, 40, 30]
    assert set(kept[0].terms) == set(WORDS["app"].split())
    assert set(kept[2].name.split(", ")) == set(WORDS["delivery"].split())
    assert kept[2].sentiment == {"negative": 1.0, "positive": 0.0}
    assert all(numbers[place] == kept[1].number for place in kept[1].examples)
    assert numbers.tolist() == [2] * 30 + [1] * 40 + [0] * 50


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("method", ["kmeans", "hdbscan"])
def test_either_device_finds_the_same_topics(method: str, kind: str) -> None:
    if kind == "cuda" and choose("auto").kind != "cuda":
        pytest.skip(f"needs CUDA: {choose('auto').reason}")
    texts, x, _, languages = corpus()
    ours, _ = topics(texts, x, languages=languages, method=method, groups=3)
    made = {method: partial(getattr(estimators, method), choose(kind))}
    theirs, _ = topics(texts, x, languages=languages, method=method, groups=3, **made)
    np.testing.assert_array_equal(theirs, ours)


@pytest.mark.parametrize("method", ["kmeans", "hdbscan"])
def test_what_is_given_groups_by_its_method_alone(method: str) -> None:
    texts, x, _, languages = corpus()
    asked: list[str] = []

    def recorded(name: str, **how: object) -> object:
        asked.append(name)
        return getattr(estimators, name)(choose("cpu"), **how)

    given = {name: partial(recorded, name) for name in ("kmeans", "hdbscan")}
    topics(texts, x, languages=languages, method=method, groups=3, **given)
    assert asked == [method]


def test_without_languages_it_groups_by_language() -> None:
    texts, x, _, languages = corpus()
    numbers, _ = topics(texts, x, groups=2)
    assert len(set(zip(numbers.tolist(), languages, strict=True))) == 2


def test_texts_without_words_have_no_terms() -> None:
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    _, found = topics(["😀"] * 6, x, groups=2)
    assert [(topic.name, topic.terms) for topic in found] == [("topic 0", ()), ("topic 1", ())]
    assert found[0].sentiment == {}


def test_what_cannot_be_grouped_says_why() -> None:
    texts, x, labels, _ = corpus()
    with pytest.raises(TopicError, match="method 'lda'; allowed: kmeans, hdbscan"):
        topics(texts, x, method="lda")
    with pytest.raises(TopicError, match="120 texts and 119 labels"):
        topics(texts, x, labels=labels[1:])
    with pytest.raises(TopicError, match="2 texts for kmeans with 8"):
        topics(texts[:2], x[:2])
