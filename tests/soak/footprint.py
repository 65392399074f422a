"""What a process takes of the machine."""

from __future__ import annotations

import time
from typing import NamedTuple

import psutil


class Footprint(NamedTuple):
    """Megabytes of its own, open files, threads."""

    megabytes: float
    files: int
    threads: int


def footprint(pid: int, looks: int = 8, seconds: float = 0.25) -> Footprint:
    """The least of several looks: what is held for a moment only does not count.

    Memory is what the process made itself (PSS of anonymous pages). Pages of files, such as libraries, count in PSS for
    as much as no other process reads them, which changes whenever another one starts or ends.
    """
    process = psutil.Process(pid)
    found = []
    for _ in range(looks):
        made = sum(part.anonymous for part in process.memory_maps())
        found.append(Footprint(made / 2**20, process.num_fds(), process.num_threads()))
        time.sleep(seconds)
    return Footprint(*map(min, zip(*found, strict=True)))
