"""How much room there is: memory that this process may come to hold, and disk."""

from __future__ import annotations

import ctypes
import gc
import resource
import shutil
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

LARGE = 1 << 20
"""Bytes of a block from which on `keep_to_limit` has it mapped by itself; smaller ones would be mapped too often."""

_MMAP_THRESHOLD = -3
"""What glibc's `malloc.h` calls M_MMAP_THRESHOLD."""

_CGROUPS = (
    # Version 2, then 1: where the groups are, the limit, what is used, and the part of it that can be taken back.
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def room(folder: Path) -> dict[str, float]:
    """What an update here may use, in MB: `memory_mb`, `disk_mb` where `folder` is, and on a GPU `gpu_memory_mb`."""
    import torch

    found = {"memory_mb": _held_mb() + _free_mb(), "disk_mb": shutil.disk_usage(folder).free / 2**20}
    if torch.cuda.is_available():
        found["gpu_memory_mb"] = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / 2**20
    return found


def peak_memory_mb() -> float:
    """The most memory this process has held so far.

    Not by `getrusage`: there a process begins with the peak of the one that started it.
    """
    return _number(Path("/proc/self/status"), "VmHWM") / 1024


def peak_gpu_memory_mb() -> float | None:
    """The most GPU memory that torch has taken for this process so far; None without a GPU."""
    import torch

    return torch.cuda.max_memory_reserved() / 2**20 if torch.cuda.is_available() else None


def give_back(error: BaseException) -> None:
    """Let go of what the frames that `error` went through still hold, and of what the allocator keeps for later.

    Where memory ran out, the next try would otherwise begin beside what the failed one has left.
    """
    traceback.clear_frames(error.__traceback__)
    gc.collect()
    with suppress(AttributeError, OSError):  # glibc alone has it.
        ctypes.CDLL(None).malloc_trim(0)


def keep_to_limit() -> None:
    """Where this process has a limit of its own (`ulimit -v`), large blocks leave its address space once they are free.

    The limit counts what is mapped, used or not. The allocator would keep freed blocks in its heap, and what is mapped
    by others, such as the code that oneDNN makes for each shape, would find no room beside them.
    """
    if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
        with suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, LARGE)


def _held_mb() -> float:
    return _number(Path("/proc/self/status"), "VmRSS") / 1024


def _free_mb() -> float:
    """What the machine has free, or what the limits of this process and of its container leave of it."""
    free = [_number(Path("/proc/meminfo"), "MemAvailable") * 1024, *_left(Path("/proc/self/cgroup"))]
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        free.append(limit - _number(Path("/proc/self/status"), "VmSize") * 1024)
    return min(free) / 2**20


def _left(cgroups: Path, root: Path = Path("/")) -> Iterator[int]:
    """Bytes that each memory limit over this process leaves: its own group's, and those of the groups around it."""
    paths = [line.split(":", 2)[2] for line in cgroups.read_text().splitlines()]
    for mount, limit, used, cached in _CGROUPS:
        top = root / mount.lstrip("/")
        own = {top / path.lstrip("/") for path in paths}
        for group in {folder for path in own for folder in (path, *path.parents) if folder.is_relative_to(top)}:
            with suppress(OSError, ValueError):  # No such group seen from here, or the limit is "max".
                left = int((group / limit).read_text()) - int((group / used).read_text())
                yield max(0, left + _number(group / "memory.stat", cached))


def _number(path: Path, name: str) -> int:
    """The number beside `name` in a file of names and numbers; in /proc they are kilobytes."""
    lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return next(int(words[1]) for words in lines if words[0] == name)
