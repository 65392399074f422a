"""Other tools' files: each key carries over or is named with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from treering import Workspace, registry
from treering.cli import run
from treering.config import Config
from treering.errors import ConfigError
from treering.importers import INCREMENTAL_METHODS, SHORT_FORM, Imported, read_config
from treering.testing import toy_rows

FILES = Path(__file__).parent / "data_files"


def written(folder: Path, values: dict[Any, Any]) -> Path:
    path = folder / "foreign.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def covered(values: dict[Any, Any], imported: Imported) -> bool:
    """Whether every key's value is in the settings or the adapter, or the key is named as left behind."""

    def carried(key: str, value: Any) -> bool:
        if key == "incremental_method":
            meant = INCREMENTAL_METHODS.get(str(value).lower(), {"": None})
            return meant.items() <= imported.settings.items()
        if key in ("adapter_name_or_path", "previous_model"):
            return str(value) in (str(imported.adapter), imported.settings.get("model_name_or_path"))
        setting = SHORT_FORM.get(key, key)
        return setting in imported.settings and imported.settings[setting] == value

    return all(str(key) in imported.left or carried(str(key), value) for key, value in values.items())


def test_llama_factory() -> None:
    imported = read_config(FILES / "llama_factory.yaml")
    assert imported.adapter is None
    assert imported.settings == {
        "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
        "trust_remote_code": True,
        "stage": "sft",
        "finetuning_type": "lora",
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.05,
        "lora_target": "all",
        "cutoff_len": 1024,
        "train_on_prompt": True,
        "save_steps": 500,
        "eval_steps": 500,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "learning_rate": 1e-4,
        "num_train_epochs": 3.0,
        "lr_scheduler_type": "cosine",
        "warmup_ratio": 0.1,
        "weight_decay": 0.01,
        "max_grad_norm": 1.0,
        "bf16": True,
        "fp16": False,
        "seed": 7,
        "val_size": 0.1,
        "report_to": "none",
    }
    assert covered(yaml.safe_load((FILES / "llama_factory.yaml").read_text(encoding="utf-8")), imported)
    assert not set(imported.left) & set(imported.settings)
    assert imported.left["dataset"].startswith("ingest the files")
    assert imported.left["template"] == "the tokenizer's own chat template is used"
    assert imported.left["plot_loss"] == "no counterpart"
    assert Config.build(dict(imported.settings)).alpha == 32


def test_short_form() -> None:
    imported = read_config(FILES / "short_form.yaml")
    assert imported.settings == {
        "model_name_or_path": "Qwen/Qwen2.5-1.5B-Instruct",
        "protect": ["replay"],
        "lora_rank": 8,
        "lora_target": "q_proj,v_proj",
        "cutoff_len": 512,
        "per_device_train_batch_size": 4,
        "learning_rate": 2e-4,
        "num_train_epochs": 2,
    }
    assert imported.left == {
        "data_path": "ingest it: treering ingest data/july.jsonl --task NAME",
        "output_dir": "versions are kept in the workspace's versions/ folder",
        "logging_steps": "no counterpart",
    }
    assert Config.build(dict(imported.settings)).learning_rate == 2e-4


@pytest.mark.parametrize(
    ("values", "left"),
    [
        ({"lora_rank": 8, "finetuning_type": "oft"}, {"finetuning_type": "unknown name"}),
        ({"lora_rank": 8, "save_steps": 0.1}, {"save_steps": "must be a valid integer"}),
        ({"lora_rank": 8, "lora_alpha": None}, {"lora_alpha": "it is empty"}),
        ({"lora_rank": 8, "stage": "ppo"}, {"stage": "must be 'sft' or 'dpo'"}),
        ({"lora_rank": 8, "adapter_name_or_path": None, 3: 4}, {"adapter_name_or_path": "it is empty", "3": "no"}),
        (
            {"batch_size": 8, "incremental_method": "magic"},
            {"incremental_method": "'magic' has no counterpart; known:"},
        ),
        ({"batch_size": 8, "previous_model": None}, {"previous_model": "it is empty"}),
        ({"num_epochs": 2, "epochs": 3, "batch_size": 1}, {"num_epochs": "num_train_epochs is 3 by another key"}),
    ],
)
def test_what_cannot_carry_over_is_named(tmp_path: Path, values: dict[Any, Any], left: dict[str, str]) -> None:
    imported = read_config(written(tmp_path, values))
    assert set(imported.left) == set(left)
    assert all(words in imported.left[key] for key, words in left.items())


KEYS = [*SHORT_FORM, *Config.model_fields, "incremental_method", "data_path", "dataset", "stage", "output_dir", "other"]
VALUES = (
    st.none() | st.booleans() | st.integers(-2, 100) | st.floats(0, 2) | st.sampled_from([*INCREMENTAL_METHODS, "x"])
)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1))
def test_no_key_is_lost(tmp_path_factory: pytest.TempPathFactory, values: dict[str, Any]) -> None:
    try:
        imported = read_config(written(tmp_path_factory.getbasetemp(), values))
    except ConfigError as error:
        named = str(error)
    else:
        assert covered(values, imported)
        for key, value in imported.settings.items():
            Config.build({key: value})
        return
    assert all(key in named for key in values)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A PEFT folder for the tiny model, made by peft alone."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    folder = tmp_path_factory.mktemp("july") / "adapter"
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize("form", ["previous_model", "adapter_name_or_path"])
def test_an_adapter_becomes_v1(
    tmp_path: Path, model_folder: Path, adapter: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model_name" if form == "previous_model" else "model_name_or_path"
    source = written(tmp_path, {name: str(model_folder), form: str(adapter), "lora_rank": 4})
    assert run(["init", str(tmp_path / "ws"), "--from", str(source), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["version"], found["not_carried"]) == ("v1", {})
    here = registry.current(Workspace(tmp_path / "ws"))
    assert here is not None and here.name == "v1" and here.check().manifest["source"] == str(adapter)
    assert (here.folder / "adapter_model.safetensors").read_bytes() == (
        adapter / "adapter_model.safetensors"
    ).read_bytes()


def test_the_adapter_settles_its_rank(
    tmp_path: Path, model_folder: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that says otherwise would make a workspace whose first update fails."""
    source = written(tmp_path, {"model_name_or_path": str(model_folder), "lora_rank": 16, "learning_rate": 1e-4})
    assert run(["init", str(tmp_path / "ws"), "--from", str(source), "--adapter", str(adapter), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["not_carried"] == {"lora_rank": "updates go on with the adapter, which has 4"}
    assert Workspace(tmp_path / "ws").config().lora_rank == 4
    with pytest.raises(ConfigError, match=r"lora_rank is 16, but .* has 4: leave it out"):
        Workspace.create(tmp_path / "other", adapter=adapter, model_name_or_path=str(model_folder), lora_rank=16)
    assert not (tmp_path / "other").exists()


def test_the_adapter_settles_what_it_is(tmp_path: Path, model_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_folder)
    made = LoraConfig(
        r=4, target_modules=["v_proj", "q_proj"], use_dora=True, use_rslora=True, modules_to_save=["norm"]
    )
    get_peft_model(model, made).save_pretrained(str(tmp_path / "adapter"))
    ws = Workspace.create(
        tmp_path / "ws", adapter=tmp_path / "adapter", model_name_or_path=str(model_folder), bf16=False
    )
    config = ws.config()
    assert (config.lora_target, config.additional_target) == ("q_proj,v_proj", "norm")
    assert config.use_dora and config.use_rslora
    ws.ingest(toy_rows("pens", 10), task="pens")
    assert ws.update(max_steps=1) is not None


def test_a_whole_previous_model_becomes_the_base(tmp_path: Path, model_folder: Path) -> None:
    imported = read_config(written(tmp_path, {"model_name": "some/base", "previous_model": str(model_folder)}))
    assert (imported.adapter, imported.settings) == (None, {"model_name_or_path": str(model_folder)})
    assert imported.left == {"model_name": f"model_name_or_path is {model_folder} by another key"}


@pytest.mark.parametrize("key", ["previous_model", "adapter_name_or_path"])
def test_a_missing_folder(tmp_path: Path, key: str) -> None:
    source = written(tmp_path, {"lora_rank": 8, key: "saves/none"})
    with pytest.raises(ConfigError, match=f"{key}: 'saves/none' is no folder here; correct the path or remove"):
        Workspace.create(tmp_path / "ws", **read_config(source).settings)
    assert run(["init", str(tmp_path / "ws"), "--from", str(source)]) == 3
    assert not (tmp_path / "ws").exists()


@pytest.mark.parametrize("text", ["", "- a\n- b\n", "a: [", "colour: red\nsize: 3\n"])
def test_files_that_hold_no_settings(tmp_path: Path, text: str) -> None:
    path = tmp_path / "foreign.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"foreign\.yaml"):
        read_config(path)
