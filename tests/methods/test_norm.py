"""Norms and biases learn, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from tests.training import Counted, Run, StopAt, same_bits, settings
from treering import Workspace, registry, shares
from treering.config import Config
from treering.errors import ConfigError, UpdateInterruptedError
from treering.methods.norm import Norm
from treering.model import load_base
from treering.testing import toy_rows


def learns(model: Any) -> set[str]:
    return {name for name, weight in Norm(Config()).prepare(model, {}).named_parameters() if weight.requires_grad}


def test_all_norms_learn_in_float32(model_folder: Path) -> None:
    model = load_base(model_folder, settings(model_folder)).bfloat16()
    layers = [f"model.layers.{n}.{name}_layernorm.weight" for n in (0, 1) for name in ("input", "post_attention")]
    assert learns(model) == {*layers, "model.norm.weight"}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_so_do_biases_wherever_they_are() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9, n_positions=8))
    vectors = {name for name, weight in model.named_parameters() if weight.ndim == 1}
    assert learns(model) == vectors
    assert {"transformer.h.0.attn.c_attn.bias", "transformer.ln_f.weight", "transformer.ln_f.bias"} <= vectors


def test_a_model_with_neither(model_folder: Path) -> None:
    model = load_base(model_folder, settings(model_folder))
    for module in model.modules():
        if "Norm" in type(module).__name__:
            del module.weight
    with pytest.raises(ConfigError, match="finetuning_type is norm, but the model's norms have no weights"):
        learns(model)


def test_interrupted_it_ends_in_the_same_bits(
    tmp_path: Path, model_folder: Path, threads: Callable[[int], None]
) -> None:
    threads(2)
    values = {"learning_rate": 3e-2, "max_steps": 6, "per_device_train_batch_size": 8}
    config = settings(model_folder, finetuning_type="norm", **values)
    assert shares.count(config, torch.device("cpu")) == 2
    whole, counted = Run(model_folder, config), Counted()
    log = whole.train(checkpoints=tmp_path / "whole", stop=counted)
    assert log[-1]["loss"] < log[0]["loss"]
    with pytest.raises(UpdateInterruptedError):
        Run(model_folder, config).train(checkpoints=tmp_path / "stopped", stop=StopAt(counted.looks // 2))
    last = Run(model_folder, config)
    last.train(checkpoints=tmp_path / "stopped")
    assert same_bits(whole.weights(), last.weights())


def test_versions_are_plain_folders(workspace: Callable[..., Workspace], model_folder: Path) -> None:
    ws = workspace(finetuning_type="norm", learning_rate=1e-2, max_steps=2)
    for task in ("pens", "cups"):
        ws.ingest(toy_rows(task, 20), task=task)
        made = ws.update()
        assert made is not None and made.problems() == [] and made.kind == "full"
        ws.promote(made.name, force=True)
    base, one, two = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (model_folder, registry.get(ws, "v1").folder, registry.get(ws).folder)
    )
    for before, after in ((base, one), (one, two)):
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {name for name in before if "norm" in name}
