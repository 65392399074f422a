"""`treering bench speed`: training and scoring beside what people use for them, on the same rows, in turns.

Every contestant has a process of its own (`contestant.py`, `scorer.py`), which waits while the others have their turn,
so that what else the machine does meets all of them.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treering.bench.stream import examples
from treering.config import Config
from treering.data.example import Example
from treering.errors import TreeringError, UsageError
from treering.files import write_json
from treering.model import Tokens, encode, load_tokenizer, resolve
from treering.progress import bar

OURS = "treering"
DISTILLATION = "distillation"
"""Ours, with a teacher's stored logits for every row: what they cost."""

PEERS = ("trainer-fp32", "trainer-bf16", "trl-fp32", "trl-bf16")
"""Transformers' `Trainer` and TRL's `SFTTrainer`, both with peft, in float32 and with bfloat16 weights and autocast."""

SCORERS = ("generate", "lm-eval")
"""Transformers' `generate` and lm-evaluation-harness, both with the adapter merged into bfloat16 weights."""

REFERENCE = "trainer-fp32"
"""Whose losses ours are compared with, step by step."""

WARM_UP_STEPS = 2
SIZES = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the matrices whose product is the machine's measure, by device."""


@dataclass(frozen=True)
class Race:
    """What is trained on: rows of `data` (a folder of tasks, or of one), `steps` batches a turn, `turns` turns.

    `eval_rows` of its held-out files are scored.
    """

    data: Path
    steps: int = 4
    turns: int = 5
    eval_rows: int = 96
    model: str | None = None
    overrides: tuple[str, ...] = ()
    """`key=value` settings of all, as in `treering.yaml`."""

    def config(self) -> Config:
        """The settings of all: the same constant rate, so that losses can be compared."""
        common = {
            "per_device_train_batch_size": 32,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "warmup_ratio": 0.0,
            "protect": [],
            **({"model_name_or_path": self.model} if self.model else {}),
        }
        return Config.build(common, self.overrides)

    def batches(self, config: Config, base: Path) -> list[list[Tokens]]:
        """Rows of like length together. Raises `UsageError` if `data` has too few."""
        from treering.memory import Memory
        from treering.methods import Methods
        from treering.schedule import plan_steps

        wanted = WARM_UP_STEPS + self.steps * self.turns
        tokenizer = load_tokenizer(base)
        rows = {example.id: encode(tokenizer, example) for example in self._examples("train")}
        size = config.per_device_train_batch_size
        if len(rows) < size:
            raise UsageError(f"--data {self.data} has {len(rows)} training rows; a batch needs {size}")
        lengths = {id: len(row.ids) for id, row in rows.items()}
        # Full ones alone: after a shorter one, the last of an epoch, those of the peers would be of other rows.
        enough = wanted + math.ceil(wanted / (len(rows) // size))
        settings = config.model_copy(update={"max_steps": enough, "gradient_accumulation_steps": 1})
        steps = plan_steps(sorted(rows), Memory(), Methods(config), lengths, settings)
        batches = [[rows[id] for id in batch] for step in steps for batch in step]
        return [batch for batch in batches if len(batch) == size][:wanted]

    def held_out(self) -> list[Example]:
        """The rows that are scored; none if `data` has no held-out files."""
        rows = self._examples("held_out")
        return random.Random(0).sample(rows, min(len(rows), self.eval_rows))

    def _examples(self, split: str) -> list[Example]:
        if not self.data.is_dir():
            raise UsageError(f"--data {self.data} is no folder; name one with files of training rows")
        return examples(self.data, split)


class Contestant:
    """A trainer or a scorer in a process of its own."""

    def __init__(self, name: str, module: str, work: Path, log: Path) -> None:
        self.name = name
        self._log = log
        command = [sys.executable, "-m", f"treering.bench.{module}", name, str(work)]
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"},
            )

    def turn(self, steps: int) -> dict[str, Any]:
        """Let it train on the next `steps` batches; with none left, the losses. A scorer scores all rows.

        Raises `TreeringError` if it ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = " ".join(self._log.read_text(errors="replace").strip().splitlines()[-1:])
            if last.startswith("ModuleNotFoundError"):
                last += "; pip install 'treering[benchmarks]'"
            if self._process.wait() == -signal.SIGKILL:
                last = "it was killed, as when the machine's memory is full; name fewer --peers, which all stay loaded"
            raise TreeringError(f"{self.name} ended ({last}); all it said is in {self._log}")
        found: dict[str, Any] = json.loads(line)
        return found

    def end(self) -> None:
        """Kill it."""
        self._process.kill()
        self._process.wait()


def run_speed(race: Race, peers: Sequence[str] = (*PEERS, *SCORERS), logs: Path | None = None) -> dict[str, Any]:
    """Train and score with treering and `peers` in turns; returns the medians of their speeds, memory, and how
    losses agree.

    Raises:
        UsageError: unknown peers, or data without rows enough.
        TreeringError: a contestant ended, say because its package is not installed.
    """
    known = (*PEERS, *SCORERS)
    unknown = [name for name in peers if name not in known]
    if unknown:
        raise UsageError(f"unknown peers: {', '.join(unknown)}; known: {', '.join(known)}")
    config = race.config()
    base = resolve(config.model_name_or_path, config.trust_remote_code)
    batches, held_out = race.batches(config, base), race.held_out()
    with tempfile.TemporaryDirectory(prefix="treering-bench-") as scratch:
        folder = logs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        work = folder / "work.json"
        rows = [[{"id": row.id, "ids": row.ids, "answers": row.answers} for row in batch] for batch in batches]
        asked = [row.as_dicts() for row in held_out]
        given = {"base": str(base), "config": config.model_dump(mode="json"), "batches": rows, "held_out": asked}
        write_json(work, given)
        trainers = [OURS, DISTILLATION, *(name for name in peers if name in PEERS)]
        runs, losses, products = _race(race, trainers, work, folder)
        found = _figures(race, batches, runs, losses, products)
        scorers = [OURS, *(name for name in peers if name in SCORERS)]
        found["evaluation"] = _scoring(race, scorers, len(held_out), work, folder) if held_out else None
    return found


def _scoring(race: Race, names: Sequence[str], rows: int, work: Path, folder: Path) -> dict[str, Any]:
    """Rows a second of each scorer, how many times as fast treering is, and what they find right."""
    told: dict[str, list[Any]] = {name: [] for name in names}
    with ExitStack() as inside, bar("scoring", (race.turns + 1) * len(names), False) as advance:
        scorers = [inside.enter_context(_contestant(name, "scorer", work, folder)) for name in names]
        for turn in range(race.turns + 1):
            for scorer in scorers:
                found = scorer.turn(1)
                told[scorer.name] += [found] if turn else []  # The first warms up.
                advance(1, scorer.name)
    return {
        "rows": rows,
        "rows_per_second": {name: rows / statistics.median(t["seconds"] for t in ts) for name, ts in told.items()},
        "times_faster": {name: _ratio(told[OURS], told[name]) for name in names if name != OURS},
        "right": {name: found[-1]["right"] for name, found in told.items()},
        "peak_memory_mb": {name: found[-1]["peak_memory_mb"] for name, found in told.items()},
    }


def _race(
    race: Race, names: Sequence[str], work: Path, folder: Path
) -> tuple[dict[str, list[Any]], dict[str, list[float]], list[float]]:
    """What each contestant says of its turns, its losses, and the FLOP/s of a plain product after each round."""
    runs: dict[str, list[Any]] = {name: [] for name in names}
    products = []
    with ExitStack() as inside, bar("racing", (race.turns + 1) * len(names), False) as advance:
        contestants = []
        for name in names:
            contestants.append(inside.enter_context(_contestant(name, "contestant", work, folder)))
            contestants[-1].turn(WARM_UP_STEPS)
            advance(1, name)
        for _ in range(race.turns):
            for contestant in contestants:
                runs[contestant.name].append(contestant.turn(race.steps))
                advance(1, contestant.name)
            products.append(product_flops())
        losses = {contestant.name: contestant.turn(0)["losses"] for contestant in contestants}
    return runs, losses, products


@contextmanager
def _contestant(name: str, module: str, work: Path, folder: Path) -> Iterator[Contestant]:
    contestant = Contestant(name, module, work, folder / f"{module}-{name}.log")
    try:
        yield contestant
    finally:
        contestant.end()


def product_flops() -> float:
    """FLOP/s of a bfloat16 matrix product, on the GPU or with all threads: the best of a few."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = SIZES[device]
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        product = torch.mm(a, b)
        float(product[0, 0])  # On a GPU it is done when it is looked at.
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _figures(
    race: Race,
    batches: Sequence[Sequence[Tokens]],
    runs: Mapping[str, list[Any]],
    losses: Mapping[str, list[float]],
    products: Sequence[float],
) -> dict[str, Any]:
    starts = [WARM_UP_STEPS + turn * race.steps for turn in range(race.turns)]
    turns = [batches[start : start + race.steps] for start in starts]
    examples = [sum(map(len, turn)) for turn in turns]
    tokens = [sum(len(row.ids) - 1 for batch in turn for row in batch) for turn in turns]
    found: dict[str, Any] = {"examples_per_second": {}, "tokens_per_second": {}, "peak_memory_mb": {}}
    for name, told in runs.items():
        seconds = [turn["seconds"] for turn in told]
        found["examples_per_second"][name] = _median(examples, seconds)
        found["tokens_per_second"][name] = _median(tokens, seconds)
        found["peak_memory_mb"][name] = told[-1]["peak_memory_mb"]
    ours = runs[OURS]
    # Of the best product: one that met other work on the machine would make the share look large.
    found["flops_share"] = statistics.median(turn["flops"] / turn["seconds"] for turn in ours) / max(products)
    peers = [name for name in runs if name in PEERS]
    found["distillation_cost"] = _ratio(ours, runs[DISTILLATION])
    found["times_faster"] = {name: _ratio(ours, runs[name]) for name in peers}
    found["losses"] = losses
    found["loss_gap"] = _gap(losses[OURS], losses[REFERENCE]) if REFERENCE in runs else None
    found["batches"] = {"rows": sum(examples), "tokens": sum(tokens), "answer_tokens": _answers(turns)}
    return found


def _median(counts: Sequence[int], seconds: Sequence[float]) -> float:
    return statistics.median(count / spent for count, spent in zip(counts, seconds, strict=True))


def _ratio(ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]) -> float:
    """Of the turns in pairs, on the same rows and one after the other, the median."""
    return statistics.median(b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True))


def _gap(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest relative difference at any step."""
    return max(abs(a - b) / b for a, b in zip(ours, theirs, strict=True))


def _answers(turns: Sequence[Sequence[Sequence[Tokens]]]) -> int:
    return sum(len(row.answers) for turn in turns for batch in turn for row in batch)


def table(found: Mapping[str, Any]) -> list[str]:
    """The figures as lines of text."""
    lines = [f"{'':14}{'rows/s':>10}{'tokens/s':>12}{'treering is':>16}{'peak memory':>16}"]
    for name, speed in found["examples_per_second"].items():
        times = f"{found['times_faster'][name]:.1f} x as fast" if name in found["times_faster"] else ""
        tokens, memory = found["tokens_per_second"][name], found["peak_memory_mb"][name]
        lines.append(f"{name:14}{speed:>10.1f}{tokens:>12.0f}{times:>16}{f'{memory:.0f} MB':>16}")
    lines.append(f"with stored logits for every row it takes {found['distillation_cost']:.2f} times as long")
    lines.append(f"{100 * found['flops_share']:.0f}% of what the machine does in a plain bfloat16 matrix product")
    if found["loss_gap"] is not None:
        lines.append(f"losses differ from {REFERENCE} by {100 * found['loss_gap']:.1f}% at most, step by step")
    scored = found["evaluation"]
    if scored is not None:
        lines.append(f"scoring {scored['rows']} held-out rows:")
        for name, speed in scored["rows_per_second"].items():
            times = f"{scored['times_faster'][name]:.1f} x as fast" if name in scored["times_faster"] else ""
            memory, right = scored["peak_memory_mb"][name], 100 * scored["right"][name]
            lines.append(f"{name:14}{speed:>10.1f}{f'{right:.0f}% right':>12}{times:>16}{f'{memory:.0f} MB':>16}")
    return lines
