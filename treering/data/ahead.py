"""Large files are read and checked by another process, ahead of the one that compares and stores their rows.

What comes of them is the same as where one process does both. The other is told what to do on the first line of
standard input, which stays open as long as somebody wants its rows, and answers on standard output, a part of them a
line.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from treering.config import Config
from treering.data.alike import Said
from treering.data.check import Fit, fit, opened
from treering.data.example import Example
from treering.data.layout import Layout, Tags
from treering.data.read import Bad, Row, read
from treering.errors import TreeringError
from treering.pipes import own_output

LARGE = 16_000_000
"""Bytes of a file from which on a second process pays for its start."""


@dataclass(frozen=True)
class Job:
    """A file to read and check, as `read` and `Checks` want it told."""

    path: Path
    name: str
    layout: Layout
    task: str
    config: Config
    root: Path

    @classmethod
    def of(cls, told: dict[str, Any]) -> Job:
        """What `plain` said."""
        layout = {**told["layout"], "tags": told["layout"]["tags"] and Tags(**told["layout"]["tags"])}
        config, root = Config.build(told["config"]), Path(told["root"])
        return cls(Path(told["path"]), told["name"], Layout(**layout), told["task"], config, root)

    @property
    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "name": self.name,
            "layout": asdict(self.layout),
            "task": self.task,
            "config": self.config.model_dump(mode="json"),
            "root": str(self.root),
        }


def rows(job: Job, note: Callable[[str], None]) -> Iterator[Row | Bad]:
    """The file's rows, unchecked."""
    config = job.config
    return read(
        job.path,
        system=config.default_system,
        pairs=config.stage == "dpo",
        name=job.name,
        layout=job.layout,
        note=note,
    )


def parts(job: Job, note: Callable[[str], None]) -> Iterator[list[Fit | Bad]]:
    """The file's rows as `check.fit` gives them, part by part; `note` is told what a user should know of the file.

    Raises `TreeringError` where the process does not end well.
    """
    ended = False
    command = [sys.executable, "-P", "-m", "treering.data.ahead"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
        assert child.stdin is not None and child.stdout is not None
        try:
            with suppress(BrokenPipeError):  # It has ended: that is told below.
                child.stdin.write(json.dumps(job.plain) + "\n")
                child.stdin.flush()
            for line in child.stdout:
                told = json.loads(line)
                ended = "end" in told
                if "note" in told:
                    note(told["note"])
                elif not ended:
                    yield [_read(one) for one in told["rows"]]
            child.wait()
        finally:
            with suppress(BrokenPipeError):
                child.stdin.close()
            child.kill()  # It has ended, unless who asks for its rows has failed.
    if not ended:
        raise TreeringError(
            f"the process that reads {job.name} was ended before the file did (exit code {child.returncode}): "
            "nothing was taken in; look whether memory is short, and try again"
        )


def main() -> None:
    """Be that process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # It ends with who asked.
    out = own_output()
    orders = io.FileIO(0, closefd=False)
    if not (order := orders.readline()):
        return  # Who asked is gone already.
    threading.Thread(target=_end_with_who_asked, args=(orders,), daemon=True).start()
    job = Job.of(json.loads(order))

    def say(told: dict[str, Any]) -> None:
        out.write(json.dumps(told, ensure_ascii=False) + "\n")
        out.flush()

    with suppress(BrokenPipeError):
        found = rows(job, lambda text: say({"note": text}))
        for part in fit(found, opened(job.config, job.root), job.task):
            say({"rows": [_plain(one) for one in part]})
        say({"end": True})


def _end_with_who_asked(orders: io.FileIO) -> None:
    orders.readline()  # Comes back when standard input is closed, which a kill does too.
    os._exit(1)


def _plain(one: Fit | Bad) -> list[Any]:
    if isinstance(one, Bad):
        return [one.file, one.line, one.rule, one.reason, one.raw, one.example and one.example.as_dicts()]
    said = one.said
    told = [said.asked, said.answered, said.system, list(said.words), said.label]
    return [one.row.file, one.row.line, one.row.example.as_dicts(), one.mended, one.warned, *told]


def _read(told: list[Any]) -> Fit | Bad:
    if len(told) == 6:
        file, line, rule, reason, raw, turns = told
        return Bad(file, line, rule, reason, raw, turns and Example.of(turns))
    file, line, turns, mended, warned, asked, answered, system, words, label = told
    row = Row(file, line, Example.of(turns))
    return Fit(row, Said(asked, answered, system, frozenset(words), label), tuple(mended), tuple(warned))


if __name__ == "__main__":
    main()
