"""`treering.yaml` as typed settings, checked when built, every error at once.

Keys that LLaMA-Factory also has carry its names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from treering.data.rules import ALL, LEVELS
from treering.errors import ConfigError, near
from treering.methods import FINETUNING_TYPES, PROTECT
from treering.optimizers import OPTIMIZERS
from treering.own import is_own
from treering.sections import (
    AutomateConfig,
    DedupConfig,
    DistillConfig,
    EmaConfig,
    EvalConfig,
    EwcConfig,
    GateConfig,
    InterpolateConfig,
    L2Config,
    LwfConfig,
    MemoryConfig,
    MergeConfig,
    OloraConfig,
    OsfConfig,
    RecallConfig,
    ReptileConfig,
    Section,
    ServeConfig,
    SiConfig,
    is_section,
)
from treering.settings import parse, read_yaml

LAUNCHERS = ("local", "accelerate", "ray")
"""What `launcher` may name."""

TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
"""What `report_to` may name."""


_OF_EXPERTS = {"finetuning_type": "lora", "launcher": "local", "additional_target": None, "use_dora": False}
"""What settings have to be for experts: plain adapters, taught here."""


class Config(Section):
    """All settings of a workspace."""

    model_name_or_path: str | None = None
    """Base model: a folder, a hub name, or nothing for SmolLM2-135M-Instruct."""

    trust_remote_code: bool = False
    """Run code that comes with a hub model."""

    stage: Literal["sft", "dpo"] = "sft"
    """How preference pairs are learned: their chosen answers like any others (`sft`), or against the rejected ones
    (`dpo`, the sigmoid loss of TRL and LLaMA-Factory). Rows that are no pairs are learned as ever. Rejected answers are
    kept of rows that are taken in under `dpo`."""

    pref_beta: float = Field(0.1, gt=0)
    """With `stage: dpo`: how strongly the model is held to what it was before the update."""

    finetuning_type: str = "lora"
    """What learns: lora, adapter (bottlenecks), norm (norms and biases), freeze (a few layers), full, or osf (full, in
    the directions that weights use least)."""

    protect: tuple[str, ...] = ("replay", "distill", "recall")
    """What protects old knowledge; any subset, freely combined. `recall` is no default where it cannot be: with another
    `finetuning_type` than `lora`, and with `serve.engine: vllm`."""

    lora_rank: int = Field(8, ge=1)
    """Rank of the LoRA matrices."""

    lora_alpha: int | None = Field(None, ge=1)
    """LoRA scale numerator; twice the rank by default."""

    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before the LoRA matrices."""

    lora_target: str = "all"
    """Modules that get adapters: `all` linear layers, or names separated by commas."""

    adapter_composition: Literal["continue", "stack", "experts"] = "continue"
    """How updates build on each other, with `lora`: `continue` trains on the parent's adapter; `stack` freezes it and
    trains `lora_rank` new columns beside it, in one plain adapter whose rank grows; with `experts` tasks that are
    unlike what is known get an adapter of their own, and a router says which of them answers a prompt."""

    use_dora: bool = False
    """Learn the length of each layer's weights apart from their direction (DoRA): nearer to full, and slower."""

    use_rslora: bool = False
    """Scale by `lora_alpha` over the square root of the rank instead of over the rank (rsLoRA), for large ranks."""

    additional_target: str | None = None
    """Modules that learn whole and are kept with the adapter, such as `lm_head`; names separated by commas."""

    quantization_bit: Literal[4, 8] | None = None
    """Keep the base model in 4 bits (QLoRA: NF4, double quantisation) or 8 while an adapter learns on it
    (`pip install 'treering[quantization]'`); the version is judged and served on the same."""

    adapter_size: int = Field(64, ge=1)
    """With `adapter`: width of the bottleneck."""

    adapter_placement: Literal["parallel", "pfeiffer", "houlsby"] = "parallel"
    """With `adapter`: beside the feed-forward of each layer (`parallel`), behind it (`pfeiffer`), or behind attention
    as well as behind it (`houlsby`)."""

    freeze_trainable_layers: int = 2
    """With `freeze`: how many layers train, counted from the last (positive) or the first (negative)."""

    freeze_trainable_modules: str = "all"
    """With `freeze`: what of those layers trains: `all`, or names of their parts separated by commas, such as `mlp`."""

    freeze_by: Literal["position", "importance"] = "position"
    """With `freeze`: which layers train: by `position` as counted, or as many of the least `importance` to what was
    learned before (diagonal Fisher information, kept from update to update; the first update goes by position)."""

    default_system: str | None = None
    """System turn given to rows that have none; nothing is added by default."""

    train_on_prompt: bool = False
    """Learn all tokens of a row and not its answers alone, so that the model can write such prompts itself
    (`memory.generate`). Scores, the range test and what methods hold stay with the answers."""

    cutoff_len: int = Field(2048, ge=8)
    """Longest row in tokens; longer ones are quarantined."""

    val_size: float = Field(0.1, ge=0, lt=1)
    """Share of a task's rows held out for judging, unless the user gives a held-out file."""

    optim: str = "adamw_torch"
    """What takes the steps: adamw_torch, adamw_8bit (less memory; `pip install 'treering[quantization]'`), muon, or
    schedule_free_adamw (needs no falling rate; `pip install 'treering[schedulefree]'`)."""

    learning_rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Peak rate; `auto`: what a range test on the update's own rows and its memory finds best, or the default of the
    `finetuning_type` (lora 1.5e-3, or 0.864 over the hidden size where that is more than 576; adapter 1e-3, norm 5e-3,
    freeze 2e-4, full and osf 5e-5) where the update is too short to repay one."""

    num_train_epochs: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    """Passes over the new rows; `auto`: 3, and with few rows as many as make 100 optimiser steps, 20 at most."""

    max_steps: int = Field(-1, ge=-1)
    """Optimiser steps; overrides `num_train_epochs` when positive."""

    per_device_train_batch_size: int = Field(8, ge=1)
    """Rows in one forward pass, in each of the `processes`."""

    gradient_accumulation_steps: int = Field(1, ge=1)
    """Forward passes per optimiser step."""

    neftune_noise_alpha: float | None = Field(None, gt=0)
    """Noise on the embeddings while training (NEFTune), such as 5: answers to open questions get fuller."""

    gradient_checkpointing: bool = False
    """Compute each layer again in the backward pass instead of keeping what it made: less memory, more time."""

    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    """Share of the steps in which the rate rises from zero."""

    lr_scheduler_type: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""

    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of the optimiser."""

    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""

    save_steps: int = Field(50, ge=1)
    """Steps between checkpoints of a running update; to one of these it goes back when the loss runs away."""

    save_minutes: float = Field(10.0, gt=0)
    """Minutes after which there is a checkpoint in any case."""

    max_loss_retries: int = Field(3, ge=0)
    """Times that an update goes back to a checkpoint, with half the rate, when the loss is not finite or runs away."""

    early_stopping_steps: int | None = Field(None, ge=1)
    """Training ends after so many evaluations in a row with no lower loss, and the weights of the lowest are taken. The
    loss is that of a tenth of the new rows, kept aside for it; the held-out rows judge and have no part in it."""

    eval_steps: int = Field(10, ge=1)
    """Optimiser steps between these evaluations."""

    bf16: bool | Literal["auto"] = "auto"
    """Compute in bfloat16; `auto`: where the machine has it in hardware."""

    fp16: bool | Literal["auto"] = "auto"
    """Compute in float16, with the loss scaled; `auto`: on a GPU that lacks bfloat16, where `bf16` is `auto` as well.
    Where neither is used, it is float32."""

    report_to: tuple[str, ...] = ()
    """Trackers that are sent the training log and the scores; any subset, or `none`."""

    seed: int = Field(42, ge=0)
    """Seed of everything random."""

    launcher: str = "local"
    """What starts the processes that train: local (the update's own process), accelerate (several on this machine) or
    ray (workers of a Ray cluster; `pip install 'treering[ray]'`). `docs/processes.md` has more."""

    processes: int = Field(1, ge=1)
    """How many processes train together, each on its share of every step; on GPUs as many as there are."""

    accelerate_config: str | None = None
    """With `launcher: accelerate`: the file that `accelerate config` wrote, seen from the workspace; its
    `num_processes` counts for nothing."""

    checks: dict[str, str] = Field(default_factory=dict)
    """Levels of rules that rows are checked by, where they are not the usual ones: `reject` (into quarantine), `repair`
    (where a rule can), `warn`, `off`; `docs/data.md` has all rules. One of your own is named by its file, which lies in
    the workspace, and its function: `rules.py:no_prices: reject`."""

    languages: tuple[str, ...] = ()
    """Languages that rows may be in, as ISO 639-1 codes (`[en, zh]`), for the rule `language`."""

    labels: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """The labels that a task may have, by task, for the rule `unknown-label`; a task that is not named may have any."""

    keep_versions: int | None = Field(None, ge=1)
    """After each update leave only the records of older versions (`treering prune`), all but so many; nothing keeps all
    of them whole. Set it where updates run by themselves, so that they never fill the disk."""

    dedup: DedupConfig = DedupConfig()
    memory: MemoryConfig = MemoryConfig()
    distill: DistillConfig = DistillConfig()
    recall: RecallConfig = RecallConfig()
    lwf: LwfConfig = LwfConfig()
    olora: OloraConfig = OloraConfig()
    osf: OsfConfig = OsfConfig()
    ema: EmaConfig = EmaConfig()
    reptile: ReptileConfig = ReptileConfig()
    interpolate: InterpolateConfig = InterpolateConfig()
    ewc: EwcConfig = EwcConfig()
    l2: L2Config = L2Config()
    si: SiConfig = SiConfig()
    merge: MergeConfig = MergeConfig()
    gate: GateConfig = GateConfig()
    eval: EvalConfig = EvalConfig()
    serve: ServeConfig = ServeConfig()
    automate: AutomateConfig = AutomateConfig()

    @model_validator(mode="before")
    @classmethod
    def _no_recall_by_default(cls, values: Any) -> Any:
        """Leave `recall` out of the default where it cannot be."""
        if not isinstance(values, Mapping) or "protect" in values:
            return values
        serve = values.get("serve")
        vllm = isinstance(serve, Mapping) and serve.get("engine") == "vllm"
        if values.get("finetuning_type", "lora") == "lora" and not vllm:
            return values
        return {**values, "protect": ("replay", "distill")}

    @field_validator("fp16")
    @classmethod
    def _one_precision(cls, value: bool | str, info: ValidationInfo) -> bool | str:
        if value is True and info.data.get("bf16") is True:
            raise ValueError("bf16 is true as well, and products are in one of them: drop either")
        return value

    @field_validator("checks")
    @classmethod
    def _known_checks(cls, value: dict[str, str]) -> dict[str, str]:
        problems = []
        for name, level in value.items():
            if not is_own(name) and name not in ALL:
                problems.append(f"{name} is no rule{near(name, ALL)}; known: {', '.join(ALL)}, or FILE.py:FUNCTION")
            elif level not in (levels := LEVELS if is_own(name) else ALL[name].levels):
                problems.append(f"{name} is {level}; it may be {', '.join(levels)}")
        if problems:
            raise ValueError("; ".join(problems))
        return value

    @field_validator("report_to", mode="before")
    @classmethod
    def _known_trackers(cls, value: object) -> object:
        return () if value in ("none", ["none"]) else _all_known(value, TRACKERS, "[tensorboard, mlflow], or none")

    @field_validator("finetuning_type")
    @classmethod
    def _known_type(cls, value: str) -> str:
        return _known(value, FINETUNING_TYPES)

    @field_validator("launcher")
    @classmethod
    def _known_launcher(cls, value: str) -> str:
        return _known(value, LAUNCHERS)

    @field_validator("optim")
    @classmethod
    def _known_optim(cls, value: str) -> str:
        return _known(value, OPTIMIZERS)

    @field_validator("protect", mode="before")
    @classmethod
    def _known_protect(cls, value: object) -> object:
        return _all_known(value, PROTECT, "[replay, distill, recall], or [] for no protection")

    @field_validator("freeze_trainable_layers")
    @classmethod
    def _some_layer(cls, value: int) -> int:
        if value == 0:
            raise ValueError("0 layers would train nothing; take a positive or negative number")
        return value

    @field_validator("lora_target")
    @classmethod
    def _some_target(cls, value: str) -> str:
        if not names(value):
            raise ValueError("no name would train nothing; write all, or layers such as q_proj,v_proj")
        return value

    @field_validator("freeze_trainable_modules")
    @classmethod
    def _some_part(cls, value: str) -> str:
        if not names(value):
            raise ValueError("no name would train nothing; write all, or parts of a layer such as mlp")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Config:
        self._distill_fits()
        self._replay_fits()
        if self.finetuning_type != "lora" and self.adapter_composition != "continue":
            raise ValueError(
                f"adapter_composition is {self.adapter_composition}, but finetuning_type is {self.finetuning_type}, "
                "and only lora has adapters: drop either"
            )
        self._averages_fit()
        self._merge_fits()
        for key in ("use_dora", "use_rslora", "additional_target", "quantization_bit"):
            kinds = ("lora", "adapter") if key == "quantization_bit" else ("lora",)
            if (value := getattr(self, key)) and self.finetuning_type not in kinds:
                raise ValueError(
                    f"{key} is {value}, but finetuning_type is {self.finetuning_type}, and it goes with "
                    f"{' and '.join(kinds)} alone: drop either"
                )
        if "recall" in self.protect and self.finetuning_type != "lora":
            raise ValueError(
                f"protect: recall needs the base model beside what is learned, but finetuning_type is "
                f"{self.finetuning_type}, and only what lora adds can be left out of a pass: drop either"
            )
        if self.serve.engine == "vllm":
            for key, value in (("protect", "recall"), ("adapter_composition", "experts")):
                if value in getattr(self, key):
                    raise ValueError(
                        f"serve.engine is vllm, but {key} has {value}, in which vLLM has no part: set serve.engine: "
                        f"builtin, or drop {value}"
                    )
        if self.adapter_composition == "experts":
            for key, needed in _OF_EXPERTS.items():
                if (value := getattr(self, key)) != needed:
                    raise ValueError(
                        f"adapter_composition is experts, but {key} is {value}: "
                        f"set {key}: {yaml.safe_dump(needed).split()[0]}, or adapter_composition: continue"
                    )
            if self.memory.policy in ("hard", "forgotten"):
                raise ValueError(
                    f"memory.policy is {self.memory.policy}, which asks one model about all rows, but "
                    "adapter_composition is experts: set memory.policy: balanced, or adapter_composition: continue"
                )
        if self.adapter_composition == "stack":
            for key in ("use_dora", "additional_target"):
                if value := getattr(self, key):
                    raise ValueError(
                        f"{key} is {value}, but adapter_composition is stack, which joins plain low-rank matrices "
                        "alone: drop either"
                    )
        if self.adapter_composition != "continue":
            for name in ("ewc", "si", "merge"):
                if name in self.protect:
                    raise ValueError(
                        f"protect: {name} keeps something of each weight that learns for the next update, but "
                        f"adapter_composition is {self.adapter_composition}, and others learn then: drop either"
                    )
        if "olora" in self.protect and self.adapter_composition != "stack":
            raise ValueError(
                "protect: olora keeps what is stacked apart from what was there; set adapter_composition: stack "
                "(finetuning_type: lora), or drop olora"
            )
        if self.optim == "schedule_free_adamw" and self.lr_scheduler_type != "constant":
            raise ValueError(
                f"optim is schedule_free_adamw, but lr_scheduler_type is {self.lr_scheduler_type}: "
                "set lr_scheduler_type: constant, or take another optim"
            )
        if self.processes > 1 and self.launcher == "local":
            raise ValueError(
                f"processes is {self.processes}, but launcher is local, which has one: set launcher: accelerate (this "
                "machine) or launcher: ray (a cluster), or drop processes"
            )
        if self.accelerate_config and self.launcher != "accelerate":
            raise ValueError(
                f"accelerate_config is {self.accelerate_config}, but launcher is {self.launcher}: set launcher: "
                "accelerate, or drop it"
            )
        if self.early_stopping_steps is not None and self.launcher != "local":
            raise ValueError(
                f"early_stopping_steps is {self.early_stopping_steps}, but launcher is {self.launcher}, and only one "
                "process looks when to stop: set launcher: local, or drop it"
            )
        if self.use_dora and self.quantization_bit == 8:
            raise ValueError(
                "use_dora is true and quantization_bit is 8, which peft and bitsandbytes do not compute: "
                "set quantization_bit: 4, or drop either"
            )
        return self

    def _replay_fits(self) -> None:
        """Raise `ValueError` where something is said of replayed rows, and none could be there."""
        usual = {"mix": ("uniform",), "generate": (0, "0%"), "answers": ("stored",)}
        for key, without in usual.items():
            value = getattr(self.memory, key)
            if value not in without and "replay" not in self.protect:
                raise ValueError(
                    f"memory.{key} is {value}, but protect does not list replay, and nothing else draws rows: add "
                    f"replay, or drop memory.{key}"
                )
        if self.memory.answers == "own" and self.memory.size in (0, "0%"):
            raise ValueError(
                f"memory.answers is own, but memory.size is {self.memory.size}, and no prompt is remembered: set "
                "memory.size: auto, or memory.generate for prompts that the parent writes itself"
            )

    def _distill_fits(self) -> None:
        """Raise `ValueError` where there would be no rows, or no teacher for them."""
        if "distill" not in self.protect:
            return
        rows, teacher = self.distill.rows, self.distill.teacher
        if "replay" not in self.protect and rows != "new":
            also = " (or set distill.teacher: parent and distill.rows: new)" if teacher == "parent" else ""
            raise ValueError(f"protect: distill works on replayed rows; add replay or drop distill{also}")
        if teacher == "stored" and rows != "replayed":
            raise ValueError(
                f"distill.rows is {rows}, but distill.teacher is stored, and of new rows nothing is stored yet: set "
                "distill.teacher: parent, or distill.rows: replayed with lwf in protect for the new ones"
            )

    def _averages_fit(self) -> None:
        """Raise `ValueError` where one would change weights after they were measured, or undo what another did."""
        if {"ema", "reptile"} <= {*self.protect}:
            raise ValueError("protect has ema and reptile, and the average would undo what reptile did: drop either")
        for name in {"ema", "reptile"} & {*self.protect}:
            if self.early_stopping_steps is not None:
                raise ValueError(
                    f"early_stopping_steps is {self.early_stopping_steps}, but protect has {name}, which makes other "
                    "weights of those that were measured: drop either"
                )
            if self.optim == "schedule_free_adamw":
                raise ValueError(
                    f"optim is schedule_free_adamw, which averages by itself, but protect has {name}: drop either"
                )
            if "interpolate" in self.protect[: self.protect.index(name)]:
                raise ValueError(
                    f"protect has interpolate before {name}, which would change the weights once more: list it last"
                )
        if "interpolate" in self.protect and self.interpolate.share == "auto" and self.memory.size in (0, "0%"):
            raise ValueError(
                f"interpolate.share is auto, but memory.size is {self.memory.size}, and no remembered row could tell "
                "what is forgotten: set a number, or memory.size: auto"
            )

    def _merge_fits(self) -> None:
        """Raise `ValueError` where others would undo what `merge` did, do it again, or count it as learned."""
        if "merge" not in self.protect:
            return
        if "interpolate" in self.protect:
            raise ValueError(
                "protect has merge and interpolate, and both take the weights back towards the parent's: drop either "
                "(merge.method: linear with a number as merge.weight is interpolate with that share)"
            )
        for name in ("ema", "reptile", "si"):
            if name in self.protect[self.protect.index("merge") :]:
                raise ValueError(f"protect has merge before {name}, which needs the weights as trained: list it last")
        if self.finetuning_type == "osf" and self.merge.method != "linear":
            raise ValueError(
                f"merge.method is {self.merge.method}, which drops single numbers, but finetuning_type is osf, which "
                "would put parts of them back: set merge.method: linear, or drop either"
            )

    @property
    def alpha(self) -> int:
        """LoRA scale numerator with its default filled in."""
        return 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha

    @property
    def additional_targets(self) -> list[str]:
        """The names in `additional_target`."""
        return names(self.additional_target or "")

    @property
    def batch_size(self) -> int:
        """Rows that are computed at once, in all processes together."""
        return self.per_device_train_batch_size * self.processes

    def of_versions(self) -> dict[str, Any]:
        """The settings that versions depend on: not when updates run, who is told of them, how versions serve.

        Nor those that say how an update gets to its end, not to which: changed, they let it be resumed. Nor what starts
        processes; on that the bits depend as on the machine (`Plan.machine`). Nor those that say which rows are taken
        in: plans name the rows.
        """
        apart = {"automate", "report_to", "serve", "save_minutes", "max_loss_retries", "launcher", "accelerate_config"}
        return self.model_dump(mode="json", exclude=apart | {"checks", "languages", "labels", "dedup", "keep_versions"})

    @classmethod
    def load(cls, path: Path, overrides: Iterable[str] = ()) -> Config:
        """Read `path`, lay `key=value` overrides over it, check everything. Raises `ConfigError`."""
        return cls.build({**read_yaml(path)}, overrides, source=path.name)

    @classmethod
    def build(cls, values: dict[str, Any], overrides: Iterable[str] = (), source: str = "settings") -> Config:
        """Check a plain dictionary of settings. Raises `ConfigError` that names every wrong one."""
        problems = []
        for override in overrides:
            key, equals, text = override.partition("=")
            if not equals or not key:
                problems.append(f"{override!r} is not key=value")
                continue
            _set(values, key.strip(), parse(text))
        try:
            config = cls.model_validate(values)
        except ValidationError as error:
            problems += _explain(error.errors())
        if problems:
            raise ConfigError(
                f"{source}: {len(problems)} wrong setting(s), nothing was changed:\n  " + "\n  ".join(problems)
            )
        return config


def names(text: str) -> list[str]:
    """What `text` lists between commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def _known(value: object, known: Iterable[str]) -> str:
    if isinstance(value, str) and value in known:
        return value
    raise ValueError(f"unknown name{near(str(value), known)}; known: {', '.join(known)}")


def _all_known(value: object, known: Iterable[str], example: str) -> tuple[str, ...]:
    """A name, or a list of them, as a tuple."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple):
        raise ValueError(f"write a list, such as {example}")
    return tuple(_known(name, known) for name in names)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = dict(inner) if isinstance(inner, Mapping) else {}
        values = values[section]
    values[last] = value


_SECRET = ("automate", "automate.webhook", "automate.on_event")
"""Settings whose values may hold a key: an error does not repeat them, for it goes to logs and hooks."""


def _explain(errors: Iterable[Any]) -> list[str]:
    """One line a setting: what each kind of value that it may have found wrong."""
    wrong: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for error in errors:
        where, group = _place(error["loc"])
        message = error["msg"].removeprefix("Value error, ").replace("Input should be ", "must be ")
        if error["type"] == "extra_forbidden":
            message = f"unknown setting{near(where.rpartition('.')[2], group.model_fields)}"
        elif error["type"] == "model_type":
            message = f"is a group; set one of {', '.join(f'{where}.{name}' for name in group.model_fields)}"
        elif error["type"] == "string_type":
            message = "must be a text: put it in quotes"
        elif error["type"].endswith("_parsing"):
            message = message.partition(",")[0]
        if error["loc"] and error["type"] != "extra_forbidden" and where not in _SECRET:
            got[where] = f" (got {error['input']!r})"
        wrong[where] = [*wrong[where], message.removeprefix("must be ")] if where in wrong else [message]
    return [
        f"{where}{': ' if where else ''}{' or '.join(dict.fromkeys(wrong[where]))}{got.get(where, '')}"
        for where in wrong
    ]


def _place(loc: tuple[Any, ...]) -> tuple[str, type[Section]]:
    """The setting's name without what pydantic adds for the kinds of value it tried, and the group it is (in)."""
    group: type[Section] = Config
    names: list[str] = []
    parts = iter(loc)
    for part in parts:
        names.append(str(part))
        field = group.model_fields.get(str(part))
        kind = field.annotation if field else None
        of_name = get_args(kind)[1] if get_origin(kind) is dict else None
        if is_section(of_name):  # Groups by a name that the user gives.
            names += [str(name) for name in islice(parts, 1)]
            kind = of_name
        if not is_section(kind):
            break
        group = kind
    return ".".join(names), group
