"""`learning_rate: auto`: a few short trainings at different rates, judged by what they teach and what they forget.

After the range test of Smith 2017 (arXiv:1506.01186), with two changes. Each rate begins at the same weights, so that
none pays for another; and the loss is measured on rows that the test does not learn: new ones, and remembered ones as
well. Only training rows take part: the held-out rows judge the version.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from treering.brief import ROWS, STEPS, briefly, short
from treering.checkpoints import Log
from treering.files import write_json
from treering.memory import Memory, Teacher
from treering.methods import Losses, Methods
from treering.model import Tokens
from treering.passes import losses
from treering.progress import Advance
from treering.readings import Readings
from treering.recovery import HalfStepError, LossError, Recovery
from treering.schedule import PREFERENCE, Step, peak_rate, plan_steps
from treering.train import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.config import Config
    from treering.stop import Stop

FILE = "rates.json"

MEASURED, LEAST = 24, 8
"""New rows that are measured, and remembered ones; with fewer new ones than the second there is no test."""

RATES, UP = 4, 1
"""Rates that are tried at most, and how many above the default: a few steps favour high rates, more so where there is
nothing to forget."""

FACTOR = 2.0
"""What a rate is apart from its neighbour."""

OLD_WEIGHT = 0.5
"""What a nat on remembered rows counts beside one on new rows: a part of what a few steps forget, the rest of the
update brings back by replay."""

READING = 1 / 3
"""What reading a row costs beside training on it."""

MOST = 0.3
"""The test may cost this share of the training, in rows, or the default is taken."""


@dataclass(frozen=True)
class Tried:
    """What came of one rate; `losses` is None where its training failed: a loss was not finite or ran away."""

    rate: float
    losses: Losses | None


@dataclass(frozen=True)
class Choice:
    """The peak learning rate `value` and why; with a test what it found, in the order it was tried, and its seconds."""

    value: float
    reason: str
    before: Losses | None = None
    tried: tuple[Tried, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Sample:
    """Rows of a test, by id: those it learns (`new`), replays (`memory`) and measures."""

    new: list[str]
    memory: Memory
    new_measured: list[str]
    old_measured: list[str]

    @classmethod
    def drawn(cls, new: Sequence[str], memory: Memory, config: Config) -> Sample:
        """From the `new` rows of an update and its `memory`; the same for the same rows, whatever their order."""
        draw = random.Random(f"{config.seed}:rates")
        fresh, old = sorted(new), sorted(memory.rows)
        draw.shuffle(fresh)
        draw.shuffle(old)
        measured, measured_old = min(MEASURED, len(fresh) // 3), min(MEASURED, math.ceil(len(old) / 2))
        replayed = set(old[measured_old:])
        learned = memory.part(lambda row: row.id in replayed)
        return cls(fresh[measured:], learned, fresh[:measured], old[:measured_old])

    @property
    def cost(self) -> float:
        """Rows trained on at most, and what reading those measured costs, as if it were training."""
        return RATES * STEPS * ROWS + (RATES + 1) * READING * (len(self.new_measured) + len(self.old_measured))


def given(config: Config, rate: float, sample: Sample, steps: Sequence[Step]) -> Choice | None:
    """`rate` where there is nothing to test: it is set, or a test would cost too much beside `steps`; else None."""
    if config.learning_rate != "auto":
        return Choice(rate, "as set")
    default = f"default for {config.finetuning_type}"
    if config.stage == "dpo":
        return Choice(rate, f"{PREFERENCE:.0%} of the {default}, for preference pairs")
    if len(sample.new_measured) < LEAST:
        found = len(sample.new) + len(sample.new_measured)
        return Choice(rate, f"{default}; {found} new rows are too few for a range test")
    rows = sum(len(batch) for step in steps for batch in step)
    if sample.cost > MOST * rows:
        cost = f"a range test would cost as much as {sample.cost:.0f}, more than {MOST:.0%}"
        return Choice(rate, f"{default}; training takes {rows} rows, and {cost}")
    return None


class RangeTest:
    """A range test on `model`, which is afterwards as it was before, the random state included.

    `sample` names the rows, `rows` has their tokens; `teachers` and `parents` are as in `train.train`.
    `methods` are those of the update; each training gets a copy of them as they are now. In `folder` it notes what it
    had to adapt to where memory ran out, so that a test that was killed finds the same losses again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        rows: Mapping[str, Tokens],
        sample: Sample,
        methods: Methods,
        config: Config,
        *,
        pad_id: int,
        teachers: Mapping[str, Teacher] | None = None,
        parents: Mapping[str, Teacher] | None = None,
        stop: Stop | None = None,
        folder: Path | None = None,
    ) -> None:
        self._folder, self._readings = folder, Readings(folder)
        self._measured, self._trained, self._pieces = 0, 0, 1
        self._scale: float | None = None
        self._model, self._rows, self._sample, self._methods = model, rows, sample, methods
        self._pad_id, self._teachers, self._parents, self._stop = pad_id, teachers, parents, stop
        self._config = short(config)
        lengths = {id: len(row.ids) for id, row in rows.items()}
        self._steps = plan_steps(sample.new, sample.memory, methods, lengths, self._config)

    def choose(self, advance: Advance) -> Choice:
        """Try rates from the default on, and take the best. Raises `UpdateInterruptedError` when asked to stop."""
        started = time.perf_counter()
        before = self.measure()
        tried: list[Tried] = []

        def gain(rate: float) -> float:
            tried.append(Tried(rate, self.after(rate)))
            advance(1)
            return gained(before, tried[-1].losses)

        rate = search(peak_rate(self._config, self._model), gain)
        return Choice(rate, self._reason(rate, before, tried), before, tuple(tried), time.perf_counter() - started)

    def measure(self) -> Losses:
        """The losses of the model as it is."""
        self._measured += 1
        return Losses(self._mean(self._sample.new_measured, "new"), self._mean(self._sample.old_measured, "remembered"))

    def after(self, rate: float) -> Losses | None:
        """The losses after a short training at `rate`, which is then undone; None: the training failed."""
        self._trained += 1
        folder = self._folder / f"training-{self._trained}" if self._folder else None
        recovery = Recovery(folder, pieces=self._pieces)
        while True:
            try:
                found = self._after(rate, recovery)
            except HalfStepError:  # It was undone, and will be taken in smaller pieces.
                continue
            self._pieces = recovery.pieces(STEPS)
            return found

    def _after(self, rate: float, recovery: Recovery) -> Losses | None:
        config = self._config.model_copy(update={"learning_rate": rate})

        def training(scale: float | None) -> Log:
            return train(
                self._model,
                self._rows,
                self._steps,
                copy.deepcopy(self._methods),  # They may count what they see.
                config,
                pad_id=self._pad_id,
                teachers=self._teachers,
                parents=self._parents,
                recovery=recovery,
                stop=self._stop,
                quiet=True,
                scale=scale,
            )

        try:
            found, self._scale = briefly(self._model, training, self.measure, config, self._scale)
        except LossError:
            return None
        return found if math.isfinite(found.new + found.old) else None

    def _mean(self, ids: Sequence[str], kind: str) -> float:
        reading = self._readings.of(f"measuring {kind} rows in the range test", self._measured)
        found = losses(self._model, [self._rows[id] for id in ids], self._config, self._pad_id, self._stop, reading)
        return math.fsum(found) / len(found) if found else 0.0

    def _reason(self, rate: float, before: Losses, tried: Sequence[Tried]) -> str:
        after = next(one.losses for one in tried if one.rate == rate)
        if after is None:
            return f"range test: training failed at {_listed(tried)}; this is the lowest"
        changes = [f"{before.new:.3g} to {after.new:.3g} on {len(self._sample.new_measured)} new rows"]
        if self._sample.old_measured:
            changes.append(f"{before.old:.3g} to {after.old:.3g} on {len(self._sample.old_measured)} remembered ones")
        return (
            f"range test of {_listed(tried)}, {STEPS} steps of {ROWS} rows each: here the loss went from "
            f"{' and from '.join(changes)}, which the test did not learn{self._adapted}"
        )

    @property
    def _adapted(self) -> str:
        """What it had to do where memory ran out."""
        split = [f"trained in {self._pieces} pieces a batch"] if self._pieces > 1 else []
        halved = [f"read {halved.rows} at once" for halved in self._readings.halved[-1:]]
        return f"; memory ran out, and rows were {' and '.join([*split, *halved])}" if split or halved else ""


def gained(before: Losses, after: Losses | None) -> float:
    """How good a rate is: how far the loss of new rows falls, less `OLD_WEIGHT` of what that of remembered ones rises.

    Minus infinity where its training failed.
    """
    if after is None:
        return -math.inf
    return before.new - after.new + OLD_WEIGHT * (before.old - after.old)


def search(default: float, gain: Callable[[float], float]) -> float:
    """The rate with the highest `gain`: from `default` up by `FACTOR` as long as that gains, or else down.

    It asks for `RATES` of them at most, `UP` of these above `default`. Below rates that fail (a gain of minus infinity)
    it goes on down.
    """
    gains = {default: gain(default)}
    best = default
    for factor, most in ((FACTOR, 1 + UP), (1 / FACTOR, RATES)):
        while len(gains) < most:
            rate = best * factor
            gains[rate] = gain(rate)
            if gains[rate] <= gains[best] and (factor > 1 or gains[best] > -math.inf):
                break
            best = rate
        if best != default:
            break
    return best


def save(folder: Path, choice: Choice) -> None:
    """Keep `choice` in `folder`, so that a resumed update goes on with it."""
    write_json(folder / FILE, asdict(choice))


def saved(folder: Path) -> Choice | None:
    """What `save` kept there, if it did."""
    path = folder / FILE
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    tried = tuple(Tried(one["rate"], one["losses"] and Losses(**one["losses"])) for one in found["tried"])
    return Choice(**{**found, "before": found["before"] and Losses(**found["before"]), "tried": tried})


def _listed(tried: Sequence[Tried]) -> str:
    return ", ".join(f"{one.rate:g}" for one in tried)
