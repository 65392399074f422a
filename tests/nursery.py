"""A process that has imported what is slow, and forks one for each program: for limits that are a process's own.

What torch takes once is taken by then. What is freed goes back at once, and there is one arena, so that no memory that
the process has already is used when a limit leaves none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Ended:
    """What came of a program."""

    returncode: int
    stdout: str
    stderr: str


class Nursery:
    """Runs programs on the tiny model in `model`."""

    def __init__(self, model: Path) -> None:
        allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **allocator}
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def run(self, program: str, *arguments: object) -> Ended:
        """Run it to its end, with those arguments in `sys.argv[1:]`."""
        assert self._process.stdin is not None and self._process.stdout is not None
        order = {"program": program, "arguments": list(map(str, arguments))}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        found = json.loads(self._process.stdout.readline())
        return Ended(os.waitstatus_to_exitcode(found["status"]), found["out"], found["err"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def serve(model: Path) -> None:
    """Fork what standard input asks for, one JSON object a line; answer with wait statuses."""
    import torch

    from tests.training import Run, settings

    torch.set_num_threads(1)
    Run(model, settings(model, max_steps=1)).train()
    for line in sys.stdin:
        order = json.loads(line)
        (out, out_end), (err, err_end) = os.pipe(), os.pipe()
        pid = os.fork()
        if not pid:
            os.dup2(out_end, 1)
            os.dup2(err_end, 2)
            perform(order["program"], order["arguments"])
        os.close(out_end)
        os.close(err_end)
        with ThreadPoolExecutor(1) as threads:  # A pipe holds 64 KiB, and both are written to.
            told = threads.submit(read, err)
            said = {"out": read(out), "err": told.result()}
        sys.stdout.write(json.dumps({**said, "status": os.waitpid(pid, 0)[1]}) + "\n")
        sys.stdout.flush()


def read(pipe: int) -> str:
    with os.fdopen(pipe, encoding="utf-8") as file:
        return file.read()


def perform(program: str, arguments: list[str]) -> None:
    """As `python -c` would, and end."""
    sys.argv = ["-c", *arguments]
    code = 0
    try:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
