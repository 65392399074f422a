"""Float16 has no numbers below 6e-8: the loss is scaled up before the backward pass, so that gradients are not lost.

After Micikevicius et al. 2017 (arXiv:1710.03740), by the rules of `torch.amp.GradScaler`: a step whose gradients
overflow is skipped and halves the scale, many good ones in a row double it. Which scale a step has follows from the log
alone, which checkpoints keep, so that a resumed run has the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

FIRST, LEAST = 2.0**16, 1.0
"""The scale of the first step, and the lowest. Where gradients are infinite even at that, the scale is not to blame."""

GOOD = 2000
"""So many steps at one scale double it."""

SCALE, SKIPPED = "loss_scale", "skipped"
"""What the training log calls the scale of a step, and what the entry of a skipped step has beside it."""

Log = Sequence[Mapping[str, float]]


def first(dtype: torch.dtype) -> float:
    """The scale to begin with where products are in `dtype`; 1: it needs none."""
    return FIRST if dtype == torch.float16 else 1.0


def scale(log: Log, dtype: torch.dtype, begin: float | None = None) -> float:
    """That of the step after `log`; the first has `begin`, where it is known to be low enough."""
    if dtype != torch.float16 or not log:
        return begin or first(dtype)
    last = log[-1][SCALE]
    if SKIPPED in log[-1]:
        return last / 2
    good = len(log) >= GOOD and all(entry[SCALE] == last and SKIPPED not in entry for entry in log[-GOOD:])
    return 2 * last if good else last


def undo(parameters: Sequence[Tensor], scale: float) -> None:
    """Bring the gradients of `parameters` back to their own size."""
    for parameter in parameters if scale != 1 else ():
        if parameter.grad is not None:
            parameter.grad.div_(scale)


def noted(norm: float, scale: float, dtype: torch.dtype) -> dict[str, float]:
    """What the log says of a step whose gradients have that `norm`; it is skipped where the scale was too much."""
    if dtype != torch.float16:
        return {"grad_norm": norm}
    too_much = scale > LEAST and not math.isfinite(norm)
    return {SCALE: scale, **({SKIPPED: 1.0} if too_much else {"grad_norm": norm})}


def choices(log: Log) -> dict[str, dict[str, Any]]:
    """What the manifest says of it, as a choice with its reason; nothing where no step was scaled."""
    if not log or SCALE not in log[-1]:
        return {}
    skipped = [f"{entry['step']:.0f}" for entry in log if SKIPPED in entry]
    shown = ", ".join([*skipped[:20], *([f"and {len(skipped) - 20} more"] if len(skipped) > 20 else [])])
    reason = f"gradients overflowed in {len(skipped)} of {len(log)} steps, which were skipped: {shown}"
    return {SCALE: {"value": log[-1][SCALE], "reason": reason if skipped else "no gradient overflowed"}}


def finite(
    scale: float, gradients: Callable[[float], Sequence[Tensor | None]]
) -> tuple[float, Sequence[Tensor | None]]:
    """The `gradients` at `scale`, or at the next half of it at which they are finite, and that scale."""
    found = gradients(scale)
    while scale > LEAST and not all(bool(each.isfinite().all()) for each in found if each is not None):
        scale /= 2
        found = gradients(scale)
    return scale, found
