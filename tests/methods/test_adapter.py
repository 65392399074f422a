"""Bottleneck adapters: what they compute, and that their versions are learned, kept, served and gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.serving import ASK
from tests.test_serve_worker import Inside
from tests.training import Counted, Run, StopAt, same_bits, settings
from treering import Workspace, bottleneck, registry, shares
from treering.config import Config
from treering.data.example import Message
from treering.errors import ConfigError, UpdateInterruptedError, VersionError
from treering.greedy import generate
from treering.methods import Methods
from treering.model import load, load_base, load_tokenizer
from treering.testing import toy_rows

PLACEMENTS = ("parallel", "pfeiffer", "houlsby")
IDS = torch.arange(12)[None]


def adapters(folder: Path, **values: Any) -> Config:
    return settings(folder, finetuning_type="adapter", **values)


def prepared(folder: Path, **values: Any) -> Any:
    config = adapters(folder, **values)
    torch.manual_seed(0)
    return Methods(config).prepare(load_base(folder, config), {})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(("placement", "each"), [("parallel", 1), ("pfeiffer", 1), ("houlsby", 2)])
def test_they_alone_learn_and_begin_as_the_base(model_folder: Path, placement: str, each: int) -> None:
    model = prepared(model_folder, adapter_size=5, adapter_placement=placement)
    learns = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    assert len(learns) == 2 * each * 4 and all(".bottleneck." in name for name in learns)
    assert sum(weight.numel() for weight in learns.values()) == 2 * each * (2 * 64 * 5 + 64 + 5)
    assert torch.equal(logits(model), logits(load_base(model_folder, adapters(model_folder))))
    for weight in learns.values():
        torch.nn.init.normal_(weight, std=0.1)
    assert not torch.allclose(logits(model), logits(load_base(model_folder, adapters(model_folder))), atol=1e-2)


def by_hand(placement: str, layer: Any, residual: Tensor) -> Tensor:
    """A Llama layer, from its parts: `residual` `[1, length, hidden]` is what attention made, added to what it read."""

    def added(part: Any, hidden: Tensor) -> Tensor:
        down, up = part.bottleneck.down, part.bottleneck.up
        found: Tensor = (hidden @ down.weight.T + down.bias).clamp(min=0) @ up.weight.T + up.bias
        return found

    read = layer.post_attention_layernorm(residual)
    gate, up = layer.mlp.gate_proj(read), layer.mlp.up_proj(read)
    made: Tensor = layer.mlp.down_proj(gate * torch.sigmoid(gate) * up)
    return residual + made + (4 * added(layer.mlp, read) if placement == "parallel" else added(layer.mlp, made))


@pytest.mark.parametrize("placement", PLACEMENTS)
@torch.no_grad()
def test_by_hand(model_folder: Path, placement: str) -> None:
    model = prepared(model_folder, adapter_size=7, adapter_placement=placement).eval()
    for number, weight in enumerate(bottleneck.weights(model).values()):
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)) / 8)
    layer = model.model.layers[0]
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, given, out: seen.update(read=given[0], made=out)),
        layer.self_attn.o_proj.register_forward_hook(lambda _, given, out: seen.update(attended=out)),
    ]
    model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    attended = seen["attended"]
    if placement == "houlsby":
        down, up = layer.self_attn.bottleneck.down, layer.self_attn.bottleneck.up
        attended = attended + up(torch.relu(down(attended)))
    else:
        assert not hasattr(layer.self_attn, "bottleneck")
    torch.testing.assert_close(seen["made"], by_hand(placement, layer, seen["read"] + attended), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("values", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed layers"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_interrupted_it_ends_in_the_same_bits(
    tmp_path: Path, model_folder: Path, placement: str, values: dict[str, Any]
) -> None:
    rates = {"learning_rate": 1e-2, "max_steps": 6, "per_device_train_batch_size": 4}
    config = adapters(model_folder, adapter_size=8, adapter_placement=placement, **rates, **values)
    whole, counted = Run(model_folder, config), Counted()
    frozen = {name: p.clone() for name, p in whole.model.named_parameters() if not p.requires_grad}
    log = whole.train(checkpoints=tmp_path / "whole", stop=counted)
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert same_bits(frozen, {name: p for name, p in whole.model.named_parameters() if not p.requires_grad})
    with pytest.raises(UpdateInterruptedError):
        Run(model_folder, config).train(checkpoints=tmp_path / "stopped", stop=StopAt(counted.looks // 2))
    last = Run(model_folder, config)
    last.train(checkpoints=tmp_path / "stopped")
    assert same_bits(whole.weights(), last.weights())


def test_rows_are_computed_side_by_side(model_folder: Path, threads: Callable[[int], None]) -> None:
    threads(2)
    config = adapters(model_folder, per_device_train_batch_size=8, max_steps=2)
    assert shares.count(config, torch.device("cpu")) == 2
    one, other = Run(model_folder, config), Run(model_folder, config)
    one.train()
    other.train()
    assert same_bits(one.weights(), other.weights())


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_version_is_kept_verified_served_and_gone_on_with(
    workspace: Callable[..., Workspace], model_folder: Path, placement: str, bf16: bool
) -> None:
    learns = {"learning_rate": 1e-2, "max_steps": 4, "bf16": bf16}
    ws = workspace(finetuning_type="adapter", adapter_size=8, adapter_placement=placement, **learns)
    for task in ("pens", "cups"):
        ws.ingest(toy_rows(task, 20), task=task)
        made = ws.update()
        assert made is not None and made.problems() == [] and made.kind == "adapter"
        ws.promote(made.name, force=True)
    first, second = registry.get(ws, "v1"), registry.get(ws)
    about = json.loads((second.folder / "bottleneck.json").read_text())
    assert about == {
        "base_model_name_or_path": str(model_folder),
        "size": 8,
        "placement": placement,
        "scale": 4.0 if placement == "parallel" else 1.0,
    }
    saved, before = (load_file(version.folder / "bottleneck.safetensors") for version in (second, first))
    assert not list(second.folder.glob("model*.safetensors"))  # The base is not kept again.
    model = load(model_folder, ws.config(), second)
    assert same_bits(dict(bottleneck.weights(model)), saved)
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16 if bf16 else torch.float32}
    # The second went on from the first, by four small steps.
    moved = {name: float((saved[name] - before[name]).abs().max()) for name in saved}
    assert 0 < max(moved.values()) < 0.1
    assert all(saved[name].any() for name in saved if name.endswith("up.weight"))

    inside = Inside(ws)
    inside.put(op="load", version="v2", keep=False)
    for name in ("base", "v2"):
        inside.generate(name, name)
    inside.run(2)
    tokenizer, asked = load_tokenizer(model_folder), [Message(**turn) for turn in ASK]
    for name, served in (("base", load(model_folder, ws.config())), ("v2", model)):
        expected = generate(served, tokenizer, [asked], [12], ws.config())[0]
        # In bfloat16 the server's products round otherwise, and this model's words are near ties.
        assert bf16 or inside.text(name).strip() == expected, name
        assert inside.text(name) and not any(event["event"] == "failed" for event in inside.events)

    path = second.folder / "bottleneck.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(VersionError, match=r"bottleneck.safetensors was changed"):
        load(model_folder, ws.config(), second)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"adapter_size": 9}, "adapter_size is 9, but .* was made with 8: set adapter_size: 8"),
        (
            {"adapter_placement": "houlsby"},
            "adapter_placement is houlsby, but .* made with parallel: set adapter_pl",
        ),
    ],
)
def test_other_adapters_are_refused(
    workspace: Callable[..., Workspace], values: dict[str, Any], told: str, tmp_path: Path
) -> None:
    ws = workspace(finetuning_type="adapter", adapter_size=8, max_steps=1)
    ws.ingest(toy_rows("pens", 10), task="pens")
    assert ws.update() is not None
    ws.promote("v1", force=True)
    ws.ingest(toy_rows("cups", 10), task="cups")
    with pytest.raises(ConfigError, match=told):
        ws.update(**values)
    with pytest.raises(ConfigError, match=r"finetuning_type is lora, but v1 is a bottleneck adapter: set .*: adapter"):
        ws.update(finetuning_type="lora")


def test_a_model_without_a_known_feed_forward(model_folder: Path) -> None:
    config = adapters(model_folder)
    model = load_base(model_folder, config)
    for layer in model.model.layers:
        layer.odd = layer.mlp
        del layer.mlp
    with pytest.raises(ConfigError, match=r"adapter_placement parallel, but .* none of mlp, .*, only self_attn.*odd"):
        Methods(config).prepare(model, {})


@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_quantised_base(tmp_path: Path, model_folder: Path, bits: int) -> None:
    config = adapters(model_folder, quantization_bit=bits, learning_rate=1e-2, max_steps=6)
    run = Run(model_folder, config)
    assert torch.equal(logits(run.model), logits(load_base(model_folder, config)))
    log = run.train()
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    bottleneck.save_adapters(run.model, tmp_path, "base")
    again = bottleneck.load_adapters(load_base(model_folder, config), tmp_path)
    assert torch.equal(logits(again), logits(run.model))
