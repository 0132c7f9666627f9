"""Sources and tables behind URLs: an S3 emulator, and a file system that Polars doesn't know."""

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import fsspec
import polars as pl
import pytest

from cluster import storage
from jobs.config_tables import Table
from jobs.ingest import SourceError, ingest
from jobs.validate import validate

ROWS = pl.DataFrame({"customer": [1, 2, 1], "amount": [2.5, -1.0, 4.0]})


def table(path: str) -> Table:
    return Table.model_validate(
        {
            "source": {"path": path},
            "entity": "customer",
            "columns": {"customer": "int64", "amount": "float64"},
            "rules": {"ranges": {"amount": {"min": 0}}},
            "max_quarantine_share": 0.5,
        }
    )


def await_port(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    # A process of its own: Delta's calls hold this one's interpreter while they wait.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    emulator = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    await_port(port)
    boto3.client("s3").create_bucket(Bucket="sales")
    fsspec.filesystem("s3").clear_instance_cache()
    yield "s3://sales"
    emulator.terminate()
    emulator.wait()


def put(bucket: str, key: str) -> None:
    content = fsspec.open("memory://put.parquet", "wb")
    with content as file:
        ROWS.write_parquet(file)
    body = fsspec.filesystem("memory").cat("/put.parquet")
    boto3.client("s3").put_object(Bucket=bucket.removeprefix("s3://"), Key=key, Body=body)


def test_s3_is_read_and_written(bucket: str, tmp_path: Path) -> None:
    put(bucket, "in/a.parquet")
    declared = table(f"{bucket}/in/*.parquet")
    root = f"{bucket}/tables"
    first = ingest("sales", declared, root, base=tmp_path)
    assert (first.version, first.rows, first.new) == (0, 3, True)
    assert not ingest("sales", declared, root, base=tmp_path).new
    done = validate("sales", declared, root, tables={"sales": declared})
    assert (done.version, done.rows, done.quarantined) == (1, 2, 1)
    assert storage.scan(root, "sales").select("amount").collect()["amount"].sum() == 6.5
    assert storage.scan(root, "quarantine/sales").collect().height == 1


def test_a_bucket_without_the_file_is_told(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"no file at 's3://sales/none/\*.parquet'"):
        ingest("sales", table(f"{bucket}/none/*.parquet"), tmp_path, base=tmp_path)


def test_another_file_system_is_read_through_fsspec(tmp_path: Path) -> None:
    with fsspec.open("memory://in/a.parquet", "wb") as file:
        ROWS.write_parquet(file)
    done = ingest("sales", table("memory://in/*.parquet"), tmp_path / "tables", base=tmp_path)
    assert done.rows == 3
