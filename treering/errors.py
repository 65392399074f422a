"""The errors a user can meet; every message says what was wrong, the value, and the way out."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TreeringError(Exception):
    """Something failed while running; the command line exits with `exit_code`."""

    exit_code = 1


class UsageError(TreeringError):
    """A wrong command, argument or version name; nothing was changed."""

    exit_code = 3


class ConfigError(UsageError):
    """A wrong setting; all wrong settings of a file are reported at once."""


class ModelError(TreeringError):
    """The base model or tokenizer cannot be had or does not fit the version."""


class VersionError(TreeringError):
    """A version folder that is missing, damaged, edited or too new."""


class LockError(TreeringError):
    """Another process is changing the workspace."""


class UpdateInterruptedError(TreeringError):
    """An update was asked to stop; its checkpoint is kept and the next update resumes it."""


_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file-size limit is met",
}


@contextmanager
def full_disk_is_clear(folder: Path) -> Iterator[None]:
    """Turn "disk full" out of any library into a `TreeringError` that names `folder`."""
    try:
        yield
    except Exception as error:
        # safetensors and pyarrow report the operating system's number only in their text.
        code = getattr(error, "errno", None)
        texts = {number: f"(os error {number})" for number in _FULL}
        found = next((n for n in _FULL if code == n or texts[n] in str(error) or f"errno {n}" in str(error)), None)
        if found is None:
            raise
        raise TreeringError(
            f"cannot write to {folder}: {_FULL[found]}. Free some space and run the command again; "
            "finished versions are untouched and an update resumes from its last checkpoint."
        ) from error
