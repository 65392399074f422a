"""`memory.mix`: which remembered rows are replayed more often than others, decided before the steps are planned.

A row is drawn as often as its weight says: one that nothing speaks for has weight 1 and goes on coming, one that more
speaks for than for the average has up to `1 + MOST`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from treering.brief import briefly, short
from treering.checkpoints import Log
from treering.files import write_json
from treering.memory import Memory, some
from treering.methods import Methods
from treering.model import Tokens
from treering.passes import losses
from treering.recovery import HalfStepError, LossError
from treering.schedule import peak_rate, plan_steps
from treering.train import train

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.config import Config
    from treering.stop import Stop

FILE = "mix.json"

MOST = 4.0
"""What speaks for a row counts no more than this many times the average, or one odd row would take the room of many."""

MEASURED = 512
"""Rows that are measured at most, new ones and remembered ones."""


@dataclass(frozen=True)
class Mix:
    """The weight of each remembered row by its id, and in words what they come from."""

    weights: dict[str, float]
    reason: str


def weighed(ids: Sequence[str], gains: Mapping[str, float]) -> dict[str, float]:
    """The weights of `ids`: 1, plus what speaks for a row (`gains`, 0 or more) beside the mean of that, at most `MOST`.

    A row that was not measured counts as the mean.
    """
    mean = math.fsum(gains.values()) / max(1, len(gains))
    if mean == 0:
        return dict.fromkeys(ids, 1.0)
    return {id: 1 + min(gains.get(id, mean) / mean, MOST) for id in ids}


def interference(
    model: PreTrainedModel,
    rows: Mapping[str, Tokens],
    new: Sequence[str],
    memory: Memory,
    methods: Methods,
    config: Config,
    pad_id: int,
    stop: Stop | None = None,
) -> Mix:
    """Rows whose loss rises most in a short training on `new` rows alone, which is undone.

    After maximally interfered retrieval (Aljundi et al. 2019, arXiv:1908.04742), where it is one step and done at every
    step: here all rows are drawn before the first one, so that an interrupted update repeats itself. Raises
    `UpdateInterruptedError` when `stop` was asked.
    """
    brief, ids = short(config), _sample(memory.rows, config)
    learned = [rows[id] for id in ids]
    lengths = {id: len(row.ids) for id, row in rows.items()}
    steps = plan_steps(sorted(new), Memory(), methods, lengths, brief)
    before = losses(model, learned, config, pad_id, stop)
    rate = brief.model_copy(update={"learning_rate": peak_rate(config, model)})

    def training(scale: float | None) -> Log:
        counted = copy.deepcopy(methods)  # They may count what they see.
        return train(model, rows, steps, counted, rate, pad_id=pad_id, stop=stop, quiet=True, scale=scale)

    try:
        after, _ = briefly(model, training, lambda: losses(model, learned, config, pad_id, stop), config)
    except (LossError, HalfStepError) as error:
        return Mix(weighed(list(memory.rows), {}), f"all alike: a short training on new rows failed ({error})")
    rises = {id: max(0.0, then - now) for id, now, then in zip(ids, before, after, strict=True)}
    if not math.isfinite(math.fsum(rises.values())):
        return Mix(
            weighed(list(memory.rows), {}), "all alike: after a short training on new rows a loss was not finite"
        )
    risen = sum(rise > 0 for rise in rises.values())
    return Mix(
        weighed(list(memory.rows), rises),
        f"in {len(steps)} steps on new rows the loss of {risen} of {len(ids)} remembered ones rose, "
        f"by {math.fsum(rises.values()) / max(1, risen):.3g} on average",
    )


def similarity(about: Callable[[Sequence[str]], Tensor], new: Sequence[str], memory: Memory, config: Config) -> Mix:
    """Rows whose features are nearest to those of one of the `new` rows: what is alike is what gets confused.

    `about` gives the features of rows by their ids, `[rows, size]`.

    Nearness is the cosine once the mean of all is taken away, for features of all rows point much the same way. What
    speaks for a row is how much nearer it is than the farthest.
    """
    fresh, ids = _sample(new, config), _sample(memory.rows, config)
    found = about([*fresh, *ids]).double()
    apart = torch.nn.functional.normalize(found - found.mean(0), dim=-1)
    nearness = (apart[len(fresh) :] @ apart[: len(fresh)].T).amax(1)
    gains = (nearness - nearness.min()).tolist()
    return Mix(
        weighed(list(memory.rows), dict(zip(ids, gains, strict=True))),
        f"{len(ids)} remembered rows lie {float(nearness.min()):.2f} to {float(nearness.max()):.2f} (cosine) from the "
        f"nearest of {len(fresh)} new ones",
    )


def save(folder: Path, mix: Mix) -> None:
    """Keep `mix` in `folder`, so that a resumed update draws the same rows."""
    write_json(folder / FILE, asdict(mix))


def saved(folder: Path) -> Mix | None:
    """What `save` kept there, if it did."""
    path = folder / FILE
    return Mix(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def _sample(ids: Mapping[str, object] | Sequence[str], config: Config) -> list[str]:
    return some(ids, MEASURED, f"{config.seed}:mix")
