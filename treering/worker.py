"""One of the processes that train: `python -m treering.worker FOLDER`, as accelerate starts it, or called by Ray.

FOLDER holds a `Handover`; what came of it is told there, in `rank-N.json`. The checkpoints are the result.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from treering.errors import TreeringError, full_disk_is_clear, short_memory_is_clear
from treering.files import write_json
from treering.handover import Handover
from treering.progress import say
from treering.stop import Stop

LOG = "log.jsonl"
"""The entries of the training log, for the update to show."""

WANTED = "wanted"
"""Locked by the update for as long as it wants its processes to go on, however it ends; it holds the update's token."""

TOKEN = "token"
"""In FOLDER: that of the update which wants this training."""

GRACE = 6.0
"""Seconds in which a process that is no longer wanted leaves a checkpoint."""

_POLL = 0.2


@dataclass(frozen=True)
class Trained:
    """How a process came to the end: `seconds` of training, and the most memory it held."""

    seconds: float
    peak_memory_mb: float
    peak_gpu_memory_mb: float | None


def work(folder: Path) -> None:
    """Train with the other processes; an error that people can mend is told, not raised."""
    rank = int(os.environ.get("RANK", "0"))
    outcome = folder / f"rank-{rank}.json"
    outcome.unlink(missing_ok=True)
    try:
        with full_disk_is_clear(folder), short_memory_is_clear(), wanted(folder) as stop, _writing(folder, rank):
            stop.check()
            found = asdict(_train(folder, stop))
    except TreeringError as error:
        found = {"error": str(error), "kind": type(error).__name__}
    try:
        write_json(outcome, found)
    except OSError as error:  # The disk is full to the last byte, which the update sees for itself.
        say(f"process {rank + 1} cannot note how it ended ({error.strerror}): {found.get('error', 'it has trained')}")


def _train(folder: Path, stop: Stop) -> Trained:
    import torch
    from accelerate import PartialState

    from treering.lesson import begun
    from treering.room import keep_to_limit, peak_gpu_memory_mb, peak_memory_mb
    from treering.train import train

    PartialState(cpu=not torch.cuda.is_available())  # Finds the others, and the device that is this process's own.
    given = Handover.load(folder)
    torch.set_num_threads(given.threads)
    keep_to_limit()
    model, methods = begun(given.base, given.config, given.parent)
    started = time.perf_counter()

    def note(entry: Mapping[str, float]) -> None:
        with (folder / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")

    train(
        model,
        given.rows,
        given.steps,
        methods,
        given.config,
        pad_id=given.pad_id,
        teachers=given.teachers,
        parents=given.parents,
        checkpoints=given.checkpoints,
        stop=stop,
        track=note,
        quiet=True,
    )
    return Trained(time.perf_counter() - started, peak_memory_mb(), peak_gpu_memory_mb())


@contextmanager
def wanted(folder: Path) -> Iterator[Stop]:
    """Asks to stop once the update wants this training no more, or is gone; who has not ended after `GRACE`, dies."""
    stop = Stop()
    ended = threading.Event()
    token = (folder / TOKEN).read_text()
    with (folder.parent / WANTED).open("rb") as file:

        def look() -> None:
            while not ended.wait(_POLL):
                if not _is_wanted(file.fileno(), token):
                    stop.asked = True
                    break
            if not ended.wait(GRACE):
                os._exit(1)

        watch = threading.Thread(target=look, daemon=True)
        stop.asked = not _is_wanted(file.fileno(), token)
        watch.start()
        try:
            yield stop
        finally:
            ended.set()
            watch.join()


def _is_wanted(descriptor: int, token: str) -> bool:
    if os.pread(descriptor, 100, 0).decode() != token:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    return False


@contextmanager
def _writing(folder: Path, rank: int) -> Iterator[None]:
    """One process writes checkpoints: that of a training that is being ended is waited for."""
    if rank:
        yield
        return
    with (folder.parent / "writing").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Train as told in the folder that is named."""
    from torch import distributed

    work(Path(sys.argv[1]))
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
