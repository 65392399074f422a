"""The one training loop.

What is trained on, and in which order, is decided before the first step (`plan_steps`), so an interrupted run goes on
exactly where it was.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import cross_entropy

from treering import shares
from treering.batches import Batch, as_step, make_batch
from treering.errors import TreeringError
from treering.files import fsync_folder, fsync_tree, write_file, write_json
from treering.memory import Memory, Teacher
from treering.methods import Methods
from treering.model import Tokens, compute, logits_at, use_bf16
from treering.progress import bar
from treering.stop import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.config import Config

LEARNING_RATES = {"lora": 1e-3, "freeze": 2e-4, "full": 5e-5}
"""Peak rates that `learning_rate: auto` takes."""

PASSES, MOST_PASSES, ENOUGH_STEPS = 3, 20, 50
"""What `num_train_epochs: auto` takes: that many passes, or more until the new rows alone make enough steps."""

BATCHES_SORTED_TOGETHER = 8
"""Rows of so many batches are sorted by length together: little padding, and still a random mix of rows."""


def peak_rate(config: Config) -> float:
    """The peak learning rate: as set, or the default of the `finetuning_type`."""
    return LEARNING_RATES[config.finetuning_type] if config.learning_rate == "auto" else config.learning_rate


def passes(config: Config, new: int) -> float:
    """Passes over `new` rows: as set, or by their number."""
    if config.num_train_epochs != "auto":
        return config.num_train_epochs
    steps = math.ceil(new / (config.per_device_train_batch_size * config.gradient_accumulation_steps))
    return min(max(PASSES, math.ceil(ENOUGH_STEPS / max(1, steps))), MOST_PASSES)


Step = list[list[str]]
"""The row ids of one optimiser step, micro-batch by micro-batch."""


def plan_steps(
    new: Sequence[str], memory: Memory, methods: Methods, lengths: Mapping[str, int], config: Config
) -> list[Step]:
    """All steps of an update: each epoch's new and replayed rows, shuffled, in batches of like length.

    `lengths` gives the tokens of each row id, new and remembered.
    """
    size, accumulate = config.per_device_train_batch_size, config.gradient_accumulation_steps
    steps: list[Step] = []
    wanted = passes(config, len(new))
    epochs = math.ceil(wanted)
    epoch = 0
    while True:
        rng = random.Random(f"{config.seed}:{epoch}")
        rows = [*new, *methods.replay(new, memory, epoch)]
        if epoch == epochs - 1 and config.max_steps <= 0:
            rng.shuffle(rows)
            rows = rows[: math.ceil(len(rows) * (wanted - epoch))]
        batches = _length_batches(rows, lengths, size, rng)
        steps += [batches[start : start + accumulate] for start in range(0, len(batches), accumulate)]
        epoch += 1
        if config.max_steps > 0:
            if len(steps) >= config.max_steps:
                return steps[: config.max_steps]
        elif epoch == epochs:
            return steps


def _length_batches(rows: list[str], lengths: Mapping[str, int], size: int, rng: random.Random) -> list[list[str]]:
    rng.shuffle(rows)
    window = size * BATCHES_SORTED_TOGETHER
    batches = []
    for start in range(0, len(rows), window):
        near = sorted(rows[start : start + window], key=lambda row: (lengths[row], row))
        batches += [near[at : at + size] for at in range(0, len(near), size)]
    rng.shuffle(batches)
    return batches


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Numbers near zero become zero, which is many times faster; the caller's process goes on as it was."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@_denormals_flushed()
def train(
    model: PreTrainedModel,
    rows: Mapping[str, Tokens],
    steps: Sequence[Step],
    methods: Methods,
    config: Config,
    *,
    pad_id: int,
    teachers: Mapping[str, Teacher] | None = None,
    parents: Mapping[str, Teacher] | None = None,
    checkpoints: Path | None = None,
    stop: Stop | None = None,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Train the weights that require gradients, in place, over `steps`; returns one log entry a step.

    Loss: cross entropy averaged over the answer tokens of the optimiser step, plus what the methods add.
    With `checkpoints` (a folder) the state is saved every `save_steps` and an earlier run there is resumed to the
    same bits. Raises `UpdateInterruptedError` (after a checkpoint) when `stop` was asked, `TreeringError` on a loss
    that is not finite.
    """
    torch.manual_seed(config.seed)
    model.train()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        list(parameters.values()), lr=peak_rate(config), weight_decay=config.weight_decay, fused=True
    )
    share = rate_schedule(config, len(steps))
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    bf16 = use_bf16(config)[0]
    log: list[dict[str, float]] = []
    done = 0
    if checkpoints is not None:
        done, log = _resume(checkpoints, parameters, optimizer)
    parts = shares.count(config, accelerator.device)
    with bar("training", len(steps), quiet) as advance, shares.side_by_side(parts) as compute_all:
        advance(done)
        for number in range(done, len(steps)):
            started = time.perf_counter()
            batches = as_step(
                [
                    make_batch([rows[id] for id in ids], pad_id, accelerator.device, teachers=teachers, parents=parents)
                    for batch in steps[number]
                    for ids in shares.dealt(batch, parts)
                ]
            )
            learn = partial(_gradients, model, list(parameters.values()), methods, bf16)
            losses: Counter[str] = Counter()
            for found, gradients in compute_all(learn, batches):
                losses.update(found)
                for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                    if gradient is not None:
                        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            entry = {"step": float(number + 1), **losses}
            if not all(math.isfinite(value) for value in entry.values()):
                raise TreeringError(
                    f"the loss is not finite at step {number + 1} ({entry}); set a lower learning_rate than "
                    f"{peak_rate(config):g}. Rows of the step: {', '.join(id for ids in steps[number] for id in ids)}"
                )
            entry["lr"] = peak_rate(config) * share(number)
            for group in optimizer.param_groups:
                group["lr"] = entry["lr"]
            accelerator.clip_grad_norm_(parameters.values(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            methods.after_step(model)
            seconds = time.perf_counter() - started
            entry["tokens_per_second"] = sum(int(b.inputs["mask"].sum()) for b in batches) / seconds
            log.append(entry)
            advance(1, f"loss {entry['loss']:.3f}  {entry['tokens_per_second']:.0f} tokens/s")
            asked = stop is not None and stop.asked
            if checkpoints is not None and (asked or (number + 1) % config.save_steps == 0 or number + 1 == len(steps)):
                _save(checkpoints, number + 1, parameters, optimizer, log)
            if stop is not None:
                stop.check()
    return log


def _gradients(
    model: PreTrainedModel, parameters: Sequence[Tensor], methods: Methods, bf16: bool, batch: Batch
) -> tuple[dict[str, float], tuple[Tensor | None, ...]]:
    """What `batch` adds to the losses of its optimiser step, and to the gradients of `parameters`."""
    with compute(bf16, batch.targets.device):
        logits = logits_at(model, **batch.inputs, at=batch.at)
    losses = {"loss": cross_entropy(logits, batch.targets, reduction="sum") / batch.of}
    losses |= methods.losses(model, batch, logits)
    gradients = torch.autograd.grad(torch.stack(list(losses.values())).sum(), parameters, allow_unused=True)
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients


def rate_schedule(config: Config, steps: int) -> Callable[[int], float]:
    """Share of the peak rate at a step: a linear rise over `warmup_ratio`, then as `lr_scheduler_type` says."""
    warmup = math.ceil(config.warmup_ratio * steps)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        left = 1 - (step - warmup) / max(1, steps - warmup)
        if config.lr_scheduler_type == "cosine":
            return 0.5 * (1 - math.cos(math.pi * left))
        return left if config.lr_scheduler_type == "linear" else 1.0

    return share


def _save(
    folder: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    log: list[dict[str, float]],
) -> None:
    """A checkpoint appears under its name whole; the one before goes away after it."""
    partial = folder / f".step-{step}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {"rng": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda_rng"] = torch.cuda.get_rng_state()
    for name, parameter in parameters.items():
        tensors[f"weight.{name}"] = parameter.detach().cpu().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = cast(Tensor, value).detach().cpu().contiguous()
    write_file(partial / "state.safetensors", save(tensors))
    write_json(partial / "state.json", {"step": step, "log": log})
    fsync_tree(partial)
    shutil.rmtree(folder / f"step-{step}", ignore_errors=True)
    partial.rename(folder / f"step-{step}")
    fsync_folder(folder)
    for other in folder.glob("step-*"):
        if other.name != f"step-{step}":
            shutil.rmtree(other)


def _resume(
    folder: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, list[dict[str, float]]]:
    """Steps done and their log, with weights, optimiser and random state as they were; (0, []) without a checkpoint."""
    found = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if not found:
        return 0, []
    tensors = load_file(found[-1] / "state.safetensors")
    torch.set_rng_state(tensors["rng"])
    if "cuda_rng" in tensors:
        torch.cuda.set_rng_state(tensors["cuda_rng"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
            # A weight that has had no gradient yet (an expert never chosen) has no such state.
            if f"step.{name}" in tensors:
                optimizer.state[parameter] = {
                    key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
                }
    state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    return state["step"], state["log"]


@torch.no_grad()
def teach(
    model: PreTrainedModel, rows: Sequence[Tokens], config: Config, *, top_k: int, pad_id: int, quiet: bool = False
) -> dict[str, Teacher]:
    """The model's `top_k` highest logits at every answer token of `rows`."""
    model.eval()
    bf16 = use_bf16(config)[0]
    found: dict[str, Teacher] = {}
    ordered = sorted(rows, key=lambda row: (len(row.ids), row.id))
    with bar("taking logits", len(ordered), quiet) as advance:
        for start in range(0, len(ordered), config.eval.batch_size):
            part = ordered[start : start + config.eval.batch_size]
            batch = make_batch(part, pad_id, model.device)
            with compute(bf16, model.device):
                logits = logits_at(model, **batch.inputs, at=batch.at)
            top = logits.topk(min(top_k, logits.shape[-1]))
            counts = [len(row.answers) for row in part]
            ids, values = top.indices.to(torch.int32).cpu().split(counts), top.values.half().cpu().split(counts)
            for row, row_ids, row_logits in zip(part, ids, values, strict=True):
                found[row.id] = Teacher(row_ids.clone(), row_logits.clone())
            advance(len(part))
    return found
