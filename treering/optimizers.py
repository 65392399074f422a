"""What takes the steps (`optim`). Importing this module loads no optimiser: settings are checked without torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from treering.extras import needed

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from treering.config import Config

OPTIMIZERS: dict[str, str] = {
    "adamw_torch": "torch.optim:AdamW",
    "adamw_8bit": "bitsandbytes.optim:AdamW8bit",
    "muon": "torch.optim:Muon",
    "schedule_free_adamw": "schedulefree:AdamWScheduleFree",
}
"""AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), with its state in 8 bits (Dettmers et al. 2021,
arXiv:2110.02861), Muon (Jordan et al. 2024; steps as large as AdamW's, Liu et al. 2025, arXiv:2502.16982), and AdamW
that averages instead of lowering the rate (Defazio et al. 2024, arXiv:2405.15682)."""

EXTRAS = {"bitsandbytes": "quantization", "schedulefree": "schedulefree"}
"""What brings the libraries that treering does without otherwise."""

_SETTINGS: dict[str, dict[str, Any]] = {"adamw_torch": {"fused": True}, "muon": {"adjust_lr_fn": "match_rms_adamw"}}


class Optimizer(Protocol):
    """What training asks of one. `torch.optim.Optimizer` has it."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Weights with their settings, `lr` among them."""

    def step(self) -> Any:
        """Change the weights by their gradients."""

    def zero_grad(self) -> None:
        """Forget the gradients."""

    def state_dict(self) -> dict[str, Any]:
        """All that `load_state_dict` needs to go on from here: tensors, numbers and text, in any containers."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there."""


class Together:
    """Several optimisers, each with weights of its own, as one."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of all."""
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        """Each takes one."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """All gradients are forgotten."""
        for part in self.parts:
            part.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Those of all, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """To each its own."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)


def optimizer(config: Config, model: PreTrainedModel, rate: float) -> Optimizer:
    """That of `config.optim` for the weights of `model` that learn. Raises `ConfigError` if it is not installed.

    Muon is for matrices of hidden layers: embeddings, and what is no matrix, learn by AdamW.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if config.optim != "muon":
        made: Optimizer = _made(config.optim, weights, config, rate)
        if hasattr(made, "train"):
            made.train()
        return made
    embeddings: list[nn.Module] = [model.get_input_embeddings(), model.get_output_embeddings()]
    outer = {id(weight) for module in embeddings for weight in module.parameters()}
    kinds: dict[str, list[nn.Parameter]] = {"muon": [], "adamw_torch": []}
    for weight in weights:
        kinds["muon" if weight.ndim == 2 and id(weight) not in outer else "adamw_torch"].append(weight)
    return Together([_made(name, part, config, rate) for name, part in kinds.items() if part])


def finish(optimizer: Optimizer) -> None:
    """Training has ended: one that averages puts the average in place."""
    if hasattr(optimizer, "eval"):
        optimizer.eval()


@contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the weights are what they would be if training ended now: of one that averages, the average."""
    finish(optimizer)
    try:
        yield
    finally:
        if hasattr(optimizer, "train"):
            optimizer.train()


def _made(name: str, weights: Sequence[nn.Parameter], config: Config, rate: float) -> Any:
    module, _, attribute = OPTIMIZERS[name].partition(":")
    extra = EXTRAS.get(module.partition(".")[0], "")
    kind = getattr(needed(module, extra, f"optim is {name}"), attribute)
    return kind(weights, lr=rate, weight_decay=config.weight_decay, **_SETTINGS.get(name, {}))
