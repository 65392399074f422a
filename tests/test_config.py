"""Settings: every mistake at once, each with the way out; what is said on the command line is what is meant."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from treering.config import Config
from treering.errors import ConfigError
from treering.sections import MemoryConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


def errors(values: dict[str, Any] | None = None, *overrides: str) -> list[str]:
    """The lines of the error, its headline left out."""
    with pytest.raises(ConfigError) as caught:
        Config.build(values or {}, overrides)
    head, *lines = str(caught.value).splitlines()
    assert head == f"settings: {len(lines)} wrong setting(s), nothing was changed:"
    return [line.strip() for line in lines]


def test_all_mistakes_are_told_at_once_with_near_names() -> None:
    found = errors(
        {
            "lora_rnak": 8,
            "protect": ["replya", "distill"],
            "finetuning_type": "lroa",
            "learning_rate": "fast",
            "memory": {"sise": "2%", "size": "half", "policy": "fair"},
            "lr_scheduler_type": "cosin",
        },
        "gate.margn=0.1",
        "num_train_epochs=0",
        "nonsense",
    )
    assert sorted(line.partition(":")[0] for line in found) == [
        "'nonsense' is not key=value",
        "finetuning_type",
        "gate.margn",
        "learning_rate",
        "lora_rnak",
        "lr_scheduler_type",
        "memory.policy",
        "memory.sise",
        "memory.size",
        "num_train_epochs",
        "protect",
    ]
    text = "\n".join(found)
    for near in ("lora_rank", "replay", "lora", "margin", "size"):
        assert f"did you mean {near!r}?" in text
    assert "(got 'fast')" in text
    assert "known: lora, full, freeze" in text


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"lora_rank": 0}, "lora_rank: .*1.*got 0"),
        ({"lora_rank": 8.5}, "lora_rank: .*integer.*got 8.5"),
        ({"lora_rank": None}, "lora_rank: .*integer.*got None"),
        ({"seed": "x"}, "seed: .*integer.*got 'x'"),
        ({"learning_rate": -1}, "learning_rate: .*0.*auto.*got -1"),
        ({"learning_rate": float("inf")}, "learning_rate: .*finite.*got inf"),
        ({"num_train_epochs": float("nan")}, "num_train_epochs: .*finite.*got nan"),
        ({"bf16": "maybe"}, "bf16: .*auto.*got 'maybe'"),
        ({"fp16": 16}, "fp16: .*auto.*got 16"),
        ({"bf16": True, "fp16": True}, r"fp16: bf16 is true as well.*drop either \(got True\)"),
        ({"val_size": 1}, "val_size: .*1.*got 1"),
        ({"protect": None}, r"protect: .*\[replay, distill, recall\].*got None"),
        ({"protect": "replya"}, "protect: unknown name, did you mean 'replay'.*got 'replya'"),
        ({"freeze_trainable_layers": 0}, "freeze_trainable_layers: 0 layers would train nothing"),
        ({"finetuning_type": "full", "use_dora": True}, "use_dora is True, but finetuning_type is full.*drop either"),
        ({"finetuning_type": "freeze", "additional_target": "lm_head"}, "additional_target is lm_head, but .*freeze"),
        (
            {"finetuning_type": "norm", "quantization_bit": 4},
            "quantization_bit is 4, but finetuning_type is norm, and it goes with lora and adapter alone: drop either",
        ),
        (
            {"adapter_placement": "serial"},
            "adapter_placement: must be 'parallel', 'pfeiffer' or 'houlsby'.*got 'serial'",
        ),
        ({"optim": "adamw"}, "optim: unknown name, did you mean 'adamw_.*'.*known: adamw_torch.*got 'adamw'"),
        (
            {"optim": "schedule_free_adamw"},
            "optim is schedule_free_adamw, but lr_scheduler_type is cosine: set lr_scheduler_type: constant",
        ),
        (
            {"early_stopping_steps": 2, "launcher": "ray"},
            "early_stopping_steps is 2, but launcher is ray.*set launcher: local, or drop it",
        ),
        ({"memory": 3}, "memory: .*memory.size.*got 3"),
        ({"gate": {"confidence": 0.5}}, "gate.confidence: .*0.5"),
        ({"gate": {"tasks": {"pens": {"margins": 1}}}}, "gate.tasks.pens.margins: unknown .*did you mean 'margin'"),
        ({"gate": {"tasks": {"pens": {"floor": 2}}}}, r"gate.tasks.pens.floor: .*\(got 2\)"),
        ({"distill": {"top_k": 17}}, "distill.top_k: .*16.*got 17"),
        ({1: 2}, "1: "),
    ],
    ids=str,
)
def test_wrong_values_are_named(values: dict[str, Any], told: str) -> None:
    [line] = errors(values)
    assert re.match(told, line), line


@pytest.mark.parametrize("size", [True, -1, 1.5, "50", "half", "x%", "-2%", "101%", "nan%", None, [1]])
def test_wrong_sizes_of_the_memory(size: Any) -> None:
    [line] = errors({"memory": {"size": size}})
    assert line.startswith("memory.size: ")
    assert line.endswith(f"(got {size!r})")


@pytest.mark.parametrize(
    ("text", "size"),
    [("2%", "2%"), ("0.5%", "0.5%"), ("2.0 %", "2%"), ("100%", "100%"), ("0", 0), ("500", 500), ("auto", "auto")],
)
def test_sizes_of_the_memory(text: str, size: int | str) -> None:
    assert Config.build({}, [f"memory.size={text}"]).memory.size == size
    assert MemoryConfig(size=size).size == size


def test_distillation_needs_replay() -> None:
    for values in ({"protect": ["distill"]}, {"protect": "distill"}):
        [line] = errors(values)
        assert line == "protect: distill works on replayed rows; add replay or drop distill"
    assert Config(protect=()).protect == ()
    assert Config().protect == ("replay", "distill", "recall")
    for override in ("finetuning_type=freeze", "serve.engine=vllm"):
        assert Config.build({"serve": {"vllm_url": "http://127.0.0.1:1"}}, [override]).protect == ("replay", "distill")
    both = {"finetuning_type": "full", "protect": ["recall"]}
    with pytest.raises(ConfigError, match="protect: recall needs the base model"):
        Config.build(both, [], source="x")
    assert Config.build({}, ["protect=replay"]).protect == ("replay",)
    assert Config.build({}, ["protect=[]"]).protect == ()


def test_overrides() -> None:
    values = {"lora_rank": 4, "memory": {"size": "2%", "replay_share": 0.2}}
    config = Config.build(
        values,
        [
            *("lora_rank=16", "memory.size=auto", "learning_rate=1e-3", "eval.max_new_tokens=7", "bf16=false"),
            *("default_system=Be brief: a=b", " seed = 3 ", "lora_alpha=null"),
        ],
    )
    assert (config.lora_rank, config.alpha) == (16, 32)
    assert (config.memory.size, config.memory.replay_share) == ("auto", 0.2)
    assert config.learning_rate == 1e-3
    assert config.eval.max_new_tokens == 7
    assert config.bf16 is False
    assert config.default_system == "Be brief: a=b"
    assert config.seed == 3


@pytest.mark.parametrize("text", ["1e-3", "0.001", "1E-3", ".001", "1.0e-03"])
def test_rates_as_people_write_them(tmp_path: Path, text: str) -> None:
    assert Config.build({}, [f"learning_rate={text}"]).learning_rate == 1e-3
    (tmp_path / "treering.yaml").write_text(f"learning_rate: {text}\n")
    assert Config.load(tmp_path / "treering.yaml").learning_rate == 1e-3


def test_the_last_override_wins_and_the_file_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "treering.yaml"
    path.write_text("memory:\n  size: 10\nlora_rank: 4\n")
    config = Config.load(path, ["lora_rank=5", "lora_rank=6", "memory.replay_share=0.1"])
    assert (config.lora_rank, config.memory.size, config.memory.replay_share) == (6, 10, 0.1)
    assert Config.load(path).lora_rank == 4


@pytest.mark.parametrize(
    "override", ["lora_rank", "=3", "", "=", "lora_rank=", "lora_rank.x=3", "memory=3", "nothing=1"]
)
def test_wrong_overrides(override: str) -> None:
    assert len(errors({}, override)) == 1


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "treering.yaml").write_text("# nothing\n")
    assert Config.load(tmp_path / "treering.yaml") == Config()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"- a\n", "holds a list"),
        (b"a: [", "cannot be read as YAML"),
        (b"\xff\xfe", "cannot be read"),
        (None, "not exist"),
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "treering.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=told) as caught:
        Config.load(path)
    assert str(path) in str(caught.value)


def test_settings_do_not_change_and_survive_json() -> None:
    config = Config.build({}, ["memory.size=3%", "protect=[replay]", "learning_rate=2e-4"])
    with pytest.raises(ValidationError):
        config.lora_rank = 3  # type: ignore[misc]
    plain = config.model_dump(mode="json")
    assert Config.build(plain) == config
    assert Config.build(plain).model_dump(mode="json") == plain


def test_every_setting_is_described() -> None:
    def check(model: Any, prefix: str = "") -> None:
        for name, field in model.model_fields.items():
            if hasattr(field.annotation, "model_fields"):
                check(field.annotation, f"{name}.")
            else:
                assert field.description, f"{prefix}{name} has no docstring"

    check(Config)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_file_loads(path: Path) -> None:
    assert isinstance(Config.load(path), Config)


@pytest.mark.parametrize("name", ["ewc", "si"])
@pytest.mark.parametrize("composition", ["stack", "experts"])
def test_what_is_known_of_weights_needs_the_same_weights(name: str, composition: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} keeps something of each weight .* {composition}"):
        Config.build({"adapter_composition": composition, "protect": [name]})
