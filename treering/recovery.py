"""What a running update had to adapt to: memory that ran out, a loss that is not finite or ran away.

It is written down before training goes on, so that a run that is killed repeats it and ends in the same bits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from treering.errors import LESS_TO_LEARN, TreeringError, first_line
from treering.files import write_json
from treering.progress import say

FILE = "recovery.json"

FIRST_STEPS = 10
"""The first steps of an update, whose losses show what is usual."""

MOST_ROWS = 8
"""Rows that an error names."""

LOWER = 0.5
"""What the rate is multiplied by, each time that training goes back."""


class LossError(TreeringError):
    """A loss or a gradient norm that is not finite, or a loss that ran away."""


class HalfStepError(TreeringError):
    """Memory ran out while the weights were changed: some of them may have been, and others not."""


@dataclass(frozen=True)
class Split:
    """Memory ran out: from `step` (counted from 1) on, the rows of a micro-batch are computed in `pieces`."""

    step: int
    pieces: int
    reason: str


@dataclass(frozen=True)
class Retry:
    """The loss of `step` (counted from 1) was no good: training went back to where `back_to` steps were done."""

    step: int
    back_to: int
    reason: str


class Recovery:
    """The splits and retries of one update, kept in `folder` (with None: nowhere), those of a killed run included.

    Of several processes that train, all come to the same; the one that `writes` keeps it and tells. `pieces` are those
    of the first step, where memory is known to be short.
    """

    def __init__(self, folder: Path | None, *, writes: bool = True, pieces: int = 1) -> None:
        self._writes, self._pieces = writes, pieces
        self._path = folder / FILE if folder else None
        found = json.loads(self._path.read_text(encoding="utf-8")) if self._path and self._path.exists() else {}
        self.splits = [Split(**split) for split in found.get("splits", ())]
        self.retries = [Retry(**retry) for retry in found.get("retries", ())]

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by."""
        return float(LOWER ** len(self.retries))

    def pieces(self, step: int) -> int:
        """In how many pieces the rows of each micro-batch of `step` (counted from 1) are computed."""
        return max([self._pieces, *(split.pieces for split in self.splits if split.step <= step)])

    def split(self, step: int, rows: int, error: Exception) -> None:
        """From `step` on, take half as many rows at once as `rows`, for which there was no memory.

        Where it ran out while the weights were changed, smaller pieces leave more of it in one place by then.

        Raises:
            TreeringError: it was one row.
        """
        reason = f"out of memory at step {step} ({first_line(error)})"
        if rows == 1 and isinstance(error, HalfStepError):
            raise TreeringError(f"{reason}, with one row at a time. {LESS_TO_LEARN}") from error
        if rows == 1:
            raise TreeringError(
                f"{reason}, with one row at a time. Lower cutoff_len (rows that are longer go to quarantine), set "
                "gradient_checkpointing: true, run with fewer threads (OMP_NUM_THREADS=1), take a smaller "
                "model_name_or_path, or free some memory; the checkpoint is kept: run `treering update` again to resume"
            ) from error
        found = Split(step, 2 * self.pieces(step), reason)
        self.splits.append(found)
        self._write(
            f"{reason}; from there on each micro-batch is computed in {found.pieces} pieces, which makes the same step"
        )

    def retry(self, step: int, back_to: int, reason: str) -> None:
        """Go back from `step` to where `back_to` steps were done, and on at a lower rate."""
        self.retries.append(Retry(step, back_to, reason))
        self._write(f"{reason} at step {step}; going back to step {back_to}, with {self.rate:g} of the learning rate")

    def holds(self, step: int, retries: int) -> bool:
        """Whether a checkpoint of `step`, made after so many retries, is on the way that was taken in the end."""
        return all(step <= later.back_to for later in self.retries[retries:])

    def choices(self, peak: float) -> dict[str, dict[str, Any]]:
        """What the manifest says of it, as choices with their reasons; `peak` is the rate before any retry."""
        splits = {
            f"micro-batches from step {split.step}": {"value": f"in {split.pieces} pieces", "reason": split.reason}
            for split in self.splits
        }
        retries = {
            f"learning_rate of retry {number}": {
                "value": peak * LOWER**number,
                "reason": f"{retry.reason} at step {retry.step}; from step {retry.back_to} again",
            }
            for number, retry in enumerate(self.retries, start=1)
        }
        return splits | retries

    def _write(self, what: str) -> None:
        if not self._writes:
            return
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            splits, retries = ([asdict(one) for one in found] for found in (self.splits, self.retries))
            write_json(self._path, {"splits": splits, "retries": retries})
        say(what)


def check_loss(entry: Mapping[str, float], log: Sequence[Mapping[str, float]], vocabulary: int) -> None:
    """Raise `LossError` if the step `entry` is no good, after the steps in `log`.

    Nothing may be infinite or NaN. Where the gradient is gone and the loss is that of blind guessing, ln(`vocabulary`),
    weights are so far off that all tokens are as likely, and nothing is learned any more. In the first `FIRST_STEPS`
    steps the loss has run away if it is above twice both the very first and blind guessing; after them, if it is above
    both twice the highest of theirs and half of blind guessing. A false alarm would cost a good update: rows that are
    merely hard stay below the one or the other.
    """
    endless = [f"{name} is {value}" for name, value in entry.items() if not math.isfinite(value)]
    if endless:
        raise LossError(", ".join(endless))
    if not log:
        return
    blind = math.log(vocabulary)
    if entry.get("grad_norm") == 0 and math.isclose(entry["loss"], blind, rel_tol=0.01):
        raise LossError(
            f"grad_norm is 0 and loss {entry['loss']:.4g}, that of blind guessing: nothing is learned any more"
        )
    if len(log) < FIRST_STEPS:
        first = log[0]["loss"]
        if entry["loss"] > 2 * max(first, blind):
            raise LossError(
                f"loss is {entry['loss']:.4g}, above twice that of the first step ({first:.4g}) and of blind guessing "
                f"({blind:.4g})"
            )
        return
    highest = max(before["loss"] for before in log[:FIRST_STEPS])
    if entry["loss"] > max(2 * highest, blind / 2):
        raise LossError(
            f"loss is {entry['loss']:.4g}, above twice the highest of the first {FIRST_STEPS} steps ({highest:.4g}) "
            f"and half the loss of blind guessing ({blind:.4g})"
        )


WHAT = "; `treering data show ID` says what a row is"


def worst(losses: Mapping[str, float]) -> str:
    """Row ids with their losses, those that are not finite first, then the highest; no more than `MOST_ROWS`."""
    if all(math.isnan(loss) for loss in losses.values()):
        return "the loss of every row is nan, so the weights themselves are no good"
    ordered = sorted(losses, key=lambda id: (not math.isfinite(losses[id]), losses[id]), reverse=True)
    more = f", and {len(ordered) - MOST_ROWS} more" if len(ordered) > MOST_ROWS else ""
    return "worst first: " + ", ".join(f"{id} (loss {losses[id]:.4g})" for id in ordered[:MOST_ROWS]) + more + WHAT
