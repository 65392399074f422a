"""One step in a process of its own, so that what kills it (memory, a crash in a library) does not end the loop.

The order is the first line of standard input, which stays open: once it closes, whoever gave the order is gone, and the
step is asked to stop. The answer is the last line of standard output.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from treering.automate import culprit
from treering.errors import TreeringError, full_disk_is_clear, short_memory_is_clear
from treering.pipes import own_output
from treering.registry import PLAN
from treering.workspace import Workspace

COUNTS = ("rows", "accepted", "duplicates", "quarantined", "held_out", "reasons")
"""What the loop is told of files taken in; the catalog has the rest."""


def perform(ws: Workspace, order: dict[str, Any]) -> dict[str, Any]:
    """Take in files, update, or try an update in miniature; returns what came of it in plain values."""
    if order["step"] == "ingest":
        from treering.data.intake import ingest

        with full_disk_is_clear(ws.root):
            taken = ingest(ws, only={Path(file) for file in order["files"]}, quiet=False).as_dict()
        return {key: taken[key] for key in COUNTS}
    if order["step"] == "calibrate":
        return _calibrated(ws, Path(order["folder"]), order["overrides"], order["quiet"])
    from treering import pipeline

    settings = culprit.careful(ws, order["file"]) if order["careful"] else ()
    outcome = pipeline.update(
        ws, settings, inbox=False, file=order["file"], rolled_back=False, ordered=order["ordered"]
    )
    version = outcome.version.name if outcome.version else None
    return {"status": outcome.status, "reason": outcome.reason, "version": version}


def _calibrated(ws: Workspace, folder: Path, overrides: list[str], quiet: bool) -> dict[str, Any]:
    """Run the plan in `folder` in miniature, on the catalog there."""
    from treering.calibrate import calibrate
    from treering.data.catalog import Catalog
    from treering.plan import Plan

    with full_disk_is_clear(ws.root), short_memory_is_clear():
        ws.catalog = Catalog(folder / "treering.db")
        plan = Plan(**json.loads((folder / PLAN).read_text(encoding="utf-8")))
        return asdict(calibrate(ws, plan, ws.config(overrides), folder, quiet))


def main() -> None:
    """Read the order, perform it, answer."""
    answers = own_output()
    orders = io.FileIO(0, closefd=False)
    order = json.loads(orders.readline())
    threading.Thread(target=_end_with_parent, args=(orders,), daemon=True).start()
    try:
        answer = perform(Workspace(order["workspace"]), order)
    except TreeringError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    except Exception as error:
        traceback.print_exc()
        answer = {"error": f"{type(error).__name__}: {error}", "kind": "bug"}
    with suppress(BrokenPipeError), answers:  # Nobody is left to be told.
        answers.write(json.dumps(answer) + "\n")


def _end_with_parent(orders: io.FileIO) -> None:
    while orders.read(1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
