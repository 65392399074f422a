"""Early stopping: training ends when the loss on new rows that are kept aside falls no more (Prechelt 1998).

The held-out rows judge the version. Were they asked when to stop as well, the best of several looks at them would be
what is judged, and a verdict better than the truth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from treering.memory import some
from treering.optimizers import Optimizer, averaged

if TYPE_CHECKING:
    from treering.config import Config

SHARE, LEAST, MOST = 0.1, 8, 64
"""How many of the new rows are kept aside: their share, the fewest and the most."""

ENOUGH = 4 * LEAST
"""New rows below which none is spared."""

LOSS = "eval_loss"
"""What the training log calls the loss on the rows kept aside, as transformers does."""

BOUNDLESS = 1e30
"""What a loss that is not finite is noted as: JSON has no word for it."""

Log = Sequence[Mapping[str, float]]


def aside(new: Sequence[str], config: Config) -> list[str]:
    """Those of the row ids in `new` that are not trained on but measured; none without `early_stopping_steps`.

    They are drawn by the hash of the seed and their id, so the same rows are kept aside whatever their order.
    """
    if config.early_stopping_steps is None or len(new) < ENOUGH:
        return []
    count = min(max(LEAST, round(SHARE * len(new))), MOST)
    return some(new, count, f"{config.seed}:aside")


def best(log: Log) -> tuple[int, float] | None:
    """The step of the lowest loss on the rows kept aside, the first of equals, and that loss; None: never measured."""
    found = [(entry[LOSS], int(entry["step"])) for entry in log if LOSS in entry]
    return (min(found)[1], min(found)[0]) if found else None


def over(log: Log, config: Config) -> bool:
    """Whether training has ended: the last `early_stopping_steps` evaluations found no lower loss than one before."""
    looks = [int(entry["step"]) for entry in log if LOSS in entry]
    found = best(log)
    since = sum(step > (found[0] if found else 0) for step in looks)
    return config.early_stopping_steps is not None and since >= config.early_stopping_steps


class EarlyStopping:
    """Looks at the rows kept aside, and keeps the weights of the lowest loss: `weights`, empty until there is one.

    `measure` gives the loss of the model as it is, after so many steps. When to look and when to end follow from the
    log alone, so that a resumed run does the same.
    """

    def __init__(
        self,
        measure: Callable[[int], float] | None,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: Optimizer,
        config: Config,
    ) -> None:
        self._measure, self._parameters, self._optimizer, self._config = measure, parameters, optimizer, config
        self.weights: dict[str, Tensor] = {}

    def due(self, log: Log, steps: int) -> bool:
        """Whether to look before the step after `log`, of `steps` in all: every `eval_steps`, and at the end."""
        if self._measure is None or not log or LOSS in log[-1]:
            return False
        return len(log) % self._config.eval_steps == 0 or len(log) == steps

    def ended(self, log: Log) -> bool:
        """Whether training has ended early (`over`)."""
        return over(log, self._config)

    def look(self, log: list[dict[str, float]]) -> None:
        """Measure, and note it in the last entry of `log`. Raises `UpdateInterruptedError` when asked to stop."""
        assert self._measure is not None
        before = best(log)
        with averaged(self._optimizer):
            measured = self._measure(len(log))
            loss = measured if math.isfinite(measured) else BOUNDLESS
            if before is None or loss < before[1]:
                self.weights.update({name: p.detach().clone() for name, p in self._parameters.items()})
        log[-1][LOSS] = loss

    @torch.no_grad()
    def take_best(self) -> None:
        """Put the weights of the lowest loss in place, if there are any."""
        for name, weight in self.weights.items():
            self._parameters[name].copy_(weight)


def choice(log: Log, new: int, kept: int, steps: int, config: Config) -> dict[str, Any]:
    """What the manifest says of it: how many of `steps` were taken, with `kept` of `new` rows aside, and why."""
    found = best(log)
    if found is None:
        why = f"{new} new rows are fewer than {ENOUGH}, so none was kept aside and training ran to its end"
        return {"value": len(log), "reason": why}
    ended = f"stopped after step {len(log)} of {steps}" if over(log, config) else f"ran all {steps} steps"
    return {
        "value": len(log),
        "reason": f"{ended}: loss {found[1]:.4g} after step {found[0]}, whose weights were taken, and no lower one "
        f"later; measured every {config.eval_steps} steps on {kept} of {new} new rows, which were kept aside",
    }
