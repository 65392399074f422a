"""The machine that `treering run` lives on: it is started again when it dies, and its disk can be full."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.serving import Served
from treering import Workspace

RESTART = 1.0


class House:
    """A running `treering run`, its logs one after the other, and the times at which nobody could be there."""

    def __init__(self, ws: Workspace, logs: Path) -> None:
        self.ws, self.logs = ws, logs
        self.down: list[tuple[float, float]] = []
        self.served = Served(ws, logs / "0.log", "run")

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in sorted(self.logs.iterdir()))

    def until(self, check: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not check():
            assert time.monotonic() < deadline and self.served.process.poll() is None, self.log[-20_000:]
            time.sleep(0.5)

    def crash(self, *, everything: bool) -> None:
        """Kill the server alone, as the system does when memory is short, or all it started too; start it again."""
        process = self.served.process
        pids = [process.pid, *(descendants(process.pid) if everything else ())]
        killed = time.time()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        process.wait()
        time.sleep(RESTART)
        port = int(self.served.url.rpartition(":")[2])
        self.served = Served(self.ws, self.logs / f"{len(self.down) + 1}.log", "run", port)
        self.down.append((killed, time.time()))

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """No byte is left while inside."""
        ballast = self.ws.root / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 12))
        yield
        ballast.unlink()


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    """A disk of its own at `folder`."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "small", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk to fill has to be mounted: run it as root, or within `unshare --map-root-user --mount`")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def descendants(pid: int) -> list[int]:
    """Every process that `pid` brought about and that still hangs on it."""
    found: list[int] = []
    with suppress(FileNotFoundError):  # It may end at any moment.
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in map(int, (thread / "children").read_text().split()):
                found += [child, *descendants(child)]
    return found
