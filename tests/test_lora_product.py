"""Joined LoRA layers give the values and the gradients that peft's own give."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from treering.config import Config
from treering.lora_product import _Group, join
from treering.model import load_base

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def adapted(model_folder: Path, **settings: Any) -> Any:
    torch.manual_seed(0)
    made = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    model: Any = get_peft_model(load_base(model_folder, Config(bf16=False)), LoraConfig(**made))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


def learn(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(input_ids=IDS).logits
    logits.logsumexp(-1).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "settings",
    [{}, {"target_modules": ["q_proj", "v_proj", "down_proj"]}, {"use_rslora": True}, {"rank_pattern": {"k_proj": 2}}],
    ids=["all", "some", "rslora", "ranks"],
)
def test_values_and_gradients(model_folder: Path, settings: dict[str, Any]) -> None:
    plain, joined = adapted(model_folder, **settings), adapted(model_folder, **settings)
    names = [name for name, _ in joined.named_parameters()]
    join(joined.base_model.model)
    assert [name for name, _ in joined.named_parameters()] == names
    (values, gradients), (ours, our_gradients) = learn(plain), learn(joined)
    torch.testing.assert_close(ours, values, rtol=1e-4, atol=1e-5)
    assert our_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(our_gradients[name], gradient, rtol=1e-3, atol=1e-5)
    with plain.disable_adapter(), joined.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(joined(input_ids=IDS).logits, plain(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)


def test_siblings_are_one_product(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    compute = _Group._compute

    def noted(group: _Group, x: Tensor) -> Tensor:
        sizes.append(len(group._layers))
        return compute(group, x)

    monkeypatch.setattr(_Group, "_compute", noted)
    model = adapted(model_folder)
    join(model)
    join(model)  # Once more changes nothing.
    with torch.no_grad():
        model(input_ids=IDS)
    assert sizes == [3, 1, 2, 1] * 2


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_dropout": 0.1}], ids=["dora", "dropout"])
def test_more_than_plain_lora_is_left_to_peft(model_folder: Path, settings: dict[str, Any]) -> None:
    model = adapted(model_folder, **settings)
    join(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_small_steps_are_not_lost_in_bfloat16(model_folder: Path) -> None:
    """Early on, adapters change a number by less than bfloat16 tells apart; of many numbers, enough must change."""

    def change(bf16: bool, joined: bool) -> Tensor:
        torch.manual_seed(0)
        made = LoraConfig(r=4, target_modules=["o_proj"], task_type="CAUSAL_LM")
        model: Any = get_peft_model(load_base(model_folder, Config(bf16=bf16)), made)
        if joined:
            join(model)
        layer = model.base_model.model.model.layers[0].self_attn.o_proj
        x = 100 * torch.randn(2000, 1, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
        x = x if bf16 else x.float()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            before: Tensor = layer(x).float()
            torch.nn.init.constant_(layer.lora_B["default"].weight, 1e-4)
            after: Tensor = layer(x).float()
        return after - before

    exact = change(bf16=False, joined=False)

    def kept(changed: Tensor) -> float:
        return float((changed * exact).sum() / exact.square().sum())

    assert kept(change(True, joined=True)) == pytest.approx(1, abs=0.1)
    assert kept(change(True, joined=False)) < 0.1


def test_a_pass_that_failed_leaves_nothing_to_the_next(model_folder: Path) -> None:
    """Between two layers of a group its outputs wait, and with them the graph before: the next group drops them."""
    model = adapted(model_folder)
    join(model)
    first, second = (layer.mlp for layer in model.base_model.model.model.layers)
    x = torch.randn(3, first.gate_proj.in_features, requires_grad=True)
    first.gate_proj(x)  # And `up_proj` is never asked.
    left = weakref.ref(x)
    del x
    assert left() is not None
    second.down_proj(torch.randn(3, second.down_proj.in_features))
    assert left() is None
