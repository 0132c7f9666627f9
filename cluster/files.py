"""Files that are replaced as a whole."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A place aside to write the file to, renamed at the end: readers see it whole or as it was.

    Raises:
        OSError: It can't be renamed; where that or the writing fails, the old file stays, and
            nothing lies beside it.
    """
    # After the whole name, so that no glob for the file's kind finds the draft.
    draft = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    try:
        yield draft
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def replace_text(file: Path, text: str) -> None:
    """Writes the text as the whole file, or leaves the old one.

    Raises:
        OSError: The file can't be written.
    """
    with replaced(file) as draft:
        draft.write_text(text, encoding="utf-8")
