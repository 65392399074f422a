"""What the twentieth update costs beside the second, and beside training on everything again.

    python benchmarks/updates.py --data DIR [--updates 20] [--rows 64] [--json FILE]

`DIR` has a folder a task with training rows, all of them shuffled together here: every update gets as many new rows of
the same kind. Each update, and each training on everything so far, is a process of its own in a workspace of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from treering import Workspace, registry
from treering.bench.stream import examples

UPDATE = "import sys; from treering import Workspace; Workspace(sys.argv[1]).update(quiet=True)"
SETTINGS: dict[str, Any] = {"num_train_epochs": 1, "memory": {"size": 64}}
AGAIN = (1, 5, 10, 20)
"""After how many updates everything is trained again, to compare."""


def rows(data: Path) -> list[Any]:
    """All training rows in `data`, shuffled."""
    found = examples(data, "train")
    random.Random(0).shuffle(found)
    return [{"messages": row.as_dicts()} for row in found]


def learn(ws: Workspace, new: list[Any]) -> dict[str, float]:
    """Ingest and update; seconds in all and of training, peak memory, and rows measured."""
    ws.ingest(new, task="stream")
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", UPDATE, str(ws.root)], check=True, env=environment)
    seconds = time.perf_counter() - started
    version = registry.versions(ws)[-1]
    if registry.current(ws) != version:
        ws.promote(version.name, force=True)  # The gate is not what is measured here.
    manifest = version.manifest
    return {
        "seconds": round(seconds, 1),
        "train_seconds": round(manifest["cost"]["seconds"], 1),
        "peak_memory_mb": round(manifest["cost"]["peak_memory_mb"]),
        "measured": sum(map(len, manifest["held_out"].values())),
    }


def main() -> None:
    """Print a line an update."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    stream = rows(given.data)
    if len(stream) < given.updates * given.rows:
        raise SystemExit(f"--data {given.data} has {len(stream)} rows; {given.updates * given.rows} are needed")
    found: dict[str, list[dict[str, float]]] = {"updates": [], "everything": []}
    with tempfile.TemporaryDirectory(prefix="treering-updates-") as scratch:
        ws = Workspace.create(Path(scratch) / "updates", **SETTINGS)
        for number in range(1, given.updates + 1):
            new = stream[(number - 1) * given.rows : number * given.rows]
            found["updates"].append({"update": number, **learn(ws, new)})
            print("update", json.dumps(found["updates"][-1]), flush=True)
            if number in AGAIN:
                alone = Workspace.create(Path(scratch) / f"everything-{number}", **SETTINGS, protect=[])
                found["everything"].append({"update": number, **learn(alone, stream[: number * given.rows])})
                print("everything", json.dumps(found["everything"][-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
