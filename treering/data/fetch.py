"""What is not a file here, standard input or a URL, as files in a folder that goes away."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from treering.data.descriptions import INFO, SPLITS, STATE
from treering.data.records import container_of
from treering.data.sniff import suffix_of
from treering.data.sources import Place
from treering.data.values import RowError
from treering.errors import TreeringError, UsageError, first_line, full_disk_is_clear

STDIN = "<stdin>"
"""What standard input is called in the catalog."""

MOST_FETCHED = 1 << 35
"""Bytes that one command fetches."""

SCHEMES = ("s3", "hf")
_PIECE = 1 << 20
_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


@contextmanager
def local(source: Any, task: str | None) -> Iterator[Any]:
    """`source` with each URL and each `-` in it as a `Place`, whose files are there until the block ends."""
    items = [source] if isinstance(source, str | Path) else source
    if not isinstance(items, list | tuple) or not any(_is_elsewhere(item) for item in items):
        yield source
        return
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="treering-")))
        stack.enter_context(full_disk_is_clear(folder))
        yield [
            _fetch(str(item), folder / str(n), task) if _is_elsewhere(item) else item for n, item in enumerate(items)
        ]


def _is_elsewhere(item: object) -> bool:
    return isinstance(item, str) and (item == "-" or "://" in item)


def _fetch(item: str, folder: Path, task: str | None) -> Place:
    folder.mkdir()
    return _from_stdin(folder, task) if item == "-" else _from_url(item, folder)


def _from_stdin(folder: Path, task: str | None) -> Place:
    if task is None:
        raise UsageError("rows from standard input need --task, the name of the task they belong to")
    file = folder / "stdin"
    _copy(sys.stdin.buffer, file, MOST_FETCHED, "standard input")
    whole = file.with_suffix(suffix_of(file))
    return Place(file.rename(whole), STDIN)


def _from_url(url: str, folder: Path) -> Place:
    scheme = url.partition("://")[0].lower()
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise UsageError(
            f"a {scheme}:// URL with a user, a password or a query: credentials belong in the environment "
            "(AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, HF_TOKEN) or the tools' own files; name the URL without them"
        )
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UsageError(f"{url}: {scheme}:// is not read, known are {known}; download the file and name that")
    try:
        return _downloaded(url, _file_system(scheme, parts.netloc), folder)
    except TreeringError:
        raise
    except FileNotFoundError:
        raise UsageError(f"{url} does not exist, or may not be seen with the credentials that are set") from None
    except Exception as error:  # Each file system has its own.
        if getattr(error, "errno", None) and getattr(error, "filename", None):
            raise  # Of our own disk.
        reason = _without_secrets(f"{type(error).__name__}: {first_line(error)}")
        raise TreeringError(
            f"{url} cannot be read ({reason}); check the name, the network and the credentials"
        ) from None


def _file_system(scheme: str, bucket: str) -> Any:
    """The fsspec file system for these URLs."""
    if scheme == "hf":
        from huggingface_hub import HfFileSystem

        return HfFileSystem()
    # pyarrow brings its own client, so that this needs no further library.
    from fsspec.implementations.arrow import ArrowFSWrapper
    from pyarrow import fs

    place = {}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        place["endpoint_override"] = endpoint
    elif not (os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")):
        with suppress(OSError):
            place["region"] = fs.resolve_s3_region(bucket)
    return ArrowFSWrapper(fs.S3FileSystem(connect_timeout=10, request_timeout=60, **place))


def _downloaded(url: str, system: Any, folder: Path) -> Place:
    remote = url.partition("://")[2].strip("/")
    above, _, name = remote.rpartition("/")
    here = folder / (Path(above).name or "bucket") / (Path(name).name or "files")
    if system.info(remote)["type"] != "directory":
        _download(system, remote, here, MOST_FETCHED)
        return Place(here, url)
    left = MOST_FETCHED
    found = sorted(system.find(remote))
    if not found:
        raise FileNotFoundError(url)
    for file in found:
        target = here / file.partition(remote)[2].strip("/")
        if not target.resolve().is_relative_to(here.resolve()):
            raise UsageError(f"{url}: the name {file!r} leads out of it; name its files one by one")
        left -= _download(system, file, target, left)
    return Place(here, url)


def _download(system: Any, remote: str, target: Path, most: int) -> int:
    target.parent.mkdir(parents=True, exist_ok=True)
    if not _is_data(target):
        target.touch()  # Its name alone says that it cannot be read.
        return 0
    with system.open(remote, "rb") as stream:
        return _copy(stream, target, most, remote)


def _is_data(file: Path) -> bool:
    try:
        container_of(file)
    except RowError:
        return file.name in (STATE, SPLITS, INFO)
    return True


def _copy(stream: BinaryIO, target: Path, most: int, what: str) -> int:
    copied = 0
    with target.open("wb") as file:
        while piece := stream.read(_PIECE):
            copied += len(piece)
            if copied > most:
                limit = f"{MOST_FETCHED:,} bytes, which is what one command fetches"
                raise UsageError(f"{what} has more than {limit}; save it to files and name those")
            file.write(piece)
    return copied


def _without_secrets(text: str) -> str:
    for name in _SECRETS:
        if secret := os.environ.get(name):
            text = text.replace(secret, "***")
    return text
