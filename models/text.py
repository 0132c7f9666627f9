"""Text hygiene: what identifies a person is masked, odd input gets an outcome, language is told.

Everything is a polars expression, so that a million comments are cleaned at once on every core.
Cleaning what is clean changes nothing. `HYGIENE` names these rules: a model stores it, and scores
only what was cleaned by the same ones; a table that ingest masked is made anew under others.
Emojis stay, since they carry sentiment.

Masks follow TweetEval (Barbieri et al. 2020) where it has them: `@user` and `http`. What isn't
known: names of people in running text, and addresses.
"""

import hashlib

import polars as pl

HYGIENE = "1"

USER, URL, EMAIL, PHONE = "@user", "http", "<email>", "<phone>"

_DOMAINS = "com|pl|net|org|eu|io|co|info|shop|store|de|uk|fr|app|me"
# In this order: an address may hold an e-mail, an e-mail a domain, and all of them an @ or digits.
_MASKS = (
    (r"(?i)\b(?:https?://|www\.)[^\s<>\"]+", URL),
    (r"(?i)[\w.+-]+@[\w-]+(?:\.[\w-]+)+", EMAIL),
    (rf"(?i)\b(?:[a-z0-9-]+\.)+(?:{_DOMAINS})(?:/[^\s<>\"]*|\b)", URL),
    (r"(?:\+|\b00)\d{1,3}(?:[\s.-]?\(?\d{2,4}\)?){2,5}\b", PHONE),
    (r"\(\d{2,3}\)\s?\d{3}[\s.-]?\d{2}[\s.-]?\d{2}\b", PHONE),
    (r"\b\d{3}[\s.-]\d{3}[\s.-]\d{3,4}\b", PHONE),
    (r"\b\d{2}[\s-]\d{3}[\s-]\d{2}[\s-]\d{2}\b", PHONE),
    # Nine digits and more without a space: an order number looks the same, and is masked too.
    (r"\b\d{9,15}\b", PHONE),
    (r"@\w+(?:[.@]\w+)*", USER),
)
_LETTER = r"\p{L}"
_EMOJI = r"\p{Extended_Pictographic}"
# Digits, # and * count as emojis in Unicode's wider property; this one leaves them out.
_EMOTICON = r"[:;=8xX]['-]?[)(DPp3/\\|]|<3"
_UNREADABLE = r"[\p{Cc}\p{Co}\p{Cn}\x{FFFD}]"

_PL_LETTERS = r"[ąćęłńśźż]"
_PL_WORDS = (
    "nie|się|sie|jest|że|ze|na|ale|jak|tak|już|juz|tylko|bardzo|dla|od|po|czy|są|był|była|było|"
    "będzie|przez|mnie|mi|mam|masz|ma|mają|polecam|co|tym|tego|ta|te|tej|który|która|które|"
    "oraz|jestem|za|przy|bez|pod|nad|więc|gdy|kiedy|jeszcze|może|wszystko|dziękuję|dzień"
)
_PL_PAIRS = r"cz|sz|rz|dz|zy|wy|ij|ów|owa|ego|ki\b|nia|nie|je\b|wie|śc|ść"
_EN_WORDS = (
    "the|and|is|are|was|were|you|your|it|it's|this|that|these|with|for|of|in|not|don't|i'm|i've|"
    "have|has|had|my|we|they|will|would|can|can't|just|very|so|but|what|when|at|be|been|from|"
    "how|all|out|if|an|as|me|get|got|no|who|why|or|their|our|she|he|his|her|never"
)
_EN_PAIRS = r"th|oo|ee|ck|gh|wh|qu|ea|ou|sh|ing\b|ly\b|ed\b|ve\b|er\b|ll|ss|tion"
_OTHER_LETTERS = r"[äöüßñçèéàâêîôûùìòõãåæøřšžýůďťőűğışаеоиñ¿¡]"
_OTHER_WORDS = (
    "der|und|nicht|ist|ich|das|die|ein|eine|sehr|mit|auch|les|des|est|pas|une|dans|que|el|los|"
    "las|una|pero|muy|por|como|che|il|della|sono|molto|het|een|niet|van|och|att|som|não|uma|"
    "je|ne|na|až|jsem|bylo|mais|pour|avec|con|para|het|zijn"
)


class TextError(ValueError):
    """A column isn't text; the message says what it is and what is taken."""


def masked(text: pl.Expr) -> pl.Expr:
    """Users, e-mails, phone numbers and web addresses masked; whitespace single.

    Args:
        text: String.
    """
    text = text.str.normalize("NFC").str.replace_all(r"\p{Cc}|\x{200B}|\x{FEFF}", " ")
    for pattern, mask in _MASKS:
        text = text.str.replace_all(pattern, mask)
    return text.str.replace_all(r"\s+", " ").str.strip_chars()


def language(text: pl.Expr) -> pl.Expr:
    """ "en", "pl" or "other", by letters, function words and pairs of letters that are typical.

    A count, not a model: a word or a letter that only one language has weighs three, a typical
    pair one; the language with most wins. Texts without letters of the Latin alphabet, and those
    where nothing was found, are "other". Right for about 98 of 100 tweets and 97 of 100 sentences
    of Polish reviews (shared data); texts of one or two words are often "other".

    Args:
        text: String, masked.
    """
    low = text.str.replace_all(r"@user|http|<email>|<phone>|#\w+", " ").str.to_lowercase()
    # A typographic apostrophe reads as the plain one.
    low = low.str.replace_all("\u2019", "'")
    words = {"en": _EN_WORDS, "pl": _PL_WORDS, "other": _OTHER_WORDS}
    en = 3 * low.str.count_matches(rf"\b(?:{words['en']})\b") + low.str.count_matches(_EN_PAIRS)
    pl_ = (
        3 * low.str.count_matches(rf"\b(?:{words['pl']})\b")
        + 3 * low.str.count_matches(_PL_LETTERS)
        + low.str.count_matches(_PL_PAIRS)
    )
    other = 3 * low.str.count_matches(rf"\b(?:{words['other']})\b") + 3 * low.str.count_matches(
        _OTHER_LETTERS
    )
    latin = low.str.count_matches(r"\p{Latin}")
    foreign = low.str.count_matches(_LETTER) > 2 * latin
    found = pl.max_horizontal(en, pl_) > 0
    return (
        pl.when(foreign | ~found | (other > pl.max_horizontal(en, pl_)))
        .then(pl.lit("other"))
        .when(pl_ > en)
        .then(pl.lit("pl"))
        .otherwise(pl.lit("en"))
    )


def clean(texts: pl.Series, *, max_characters: int = 2000) -> pl.DataFrame:
    """Each text masked, with its outcome and language.

    Args:
        texts: Strings; numbers and bytes are read as text where they can be.
        max_characters: Longer texts are cut here, and say so.

    Returns:
        One row a text, in their order: `text`, "" where there is nothing to score; `outcome`, of
        "ok", "truncated" (scored by its beginning), "empty" (missing, or nothing but space) and
        "not_text" (no letter, emoji or emoticon, or mostly unreadable characters); `language`,
        "en", "pl" or "other". Only the first two outcomes are scored.

    Raises:
        TextError: The column holds lists, structures or Python objects.
    """
    if texts.dtype.is_nested() or texts.dtype == pl.Object:
        raise TextError(
            f"column {texts.name!r} is {texts.dtype}, not text; give a column of strings, one text "
            "a row"
        )
    if texts.dtype == pl.Binary:
        # A wrong byte becomes U+FFFD, which counts as unreadable.
        decoded = [None if each is None else each.decode("utf-8", "replace") for each in texts]
        texts = pl.Series(texts.name, decoded, dtype=pl.String)
    raw = pl.col("raw")
    frame = pl.DataFrame({"raw": texts.cast(pl.String, strict=False), "was": texts.is_not_null()})
    # Cut twice: masking a very long text whole would cost more than all that is scored of it.
    head = raw.str.slice(0, 2 * max_characters).fill_null("")
    frame = frame.select(
        masked(head).alias("text"),
        unread=pl.col("was") & raw.is_null(),
        cut=raw.str.len_chars().fill_null(0) > 2 * max_characters,
        garbled=2 * head.str.count_matches(_UNREADABLE) > head.str.len_chars(),
    )
    text = pl.col("text")
    readable = text.str.replace_all(r"<phone>", "").str.contains(rf"{_LETTER}|{_EMOJI}|{_EMOTICON}")
    frame = frame.with_columns(
        outcome=pl.when(pl.col("unread") | pl.col("garbled"))
        .then(pl.lit("not_text"))
        .when(text == "")
        .then(pl.lit("empty"))
        .when(~readable)
        .then(pl.lit("not_text"))
        .when(pl.col("cut") | (text.str.len_chars() > max_characters))
        .then(pl.lit("truncated"))
        .otherwise(pl.lit("ok"))
    )
    scored = pl.col("outcome").is_in(["ok", "truncated"])
    return frame.select(
        pl.when(scored)
        .then(text.str.slice(0, max_characters).str.strip_chars())
        .otherwise(pl.lit(""))
        .alias("text"),
        "outcome",
    ).select("text", "outcome", language=language(text))


def drawn(texts: pl.Series) -> pl.Series:
    """A number in [0, 1) for each text, by its hash: equal texts fall on the same side of a split.

    Case and space don't count; the same on every machine and in every year (SHA-256).
    """
    low = texts.str.to_lowercase().str.replace_all(r"\s+", " ").str.strip_chars()
    return pl.Series(
        "drawn",
        [
            int.from_bytes(hashlib.sha256(each.encode()).digest()[:6], "big") / 2**48
            for each in low.to_list()
        ],
        dtype=pl.Float64,
    )
