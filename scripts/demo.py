"""The main job on the packaged example stream: four product lines in turn, beside plain sequential LoRA.

Writes `.demo/summary.json` and prints the score matrices and the path of the last version's report.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# The two streams run side by side, half the cores each: with batches this small a second thread gains nothing.
os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 2) // 2))

from treering import Workspace, examples, registry

FOLDER = Path(".demo")
SETTINGS: dict[str, Any] = {
    "learning_rate": 1.5e-3,
    "num_train_epochs": 4,
    "per_device_train_batch_size": 8,
    "memory": {"size": "75%", "replay_share": 0.6},
    "distill": {"weight": 1.0},
    "gate": {"margin": 0.1},
    "seed": 1,
}
"""The same for both (without replay the memory is not used). A few hundred rows need smaller batches and a higher rate
than thousands do, and a memory that is a larger share of them, which a large stream would not keep, replayed more and
held on to with more weight than the default. 36 held-out rows a task cannot show differences below 10 points.
"""


def season_after_season(folder: Path, promote_held: bool, **settings: Any) -> list[registry.Version]:
    """A workspace that learns the stream's tasks in turn; `promote_held` goes on past the gate."""
    ws = Workspace.create(folder, **SETTINGS, **settings)
    for number, task in enumerate(sorted(path.name for path in examples.path().iterdir() if path.is_dir()), start=1):
        rows = ws.ingest(
            examples.path() / task / "train.jsonl", task=task, held_out=examples.path() / task / "test.jsonl"
        )
        print(f"\n{folder.name}, update {number}: {task}, {rows.accepted} rows ({rows.held_out} held out)", flush=True)
        version = ws.update(quiet=False)
        assert version is not None
        print(f"{version.name} {version.summary}", flush=True)
        if promote_held and not version.promote:
            ws.promote(version.name, force=True)
    return registry.versions(ws)


def show(title: str, version: registry.Version) -> None:
    """The score matrix and its measures."""
    matrix, summary = version.manifest["matrix"], version.manifest["summary"]
    print(f"\n{title}: score on each task after each update")
    print("          " + "".join(f"{task:>11}" for task in matrix["tasks"]))
    for number, row in enumerate(matrix["R"], start=1):
        print(f"update {number:<3}" + "".join(f"{'-' if v is None else f'{100 * v:.1f}':>11}" for v in row))
    print(f"average accuracy {100 * summary['average_accuracy']:.1f}, forgetting {100 * summary['forgetting']:.1f}")


def main() -> int:
    """Run both, compare, write the summary."""
    started = time.monotonic()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    print(f"plain sequential LoRA runs beside it and writes to {FOLDER / 'naive.log'}", flush=True)
    with (FOLDER / "naive.log").open("w") as log:
        beside = subprocess.Popen([sys.executable, __file__, "naive"], stdout=log, stderr=log)
        try:
            ours = season_after_season(FOLDER / "treering", promote_held=False)
            if beside.poll() is None:
                print("\nwaiting for plain sequential LoRA", flush=True)
            if beside.wait():
                print(f"plain sequential LoRA failed; {FOLDER / 'naive.log'} says why")
                return 1
        finally:
            beside.terminate()
    naive = registry.versions(Workspace(FOLDER / "naive"))
    current = registry.current(Workspace(FOLDER / "treering"))
    assert current is not None
    report = (current.folder / "report.html").resolve()
    show("treering", current)
    show("plain sequential LoRA", naive[-1])
    figures = {"treering": current.manifest["summary"], "naive": naive[-1].manifest["summary"]}
    gain = figures["treering"]["average_accuracy"] - figures["naive"]["average_accuracy"]
    promoted = sum(version.promote for version in ours)
    print(f"\n{100 * gain:+.1f} points of average accuracy over plain sequential LoRA")
    print(
        f"{promoted} of {len(ours)} updates of treering promoted; its memory: {SETTINGS['memory']['size']} of the rows"
    )
    print(f"{time.monotonic() - started:.0f} s; report: {report}")
    (FOLDER / "summary.json").write_text(json.dumps({**figures, "report": str(report)}, indent=1) + "\n")
    return 0 if promoted == len(ours) else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["naive"]:
        season_after_season(FOLDER / "naive", promote_held=True, protect=[])
    else:
        sys.exit(main())
