"""A base model in 4 or 8 bits: an adapter learns on it, is judged and served on it, and loads on the whole one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import QUICK
from tests.serving import ASK
from tests.test_serve_worker import Inside
from tests.training import Counted, Run, StopAt, same_bits
from treering import Workspace, registry
from treering import shares as shares_module
from treering.answers import Answerer
from treering.config import Config
from treering.data.example import Message
from treering.errors import ConfigError, UpdateInterruptedError
from treering.greedy import generate
from treering.methods import Methods
from treering.model import load, load_base, load_tokenizer
from treering.testing import toy_rows

IDS = torch.arange(12)[None]


def settings(folder: Path, bits: int | None, **values: Any) -> Config:
    return Config.build({"model_name_or_path": str(folder), "bf16": False, "quantization_bit": bits, **values})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("bits", [4, 8])
def test_linear_layers_are_quantised_and_the_rest_is_not(model_folder: Path, bits: int) -> None:
    whole, small = (
        load_base(model_folder, settings(model_folder, None)),
        load_base(model_folder, settings(model_folder, bits)),
    )
    integers = {name for name, weight in small.named_parameters() if not weight.is_floating_point()}
    assert len(integers) == 2 * 7 and all("_proj" in name for name in integers)
    assert 0 < small.get_memory_footprint() < whole.get_memory_footprint()
    # The same model, only rounded.
    assert torch.corrcoef(torch.stack([logits(whole).flatten(), logits(small).flatten()]))[0, 1] > 0.7


@pytest.mark.parametrize(
    ("bits", "values"), [(4, {}), (4, {"use_dora": True}), (8, {})], ids=["4 bits", "4 bits and DoRA", "8 bits"]
)
def test_an_adapter_learns_on_it(tmp_path: Path, model_folder: Path, bits: int, values: dict[str, Any]) -> None:
    """From where the base is, and to the same bits however often it is interrupted."""
    config = settings(
        model_folder, bits, protect=[], learning_rate=1e-2, max_steps=6, per_device_train_batch_size=4, **values
    )
    assert shares_module.count(config, torch.device("cpu")) == 1
    bare = logits(load_base(model_folder, config))
    prepared = Methods(config).prepare(load_base(model_folder, config), {})
    torch.testing.assert_close(logits(prepared), bare, rtol=1e-3, atol=1e-3)
    whole = Run(model_folder, config)
    counted = Counted()
    log = whole.train(checkpoints=tmp_path / "whole", stop=counted)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    with pytest.raises(UpdateInterruptedError):
        Run(model_folder, config).train(checkpoints=tmp_path / "stopped", stop=StopAt(counted.looks // 2))
    last = Run(model_folder, config)
    last.train(checkpoints=tmp_path / "stopped")
    assert same_bits(whole.weights(), last.weights())


@pytest.mark.parametrize(
    ("bits", "values", "alike"),
    [(4, {}, 0.9999), (4, {"use_dora": True}, 0.9999), (8, {}, 0.98)],
    ids=["4 bits", "4 bits and DoRA", "8 bits"],
)
def test_gradients_are_those_of_the_rounded_model(
    model_folder: Path, bits: int, values: dict[str, Any], alike: float
) -> None:
    """Also after the model was measured. With 8 bits what is multiplied is rounded as well."""

    def gradients(rounded: bool) -> dict[str, Tensor]:
        config = settings(model_folder, bits, **values)
        base = load_base(model_folder, config)
        if rounded:
            base.dequantize()
        torch.manual_seed(0)
        model = Methods(config).prepare(base, {})
        logits(model)
        model.train()
        model(input_ids=IDS).logits.square().sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    found, wanted = gradients(False), gradients(True)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        if gradient.any():
            assert torch.cosine_similarity(found[name].flatten(), gradient.flatten(), 0) > alike, name


@pytest.mark.parametrize("bits", [4, 8])
def test_versions_are_made_and_served_on_it_and_load_on_the_whole_base(
    workspace: Callable[..., Workspace], model_folder: Path, bits: int
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ws = workspace(quantization_bit=bits, **{**QUICK, "max_steps": 1})
    for task in ("pens", "cups"):
        ws.ingest(toy_rows(task, 10), task=task)
        made = ws.update()
        assert made is not None
        ws.promote(made.name, force=True)
    version = registry.get(ws)
    assert version.name == "v2" and version.manifest["config"]["quantization_bit"] == bits
    assert "bitsandbytes" in version.manifest["libraries"]

    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), str(version.folder))
    found = {name: weight for name, weight in peft.named_parameters() if "lora_" in name}
    saved = load_file(version.folder / "adapter_model.safetensors")
    assert same_bits({name.replace(".default", ""): weight for name, weight in found.items()}, saved)
    whole = settings(model_folder, None)
    torch.testing.assert_close(logits(peft), logits(load(model_folder, whole, version)), rtol=1e-4, atol=1e-5)

    inside = Inside(ws)
    inside.put(op="load", version="v2", keep=False)
    for name in ("base", "v2"):
        inside.generate(name, name)
    inside.run(2)
    assert len(inside.worker._loaded.batches()) == 1  # One base for all.
    tokenizer, config = load_tokenizer(model_folder), ws.config()
    asked = [Message(**turn) for turn in ASK]
    for name, model in (("base", load(model_folder, config)), ("v2", load(model_folder, config, version))):
        assert inside.text(name).strip() == generate(model, tokenizer, [asked], [12], config)[0]


def test_scores_on_it_are_not_compared_with_scores_on_the_whole_base(
    workspace: Callable[..., Workspace], capsys: pytest.CaptureFixture[str]
) -> None:
    ws = workspace(max_steps=1)
    ws.ingest(toy_rows("pens", 20), task="pens")
    first = ws.update()
    assert first is not None
    ws.promote("v1", force=True)
    ws.ingest(toy_rows("cups", 20), task="cups")
    with pytest.raises(ConfigError, match=r"quantization_bit=8 would be for this command alone.*write it in"):
        ws.update(quantization_bit=8)
    with (ws.root / "treering.yaml").open("a") as file:
        file.write("quantization_bit: 8\n")
    second = ws.update()
    assert second is not None
    assert second.manifest["evaluation"] == first.manifest["evaluation"] | {"quantization_bit": 8}
    capsys.readouterr()
    Answerer(ws, second)
    assert capsys.readouterr().err == ""
    Answerer(ws, first)
    told = capsys.readouterr().err
    assert f"{first.name} was judged on a base model of whole weights and is loaded on one of 8 bits" in told


def test_without_bitsandbytes_the_error_says_what_to_install(
    workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    ws = workspace(quantization_bit=4)
    ws.ingest(toy_rows("pens", 10), task="pens")
    with pytest.raises(ConfigError, match=r"(?s)quantization_bit is 4, but .* `pip install 'treering\[quantization\]'"):
        ws.update()
    assert list(ws.versions.iterdir()) == []


def test_quantised_weights_cannot_learn_whole(model_folder: Path) -> None:
    config = settings(model_folder, 4, additional_target="q_proj")
    with pytest.raises(ConfigError, match="additional_target is q_proj, but quantised weights cannot"):
        Methods(config).prepare(load_base(model_folder, config), {})
    with pytest.raises(ConfigError, match="quantization_bit is 4, but finetuning_type is full"):
        settings(model_folder, 4, finetuning_type="full")
    with pytest.raises(ConfigError, match="use_dora is true and quantization_bit is 8, which peft"):
        settings(model_folder, 8, use_dora=True)
    with pytest.raises(ConfigError, match=r"quantization_bit: must be 4 or 8 \(got 3\)"):
        settings(model_folder, 3)
