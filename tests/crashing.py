"""Processes to be killed: a server that has imported all that is slow forks one for each command.

A process can be told to kill itself at its n-th change to the disk, as the power would (what was not fsynced is then
cut in half), or in the middle of its n-th forward pass while it trains; or to wait at a change of a given name, or in
such a pass, until it is released.
"""

from __future__ import annotations

import gc
import importlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHANGES = ("os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.symlink", "os.link", "os.truncate")
DEADLINE = 120.0


@dataclass(frozen=True)
class Process:
    """A command that runs. `out` gets what it prints on standard output, `err` the rest."""

    server: Server
    pid: int
    folder: Path

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self) -> int:
        """Its exit code; minus the signal's number if one ended it."""
        return os.waitstatus_to_exitcode(int(self.server.ask({"wait": self.pid})))

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def changes(self) -> list[str]:
        """The changes it made to the disk; known once it has ended by itself."""
        found: list[str] = json.loads((self.folder / "changes").read_text())
        return found

    @property
    def passes(self) -> int:
        """The forward passes that it trained with; known once it has ended by itself."""
        return int((self.folder / "passes").read_text())

    def until_paused(self) -> None:
        """Wait until it has come to the change it was to pause at."""
        deadline = time.monotonic() + DEADLINE
        while not (self.folder / "paused").exists():
            assert time.monotonic() < deadline, self.err
            time.sleep(0.01)

    def release(self) -> None:
        (self.folder / "go").touch()


class Server:
    """Forks processes that run `treering` commands on the workspace `root`."""

    def __init__(self, root: Path, scratch: Path, model: Path) -> None:
        self.root, self.scratch, self.count = root, scratch, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(
        self,
        *arguments: str,
        kill_at: int = 0,
        pause_at: str = "",
        kill_in_pass: int = 0,
        pause_in_pass: int = 0,
        threads: int = 1,
    ) -> Process:
        """Run `treering *arguments` on the workspace."""
        self.count += 1
        folder = self.scratch / str(self.count)
        folder.mkdir()
        order = {
            "arguments": [*arguments, "--workspace", str(self.root)],
            "root": str(self.root),
            "folder": str(folder),
            "kill_at": kill_at,
            "pause_at": pause_at,
            "kill_in_pass": kill_in_pass,
            "pause_in_pass": pause_in_pass,
            "threads": threads,
        }
        return Process(self, int(self.ask({"start": order})), folder)

    def run(self, *arguments: str, code: int = 0, **options: Any) -> Process:
        """Run it to its end, which must be `code`."""
        process = self.start(*arguments, **options)
        found = process.wait()
        assert found == code, f"{arguments} ended with {found}, not {code}: {process.out}{process.err}"
        return process

    def json(self, *arguments: str) -> dict[str, Any]:
        """What the command prints with --json."""
        found: dict[str, Any] = json.loads(self.run(*arguments, "--json").out)
        return found

    def ask(self, question: dict[str, Any]) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Disk:
    """Sees every change this process makes to files below `root`, before it is made."""

    def __init__(self, root: str, folder: Path, kill_at: int, pause_at: str) -> None:
        self.root, self.folder, self.kill_at, self.pause_at = root, folder, kill_at, pause_at
        self.changes: list[str] = []
        self.synced = {os.stat(path).st_ino: os.stat(path).st_size for path in self._files()}
        self.fsync = os.fsync

    def watch(self) -> None:
        import sqlalchemy as sa

        os.fsync = self._fsync
        sys.addaudithook(self._audit)
        sa.event.listen(sa.Engine, "before_cursor_execute", lambda *call: self._sql(call[2]))
        sa.event.listen(sa.Engine, "commit", lambda _: self._change("sql commit"))

    def _audit(self, event: str, arguments: Sequence[Any]) -> None:
        if event in CHANGES:
            self._change(f"{event} {' '.join(a for a in map(str, arguments) if a != '-1')}")
        elif event == "open" and str(arguments[0]).startswith(self.root) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            self._change(f"open {arguments[0]}")

    def _sql(self, statement: str) -> None:
        if not statement.startswith(("SELECT", "PRAGMA")):
            self._change(f"sql {statement.partition(' ')[0]}")

    def _fsync(self, fd: Any) -> None:
        self._change(f"fsync {os.readlink(f'/proc/self/fd/{fd}')}")
        self.fsync(fd)
        found = os.fstat(fd)
        self.synced[found.st_ino] = found.st_size

    def _change(self, name: str) -> None:
        self.changes.append(name)
        if len(self.changes) == self.kill_at:
            self._lose_what_was_not_synced()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.pause_at and self.pause_at in name:
            self.pause_at = ""
            wait_in(self.folder)

    def _lose_what_was_not_synced(self) -> None:
        for path in self._files():
            found = os.stat(path)
            safe = self.synced.get(found.st_ino, 0)
            if found.st_size > safe:
                os.truncate(path, (found.st_size + safe) // 2)

    def _files(self) -> list[str]:
        """Plain files of the workspace; SQLite looks after its own."""
        found = [os.path.join(here, name) for here, _, names in os.walk(self.root) for name in names]
        return [path for path in found if ".db" not in path and not os.path.islink(path)]


def wait_in(folder: Path) -> None:
    """Say that this process waits, and wait until it is released."""
    (folder / "paused").touch()
    while not (folder / "go").exists():
        time.sleep(0.01)


def watch_passes(folder: Path, kill_in: int, pause_in: int) -> list[int]:
    """Kill this process, or have it wait, in one of training's forward passes; returns the list that counts them."""
    train: Any = importlib.import_module("treering.train")

    numbers = itertools.count(1)
    seen: list[int] = []
    plain = train.cross_entropy

    def loss(*arguments: Any, **options: Any) -> Any:
        number = next(numbers)  # Of its own in each thread.
        seen.append(number)
        if number == kill_in:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == pause_in:
            wait_in(folder)
        return plain(*arguments, **options)

    train.cross_entropy = loss
    return seen


def import_all(model: Path) -> None:
    """Import what commands need, by running them: each forked process would have to import it anew."""
    from treering import Workspace
    from treering.cli import run
    from treering.testing import toy_rows

    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        root = Path(folder) / "ws"
        Workspace.create(root, model_name_or_path=str(model), bf16=False, max_steps=1)
        for task in ("pens", "cups"):
            Workspace(root).ingest(toy_rows(task, 20), task=task)
            assert run(["update", "gate.floor=1.0", "--workspace", str(root)]) == 0
        for command in ("status", "verify"):
            run([command, "--workspace", str(root)])
        gc.collect()  # Closes the databases.


def serve(model: Path) -> None:
    """Fork what standard input asks for, one JSON object a line; answer with process ids and wait statuses."""
    import torch

    from treering.cli import run

    def answer(number: int) -> None:
        sys.stdout.write(f"{number}\n")
        sys.stdout.flush()

    torch.set_num_threads(1)
    import_all(model)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer(os.waitpid(question["wait"], 0)[1])
            continue
        pid = os.fork()
        if pid:
            answer(pid)
            continue
        order = question["start"]
        folder = Path(order["folder"])
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
        disk = Disk(order["root"], folder, order["kill_at"], order["pause_at"])
        disk.watch()
        passes = watch_passes(folder, order["kill_in_pass"], order["pause_in_pass"])
        torch.set_num_threads(order["threads"])
        code = 70
        try:
            code = run(order["arguments"])
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            disk.kill_at, disk.pause_at = 0, ""
            (folder / "changes").write_text(json.dumps(disk.changes))
            (folder / "passes").write_text(str(len(passes)))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
