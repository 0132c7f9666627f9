"""Files that are replaced as a whole."""

import secrets
from pathlib import Path


def replace_text(file: Path, text: str) -> None:
    """Writes the text aside and renames it: a reader sees the old file or the new one, whole.

    Raises:
        OSError: The file can't be written; the old one stays, and nothing lies beside it.
    """
    # After the whole name, so that no glob for the file's kind finds the draft.
    draft = file.with_name(f"{file.name}.{secrets.token_hex(4)}")
    try:
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)
