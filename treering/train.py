"""The one training loop. What it is to do at each step was decided before (`schedule.py`)."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy

from treering import shares
from treering.batches import Batch, as_step, make_batch
from treering.checkpoints import resume, save
from treering.errors import TreeringError
from treering.memory import Teacher
from treering.methods import Methods
from treering.model import Tokens, compute, logits_at, use_bf16
from treering.passes import read
from treering.progress import bar
from treering.schedule import Step, peak_rate, rate_schedule
from treering.stop import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.config import Config


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
    track: Callable[[Mapping[str, float]], None] | None = None,
    quiet: bool = False,
) -> list[dict[str, float]]:
    """Train the weights that require gradients, in place, over `steps`; returns one log entry a step.

    Each is given to `track` when it is finished; those of steps that an earlier run did are not.
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
        done, log = resume(checkpoints, parameters, optimizer)
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
            if track is not None:
                track(entry)
            advance(1, f"loss {entry['loss']:.3f}  {entry['tokens_per_second']:.0f} tokens/s")
            asked = stop is not None and stop.asked
            if checkpoints is not None and (asked or (number + 1) % config.save_steps == 0 or number + 1 == len(steps)):
                save(checkpoints, number + 1, parameters, optimizer, log)
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


def teach(
    model: PreTrainedModel, rows: Sequence[Tokens], config: Config, *, top_k: int, pad_id: int, quiet: bool = False
) -> dict[str, Teacher]:
    """The model's `top_k` highest logits at every answer token of `rows`."""
    model.eval()

    def highest(batch: Batch, logits: Tensor) -> list[Teacher]:
        top = logits.topk(min(top_k, logits.shape[-1]))
        ids, values = top.indices.to(torch.int32).cpu(), top.values.half().cpu()
        pairs = zip(ids.split(batch.counts), values.split(batch.counts), strict=True)
        return [Teacher(row_ids.clone(), row_logits.clone()) for row_ids, row_logits in pairs]

    with bar("taking logits", len(rows), quiet) as advance:
        found = read(model, rows, highest, config, pad_id, advance)
    return {row.id: teacher for row, teacher in zip(rows, found, strict=True)}
