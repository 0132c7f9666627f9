"""What a user may have meant by a name that isn't known."""

import difflib
from collections.abc import Collection


def suggestion(value: object, known: Collection[str]) -> str:
    """ "; did you mean …?" where something known is close, else nothing."""
    close = difflib.get_close_matches(str(value), list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
