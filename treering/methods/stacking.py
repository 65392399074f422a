"""`adapter_composition: stack`: each update learns columns of its own beside the frozen ones of those before it.

The sum of two low-rank products is one of the sum of their ranks: `B1 A1 + B2 A2 = [B1 B2] [A1; A2]`. So while an
update trains there are two adapters, and afterwards one again, which every tool loads and the next update builds on.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from treering.errors import ConfigError
from treering.lora_product import ADAPTER, ADDED

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import nn

    from treering.config import Config


def check(made: LoraConfig, config: Config) -> None:
    """Raise `ConfigError` where an adapter of `config` cannot be joined with the one `made` before."""
    if made.use_dora or made.modules_to_save or made.lora_bias or made.rank_pattern or made.alpha_pattern:
        raise ConfigError(
            "adapter_composition is stack, but the parent version's adapter is more than low-rank matrices of one rank "
            "(DoRA, modules that learn whole, biases, patterns), which cannot be joined: set adapter_composition: "
            "continue, or start a new workspace"
        )
    if made.use_rslora != config.use_rslora:
        raise ConfigError(
            f"use_rslora is {config.use_rslora}, but the parent version's adapter was made with {made.use_rslora}: "
            f"set use_rslora: {made.use_rslora}, or start a new workspace"
        )
    if made.lora_alpha * config.lora_rank != config.alpha * made.r:
        raise ConfigError(
            f"lora_alpha is {config.alpha} for lora_rank {config.lora_rank}, but the parent version's adapter has "
            f"{made.lora_alpha} for {made.r}, and what is stacked has one scale: set lora_alpha to "
            f"{made.lora_alpha / made.r:g} times lora_rank, or start a new workspace"
        )


def add(model: PeftModel, settings: LoraConfig, seed: int) -> None:
    """Freeze the adapter of `model`, and have one made by `settings` learn beside it, on the same modules.

    It begins with other random numbers than those before it, or it would read the same directions.
    """
    made = cast("LoraConfig", model.peft_config[ADAPTER])
    settings.target_modules = made.target_modules
    torch.manual_seed(seed + made.r)
    model.add_adapter(ADDED, settings)
    cast(Any, model.base_model).set_adapter([ADAPTER, ADDED])
    for _, frozen, _ in pairs(model):
        for weight in frozen:
            weight.requires_grad_(False)


@torch.no_grad()
def join(model: PeftModel) -> None:
    """One adapter of both, if there are two, which computes the same.

    Its rank and its `lora_alpha` are sums, and with them `lora_alpha / rank` is what it was. Not so the scale of
    rsLoRA, `lora_alpha / sqrt(rank)`: there B takes up the difference.
    """
    if ADDED not in model.peft_config:
        return
    made, added = (cast("LoraConfig", model.peft_config[name]) for name in (ADAPTER, ADDED))
    rank, alpha = made.r + added.r, made.lora_alpha + added.lora_alpha
    scale = alpha / rank**0.5 if made.use_rslora else alpha / rank
    for layer, (a, b), (new_a, new_b) in pairs(model):
        sides = [side * (layer.scaling[name] / scale) for name, side in ((ADAPTER, b), (ADDED, new_b))]
        a.data, b.data = torch.cat([a, new_a]), torch.cat(sides, 1)
        for side, size in ((layer.lora_A, "out_features"), (layer.lora_B, "in_features")):
            if ADAPTER in side:
                setattr(side[ADAPTER], size, rank)
        layer.r[ADAPTER], layer.lora_alpha[ADAPTER], layer.scaling[ADAPTER] = rank, alpha, scale
    made.r, made.lora_alpha = rank, alpha
    model.delete_adapter(ADDED)
    model.set_adapter(ADAPTER)


def pairs(model: nn.Module) -> Iterator[tuple[Any, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Each layer with something stacked: the layer, its frozen A `[rank, in]` and B `[out, rank]`, and those added."""
    for layer in model.modules():
        for sides in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            a, b = (getattr(layer, side, {}) for side in sides)
            if ADDED in a:
                frozen, added = ((_weight(a[name]), _weight(b[name])) for name in (ADAPTER, ADDED))
                yield layer, frozen, added


def _weight(side: Any) -> Tensor:
    return side if isinstance(side, Tensor) else cast(Tensor, side.weight)
