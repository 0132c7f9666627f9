"""Versioned tables, and what two writers at once meet."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import polars as pl
import pytest

from cluster import storage

ONE = pl.DataFrame({"a": [1]})


def rows(root: Path) -> int:
    return int(storage.scan(root, "t").select(pl.len()).collect().item())


@pytest.mark.parametrize("mode", ["append", "overwrite"])
def test_the_second_of_two_writers_on_one_version_is_refused(tmp_path: Path, mode: str) -> None:
    write = dict(mode=mode, metadata={})
    assert storage.write(tmp_path, "t", ONE, onto=None, **write) == 0
    with pytest.raises(storage.StorageConflict, match="since it was absent"):
        storage.write(tmp_path, "t", ONE, onto=None, **write)
    assert storage.write(tmp_path, "t", ONE, onto=0, **write) == 1
    with pytest.raises(storage.StorageConflict, match="since version 0"):
        storage.write(tmp_path, "t", ONE, onto=0, **write)
    assert (storage.version(tmp_path, "t"), rows(tmp_path)) == (1, 2 if mode == "append" else 1)


def test_work_that_meets_another_writer_is_done_again(tmp_path: Path) -> None:
    together = Barrier(2)

    @storage.retried
    def add_one(first: list[bool]) -> None:
        onto = storage.latest(tmp_path, "t")
        if first.pop() if first else False:
            together.wait()
        storage.write(tmp_path, "t", ONE, mode="append", onto=onto, metadata={})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(add_one, [[True], [True]]))
    assert rows(tmp_path) == 2


def test_metadata_is_the_versions_own(tmp_path: Path) -> None:
    for onto, said in ((None, "first"), (0, "second")):
        storage.write(tmp_path, "t", ONE, mode="overwrite", onto=onto, metadata={"said": said})
    assert storage.metadata(tmp_path, "t", 0)["said"] == "first"
    assert storage.metadata(tmp_path, "t", 1)["said"] == "second"
