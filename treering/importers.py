"""Settings from other tools' files: a LLaMA-Factory training file, or the short form of incremental-tuning guides."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treering.config import Config
from treering.errors import ConfigError
from treering.settings import read_yaml

SHORT_FORM = {
    "model_name": "model_name_or_path",
    "lora_rank": "lora_rank",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "learning_rate": "learning_rate",
    "num_epochs": "num_train_epochs",
    "epochs": "num_train_epochs",
    "max_length": "cutoff_len",
    "batch_size": "per_device_train_batch_size",
    "seed": "seed",
}
_SHORT_ONLY = {"model_name", "incremental_method", "data_path", "previous_model", "max_length", "batch_size"}

INCREMENTAL_METHODS: dict[str, dict[str, Any]] = {
    "lora": {"finetuning_type": "lora"},
    "full": {"finetuning_type": "full"},
    "full_finetuning": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze"},
    "partial_freezing": {"finetuning_type": "freeze"},
    "replay": {"protect": ["replay"]},
    "experience_replay": {"protect": ["replay"]},
    "distillation": {"protect": ["replay", "distill"]},
    "knowledge_distillation": {"protect": ["replay", "distill"]},
}

_ELSEWHERE = {
    "adapter_name_or_path": "it is empty",
    "dataset": "ingest the files: treering ingest DATASET_DIR/dataset_info.json --dataset {value}",
    "dataset_dir": "ingest the files: treering ingest {value}/dataset_info.json --dataset NAME",
    "data_path": "ingest it: treering ingest {value} --task NAME",
    "do_train": "treering update",
    "neat_packing": "rows of like length are batched, which leaves little padding",
    "output_dir": "versions are kept in the workspace's versions/ folder",
    "packing": "rows of like length are batched, which leaves little padding",
    "previous_model": "it is empty",
    "template": "the tokenizer's own chat template is used",
}


@dataclass(frozen=True)
class Imported:
    """What carried over: `settings`, an `adapter` to start from, and in `left` what has no counterpart, with why."""

    settings: dict[str, Any] = field(default_factory=dict)
    adapter: Path | None = None
    left: dict[str, str] = field(default_factory=dict)


def read_config(path: Path) -> Imported:
    """Read a foreign YAML or JSON file. Raises `ConfigError` if it cannot be read or holds nothing known."""
    values = read_yaml(path)
    imported = _short_form(values) if _SHORT_ONLY & set(values) else _llama_factory(values)
    if not imported.settings and imported.adapter is None:
        raise ConfigError(f"{path}: no setting in it is known; its keys are {', '.join(map(str, values)) or 'none'}")
    return imported


def _llama_factory(values: dict[str, Any]) -> Imported:
    imported = Imported(adapter=_folder(values.get("adapter_name_or_path"), "adapter_name_or_path"))
    for key, value in values.items():
        if key == "adapter_name_or_path" and imported.adapter is not None:
            continue
        if key in Config.model_fields:
            _carry(imported, key, key, value)
        else:
            imported.left[str(key)] = _why(str(key), value)
    return imported


def _short_form(values: dict[str, Any]) -> Imported:
    previous = _folder(values.get("previous_model"), "previous_model")
    is_adapter = previous is not None and (previous / "adapter_config.json").exists()
    imported = Imported(adapter=previous if is_adapter else None)
    if previous is not None and not is_adapter:
        # A whole model goes on as the base.
        imported.settings["model_name_or_path"] = str(previous)
    for key, value in values.items():
        if key == "previous_model" and previous is not None:
            continue
        if key in SHORT_FORM or key in Config.model_fields:
            _carry(imported, key, SHORT_FORM.get(key, key), value)
        elif key == "incremental_method" and str(value).lower() in INCREMENTAL_METHODS:
            for setting, meaning in INCREMENTAL_METHODS[str(value).lower()].items():
                _carry(imported, key, setting, meaning)
        elif key == "incremental_method":
            known = ", ".join(INCREMENTAL_METHODS)
            imported.left[key] = f"method {value!r} has no counterpart; known: {known}"
        else:
            imported.left[str(key)] = _why(str(key), value)
    return imported


def _carry(imported: Imported, name: str, key: str, value: Any) -> None:
    """Take the value over if treering accepts it there and no other key gave one; otherwise say why not."""
    if value is None:
        imported.left[name] = "it is empty"
        return
    if imported.settings.get(key, value) != value:
        imported.left[name] = f"{key} is {imported.settings[key]} by another key"
        return
    try:
        Config.build({key: value})
    except ConfigError as error:
        imported.left[name] = str(error).splitlines()[-1].strip()
    else:
        imported.settings[key] = value


def _folder(value: Any, key: str) -> Path | None:
    if value is None:
        return None
    if not Path(str(value)).is_dir():
        raise ConfigError(f"{key}: {value!r} is no folder here; correct the path or remove the key")
    return Path(str(value))


def _why(key: str, value: Any) -> str:
    return _ELSEWHERE.get(key, "no counterpart").format(value=value)
