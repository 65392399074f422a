"""Each optimiser takes the steps it should, learns, and goes on to the same bits from any checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import Counted, Run, StopAt, same_bits, settings
from treering import optimizers
from treering.config import Config
from treering.errors import ConfigError, UpdateInterruptedError
from treering.methods import Methods
from treering.model import load_base
from treering.optimizers import OPTIMIZERS, Together, optimizer

LORA: dict[str, Any] = {"lora_rank": 64, "use_dora": True}  # Matrices of 4096 numbers and more have 8-bit states.
FULL: dict[str, Any] = {"finetuning_type": "full"}
CONSTANT = {"schedule_free_adamw": {"lr_scheduler_type": "constant"}}


def chosen(folder: Path, name: str, **values: Any) -> Config:
    return settings(folder, optim=name, learning_rate=5e-3, **CONSTANT.get(name, {}), **values)


@pytest.mark.parametrize("values", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_learns_and_resumes_to_the_same_bits(
    tmp_path: Path, model_folder: Path, name: str, values: dict[str, Any]
) -> None:
    config = chosen(model_folder, name, max_steps=8, per_device_train_batch_size=4, weight_decay=0.01, **values)
    whole = Run(model_folder, config)
    start = whole.weights()
    counted = Counted()
    log = whole.train(checkpoints=tmp_path / "whole", stop=counted)
    looks = counted.looks // len(log)
    assert log[-1]["loss"] < log[0]["loss"]
    assert not any(torch.equal(start[weight], found) for weight, found in whole.weights().items())
    for stops in ((1,), (2, 3), (7,)):
        folder = tmp_path / str(stops)
        for steps in stops:
            with pytest.raises(UpdateInterruptedError):
                Run(model_folder, config).train(checkpoints=folder, stop=StopAt(steps * looks + 1))
            torch.manual_seed(12345)
        last = Run(model_folder, config)
        assert [e["loss"] for e in last.train(checkpoints=folder)] == [e["loss"] for e in log]
        assert same_bits(whole.weights(), last.weights())


def test_a_state_in_8_bits_is_smaller(tmp_path: Path, model_folder: Path) -> None:
    sizes = {}
    for name in ("adamw_torch", "adamw_8bit"):
        Run(model_folder, chosen(model_folder, name, max_steps=1, **FULL)).train(checkpoints=tmp_path / name)
        sizes[name] = (tmp_path / name / "step-1" / "state.safetensors").stat().st_size
    assert sizes["adamw_8bit"] < 0.6 * sizes["adamw_torch"]  # Weights and two moments: 12 bytes, or 4 + 2.


def test_muon_takes_hidden_matrices_alone(model_folder: Path) -> None:
    def kinds(**values: Any) -> dict[str, set[str]]:
        config = chosen(model_folder, "muon", **values)
        model = Methods(config).prepare(load_base(model_folder, config), {})
        names = {id(weight): name for name, weight in model.named_parameters()}
        made = optimizer(config, model, 1.0)
        assert isinstance(made, Together)
        return {
            type(part).__name__: {names[id(w)] for group in part.param_groups for w in group["params"]}
            for part in made.parts
        }

    full = kinds(finetuning_type="full")
    assert full["Muon"] and all("_proj" in name for name in full["Muon"])
    assert full["AdamW"] and all("norm" in name or "embed" in name for name in full["AdamW"])
    assert kinds().keys() == {"Muon"}
    dora = kinds(use_dora=True, additional_target="lm_head")
    assert all("lora_magnitude" in name or "embed_tokens" in name for name in dora["AdamW"])


def test_schedule_free_ends_with_the_average(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = chosen(model_folder, "schedule_free_adamw", max_steps=6)
    averaged = Run(model_folder, config)
    averaged.train()
    monkeypatch.setattr(optimizers, "finish", lambda _: None)
    last = Run(model_folder, config)
    last.train()
    assert not same_bits(averaged.weights(), last.weights())


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [("adamw_8bit", "bitsandbytes.optim", "quantization"), ("schedule_free_adamw", "schedulefree", "schedulefree")],
)
def test_what_is_not_installed_is_told(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        ConfigError, match=rf"(?s)optim is {name}, but .* pip install 'treering\[{extra}\]'".replace(" pip", " .pip")
    ):
        Run(model_folder, chosen(model_folder, name, max_steps=1)).train()
