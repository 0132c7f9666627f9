import polars as pl
import pytest

from models.text import TextError, clean, drawn


def one(text: str | None, **how: int) -> dict[str, str]:
    return clean(pl.Series("text", [text], dtype=pl.String), **how).row(0, named=True)


@pytest.mark.parametrize(
    ("raw", "masked"),
    [
        ("thanks @john.doe and @ania!", "thanks @user and @user!"),
        ("write to anna.reed+shop@mail.example.org now", "write to <email> now"),
        ("see https://shop.example/a?b=1&mail=x@y.pl ok", "see http ok"),
        ("www.sklep.pl/oferta oraz sklep.pl", "http oraz http"),
        ("call +48 601 234 567", "call <phone>"),
        ("call 601-234-567 or (022) 345 67 89", "call <phone> or <phone>"),
        ("tel. 22 345 67 89", "tel. <phone>"),
        ("a \t b\n\nc", "a b c"),
        ("great 😍👍🏽", "great 😍👍🏽"),
        ("it cost 1200 on 2026-11-24", "it cost 1200 on 2026-11-24"),
    ],
)
def test_what_identifies_is_masked_and_nothing_else(raw: str, masked: str) -> None:
    assert one(raw)["text"] == masked


@pytest.mark.parametrize(
    ("raw", "outcome"),
    [
        ("fine", "ok"),
        ("👍", "ok"),
        (":)", "ok"),
        (None, "empty"),
        ("  \n", "empty"),
        ("12345 / 67", "not_text"),
        ("601 234 567", "not_text"),
        ("\ufffd\ufffd\ufffd\ufffd a", "not_text"),
        ("word " * 1000, "truncated"),
    ],
)
def test_each_text_has_an_outcome(raw: str | None, outcome: str) -> None:
    found = one(raw)
    assert found["outcome"] == outcome
    assert bool(found["text"]) == (outcome in ("ok", "truncated"))


def test_a_long_text_is_cut_where_asked() -> None:
    assert one("word " * 20, max_characters=9)["text"] == "word word"


def test_numbers_and_bytes_are_read_and_lists_refused() -> None:
    assert clean(pl.Series([1.5, None])).get_column("outcome").to_list() == ["not_text", "empty"]
    raw = clean(pl.Series([b"dobrze", b"\xff\xfe"]))
    assert raw["outcome"].to_list() == ["ok", "not_text"]
    with pytest.raises(TextError, match="'tags' is List"):
        clean(pl.Series("tags", [["a"]]))


def test_cleaning_what_is_clean_changes_nothing() -> None:
    raw = pl.Series(["@a mail b@c.pl www.d.com 601234567 😀", "nic  takiego", None])
    once = clean(raw)
    assert clean(once["text"])["text"].to_list() == once["text"].to_list()


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The parcel was late again", "en"),
        ("great product", "en"),
        ("Paczka znowu się spóźniła", "pl"),
        ("nie polecam tego sklepu", "pl"),
        ("Das ist nicht gut und sehr teuer", "other"),
        ("Очень хорошо", "other"),
        ("😀", "other"),
    ],
)
def test_language(text: str, language: str) -> None:
    assert one(text)["language"] == language


def test_equal_texts_fall_on_one_side() -> None:
    found = drawn(pl.Series(["Polecam.", "  polecam. ", "Nie polecam."])).to_list()
    assert found[0] == found[1] != found[2]
    many = drawn(pl.Series([f"text {at}" for at in range(2000)]))
    assert 0.4 < (many < 0.5).mean() < 0.6
