"""A table worked on in batches that are kept, so that a run that was stopped goes on where it was.

A finished batch is a file of a folder beside what is to be written, renamed into place; at the end
the batches become the output, in order and at once. Never more than a few of them are in memory.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from cluster.files import replace_text, replaced

FILES = (".csv", ".parquet")


class BatchesError(ValueError):
    """A file can't be read or written, or the batches are another run's; the message says which."""


def open_file(path: Path) -> tuple[pl.LazyFrame, str]:
    """A file's rows, and what tells it from any other: where it is, its size and its time.

    Args:
        path: `.parquet`, or `.csv` with a header, of which every value is text.

    Raises:
        BatchesError: There is no such file.
    """
    if not path.is_file():
        raise BatchesError(f"no file {path}")
    about = path.stat()
    frame = (
        pl.scan_parquet(path)
        if path.suffix == ".parquet"
        else pl.scan_csv(path, infer_schema=False)
    )
    return frame, f"{path.resolve()} {about.st_size} {about.st_mtime_ns}"


def count(frame: pl.LazyFrame, name: str | Path) -> int:
    """How many rows there are.

    Args:
        frame: Of a file or table.
        name: As errors call it.

    Raises:
        BatchesError: It can't be read.
    """
    try:
        return int(frame.select(pl.len()).collect(engine="streaming").item())
    except pl.exceptions.NoDataError:
        raise BatchesError(f"{name} is empty: it has no header") from None
    except (OSError, pl.exceptions.PolarsError) as error:
        raise BatchesError(f"{name}: can't be read: {error}") from error


def cut(frame: pl.LazyFrame, rows: int) -> Iterator[pl.DataFrame]:
    """The frame in pieces of exactly `rows`, the last one shorter, read as they are asked for."""
    held: list[pl.DataFrame] = []
    height = 0
    for piece in frame.collect_batches(chunk_size=rows, maintain_order=True):
        while height + piece.height >= rows:
            held.append(piece.head(rows - height))
            piece = piece.slice(held[-1].height)
            yield pl.concat(held)
            held, height = [], 0
        if piece.height:
            held.append(piece)
            height += piece.height
    if held:
        yield pl.concat(held)


def begin(folder: Path, said: Mapping[str, Any]) -> set[int]:
    """Makes the folder of batches, or makes sure that it is this run's; the numbers it has.

    Args:
        folder: Of the batches.
        said: What the batches depend on; JSON values.

    Raises:
        BatchesError: The folder is of a run of which something else was said.
        OSError: It can't be made.
    """
    about = folder / "run.json"
    if about.exists():
        before = json.loads(about.read_text(encoding="utf-8"))
        if other := [key for key in said if before.get(key) != said[key]]:
            shown_before = ", ".join(f"{key} {before.get(key)!r}" for key in other)
            raise BatchesError(
                f"{folder} holds the batches of a run that was stopped, with {shown_before}: give "
                "the same again to go on with it, or remove the folder to begin anew"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(about, json.dumps(said, indent=2))
    return {int(file.stem) for file in folder.glob("*.parquet")}


def keep(folder: Path, number: int, rows: pl.DataFrame) -> None:
    """Keeps a finished batch, whole or not at all.

    Raises:
        OSError: It can't be written.
    """
    with replaced(_file(folder, number)) as draft:
        rows.write_parquet(draft, compression="lz4")


def scan(folder: Path, batches: int) -> pl.LazyFrame:
    """The rows of all batches, in order."""
    return pl.scan_parquet([_file(folder, number) for number in range(batches)])


def publish(rows: pl.LazyFrame, path: Path) -> None:
    """Writes `.csv` or `.parquet`, whole or not at all.

    Raises:
        BatchesError: A value is of a kind that the file can't hold.
        OSError: The file can't be written.
    """
    try:
        with replaced(path) as draft:
            if path.suffix == ".csv":
                rows.sink_csv(draft)
            else:
                rows.sink_parquet(draft)
    except pl.exceptions.PolarsError as error:
        raise BatchesError(f"{path} can't be written: {error}") from error


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:08d}.parquet"
