"""O-LoRA: what an update adds reads other directions of the input than what was there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.test_stack import STACK, second, stacked
from tests.training import settings
from treering.config import Config
from treering.errors import ConfigError
from treering.lora_product import ADAPTER, ADDED
from treering.methods.lora import LoRA
from treering.methods.olora import OLoRA
from treering.model import load_base


def overlap(model: Any) -> float:
    """The squares of all inner products of an old row of A with a new one, added up one by one."""
    total = 0.0
    for layer in model.modules():
        if ADDED in getattr(layer, "lora_A", {}):
            for old in layer.lora_A[ADAPTER].weight:
                for new in layer.lora_A[ADDED].weight:
                    total += float(torch.dot(old, new)) ** 2
    return total


def test_the_penalty_by_hand(model_folder: Path) -> None:
    model = stacked(model_folder, 2)
    found = OLoRA(Config.build({**STACK, "protect": ["olora"], "olora": {"weight": 2.0}})).penalty(model)
    assert found is not None and overlap(model) > 0
    assert float(found) == pytest.approx(2.0 * overlap(model), rel=1e-4)
    found.backward()
    graded = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert graded == {name for name, _ in model.named_parameters() if f"lora_A.{ADDED}" in name}


def test_the_first_update_has_nothing_to_be_orthogonal_to(model_folder: Path) -> None:
    config = settings(model_folder, **STACK)
    model = LoRA(config).prepare(load_base(model_folder, config), {})
    assert OLoRA(config).penalty(model) is None


def test_it_keeps_new_directions_apart(model_folder: Path) -> None:
    found = {}
    for weight in (0.0, 0.5, 50.0):
        run = second(model_folder, max_steps=20, olora={"weight": weight})
        before = overlap(run.model)
        log = run.train()
        assert [float(entry["olora"] > 0) for entry in log] == [float(weight > 0)] * 20
        found[weight] = overlap(run.model) / before
    assert found[50.0] < 0.1 * found[0.0] and found[50.0] < found[0.5] < found[0.0]


@pytest.mark.parametrize("values", [{}, {"finetuning_type": "full"}, {"finetuning_type": "freeze"}])
def test_it_needs_something_stacked(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="set adapter_composition: stack"):
        Config.build({"protect": ["olora"], **values})
