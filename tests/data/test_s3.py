"""Rows from `s3://`, from a real server that speaks S3 (moto's, in a virtual environment of its own: `make s3`)."""

from __future__ import annotations

import gzip
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyarrow import fs

from treering import Workspace
from treering.data import fetch
from treering.errors import TreeringError, UsageError
from treering.testing import toy_rows

pytestmark = pytest.mark.s3

SECRET = "a-secret-that-nobody-may-see"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A server's port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = int(free.getsockname()[1])
    log = (tmp_path_factory.mktemp("moto") / "log").open("w")
    program = [os.environ["MOTO_SERVER"], "-H", "127.0.0.1", "-p", str(number)]
    server = subprocess.Popen(program, stdout=log, stderr=log)
    try:
        for _ in range(600):
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", number)) == 0:
                    break
            time.sleep(0.1)
        yield number
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def bucket(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, bytes], None]]:
    """Puts objects into the bucket `shop`."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "a-key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    there = fs.S3FileSystem(
        endpoint_override=os.environ["AWS_ENDPOINT_URL"], allow_bucket_creation=True, allow_bucket_deletion=True
    )
    there.create_dir("shop")

    def put(key: str, content: bytes) -> None:
        with there.open_output_stream(f"shop/{key}", compression=None) as stream:
            stream.write(content)

    yield put
    there.delete_dir("shop")


def lines(rows: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_file(bucket: Callable[[str, bytes], None], workspace: Callable[..., Workspace]) -> None:
    bucket("june/pens.jsonl", lines([*toy_rows("pens", 10), {"odd": "1"}]))
    ws = workspace()
    found = ws.ingest("s3://shop/june/pens.jsonl")
    assert (found.accepted, found.tasks, found.quarantined) == (10, {"pens": 10}, 1)
    assert found.refused[0]["file"] == "s3://shop/june/pens.jsonl"
    ids = [id for ids in ws.catalog.waiting(()).values() for id in ids]
    assert {origin.file for origin in ws.catalog.origins(ids).values()} == {"s3://shop/june/pens.jsonl"}
    assert ws.ingest("s3://shop/june/pens.jsonl", task="pens").duplicates == 10
    assert SECRET.encode() not in b"".join(file.read_bytes() for file in ws.root.glob("treering.db*"))


def test_a_folder(bucket: Callable[[str, bytes], None], workspace: Callable[..., Workspace]) -> None:
    bucket("june/pens/train.jsonl.gz", gzip.compress(lines(toy_rows("pens", 10))))
    bucket("june/pens/test.jsonl", lines(toy_rows("pencils", 3)))
    bucket("june/cups/a.csv", b"text,label\nis it hot,yes\n")
    bucket("june/notes.docx", b"PK" * 1000)
    found = workspace().ingest("s3://shop/june")
    assert (found.accepted, found.held_out, found.tasks) == (14, 3, {"pens": 13, "cups": 1})
    assert [(bad["file"], bad["rule"]) for bad in found.refused] == [("s3://shop/june/notes.docx", "unknown-format")]


def test_what_is_not_there(bucket: Callable[[str, bytes], None], workspace: Callable[..., Workspace]) -> None:
    ws = workspace()
    for url in ("s3://shop/none.jsonl", "s3://nowhere/none.jsonl", "s3://shop/none/"):
        with pytest.raises(UsageError, match=f"{url} does not exist"):
            ws.ingest(url, task="a")
    assert not any(ws.catalog.counts().values())


def test_more_than_is_fetched(
    bucket: Callable[[str, bytes], None], workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket("a.jsonl", lines(toy_rows("pens", 10)))
    monkeypatch.setattr(fetch, "MOST_FETCHED", 100)
    with pytest.raises(UsageError, match="has more than 100 bytes"):
        workspace().ingest("s3://shop/a.jsonl")


def test_a_server_that_is_gone(
    bucket: Callable[[str, bytes], None], workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(TreeringError, match=r"s3://shop/a\.jsonl cannot be read") as caught:
        workspace().ingest("s3://shop/a.jsonl")
    assert SECRET not in str(caught.value) and "a-key" not in str(caught.value)


def test_no_file_is_left(
    bucket: Callable[[str, bytes], None], workspace: Callable[..., Workspace], tmp_path: Path
) -> None:
    bucket("a.jsonl", lines(toy_rows("pens", 10)))
    import tempfile

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path))
        workspace("ws").ingest("s3://shop/a.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["ws"]
