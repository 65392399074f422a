"""LoRA: low-rank adapters on frozen weights (Hu et al. 2021, arXiv:2106.09685), through peft."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from treering.config import Config
from treering.errors import ConfigError
from treering.lora_product import join

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoRA:
    """Adds an adapter, or goes on with the one the parent version has."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Returns a `PeftModel` whose float32 adapter alone trains. Raises `ConfigError` if rank or scale differ."""
        if not isinstance(model, PeftModel):
            adapted = cast("PreTrainedModel", get_peft_model(model, adapter(self.config)))
            join(adapted)
            return adapted
        made = cast(LoraConfig, model.peft_config["default"])
        for key, wanted, found in (
            ("lora_rank", self.config.lora_rank, made.r),
            ("lora_alpha", self.config.alpha, made.lora_alpha),
        ):
            if wanted != found:
                raise ConfigError(
                    f"{key} is {wanted}, but the parent version's adapter was made with {found}: "
                    f"set {key}: {found}, or start a new workspace"
                )
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        return cast("PreTrainedModel", model)


def adapter(config: Config) -> LoraConfig:
    """A new adapter, as peft has it."""
    target = config.lora_target
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if target == "all" else [name.strip() for name in target.split(",")],
    )
