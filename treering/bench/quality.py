"""`treering bench quality`: a stream of tasks through several methods, side by side.

Every method runs through the real pipeline, in a workspace and a process of its own; verdicts are ignored, so each
update builds on the one before. All methods get the same rows, rate and epochs.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from treering import metrics
from treering.config import Config
from treering.data.example import Example
from treering.data.read import Bad, Row, find_files, read, split_of
from treering.errors import TreeringError, UpdateInterruptedError, UsageError
from treering.files import write_json
from treering.stop import stop_on_signals

METHODS: dict[str, dict[str, Any]] = {
    "untouched": {},
    "naive": {"protect": []},
    "full": {"finetuning_type": "full", "protect": []},
    "replay": {"protect": ["replay"], "memory": {"policy": "reservoir"}},
    "treering": {},
    "joint": {"protect": []},
}
"""Settings of each method over the common ones: `naive` is sequential LoRA, `full` sequential full fine-tuning,
`replay` LoRA with uniform random replay, `treering` the default, `joint` all data in one update."""


@dataclass(frozen=True)
class Stream:
    """Which rows, in which order: `data` has one folder a task, taken in name order.

    `per_label` or `rows` limits the training rows of a task, `eval_rows` its test rows; `seed` chooses them.
    """

    data: Path
    per_label: int | None = None
    rows: int | None = None
    eval_rows: int | None = None
    memory: str = "auto"
    epochs: float = 3
    seed: int = 42
    model: str | None = None
    overrides: tuple[str, ...] = ()
    """`key=value` settings of all methods, but for what makes a method what it is."""

    def tasks(self) -> dict[str, tuple[list[Example], list[Example]]]:
        """Training and test examples of each task. Raises `UsageError` for a folder that is no stream."""
        if not self.data.is_dir():
            raise UsageError(f"--data {self.data} is no folder; name one that holds a folder a task")
        found = {}
        for folder in sorted(path for path in self.data.iterdir() if path.is_dir()):
            train, test = examples(folder, "train"), examples(folder, "held_out")
            if not train or not test:
                raise UsageError(f"{folder} needs a train and a test file with rows")
            found[folder.name] = self._limited(folder.name, train), self._sample(folder.name, test, self.eval_rows)
        if not found:
            raise UsageError(f"--data {self.data} holds no folder; it needs one a task, with train and test files")
        return found

    def settings(self, method: str) -> dict[str, Any]:
        """The workspace settings of `method` on this stream."""
        from treering.schedule import LEARNING_RATES

        special = METHODS[method]
        common = {
            "learning_rate": LEARNING_RATES["lora"],
            "num_train_epochs": self.epochs,
            "seed": self.seed,
            "memory": {"size": int(self.memory) if self.memory.isdigit() else self.memory},
            **({"model_name_or_path": self.model} if self.model else {}),
        }
        found = Config.build(common, self.overrides).model_dump(mode="json", exclude_unset=True)
        return {**found, **special, "memory": {**found["memory"], **special.get("memory", {})}}

    def _limited(self, task: str, rows: list[Example]) -> list[Example]:
        if self.per_label is None:
            return self._sample(task, rows, self.rows)
        counts: dict[str, int] = {}
        kept = []
        for row in self._sample(task, rows, None):
            counts[row.label] = counts.get(row.label, 0) + 1
            if counts[row.label] <= self.per_label:
                kept.append(row)
        return kept

    def _sample(self, task: str, rows: list[Example], count: int | None) -> list[Example]:
        order = sorted(rows, key=lambda row: row.id)
        random.Random(f"{self.seed}:{task}").shuffle(order)
        return order[:count]


def run_quality(stream: Stream, methods: Sequence[str], work: Path | None = None) -> dict[str, Any]:
    """Run exactly `methods`; returns `{"methods": {name: figures}, "stream": {...}}`.

    In `work` (a temporary folder by default) every finished method leaves its figures, so that a run that was broken
    off goes on with the next one.
    """
    unknown = [name for name in methods if name not in METHODS]
    if unknown or not methods:
        raise UsageError(f"unknown methods: {', '.join(unknown) or 'none named'}; known: {', '.join(METHODS)}")
    tasks = stream.tasks()
    for name in methods:
        Config.build(stream.settings(name))
    with tempfile.TemporaryDirectory(prefix="treering-bench-") as scratch:
        folder = (work or Path(scratch)) / _digest(stream, tasks)
        folder.mkdir(parents=True, exist_ok=True)
        # Forward transfer is measured against the untouched model, whatever methods are named.
        untouched = _run(stream, "untouched", folder)
        found = {name: _run(stream, name, folder) if name != "untouched" else untouched for name in methods}
    for name, figures in found.items():
        if name not in ("untouched", "joint"):
            figures["fwt"] = _fwt(figures["matrix"], list(tasks), untouched["matrix"])
    sizes = {task: {"train": len(train), "test": len(test)} for task, (train, test) in tasks.items()}
    return {"methods": found, "stream": {**asdict(stream), "data": str(stream.data), "tasks": sizes}}


def table(found: Mapping[str, Any]) -> list[str]:
    """The figures as lines of text; scores in points."""
    names = ("average_accuracy", "new", "old", "bwt", "fwt", "forgetting", "negative_flips")
    head = f"{'method':12}" + "".join(f"{name.replace('_', ' '):>18}" for name in names) + f"{'seconds':>10}"
    lines = [head]
    for method, figures in found["methods"].items():
        cells = "".join(f"{'-' if figures[n] is None else f'{100 * figures[n]:.1f}':>18}" for n in names)
        lines.append(f"{method:12}{cells}{figures['seconds']:>10.0f}")
    return lines


def _run(stream: Stream, method: str, folder: Path) -> dict[str, Any]:
    """One method in a process of its own, so that peak memory is its own; finished figures are read back."""
    kept = folder / f"{method}.json"
    if not kept.exists():
        _say(f"{method}: {stream.data}")
        child = multiprocessing.get_context("spawn").Process(target=_in_child, args=(stream, method, folder))
        with stop_on_signals() as stop:
            child.start()
            while child.exitcode is None:
                child.join(0.5)
                if stop.asked:
                    child.terminate()  # Its update keeps a checkpoint.
            child.join()
        if stop.asked:
            raise UpdateInterruptedError(f"stopped in {method}; with --work the same command goes on from there")
        if child.exitcode != 0:
            raise TreeringError(f"method {method} ended with exit code {child.exitcode}; its messages are above")
    figures: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return figures


def _in_child(stream: Stream, method: str, folder: Path) -> None:
    try:
        figures = _untouched(stream) if method == "untouched" else _trained(stream, method, folder / method)
    except TreeringError as error:
        _say(f"{method}: {error}")
        sys.exit(error.exit_code)
    write_json(folder / f"{method}.json", figures)


def _untouched(stream: Stream) -> dict[str, Any]:
    from treering.evaluate import evaluate
    from treering.model import load_base, load_tokenizer, resolve
    from treering.results import task_scores
    from treering.room import peak_memory_mb

    config = Config.build(stream.settings("untouched"))
    base = resolve(config.model_name_or_path)
    rows = [(example, task) for task, (_, test) in stream.tasks().items() for example in test]
    names = {
        task: metrics.metric_for([example.label for example in train]) for task, (train, _) in stream.tasks().items()
    }
    results = evaluate(load_base(base, config), load_tokenizer(base), rows, names, config, title="untouched")
    scores = [task_scores(results)[task]["score"] for task in stream.tasks()]
    average = sum(scores) / len(scores)
    nothing = dict.fromkeys(("new", "bwt", "fwt", "forgetting", "negative_flips"))
    return {
        "average_accuracy": average,
        **nothing,
        "old": metrics.old([scores]) if len(scores) > 1 else None,
        "seconds": 0.0,
        "peak_memory_mb": peak_memory_mb(),
        "trainable_parameters": 0,
        "memory_rows": 0,
        "matrix": [scores],
    }


def _trained(stream: Stream, method: str, folder: Path) -> dict[str, Any]:
    from treering import registry
    from treering.workspace import Workspace

    tasks = stream.tasks()
    try:
        ws = Workspace(folder)
    except UsageError:
        ws = Workspace.create(folder, **stream.settings(method))
    made = len(registry.versions(ws))
    groups = [list(tasks)] if method == "joint" else [[task] for task in tasks]
    for number, group in enumerate(groups, start=1):
        if number > made:
            for task in group:
                train, test = tasks[task]
                ws.ingest([_record(e) for e in train], task=task, held_out=[_record(e) for e in test])
            _say(f"{method}: update {number} of {len(groups)}, {', '.join(group)}")
            ws.update(promote=False, quiet=False)
        ws.promote(f"v{number}", force=True)
    return _figures(registry.versions(ws), replayed="replay" in ws.config().protect)


def _figures(versions: Sequence[Any], replayed: bool) -> dict[str, Any]:
    last = versions[-1].manifest
    flips = [v.manifest["summary"]["negative_flips"] for v in versions[1:]]
    R = [[np.nan if value is None else value for value in row] for row in last["matrix"]["R"]]
    return {
        **{name: last["summary"][name] for name in ("average_accuracy", "new", "bwt", "forgetting")},
        "old": metrics.old(R) if len(R[-1]) > 1 else None,
        "fwt": None,
        "negative_flips": sum(flips) / len(flips) if flips else None,
        "seconds": sum(v.manifest["cost"]["seconds"] for v in versions),
        "peak_memory_mb": max(v.manifest["cost"]["peak_memory_mb"] for v in versions),
        "trainable_parameters": last["cost"]["trainable_parameters"],
        "memory_rows": sum(last["memory"].values()) if replayed else 0,
        "matrix": last["matrix"]["R"],
    }


def _fwt(matrix: list[list[float | None]], tasks: list[str], untouched: list[list[float]]) -> float | None:
    R = [[np.nan if value is None else value for value in row] for row in matrix]
    found = metrics.forward_transfer(R, range(len(tasks)), untouched[0])
    return None if np.isnan(found) else found


def examples(folder: Path, split: str) -> list[Example]:
    """Each row once of the files in `folder` whose names tell `split`; what cannot be read is said."""
    found = [row for file in find_files(folder) if split_of(file) == split for row in read(file)]
    left = [row for row in found if isinstance(row, Bad)]
    if left:
        _say(f"{folder}: {len(left)} rows left out, the first at {left[0].file}, line {left[0].line}: {left[0].reason}")
    return list({row.example.id: row.example for row in found if isinstance(row, Row)}.values())


def _record(example: Example) -> dict[str, object]:
    return {"messages": example.as_dicts()}


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _digest(stream: Stream, tasks: Mapping[str, tuple[list[Example], list[Example]]]) -> str:
    """Names what the figures depend on: the rows themselves, wherever they lie, and how they are used."""
    rows = {task: [[row.id for row in side] for side in sides] for task, sides in tasks.items()}
    content = {**asdict(stream), "data": rows}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
