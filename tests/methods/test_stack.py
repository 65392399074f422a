"""Updates stacked by rank: what was learned stays bit for bit, and a version is one plain adapter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.conftest import QUICK
from tests.training import KillAt, KilledError, Run, same_bits, settings
from treering import Workspace, registry
from treering.config import Config
from treering.errors import ConfigError
from treering.lora_product import ADAPTER, ADDED
from treering.methods import Losses, Methods, stacking
from treering.methods.lora import LoRA
from treering.model import load, load_base
from treering.serve.vllm.base import Base
from treering.serve.vllm.child import command
from treering.testing import toy_rows

MakeWorkspace = Callable[..., Workspace]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
STACK: dict[str, Any] = {"adapter_composition": "stack", "lora_rank": 4}


def stacked(folder: Path, updates: int = 2, **values: Any) -> Any:
    """A model in its last of so many updates; what each has learned are random numbers."""
    config = settings(folder, **{**STACK, **values})
    model: Any = load_base(folder, config)
    for update in range(updates):
        model = LoRA(config).prepare(model, {})
        generator = torch.Generator().manual_seed(update)
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.1, generator=generator)
        if update < updates - 1:
            stacking.join(model)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


def deltas(model: Any) -> dict[str, Tensor]:
    """What the adapters of each layer add to its weight, computed from its matrices alone."""
    found = {}
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and layer.lora_A:
            parts = [
                layer.scaling[key] * layer.lora_B[key].weight.double() @ layer.lora_A[key].weight.double()
                for key in layer.lora_A
            ]
            found[name] = torch.stack(parts).sum(0).detach()
    return found


@pytest.mark.parametrize("values", [{}, {"lora_target": "q_proj, v_proj"}, {"use_rslora": True}])
def test_values_and_gradients_are_those_of_two_adapters_in_peft(model_folder: Path, values: dict[str, Any]) -> None:
    ours = stacked(model_folder, 3, **values)
    plain: Any = load_base(model_folder, settings(model_folder))
    made = ours.peft_config[ADAPTER]
    for name in (ADAPTER, ADDED):
        settled = LoraConfig(
            r=ours.peft_config[name].r,
            lora_alpha=ours.peft_config[name].lora_alpha,
            target_modules=made.target_modules,
            use_rslora=made.use_rslora,
        )
        plain = get_peft_model(plain, settled, name) if name == ADAPTER else plain
        if name == ADDED:
            plain.add_adapter(name, settled)
    plain.base_model.set_adapter([ADAPTER, ADDED])
    plain.load_state_dict(ours.state_dict())
    results = {}
    for kind, model in (("ours", ours), ("peft", plain)):
        found = model(input_ids=IDS).logits
        found.logsumexp(-1).sum().backward()
        results[kind] = found.detach()
    torch.testing.assert_close(results["ours"], results["peft"], rtol=1e-4, atol=1e-5)
    theirs = dict(plain.named_parameters())
    for name, weight in ours.named_parameters():
        assert weight.requires_grad == (f".{ADDED}." in name) == (weight.grad is not None)
        if weight.grad is not None:
            assert weight.grad.abs().max() > 0
            torch.testing.assert_close(weight.grad, theirs[name].grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("values", [{}, {"use_rslora": True}, {"lora_target": "embed_tokens, q_proj"}])
def test_joined_adapters_are_the_sum_of_both(model_folder: Path, values: dict[str, Any]) -> None:
    model = stacked(model_folder, 3, **values)
    before, values_before = deltas(model), logits(model)
    stacking.join(model)
    stacking.join(model)  # Once more changes nothing.
    torch.testing.assert_close(logits(model), values_before, rtol=1e-4, atol=1e-5)
    after = deltas(model)
    assert list(model.peft_config) == [ADAPTER] and after.keys() == before.keys()
    for name, delta in before.items():
        torch.testing.assert_close(after[name], delta, rtol=1e-5, atol=1e-7)
    made = model.peft_config[ADAPTER]
    assert (made.r, made.lora_alpha) == (12, 24)
    assert all(weight.requires_grad == ("lora_" in name) for name, weight in model.named_parameters())


@pytest.mark.parametrize("bf16", [False, True])
def test_the_joined_adapter_computes_the_same_bits(model_folder: Path, bf16: bool) -> None:
    model = stacked(model_folder, 3, bf16=bf16)
    before = logits(model)
    stacking.join(model)
    assert torch.equal(logits(model), before)


def test_each_update_begins_in_other_directions(model_folder: Path) -> None:
    """With the same random numbers every time, new columns would read what the old ones read."""
    config = settings(model_folder, **STACK)
    model: Any = load_base(model_folder, config)
    starts = []
    for _ in range(3):
        torch.manual_seed(config.seed)  # As an update begins.
        model = LoRA(config).prepare(model, {})
        a = model.base_model.model.model.layers[0].mlp.up_proj.lora_A
        starts.append(a[ADDED if ADDED in a else ADAPTER].weight.detach().clone())
        stacking.join(model)
    assert not torch.equal(starts[0], starts[1]) and not torch.equal(starts[1], starts[2])
    assert torch.equal(
        starts[1], stacked(model_folder).base_model.model.model.layers[0].mlp.up_proj.lora_A[ADDED].weight
    )


@pytest.mark.parametrize(
    "values",
    [
        {"weight_decay": 0.5},
        {"optim": "muon"},
        {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
        {"lora_dropout": 0.1},
        {"bf16": True},
        {"quantization_bit": 4},
    ],
    ids=lambda values: next(iter(values)) + "-" + str(next(iter(values.values()))),
)
def test_versions_keep_what_was_learned_bit_for_bit(
    workspace: MakeWorkspace, model_folder: Path, values: dict[str, Any]
) -> None:
    ws = workspace(**{**QUICK, **STACK, **values})
    versions = []
    for task in ("pens", "cups", "hats"):
        ws.ingest(toy_rows(task, 20), task=task)
        version = ws.update()
        assert version is not None
        ws.promote(version.name, force=True)
        versions.append(version)
    weights = [load_file(version.folder / "adapter_model.safetensors") for version in versions]
    for rank, older, newer in zip((4, 8), weights, weights[1:], strict=False):
        assert older.keys() == newer.keys()
        for name, weight in older.items():
            side = newer[name] if "lora_A" in name else newer[name].T
            assert len(side) == rank + 4
            assert torch.equal(side[:rank], weight if "lora_A" in name else weight.T)
            assert side[rank:].any()
    made = json.loads((versions[2].folder / "adapter_config.json").read_text())
    assert (made["r"], made["lora_alpha"]) == (12, 24)
    assert {version.manifest["cost"]["trainable_parameters"] for version in versions} == {
        sum(weight.numel() for weight in weights[0].values())
    }
    if values.get("quantization_bit") is None:
        _loads_in_plain_peft(ws, model_folder, bf16=bool(values.get("bf16")))


def _loads_in_plain_peft(ws: Workspace, model_folder: Path, bf16: bool) -> None:
    version = registry.get(ws)
    dtype = torch.bfloat16 if bf16 else torch.float32
    base = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager", dtype=dtype)
    bare = logits(base)
    near: Any = {"rtol": 0.1, "atol": 0.3} if bf16 else {"rtol": 1e-4, "atol": 1e-5}
    found = logits(PeftModel.from_pretrained(base, str(version.folder)))
    torch.testing.assert_close(found, logits(load(model_folder, ws.config(), version)), **near)
    assert not torch.allclose(found, bare, atol=0.1)


def second(folder: Path, **values: Any) -> Run:
    """The second of two updates, about to train."""
    config = settings(folder, **{**STACK, "max_steps": 4, "learning_rate": 1e-2, "protect": ["olora"], **values})
    run = Run(folder, config)
    run.train()
    run.methods.after_training(run.model, lambda: Losses(0.0, 0.0))
    run.methods = Methods(config)
    run.model = run.methods.prepare(run.model, {})
    return run


def test_an_interrupted_update_resumes_to_the_same_bits(model_folder: Path, tmp_path: Path) -> None:
    whole = second(model_folder)
    log = whole.train()
    assert all("olora" in entry for entry in log)
    broken = second(model_folder, save_steps=1)
    with pytest.raises(KilledError):
        broken.train(checkpoints=tmp_path, stop=KillAt(400))
    assert 0 < max(int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*")) < 4
    resumed = second(model_folder, save_steps=1)
    resumed.train(checkpoints=tmp_path)
    for run in (whole, resumed):
        run.methods.after_training(run.model, lambda: Losses(0.0, 0.0))
    assert same_bits(whole.weights(), resumed.weights())
    assert {min(weight.shape) for weight in whole.weights().values()} == {8}


def test_the_old_columns_cost_no_state_of_the_optimiser(model_folder: Path, tmp_path: Path) -> None:
    run = second(model_folder)
    assert {min(weight.shape) for weight in run.weights().values()} == {4}
    run.train(checkpoints=tmp_path)
    kept = load_file(max(tmp_path.glob("step-*")) / "state.safetensors")
    assert all(ADDED in name for name in kept if name.startswith("weight."))
    assert {min(t.shape) for name, t in kept.items() if name.startswith("optimizer.") and t.ndim == 2} == {4}


class Ends:
    """A method that looks at what learns when training has ended."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def after_training(self, model: Any, measure: Any) -> None:
        self.found = [name for name, weight in model.named_parameters() if weight.requires_grad]


def test_methods_that_protect_act_before_adapters_are_joined(model_folder: Path) -> None:
    run = second(model_folder)
    method = run.methods.by_name["mine"] = Ends()
    learns = list(run.weights())
    run.methods.after_training(run.model, lambda: Losses(0.0, 0.0))
    assert method.found == learns and all(ADDED in name for name in learns)
    assert not any(ADDED in name for name, _ in run.model.named_parameters())


@pytest.mark.parametrize(
    ("made", "wanted", "told"),
    [
        ({}, {"lora_alpha": 4}, "lora_alpha is 4 for lora_rank 4, but .* has 8 for 4, .* set lora_alpha to 2 times"),
        ({}, {"use_rslora": True}, "use_rslora is True, but .* was made with False: set use_rslora: False"),
        ({"adapter_composition": "continue", "use_dora": True}, {}, "is stack, but .* is more than low-rank matrices"),
        ({"adapter_composition": "continue", "additional_target": "norm"}, {}, "set adapter_composition: continue"),
        (
            {},
            {"adapter_composition": "continue", "lora_rank": 8},
            "lora_rank is 8, but .* made with 4: set lora_rank: 4",
        ),
    ],
)
def test_adapters_that_cannot_be_joined(
    model_folder: Path, made: dict[str, Any], wanted: dict[str, Any], told: str
) -> None:
    model = stacked(model_folder, 1, **made)
    with pytest.raises(ConfigError, match=told):
        LoRA(settings(model_folder, **{**STACK, **wanted})).prepare(model, {})


def test_an_update_may_add_another_rank(model_folder: Path) -> None:
    model = stacked(model_folder, 1)
    LoRA(settings(model_folder, **{**STACK, "lora_rank": 6})).prepare(model, {})
    assert {min(w.shape) for w in model.parameters() if w.requires_grad} == {6}
    stacking.join(model)
    made = model.peft_config[ADAPTER]
    assert (made.r, made.lora_alpha) == (10, 20)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"use_dora": True}, "use_dora is True, but adapter_composition is stack"),
        ({"additional_target": "norm"}, "additional_target is norm, but adapter_composition is stack"),
        ({"finetuning_type": "full"}, "adapter_composition is stack, but finetuning_type is full"),
        ({"adapter_composition": "heap"}, "adapter_composition: .*'continue'.*'stack'.*got 'heap'"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Config.build({**STACK, **values})


def test_a_server_of_vllm_has_room_for_ranks_to_come(tmp_path: Path) -> None:
    base = Base(name=None, folder=str(tmp_path), sha256="0", dtype="float32", tools=True)
    for composition, room in (("continue", "16"), ("stack", "32")):
        line = command(Config.build({"adapter_composition": composition}), base, [12])
        assert line[line.index("--max-lora-rank") + 1] == room
