"""Merging of what updates added: where they agree the weights are a mean of theirs, and none overwrites the others.

Task arithmetic (`linear`; Ilharco et al. 2022, arXiv:2212.04089), TIES (Yadav et al. 2023, arXiv:2306.01708) and DARE
(Yu et al. 2023, arXiv:2311.03099), built of peft's parts. The papers merge models that were all trained from one
start. Here each update goes on from the merged weights of its parent, so its vector is `trained - first`, all that lies
between its weights and the first ones; were it `trained - parent`, what two updates want alike would be halved by
their mean, though neither asked for that (`docs/decisions.md`). All earlier vectors are one, `parent - first`, which
counts for as many as they were: so a version keeps `first` and a number, however many updates there are.

LoRA's A and B are merged apart, as peft does; `docs/methods.md` says what that does to their product.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.utils.merge_utils import calculate_majority_sign_mask, dare_linear, disjoint_merge, prune, task_arithmetic
from torch import Tensor

from treering.config import Config
from treering.methods import Losses, trained
from treering.methods.anchor import check_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.batches import Batch

FIRST = "first."
"""What is kept: under this and its name each weight as it was at first, float32; and `updates`, how many merged."""


class Merge:
    """`weights = first + merged(parent - first, weights - first)`, once, when training is over.

    The newest vector counts for `merge.weight`, the history for the rest; `auto`: every update alike, 1 / updates. An
    update without a history, the first that merges, stays as trained. It keeps two copies of what learns in memory, and
    one, in float32, in the version.
    """

    def __init__(self, config: Config) -> None:
        self.method, self.density, self.weight = config.merge.method, config.merge.density, config.merge.weight
        self.seed = config.seed
        self.updates = 1
        self.first: dict[str, Tensor] = {}
        self.parent: dict[str, Tensor] = {}
        self.choices: dict[str, dict[str, Any]] = {}

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Returns `model` as it is, whose weights are noted, in memory that a GPU need not spare.

        Weights that learn for the first time have no history: for them `first` is the parent.
        """
        first = {key.removeprefix(FIRST): kept for key, kept in state.items() if key.startswith(FIRST)}
        check_shapes(first, trained(model), "merge")
        self.updates = int(state.get("updates", torch.tensor(0))) + 1
        self.parent = {name: weight.detach().to("cpu", copy=True) for name, weight in trained(model).items()}
        self.first = {**self.parent, **first}
        return model

    @torch.no_grad()
    def after_training(self, model: PreTrainedModel, measure: Callable[[], Losses]) -> None:
        """Put the merged weights in place."""
        weight = 1 / self.updates if self.weight == "auto" else self.weight
        if self.weight == "auto":
            reason = f"{self.updates} updates are merged, each counts alike"
            alone = "the first update that merges stays as trained"
            self.choices["merge.weight"] = {"value": weight, "reason": alone if self.updates == 1 else reason}
        if self.updates == 1:
            return
        with torch.random.fork_rng(devices=[]):
            # DARE's drops: others in each update, the same whenever this one is resumed.
            torch.manual_seed(random.Random(f"{self.seed}:merge:{self.updates}").getrandbits(63))
            for name, learned in trained(model).items():
                history = self.parent[name] - self.first[name]
                added = learned.detach().cpu() - self.parent[name]
                learned.copy_(self.first[name] + self._merged(history, added, weight))

    def after_update(self, model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """`FIRST` and `updates`; weights that did not learn now keep what they had."""
        return {"updates": torch.tensor(self.updates)} | {FIRST + name: kept for name, kept in self.first.items()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Merge:
        """Itself: the range test copies methods, this one changes nothing before the end, and its copies are large."""
        return self

    def _merged(self, history: Tensor, added: Tensor, weight: float) -> Tensor:
        if self.method == "linear":
            return task_arithmetic([history, history + added], torch.tensor([1 - weight, weight]))
        if self.method == "dare":
            return history + dare_linear([added], torch.tensor([weight]), self.density)
        return ties(history, history + added, weight, self.density)


def ties(history: Tensor, newest: Tensor, weight: float, density: float) -> Tensor:
    """TIES of two vectors of one shape, of which `newest` counts for `weight` and `history` for the rest.

    Of each the `density` largest numbers stay (trim); at each place the sign with more weight wins (elect); of those
    that have it the weighted mean is taken, and 0 where there is none. peft's `ties` does the same for vectors that
    count alike; its weights would scale a vector where it stands alone, too.
    """
    vectors = torch.stack([prune(vector, density, "magnitude") for vector in (history, newest)])
    counts = torch.tensor([1 - weight, weight]).view(-1, *[1] * history.dim()).expand_as(vectors)
    elected = calculate_majority_sign_mask(vectors * counts)
    found = disjoint_merge(vectors * counts, elected)
    return torch.where(found == 0, found, found / disjoint_merge(counts, elected))
