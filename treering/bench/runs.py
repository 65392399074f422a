"""One method through one draw of a stream, in a process of its own; kept under a digest of all it depends on.

A method runs through the real pipeline, in a workspace of its own; verdicts are ignored, so each update builds on the
one before. A run that was broken off goes on with the update it was in; of a finished one the figures are kept, and the
workspace goes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from treering.bench import general
from treering.bench.code import code_digest
from treering.bench.entries import JOINT, ORACLE, UNTOUCHED
from treering.bench.general import Asked
from treering.bench.stream import Draw, Update
from treering.config import Config
from treering.data.example import Example
from treering.errors import TreeringError, UpdateInterruptedError, UsageError
from treering.files import write_json
from treering.methods import FINETUNING_TYPES, PROTECT
from treering.progress import say
from treering.results import Result, read_results, task_scores
from treering.scoring import metric_for, scorers, wanted
from treering.stop import stop_on_signals

FORMAT = 1
"""Raised when figures are measured or kept in another way."""

FIGURES = "figures.json"

NOT_KEPT = ("results.parquet", "parent.parquet", "best.parquet", "log.jsonl", "report.html", "manifest.json")
"""Files of a version that neither serving nor the next update needs."""

MEMORY = ("memory.json", "memory.safetensors")


@dataclass(frozen=True)
class Job:
    """What a run is: `settings` are those of its workspace, `kind` is `untouched`, `joint`, `oracle` or another method.

    Of `metrics`, by task, only `untouched` makes use; it learns nothing that would settle them.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    updates: list[Update]
    test: Update
    metrics: dict[str, str]
    asked: Asked | None = None

    @classmethod
    def of(cls, name: str, kind: str, settings: Mapping[str, Any], draw: Draw, asked: Asked | None = None) -> Job:
        """The run of a method on a draw. What does not depend on the order is the same job in every order."""
        names = {task: metric_for(rows) for task, rows in draw.taught.items()}
        settings, updates = dict(settings), draw.updates
        if kind == UNTOUCHED:
            updates, settings["seed"] = [], 0
        elif kind == JOINT:
            updates = [draw.taught]
        elif kind == ORACLE:
            updates, asked = [{task: rows} for task, rows in draw.taught.items()], None
        return cls(name, kind, settings, updates, {task: draw.test[task] for task in sorted(draw.test)}, names, asked)

    @property
    def config(self) -> Config:
        """The settings, resolved."""
        return Config.build(dict(self.settings))

    @property
    def digest(self) -> str:
        """Of the resolved settings, the base model, the rows, what else is asked, and the code that trains."""
        from treering.model import resolve

        config = self.config
        # The base model's weights are what counts, not where they lie.
        unused = {"model_name_or_path", *FINETUNING_TYPES, *PROTECT} - {config.finetuning_type, *config.protect}
        content = {
            "format": FORMAT,
            "kind": self.kind if self.kind in (UNTOUCHED, JOINT, ORACLE) else "sequential",
            "settings": {key: value for key, value in config.of_versions().items() if key not in unused},
            "base": _fingerprint(resolve(config.model_name_or_path, config.trust_remote_code)),
            "updates": [{task: [row.id for row in rows] for task, rows in update.items()} for update in self.updates],
            "test": {task: [row.id for row in rows] for task, rows in self.test.items()},
            "metrics": self.metrics if self.kind == UNTOUCHED else None,
            "general": self.asked and self.asked.content,
            "code": code_digest(config),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def run_all(jobs: Sequence[Job], work: Path) -> list[dict[str, Any]]:
    """The figures of each job, in order; those kept in `work` are read, the others run.

    Several commands may share `work`: each takes the jobs that no other is at, then waits for those. Raises what
    `failed` says a method met, and `UpdateInterruptedError` when asked to stop.
    """
    folders = [work / job.digest for job in jobs]
    for wait in (False, True):
        for job, folder in zip(jobs, folders, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / FIGURES).exists():
                with _claimed(folder, wait) as ours:
                    if ours and not (folder / FIGURES).exists():
                        _run(job, folder)
    return [json.loads((folder / FIGURES).read_text(encoding="utf-8")) for folder in folders]


@contextmanager
def _claimed(folder: Path, wait: bool) -> Iterator[bool]:
    """Whether this command may run what is in `folder`; the claim goes with the process."""
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _run(job: Job, folder: Path) -> None:
    """In a process of its own, so that peak memory is its own."""
    say(f"{job.name}: {folder}")
    child = multiprocessing.get_context("spawn").Process(target=_in_child, args=(job, folder))
    with stop_on_signals() as stop:
        child.start()
        while child.exitcode is None:
            child.join(0.5)
            if stop.asked:
                child.terminate()  # Its update keeps a checkpoint.
        child.join()
    if stop.asked:
        raise UpdateInterruptedError(f"stopped in {job.name}; with --work the same command goes on from there")
    if child.exitcode != 0:
        raise TreeringError(f"method {job.name} ended with exit code {child.exitcode}; its messages are above")


def _in_child(job: Job, folder: Path) -> None:
    _end_with_parent()
    try:
        figures = _figures(job, folder)
    except TreeringError as error:
        say(f"{job.name}: {error}")
        sys.exit(error.exit_code)
    write_json(folder / FIGURES, figures)
    for left in folder.glob("ws*"):
        shutil.rmtree(left)


def _end_with_parent() -> None:
    """When the command is killed, its run ends as well: another command could not go on with it otherwise."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def end() -> None:
            parent.join()
            while True:  # An update that is about to end takes the signal and goes by; the next one is asked again.
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)

        threading.Thread(target=end, daemon=True).start()


def _figures(job: Job, folder: Path) -> dict[str, Any]:
    if job.kind == UNTOUCHED:
        return _untouched(job)
    if job.kind != ORACLE:
        return _taught(job, folder / "ws")
    alone = [replace(job, updates=[update], test=_of(job.test, update)) for update in job.updates]
    return _together([_taught(one, folder / f"ws-{number}") for number, one in enumerate(alone)])


def _untouched(job: Job) -> dict[str, Any]:
    from treering.evaluate import evaluate
    from treering.model import load_base, load_tokenizer, resolve
    from treering.room import peak_memory_mb

    config = job.config
    base = resolve(config.model_name_or_path, config.trust_remote_code)
    rows = [(example, task) for task, test in job.test.items() for example in test]
    model, tokenizer = load_base(base, config), load_tokenizer(base, config.trust_remote_code)
    named, ways = wanted(config, job.metrics), scorers(config, Path())
    results = evaluate(model, tokenizer, rows, named, config, scorers=ways, title=job.name)
    scores = task_scores(results)
    costs = dict.fromkeys(("seconds", "rows_trained", "stored_bytes", "trainable_parameters", "memory_rows"), 0)
    return {
        "tasks": list(scores),
        "learned": None,
        "matrix": [[scores[task]["score"] for task in scores]],
        "final": _by_task(results),
        "first": None,
        "loss": fmean(result.loss for result in results),
        "negative_flips": None,
        "cost": {**costs, "peak_memory_mb": peak_memory_mb()},
        "general": job.asked and general.measure(model, tokenizer, base, None, config, job.asked),
    }


def _taught(job: Job, folder: Path) -> dict[str, Any]:
    from treering import registry
    from treering.workspace import Workspace

    try:
        ws = Workspace(folder)
    except UsageError:
        ws = Workspace.create(folder, **job.settings)
    made = len(registry.versions(ws))
    seen: set[str] = set()
    for number, update in enumerate(job.updates, start=1):
        if number > made:
            for task, rows in update.items():
                held_out = None if task in seen else _records(job.test[task])
                ws.ingest(_records(rows), task=task, held_out=held_out)
            say(f"{job.name}: update {number} of {len(job.updates)}, {', '.join(update)}")
            ws.update(promote=False, quiet=False)
        seen |= update.keys()
        ws.promote(f"v{number}", force=True)
    return _measured(job, registry.versions(ws), _text_bytes(ws, registry.versions(ws)[-1]))


def _text_bytes(ws: Any, version: Any) -> int:
    """What the texts of the remembered rows take, which are in the catalog."""
    from treering.memory import Memory

    rows = ws.catalog.examples(list(Memory.load(version.folder).rows))
    return sum(len(json.dumps(row.as_dicts(), ensure_ascii=False).encode()) for row in rows.values())


def _measured(job: Job, versions: Sequence[Any], texts: int) -> dict[str, Any]:
    from treering.methods import Methods
    from treering.model import load, load_tokenizer, resolve

    config, last = job.config, versions[-1]
    costs = [version.manifest["cost"] for version in versions]
    flips = [version.manifest["summary"]["negative_flips"] for version in versions[1:]]
    flips = [share for share in flips if share is not None]
    remembers = any(hasattr(method, "replay") for method in Methods(config).by_name.values())
    kept = set(NOT_KEPT) if remembers else {*NOT_KEPT, *MEMORY}
    stored = sum(p.stat().st_size for p in last.folder.rglob("*") if p.is_file() and p.name not in kept)
    matrix = last.manifest["matrix"]
    each = [_by_task(read_results(version.folder / "results.parquet")) for version in versions]
    after = None
    if job.asked is not None:
        base = resolve(config.model_name_or_path, config.trust_remote_code)
        tokenizer = load_tokenizer(base, config.trust_remote_code)
        after = general.measure(load(base, config, last), tokenizer, base, last.folder, config, job.asked)
    return {
        "tasks": matrix["tasks"],
        "learned": matrix["learned"],
        "matrix": matrix["R"],
        "final": each[-1],
        "first": {task: each[at][task] for task, at in zip(matrix["tasks"], matrix["learned"], strict=True)},
        "loss": fmean(result.loss for result in read_results(last.folder / "results.parquet")),
        "negative_flips": fmean(flips) if flips else None,
        "cost": {
            "seconds": sum(cost["seconds"] for cost in costs),
            "rows_trained": sum(cost["rows_trained"] for cost in costs),
            "stored_bytes": stored + (texts if remembers else 0),
            "trainable_parameters": costs[-1]["trainable_parameters"],
            "memory_rows": sum(last.manifest["memory"].values()) if remembers else 0,
            "peak_memory_mb": max(cost["peak_memory_mb"] for cost in costs),
        },
        "general": after,
    }


def _together(alone: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of models that each know one task, as one that is told which to ask."""
    costs = [one["cost"] for one in alone]
    final = {task: rows for one in alone for task, rows in one["final"].items()}
    return {
        "tasks": [task for one in alone for task in one["tasks"]],
        "learned": [0 for one in alone for _ in one["tasks"]],
        "matrix": [[score for one in alone for score in one["matrix"][-1]]],
        "final": final,
        "first": final,
        "loss": fmean(one["loss"] for one in alone),
        "negative_flips": None,
        "cost": {
            name: max(cost[name] for cost in costs) if name == "peak_memory_mb" else sum(cost[name] for cost in costs)
            for name in costs[0]
        },
        "general": None,
    }


def _by_task(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for result in results:
        found.setdefault(result.task, {})[result.id] = result.score
    return found


def _of(test: Update, update: Update) -> Update:
    return {task: test[task] for task in update}


def _records(rows: Sequence[Example]) -> list[dict[str, object]]:
    return [{"messages": row.as_dicts()} for row in rows]


@cache
def _fingerprint(folder: Path) -> str:
    from treering.model import fingerprint

    return fingerprint(folder)
