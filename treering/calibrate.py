"""What an update will need, measured on itself in miniature: the same code, on a few of its steps and rows.

It runs in a process of its own (`forecast.py` starts it), so that its peak of memory is nobody else's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from treering import rates, registry
from treering.candidate import Candidate
from treering.manifest import base_name
from treering.methods.lwf import TOP_K
from treering.model import resolve
from treering.passes import losses
from treering.schedule import peak_rate
from treering.written import Writer, Written

if TYPE_CHECKING:
    from treering.config import Config
    from treering.lesson import Lesson
    from treering.plan import Plan
    from treering.schedule import Step
    from treering.workspace import Workspace

T = TypeVar("T")

SPREAD = 7
"""Steps tried after the first, at most; of a short update half of its own, but no fewer than `FEWEST`."""

FEWEST = 3

REPORT_MB = 5
"""A report, most of it the library that draws its curves."""


@dataclass(frozen=True)
class Estimate:
    """What an update will need, under the names that `cost` has in the manifest of what it then took.

    `seconds` of training, `total_seconds` from the loading of the model to the verdict, `disk_mb` at its fullest,
    `peak_gpu_memory_mb` None without a GPU. `steps` and `rows_trained` are exact, but where nothing is stored and the
    parent writes no row that can be replayed: `rows_written` are as many as it is to write.
    """

    steps: int
    rows_trained: int
    seconds: float
    total_seconds: float
    peak_memory_mb: float
    peak_gpu_memory_mb: float | None
    disk_mb: float
    rows_written: int = 0

    @property
    def needs(self) -> dict[str, float]:
        """The same as `room.room` counts it."""
        gpu = self.peak_gpu_memory_mb
        found = {"memory_mb": self.peak_memory_mb, "disk_mb": self.disk_mb}
        return found if gpu is None else {**found, "gpu_memory_mb": gpu}


def calibrate(ws: Workspace, plan: Plan, config: Config, folder: Path, quiet: bool = True) -> Estimate:
    """Run `plan` on a few of its steps and held-out rows, as an update that works in `folder` (empty; MBs to GBs).

    Nothing outside of `folder` is changed. `quiet`: no bars are shown. Raises what an update raises that cannot begin.
    """
    parent = registry.get(ws, plan.parent) if plan.parent else None
    base = resolve(config.model_name_or_path, config.trust_remote_code)
    candidate = Candidate(ws, plan, parent, base, config, folder, quiet=quiet)
    to_score = len(candidate.unmeasured()) + sum(map(len, candidate.held_out.values()))
    tried = _typical_rows(candidate)
    candidate.held_out = {task: [id for id in ids if id in tried] for task, ids in candidate.held_out.items()}
    asked = len(candidate.unmeasured())
    _, before = _timed(candidate.measure_parent)

    writing: list[float] = []  # How much longer than its trial the writing of each lesson takes.
    candidate.prepare(partial(_stand_in, writing))
    written = sum(len(lesson.written.rows) for lesson in candidate.lessons)
    planned, main = [(lesson, lesson.steps) for lesson in candidate.lessons], candidate.main
    steps, parents = candidate.steps, _parents_mb(candidate)
    tests, trying = _trying(candidate)
    tokens = {id: len(row.ids) for id, row in candidate.pupil.rows.items()}
    tried_steps = typical_steps(steps, tokens)
    learned = {id for step in tried_steps for batch in step for id in batch}
    for lesson in candidate.lessons:  # What one adapter learns takes as long as what others do.
        lesson.steps = tried_steps if lesson is main else []
        lesson.ids = [id for id in lesson.ids if id in learned]
    if main.aside:  # All of them are to be taken.
        main.config = config.model_copy(update={"early_stopping_steps": len(tried_steps) + 1})
    candidate.plan = replace(plan, rows={task: [i for i in ids if i in learned] for task, ids in plan.rows.items()})
    log, learning = _timed(candidate.learn)
    stepping = [_tokens(step, tokens) / e["tokens_per_second"] for step, e in zip(tried_steps, log, strict=True)]
    looking = _looking(main)
    looks = sum(_looks(lesson, len(own)) for lesson, own in planned)
    # Processes of their own begin once, however many the steps are.
    starting = learning - main.processes[0].seconds if main.processes else 0.0
    ended = sum(lesson.ending_seconds for lesson in candidate.lessons)
    looked = _looks(main, len(tried_steps)) * looking
    saving = max(0.0, learning - starting - sum(stepping) - looked - ended)
    checkpoint = max(map(_size_mb, main.checkpoints.glob("step-*")))

    candidate.merge_alike()
    results, after = _timed(candidate.measure)
    candidate.remember()
    candidate.write(base_name(config), results, results, log)
    rest = (
        time.perf_counter()
        - candidate.started
        - before
        - tests * trying
        - learning
        - looking
        - after
        + starting
        + sum(writing)
    )
    memory, gpu_memory = candidate.peaks

    seconds = _all_steps(steps, tried_steps, stepping, tokens)
    saves = [-(-len(own) // config.save_steps) for _, own in planned]
    training = seconds + sum(saves) * saving + looks * looking + ended + tests * rates.RATES * trying
    scoring = to_score * (before + after) / max(1, asked + len(results))
    # Of each lesson that of the beginning, two by count and the newest stay; the version is written beside them.
    fullest = checkpoint * sum(min(4, count + 2) for count in saves) + _size_mb(candidate.folder) + REPORT_MB
    return Estimate(
        steps=len(steps),
        rows_trained=sum(len(batch) for step in steps for batch in step),
        seconds=training,
        total_seconds=rest + training + scoring,
        peak_memory_mb=memory + parents,
        peak_gpu_memory_mb=gpu_memory,
        disk_mb=fullest,
        rows_written=written,
    )


def _stand_in(writing: list[float], writer: Writer) -> Written:
    """Rows in place of those that the parent will write, once a few were tried; `writing` gets the seconds to come."""
    expected, took = _timed(writer.seconds)
    writing.append(expected - took)
    return writer.stand_in()


def typical_steps(steps: Sequence[Step], tokens: Mapping[str, int]) -> list[Step]:
    """The step with the largest batch, to warm up; then some from the smallest to the largest, evenly by rank.

    So the large ones come when the optimiser has its state, and more than once: what the first of them gave back to the
    allocator is not all of use to the next. `tokens`: the length of each row.
    """
    ranked = sorted(steps, key=lambda step: max(len(batch) * max(tokens[id] for id in batch) for batch in step))
    count = min(SPREAD, max(FEWEST, len(steps) // 2))
    return [ranked[-1], *(ranked[(len(ranked) - 1) * at // (count - 1)] for at in range(count))]


def _trying(candidate: Candidate) -> tuple[int, float]:
    """How many lessons have a range test, and the seconds of a rate in it.

    Leaves the model to the main lesson.
    """
    tests, seconds = 0, 0.0
    for lesson in reversed(candidate.lessons):
        candidate.turn_to(lesson)
        sample = rates.Sample.drawn(lesson.new, lesson.memory, lesson.config)
        rate = peak_rate(lesson.config, candidate.model)
        if rates.given(lesson.config, rate, sample, lesson.steps) is None:
            tests += 1
            test = lesson.range_test(sample)
            seconds = _timed(partial(test.after, rate))[1]
    return tests, seconds


def _looking(lesson: Lesson) -> float:
    """Seconds of measuring the rows kept aside."""
    if not lesson.aside:
        return 0.0
    rows = [lesson.pupil.rows[id] for id in lesson.aside]
    return _timed(lambda: losses(lesson.pupil.model, rows, lesson.config, lesson.pupil.pad_id))[1]


def _looks(lesson: Lesson, steps: int) -> int:
    """How often they are measured in so many steps."""
    return -(-steps // lesson.config.eval_steps) if lesson.aside else 0


def _all_steps(
    steps: Sequence[Step], tried: Sequence[Step], seconds: Sequence[float], tokens: Mapping[str, int]
) -> float:
    """Seconds of all `steps`, by their tokens, between those of the steps tried; the first of these warmed up."""
    measured = {_tokens(step, tokens): took for step, took in zip(tried[1:], seconds[1:], strict=True)}
    known = sorted(measured.items())
    sizes = [_tokens(step, tokens) for step in steps]
    return float(np.interp(sizes, [size for size, _ in known], [took for _, took in known]).sum())


def _tokens(step: Step, tokens: Mapping[str, int]) -> int:
    """Tokens that a step reads; the last of a row is only predicted."""
    return sum(tokens[id] - 1 for batch in step for id in batch)


def _typical_rows(candidate: Candidate) -> set[str]:
    """Held-out rows as they are scored at once, a batch a thread: the shortest, those in the middle, the longest."""
    size = candidate.config.eval.batch_size * candidate.plan.machine["threads"]
    ids = [id for ids in candidate.held_out.values() for id in ids]
    ids.sort(key=lambda id: sum(len(turn.content) for turn in candidate.examples[id].messages))
    middle = max(0, (len(ids) - size) // 2)
    return {*ids[:size], *ids[middle : middle + size], *ids[-size:]}


def _parents_mb(candidate: Candidate) -> float:
    """What the parent makes of the rows it is asked about in a lesson: 4 bytes and 2 for each of its top logits."""
    most = 0
    for lesson in candidate.lessons:
        asked = lesson.asked_of_parent(lesson.ids, lesson.memory.rows)
        if candidate.parent is not None and "lwf" in candidate.config.protect:
            asked += lesson.ids
        most = max(most, sum(len(candidate.pupil.rows[id].answers) for id in asked))
    return most * TOP_K * 6 / 2**20


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def _size_mb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 2**20
