"""The errors a user can meet; every message says what was wrong, the value, and the way out."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def near(name: str, known: Iterable[str]) -> str:
    """For a message that says that `name` is none of those `known`: which was meant, perhaps."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


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


class RoomError(TreeringError):
    """Memory or disk will not do; nothing was begun."""


class UpdateInterruptedError(TreeringError):
    """An update was asked to stop; the next one resumes it from its checkpoint, if there is one."""


_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "a file-size limit is met",
}
# How libraries say the same in words: safetensors and pyarrow give the system's number, SQLite its own messages.
_TEXTS = {
    **{f"(os error {number})": reason for number, reason in _FULL.items()},
    **{f"errno {number}": reason for number, reason in _FULL.items()},
    "database or disk is full": _FULL[errno.ENOSPC],
    "disk I/O error": "the disk takes no more data",
}


RESUMES = "finished versions are untouched and an update resumes from its last checkpoint"

LESS_TO_READ = (
    "Lower cutoff_len or eval.max_new_tokens, run with fewer threads (OMP_NUM_THREADS=1), set quantization_bit: 4, "
    f"take a smaller model_name_or_path, or free some memory and run the command again; {RESUMES}"
)
LESS_TO_LEARN = (
    "Set optim: adamw_8bit, a smaller lora_rank (finetuning_type: lora where more weights learn), quantization_bit: 4 "
    "or gradient_checkpointing: true, take a smaller model_name_or_path, or free some memory and run the command "
    f"again; {RESUMES}"
)
LESS_TO_TAKE = "Name fewer or smaller files at once, or free some memory, and run the command again; nothing changed"
"""The ways out where memory runs out: of those who read, of those who learn as well, and of those who take rows in."""


SWITCHED_OFF = "mkldnn_matmul failed"
"""What torch warns of where a product finds no memory, and it does without oneDNN from then on."""

# On CPU it is known by its text alone: the allocator's own, what C++ says where a library asked for memory, Python's
# where it asked for a thread, or oneDNN's, which says no more than that.
_NO_MEMORY = (
    "allocate memory",
    "bad_alloc",
    "start new thread",
    "create a primitive",
    "execute a primitive",
    SWITCHED_OFF,
)


def no_memory(error: Exception) -> bool:
    """Whether `error` is a device's or the process's way to say that memory has run out."""
    import torch

    if switched_off() or isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(text in str(error) for text in _NO_MEMORY)


def switched_off() -> bool:
    """Whether torch found no memory for a product and does without oneDNN since, many times slower; it is on again.

    In a backward pass nothing but this tells of it, or another error.
    """
    import torch

    if torch.backends.mkldnn.enabled:
        return False
    torch.backends.mkldnn.set_flags(True)
    return True


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether a `MemoryError` began it, though what cleaned up after that met other errors."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__cause__ or error.__context__
    return error is not None


def first_line(error: Exception) -> str:
    """What `error` says, as far as it fits into a message of ours."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


@contextmanager
def short_memory_is_clear() -> Iterator[None]:
    """Turn "out of memory", wherever nothing smaller can be tried, into a `TreeringError` with the ways out."""
    try:
        yield
    except Exception as error:
        if isinstance(error, TreeringError) or not no_memory(error):
            raise
        raise TreeringError(f"out of memory ({first_line(error)}). {LESS_TO_LEARN}") from error


@contextmanager
def full_disk_is_clear(folder: Path) -> Iterator[None]:
    """Turn "disk full" out of any library into a `TreeringError` that names `folder`."""
    try:
        yield
    except Exception as error:
        reason = _FULL.get(getattr(error, "errno", None) or 0)
        reason = reason or next((found for text, found in _TEXTS.items() if text in str(error)), None)
        if reason is None or isinstance(error, TreeringError):
            raise
        raise TreeringError(
            f"cannot write to {folder}: {reason}. Free some space and run the command again; {RESUMES}."
        ) from error
