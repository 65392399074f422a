"""What learns and what protects: the registry of methods, the protocol they follow, and how they combine.

Importing this module loads no method: settings are checked without torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel

    from treering.batches import Batch
    from treering.config import Config
    from treering.memory import Memory

FINETUNING_TYPES: dict[str, str] = {
    "lora": "treering.methods.lora:LoRA",
    "full": "treering.methods.full:Full",
    "freeze": "treering.methods.freeze:Freeze",
    "osf": "treering.methods.osf:OSF",
    "adapter": "treering.methods.adapter:Adapter",
    "norm": "treering.methods.norm:Norm",
}
"""What learns."""

PROTECT: dict[str, str] = {
    "replay": "treering.methods.replay:Replay",
    "distill": "treering.methods.distill:Distill",
    "recall": "treering.methods.recall:Recall",
    "lwf": "treering.methods.lwf:LwF",
    "olora": "treering.methods.olora:OLoRA",
    "ema": "treering.methods.ema:EMA",
    "reptile": "treering.methods.reptile:Reptile",
    "interpolate": "treering.methods.interpolate:Interpolate",
    "ewc": "treering.methods.ewc:EWC",
    "l2": "treering.methods.l2:L2",
    "si": "treering.methods.si:SI",
    "merge": "treering.methods.merge:Merge",
}
"""What protects old knowledge."""


class Method(Protocol):
    """The hooks of a method. Each is optional: a method has only those it needs.

    A method is built from the whole `Config` and knows nothing of files, tasks' names or versions. Tensors that it
    changes from step to step it holds in `running`: they are kept in the checkpoints with the weights, so that an
    interrupted update goes on with the same. What it chooses automatically it tells in `choices`, for the manifest: by
    the name of the setting its `value` and the `reason`.
    """

    running: dict[str, Tensor]
    choices: dict[str, dict[str, Any]]

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Freeze, wrap or load what `after_update` returned last time; returns the model to train."""

    def replay(self, new: Sequence[str], memory: Memory, epoch: int) -> list[str]:
        """Ids of remembered rows to mix into this epoch beside the ids in `new`."""

    def loss(self, model: PreTrainedModel, batch: Batch, logits: Tensor) -> Tensor | None:
        """An extra scalar loss, or None: what the batch adds to a mean over its optimiser step (`Batch.of`).

        `logits` is `[answer tokens of the batch, vocabulary]`, float32. Batches of a step come from several threads.
        """

    def penalty(self, model: PreTrainedModel) -> Tensor | None:
        """An extra scalar loss of the weights alone, or None; asked for once an optimiser step.

        The weights have the gradients of the other losses of the whole step then, not yet clipped.
        """

    def after_step(self, model: PreTrainedModel) -> None:
        """Called after each optimiser step, while its gradients (those of `penalty` too, clipped) are there."""

    def after_training(self, model: PreTrainedModel, measure: Callable[[], Losses]) -> None:
        """Called once, when the last step is done: averaging, merging. `measure` is for choices; it takes seconds."""

    def after_update(self, model: PreTrainedModel, batches: Sequence[Batch]) -> dict[str, Tensor]:
        """Tensors to keep in the version; they come back as `state` in the next update.

        `batches` are the rows that were new, each alone.
        """


@dataclass(frozen=True)
class Losses:
    """Mean cross entropy of some training rows in nats, new and remembered; 0 where there are none."""

    new: float
    old: float


class Methods:
    """The methods of one update, called in the order: what learns first, then `protect` as listed.

    After training what learns comes last.
    """

    def __init__(self, config: Config) -> None:
        self.by_name: dict[str, Any] = {config.finetuning_type: _load(FINETUNING_TYPES[config.finetuning_type])(config)}
        for name in config.protect:
            self.by_name[name] = _load(PROTECT[name])(config)

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Let each method prepare `model` with its own part of `state` (keys `<name>.<key>`)."""
        for name, hook in self._hooks("prepare"):
            own = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
            model = hook(model, own)
        return model

    def replay(self, new: Sequence[str], memory: Memory, epoch: int) -> list[str]:
        """All ids that the methods want replayed in this epoch."""
        return [row for _, hook in self._hooks("replay") for row in hook(new, memory, epoch)]

    def losses(self, model: PreTrainedModel, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """The extra losses by method name."""
        found = {name: hook(model, batch, logits) for name, hook in self._hooks("loss")}
        return {name: loss for name, loss in found.items() if loss is not None}

    def penalties(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """The losses of the weights alone, by method name."""
        found = {name: hook(model) for name, hook in self._hooks("penalty")}
        return {name: penalty for name, penalty in found.items() if penalty is not None}

    def after_step(self, model: PreTrainedModel) -> None:
        """Let each method act on the weights after an optimiser step."""
        for _, hook in self._hooks("after_step"):
            hook(model)

    def after_training(self, model: PreTrainedModel, measure: Callable[[], Losses]) -> None:
        """Let each method act on the weights after the last step; what learns, and may reshape them, comes last."""
        for _, hook in sorted(self._hooks("after_training"), key=lambda named: named[0] in FINETUNING_TYPES):
            hook(model, measure)

    @property
    def running(self) -> dict[str, dict[str, Tensor]]:
        """What each method that has any changes from step to step, by its name: to be kept, and put back in place."""
        return dict(self._hooks("running"))

    @property
    def choices(self) -> dict[str, dict[str, Any]]:
        """What the methods chose automatically, and why, by the name of the setting."""
        return {setting: choice for _, made in self._hooks("choices") for setting, choice in made.items()}

    def after_update(self, model: PreTrainedModel, learned: Callable[[], Sequence[Batch]]) -> dict[str, Tensor]:
        """The state of all methods, keys `<name>.<key>`; `learned` makes the batches that they are given."""
        hooks = self._hooks("after_update")
        batches = learned() if hooks else []
        return {f"{name}.{key}": tensor for name, hook in hooks for key, tensor in hook(model, batches).items()}

    def _hooks(self, hook: str) -> list[tuple[str, Any]]:
        return [(name, getattr(method, hook)) for name, method in self.by_name.items() if hasattr(method, hook)]


def trained(model: PreTrainedModel) -> dict[str, Parameter]:
    """The weights of `model` that learn, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
