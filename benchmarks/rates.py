"""`learning_rate: auto` beside a grid of fixed rates: what is learned, what is forgotten, and what the choice costs.

    python benchmarks/rates.py --data DIR --out FILE.jsonl [--tasks home,travel] [--rates 5e-4,1e-3,2e-3,4e-3,auto]

`DIR` has a folder a task with train and test files. Every rate goes through the whole stream of tasks, in a workspace
of its own, on the same rows; verdicts are ignored. A rate whose figures are in `FILE.jsonl` is not run again, so a run
that was broken off goes on with the next, and two runs of different rates may share the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from treering import Workspace, registry
from treering.bench.stream import Draw, Stream
from treering.results import read_results


def run(draw: Draw, seed: int, names: list[str], rate: str, settings: list[str], folder: Path) -> dict[str, Any]:
    """The stream of tasks `names` at `rate`: scores of the last version by row, and what each update took."""
    ws = Workspace.create(folder, seed=seed)
    updates = []
    for name in names:
        train, test = ([{"messages": row.as_dicts()} for row in rows] for rows in (draw.taught[name], draw.test[name]))
        ws.ingest(train, task=name, held_out=test)
        ws.update(f"learning_rate={rate}", *settings, promote=False)
        version = registry.versions(ws)[-1]
        ws.promote(version.name, force=True)
        manifest = version.manifest
        updates.append(
            {
                "task": name,
                "score": manifest["scores"][name]["score"],
                "choice": manifest["choices"]["learning_rate"],
                "range_test": manifest["range_test"],
                "rows_trained": manifest["cost"]["rows_trained"],
                "seconds": manifest["cost"]["seconds"],
            }
        )
    results = read_results(version.folder / "results.parquet")
    return {"updates": updates, "scores": {name: {r.id: r.score for r in results if r.task == name} for name in names}}


def table(found: dict[str, dict[str, Any]], names: list[str]) -> list[str]:
    """A line a rate, in points: the mean of all tasks with its standard error, new and old ones, `auto` against it."""
    lines = ["| rate | average | standard error | new | old | auto minus this | its standard error |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |"]
    auto = _scores(found["auto"]) if "auto" in found else {}
    for rate, figures in found.items():
        scores = _scores(figures)
        old = fmean(fmean(figures["scores"][name].values()) for name in names[:-1])
        new = fmean(update["score"] for update in figures["updates"])
        cells = [fmean(scores.values()), _error(list(scores.values())), new, old]
        differences = [auto[id] - score for id, score in scores.items()] if auto and rate != "auto" else []
        cells += [fmean(differences), _error(differences)] if differences else []
        lines.append(
            f"| {rate} | " + " | ".join(f"{100 * cell:.1f}" for cell in cells) + " |" + " | |" * (not differences)
        )
    for update in found["auto"]["updates"] if auto else []:
        tested = update["range_test"]["seconds"] if update["range_test"] else 0.0
        lines.append(f"{update['task']}: {update['choice']['value']:g} ({update['choice']['reason']})")
        lines.append(f"{update['task']}: {tested:.0f} s of range test, {update['seconds'] - tested:.0f} s of training")
    return lines


def _scores(figures: dict[str, Any]) -> dict[str, float]:
    return {id: score for scores in figures["scores"].values() for id, score in scores.items()}


def _error(values: list[float]) -> float:
    return stdev(values) / sqrt(len(values))


def main() -> None:
    """Run what is missing, then print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default="home,travel")
    parser.add_argument("--rates", default="5e-4,1e-3,2e-3,4e-3,auto")
    parser.add_argument("--per-label", type=int, default=8)
    parser.add_argument("--eval-rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    given = parser.parse_args()
    draw = Stream(given.data, given.per_label, eval_rows=given.eval_rows).draw(given.seed)
    names = given.tasks.split(",")
    if missing := set(names) - draw.taught.keys():
        raise SystemExit(f"--tasks names {', '.join(sorted(missing))}, but {given.data} has {', '.join(draw.taught)}")
    key = [names, given.per_label, given.eval_rows, given.seed, given.settings]
    for rate in given.rates.split(","):
        if rate in _kept(given.out, key):
            continue
        with tempfile.TemporaryDirectory(prefix="treering-rates-") as scratch:
            figures = run(draw, given.seed, names, rate, given.settings, Path(scratch) / "ws")
        with given.out.open("a", encoding="utf-8") as out:
            out.write(json.dumps({"stream": key, "rate": rate, **figures}) + "\n")
    print("\n".join(table(_kept(given.out, key), names)))


def _kept(path: Path, key: list[Any]) -> dict[str, dict[str, Any]]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {figures["rate"]: figures for figures in found if figures["stream"] == key}


if __name__ == "__main__":
    main()
