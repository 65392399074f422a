"""LoRA: low-rank adapters on frozen weights (Hu et al. 2021, arXiv:2106.09685), through peft.

Two variants: DoRA (`use_dora`; Liu et al. 2024, arXiv:2402.09353) and rsLoRA (`use_rslora`; Kalajdzievski 2023,
arXiv:2312.03732).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, cast

from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from treering.config import Config, names
from treering.errors import ConfigError
from treering.lora_product import ADAPTER, join
from treering.methods import Losses, stacking

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoRA:
    """Adds an adapter; where the parent version has one, goes on with it, or stacks one on it."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.stacks = config.adapter_composition == "stack"

    def prepare(self, model: PreTrainedModel, state: dict[str, Tensor]) -> PreTrainedModel:
        """Returns a `PeftModel` of which alone the adapter, or what is stacked on it, and `additional_target` train.

        They do in float32.

        Raises `ConfigError` for modules that the model lacks, and where the parent's adapter is another.
        """
        if isinstance(model, PeftModel):
            self._check(cast(LoraConfig, model.peft_config[ADAPTER]))
            model.set_adapter(ADAPTER)
            adapted = model
            if self.stacks:
                stacking.add(adapted, adapter(self.config), self.config.seed)
        else:
            adapted = self._added(model)
            join(adapted)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # In bfloat16 small steps would be lost.
        return cast("PreTrainedModel", adapted)

    def after_training(self, model: PreTrainedModel, measure: Callable[[], Losses]) -> None:
        """What was stacked becomes one adapter."""
        if self.stacks:
            stacking.join(cast(PeftModel, model))

    def _added(self, model: PreTrainedModel) -> PeftModel:
        modules, targets = dict(model.named_modules()), self.config.additional_targets
        for target in targets:
            if not any(name.endswith(target) for name in modules):
                raise ConfigError(f"additional_target names {target!r}, but the model has {_kinds(modules)}")
        fitting = [name for name, module in modules.items() if _takes_adapters(module)]
        for target in [] if self.config.lora_target == "all" else names(self.config.lora_target):
            if not any(name == target or name.endswith(f".{target}") for name in fitting):
                raise ConfigError(f"lora_target names {target!r}, but what takes adapters is {_kinds(fitting)}")
        settings = adapter(self.config)
        # Where input and output embeddings are one, they stay one: whichever is named, both learn.
        whole = {module for name, module in modules.items() if name.endswith(tuple(targets))}
        if any(not weight.is_floating_point() for module in whole for weight in module.parameters()):
            raise ConfigError(
                f"additional_target is {self.config.additional_target}, but quantised weights cannot learn whole: "
                "drop quantization_bit, or name modules that stay as they are, such as lm_head"
            )
        settings.ensure_weight_tying = getattr(model.config, "tie_word_embeddings", False) and not whole.isdisjoint(
            {model.get_input_embeddings(), model.get_output_embeddings()}
        )
        try:
            return cast(PeftModel, get_peft_model(model, settings))
        except ValueError as error:
            raise ConfigError(
                f"lora_target is {self.config.lora_target}, but what takes adapters is {_kinds(fitting)} "
                f"({str(error).splitlines()[0]})"
            ) from None

    def _check(self, made: LoraConfig) -> None:
        if self.stacks:
            stacking.check(made, self.config)
            return
        for key, wanted, found in (
            ("lora_rank", self.config.lora_rank, made.r),
            ("lora_alpha", self.config.alpha, made.lora_alpha),
            ("use_dora", self.config.use_dora, made.use_dora),
            ("use_rslora", self.config.use_rslora, made.use_rslora),
        ):
            if wanted != found:
                raise ConfigError(
                    f"{key} is {wanted}, but the parent version's adapter was made with {found}: "
                    f"set {key}: {found}, or start a new workspace"
                )


def adapter(config: Config) -> LoraConfig:
    """A new adapter, as peft has it."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=config.lora_rank,
        lora_alpha=config.alpha,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear" if config.lora_target == "all" else names(config.lora_target),
        use_dora=config.use_dora,
        use_rslora=config.use_rslora,
        modules_to_save=config.additional_targets or None,
    )


def _takes_adapters(module: nn.Module) -> bool:
    """Whether peft has LoRA for such a layer: linear ones, quantised or as GPT-2 has them, and embeddings."""
    return "Linear" in type(module).__name__ or isinstance(module, Conv1D | nn.Embedding)


def _kinds(modules: Iterable[str]) -> str:
    """The last part of each name, numbers left out: what `lora_target` may list."""
    return ", ".join(sorted({kind for name in modules if (kind := name.rpartition(".")[2]) and not kind.isdigit()}))
