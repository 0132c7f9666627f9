"""What texts are about: embeddings grouped, groups named by their terms, sentiment by group.

Embeddings come from the same encoder that tells sentiment. They are centred language by language
where languages are given, since otherwise a multilingual encoder groups by language first. Groups
are k-means' or HDBSCAN's; names are the terms with the highest class-based TF-IDF (Grootendorst
2022). Texts must be masked: names and numbers would else become terms.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

METHODS = ("kmeans", "hdbscan")
# Words that tell nothing of a topic; English ones are scikit-learn's.
_STOP_PL = (
    "a aby ale ani bardzo bez bo by był była było były być chyba ci co czy da dla do dość dużo "
    "gdy gdzie go ich ile im inne ja jak jako jakoś je jednak jego jej jest jestem jeszcze już "
    "kiedy kto która które który ma mają mam masz mi mnie mną może można mój moja moje na nad nam "
    "nas nasz nawet nic nie niej nim niż no o od on ona one oni ono oraz po pod poza przed przez "
    "przy raz są się sobie swoje ta tak taka taki takie tam te tego tej ten też to trochę tu tutaj "
    "tych tylko tym u w we więc wszystko z za ze że żeby znowu dziś jutro wczoraj user http email "
    "phone just really got get don ve ll didn doesn isn"
)
# Components that HDBSCAN sees: density means little in hundreds of dimensions.
_COMPONENTS = 15


class TopicError(ValueError):
    """Texts can't be grouped as asked; the message says what is allowed."""


@dataclass(frozen=True, kw_only=True)
class Topic:
    """A group of texts.

    Attributes:
        number: From 0, the largest first; -1 holds what HDBSCAN leaves outside of groups.
        name: Its three most distinctive terms.
        terms: Distinctive terms, the most first.
        rows: Texts in it.
        examples: Places of the texts nearest to its centre.
        sentiment: Share of each label; empty where no labels are given.
    """

    number: int
    name: str
    terms: tuple[str, ...]
    rows: int
    examples: tuple[int, ...]
    sentiment: dict[str, float]


def sklearn_kmeans(*, clusters: int, seed: int, restarts: int) -> Any:
    """An untrained k-means; another of the same arguments may take its place in `topics`."""
    from sklearn.cluster import KMeans

    return KMeans(clusters, n_init=restarts, random_state=seed)


def sklearn_hdbscan(*, least: int) -> Any:
    """An untrained HDBSCAN; another of the same argument may take its place in `topics`."""
    from sklearn.cluster import HDBSCAN

    return HDBSCAN(min_cluster_size=least, copy=True)


def topics(
    texts: Sequence[str],
    embeddings: np.ndarray,
    *,
    labels: Sequence[str] | None = None,
    languages: Sequence[str] | None = None,
    method: str = "kmeans",
    groups: int = 8,
    least: int = 10,
    seed: int = 0,
    kmeans: Callable[..., Any] = sklearn_kmeans,
    hdbscan: Callable[..., Any] = sklearn_hdbscan,
) -> tuple[np.ndarray, list[Topic]]:
    """Groups texts.

    Args:
        texts: Cleaned by `models.text.clean`.
        embeddings: (n, width) float32, a row a text.
        labels: A sentiment a text; None leaves `Topic.sentiment` empty.
        languages: A language a text; None doesn't centre.
        method: "kmeans" puts every text in one of `groups`; "hdbscan" finds how many there are,
            of at least `least` texts, and leaves outliers out.
        groups: Of k-means.
        least: Of HDBSCAN.
        seed: Of k-means' starts.
        kmeans: Makes what groups by "kmeans"; cuML's computes on a GPU.
        hdbscan: The same for "hdbscan".

    Returns:
        (n,) int64 topic numbers, and the topics by number, -1 last.

    Raises:
        TopicError: The method isn't known, lengths disagree, or there are too few texts.
    """
    if method not in METHODS:
        raise TopicError(f"method {method!r}; allowed: {', '.join(METHODS)}")
    for name, given in (("embeddings", embeddings), ("labels", labels), ("languages", languages)):
        if given is not None and len(given) != len(texts):
            raise TopicError(f"{len(texts)} texts and {len(given)} {name}; give one a text")
    needed = groups if method == "kmeans" else least
    if len(texts) < needed or needed < 2:
        raise TopicError(
            f"{len(texts)} texts for {method} with {needed}: give at least as many texts as that, "
            "and 2 or more"
        )
    x = _centred(embeddings, languages)
    if method == "kmeans":
        grouped = kmeans(clusters=groups, seed=seed, restarts=5).fit(x).labels_
    else:
        grouped = hdbscan(least=least).fit(_fewer(x, seed)).labels_
    found = _ordered(grouped)
    numbers = [*range(found.max() + 1), *([-1] if (found == -1).any() else [])]
    named = distinctive_terms(texts, found, numbers)
    return found, [
        _topic(number, found, x, named[place], labels) for place, number in enumerate(numbers)
    ]


def _topic(
    number: int,
    found: np.ndarray,
    x: np.ndarray,
    terms: tuple[str, ...],
    labels: Sequence[str] | None,
) -> Topic:
    inside = np.flatnonzero(found == number)
    distance = ((x[inside] - x[inside].mean(axis=0)) ** 2).sum(axis=1)
    shares: dict[str, float] = {}
    if labels is not None:
        told = np.asarray(labels)[inside]
        shares = {label: float((told == label).mean()) for label in sorted(set(labels))}
    name = ", ".join(terms[:3]) or f"topic {number}"
    return Topic(
        number=number,
        name=name if number >= 0 else "outside of topics",
        terms=terms,
        rows=len(inside),
        examples=tuple(int(place) for place in inside[np.argsort(distance, kind="stable")[:3]]),
        sentiment=shares,
    )


def _centred(embeddings: np.ndarray, languages: Sequence[str] | None) -> np.ndarray:
    """Unit length, then without each language's mean, then unit length again."""
    x = _unit(embeddings.astype(np.float32))
    if languages is not None:
        told = np.asarray(languages)
        for language in set(languages):
            x[told == language] -= x[told == language].mean(axis=0)
        x = _unit(x)
    return x


def _unit(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    return found


def _fewer(x: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.decomposition import PCA

    found: np.ndarray = PCA(min(_COMPONENTS, *x.shape), random_state=seed).fit_transform(x)
    return found


def _ordered(found: np.ndarray) -> np.ndarray:
    """Renumbered by size, the largest 0; -1 stays."""
    numbers, rows = np.unique(found[found >= 0], return_counts=True)
    renamed = {int(numbers[old]): new for new, old in enumerate(np.argsort(-rows, kind="stable"))}
    return np.array([renamed.get(int(number), -1) for number in found], dtype=np.int64)


def distinctive_terms(
    texts: Sequence[str], found: np.ndarray, numbers: Sequence[int], *, most: int = 6
) -> list[tuple[str, ...]]:
    """Each group's terms by class-based TF-IDF: its share of the group's words, times
    log(1 + mean words a group / times the word occurs in all groups).

    Args:
        texts: All of them.
        found: Group of each.
        numbers: The groups, in the order of what is returned.
        most: Terms a group.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS, CountVectorizer

    joined = [
        " ".join(texts[at] for at in np.flatnonzero(found == number).tolist()) for number in numbers
    ]
    counter = CountVectorizer(
        stop_words=sorted(ENGLISH_STOP_WORDS | set(_STOP_PL.split())),
        token_pattern=r"(?u)\b[^\W\d_]{3,}\b",
    )
    try:
        counts = counter.fit_transform(joined).toarray().astype(np.float64)
    except ValueError:
        # No word is left besides stop words; a topic of emojis has no terms.
        return [()] * len(numbers)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    score = share * np.log1p(counts.sum() / len(numbers) / counts.sum(axis=0))
    words = counter.get_feature_names_out()
    return [
        tuple(str(words[at]) for at in np.argsort(-row, kind="stable")[:most] if row[at] > 0)
        for row in score
    ]
