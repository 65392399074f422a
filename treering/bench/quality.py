"""`treering bench quality`: a stream of tasks through several methods, side by side.

All methods get the same rows, epochs and memory, several seeds and orders; what a run is, and how it resumes, is in
`runs.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from treering.bench.entries import UNTOUCHED, Entry
from treering.bench.general import Asked
from treering.bench.measures import BY_ROW, NAMES, Run, defined, difference, interval, measures, spread, summarised
from treering.bench.runs import Job, run_all
from treering.bench.stream import Draw, Stream
from treering.bench.tuning import tune
from treering.errors import UsageError


@dataclass(frozen=True)
class Bench:
    """A stream, how often it is run, and the settings of all methods: `overrides` are `key=value` texts.

    Orders are numbered from 0, the one as named. Differences are told against the method named `baseline`.
    """

    stream: Stream
    seeds: tuple[int, ...] = (42,)
    orders: int = 1
    memory: str = "auto"
    epochs: float = 3
    model: str | None = None
    baseline: str | None = None
    general: Path | None = None
    lm_eval: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()

    def settings(self, entry: Entry, seed: int) -> dict[str, Any]:
        """The workspace settings of a method. Raises `ConfigError`."""
        common = {
            "num_train_epochs": self.epochs,
            "seed": seed,
            "memory": {"size": int(self.memory) if self.memory.isdigit() else self.memory},
            **({"model_name_or_path": self.model} if self.model else {}),
        }
        return entry.settings(common, self.overrides)


def run_quality(bench: Bench, entries: Sequence[Entry], work: Path | None = None) -> dict[str, Any]:
    """Run exactly `entries`; returns what `treering bench quality --json` prints.

    In `work` (a temporary folder by default) every run leaves its figures, so that a benchmark that was broken off goes
    on where it was.
    """
    names = [entry.name for entry in entries]
    if bench.baseline is not None and bench.baseline not in names:
        raise UsageError(f"--baseline {bench.baseline} is none of the methods: {', '.join(names)}")
    for entry in entries:
        bench.settings(entry, bench.seeds[0])
    asked = Asked.of(bench.general, bench.lm_eval)
    draws = {(seed, order): bench.stream.draw(seed, order) for seed in bench.seeds for order in range(bench.orders)}
    with tempfile.TemporaryDirectory(prefix="treering-bench-") as scratch:
        folder = work or Path(scratch)
        tunings = {entry.name: _tuned(bench, entry, draws, folder) for entry in entries}
        rates = {name: found["rate"] for name, found in tunings.items() if found}
        fixed = [entry.at(rates[entry.name]) if entry.name in rates else entry for entry in entries]
        keys = [(entry, *key) for entry in fixed for key in draws]
        jobs = [
            Job.of(entry.name, entry.kind, bench.settings(entry, seed), draws[seed, order], asked)
            for entry, seed, order in keys
        ]
        figures = run_all(jobs, folder)
        before = run_all([_before(bench, draws, asked)], folder)[0]["general"] if asked else None
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for (entry, seed, order), found in zip(keys, figures, strict=True):
        runs[entry.name].append(Run(seed, order, tuple(draws[seed, order].tasks), found))
    untouched = next((runs[e.name][0].figures for e in entries if e.kind == UNTOUCHED), None)
    baseline = runs[bench.baseline] if bench.baseline else None
    methods = {
        entry.name: {
            "kind": entry.kind,
            "settings": list(entry.overrides),
            "tuning": tunings[entry.name],
            **_summary(runs[entry.name], untouched),
            "against": _against(runs[entry.name], baseline) if entry.name != bench.baseline else None,
        }
        for entry in fixed
    }
    return {"stream": _described(bench, draws), "general": before, "methods": methods}


def _tuned(bench: Bench, entry: Entry, draws: Mapping[tuple[int, int], Draw], work: Path) -> dict[str, Any] | None:
    """The rate that all runs of the method get, found on the first seed and order."""
    if not entry.tuned:
        return None
    seed = bench.seeds[0]
    return tune(entry, draws[seed, 0], lambda one: bench.settings(one, seed), work)


def _before(bench: Bench, draws: Mapping[tuple[int, int], Draw], asked: Asked) -> Job:
    """The untouched model, for what it can do before anything is learned."""
    entry, seed = Entry(UNTOUCHED, UNTOUCHED, ()), bench.seeds[0]
    return Job.of(entry.name, entry.kind, bench.settings(entry, seed), draws[seed, 0], asked)


def _summary(runs: Sequence[Run], untouched: Mapping[str, Any] | None) -> dict[str, Any]:
    each = [measures(run, untouched) for run in runs]
    told = {}
    for name in NAMES:
        values = [(run.order, found[name]) for run, found in zip(runs, each, strict=True)]
        known = [(order, value) for order, value in values if value is not None]
        _, low, high = interval(name, runs) if name in BY_ROW and known and defined(name, runs) else (None, None, None)
        told[name] = {
            "mean": summarised([value for _, value in known]),
            "spread": spread(known) if known else None,
            "low": low,
            "high": high,
        }
    costs = [run.figures["cost"] for run in runs]
    cost = {name: (max if name == "peak_memory_mb" else fmean)(one[name] for one in costs) for name in costs[0]}
    general = [run.figures["general"] for run in runs if run.figures["general"]]
    return {
        "measures": told,
        "cost": cost,
        "general": _mean_general(general) if general else None,
        "runs": [
            {
                "seed": run.seed,
                "order": run.order,
                **found,
                "cost": run.figures["cost"],
                "general": run.figures["general"],
                "tasks": run.figures["tasks"],
                "learned": run.figures["learned"],
                "matrix": run.figures["matrix"],
            }
            for run, found in zip(runs, each, strict=True)
        ],
    }


def _mean_general(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tasks = {
        task: {key: fmean(one["tasks"][task][key] for one in found) for key in values}
        for task, values in found[0]["tasks"].items()
    }
    return {name: summarised([one[name] for one in found]) for name in ("perplexity", "questions")} | {"tasks": tasks}


def _against(runs: Sequence[Run], baseline: Sequence[Run] | None) -> dict[str, Any] | None:
    if baseline is None:
        return None
    return {
        name: difference(name, runs, baseline) if defined(name, runs) and defined(name, baseline) else None
        for name in BY_ROW
    }


def _described(bench: Bench, draws: Mapping[tuple[int, int], Draw]) -> dict[str, Any]:
    first = next(iter(draws.values()))
    given = {key: value for key, value in asdict(bench).items() if key not in ("stream", "general", "lm_eval")}
    limits = asdict(bench.stream)
    return {
        **limits,
        "data": str(bench.stream.data),
        **given,
        "seeds": list(bench.seeds),
        "overrides": list(bench.overrides),
        "updates": len(first.updates),
        "tasks": {task: {"train": len(rows), "test": len(first.test[task])} for task, rows in first.taught.items()},
    }
