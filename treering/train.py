"""The one training loop. What it is to do at each step was decided before (`schedule.py`)."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from treering import optimizers, preference, scaling, sharding, shares
from treering.attention import recomputed
from treering.batches import Batch, as_step, make_batch, with_noise
from treering.checkpoints import Checkpoints, Log, random_state, set_random_state
from treering.early import LOSS, EarlyStopping
from treering.errors import (
    LESS_TO_LEARN,
    SWITCHED_OFF,
    ConfigError,
    UpdateInterruptedError,
    first_line,
    no_memory,
    switched_off,
)
from treering.memory import Teacher
from treering.methods import Methods, trained
from treering.model import Tokens, compute, logits_at, precision
from treering.optimizers import Optimizer
from treering.passes import losses, read
from treering.progress import bar
from treering.ranks import Ranks
from treering.readings import Reading, Readings
from treering.recovery import HalfStepError, LossError, Recovery, check_loss, worst
from treering.room import give_back
from treering.schedule import Step, peak_rate, rate_schedule
from treering.stop import Stop

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from treering.config import Config


Gradients = tuple[dict[str, float], tuple[Tensor | None, ...]]
"""What a batch adds to the losses of its step, by name, and to the gradients of all that learns."""


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Numbers near zero become zero, which is many times faster; after it they are numbers, as they usually are."""
    try:
        torch.set_flush_denormal(True)
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
    aside: Sequence[Tokens] = (),
    checkpoints: Path | None = None,
    recovery: Recovery | None = None,
    stop: Stop | None = None,
    track: Callable[[Mapping[str, float]], None] | None = None,
    quiet: bool = False,
    scale: float | None = None,
) -> list[dict[str, float]]:
    """Train the weights that require gradients, in place, over `steps`; returns one log entry a step.

    Each is given to `track` when it is finished; those of steps that an earlier run did come again at the beginning.
    Loss: cross entropy averaged over the tokens of the optimiser step that are learned, that of its preference pairs
    averaged over these, plus what the methods add.
    With `checkpoints` (a folder) the state is kept there now and then, and an earlier run is resumed to the same bits.
    Where memory runs out, the step is taken again in smaller pieces (which `recovery` remembers, else the checkpoints'
    folder), from the last checkpoint on if weights may have changed; where its loss is no good (`check_loss`), training
    goes back to a checkpoint, and on from there at a lower rate. With rows `aside` their loss is measured every
    `eval_steps`, the log ends where it decides so (`early.over`), and the weights are those of its lowest. Where
    several processes train, each computes its share of every step and takes the whole step; one writes and tracks.
    In float16 the loss of the first step is scaled by `scale`, if it is given.

    Raises:
        UpdateInterruptedError: `stop` was asked; there is a checkpoint of where the step under way began.
        LossError: the loss was no good once more than `max_loss_retries` times, or there is nowhere to go back to.
        HalfStepError: memory ran out while the weights were changed, and there are no checkpoints.
        TreeringError: there is no memory for one row.
    """
    torch.manual_seed(config.seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    ranks = Ranks(accelerator)
    _made_ready(model, config, accelerator)
    parameters = trained(model)
    optimizer = optimizers.optimizer(config, model, peak := peak_rate(config, model))
    share = rate_schedule(config, len(steps))
    parts = shares.count(config, accelerator.device)
    collate = partial(make_batch, pad_id=pad_id, device=accelerator.device, teachers=teachers, parents=parents)
    names, weights, dtype = ["loss", *methods.by_name], list(parameters.values()), precision(config)[0]
    losses_of = partial(_losses, model, methods, dtype, config.pref_beta)
    stop, sharded = stop or Stop(), sharding.asked()
    gradients_of = partial(sharding.gradients if sharded else partial(_gradients, stop), losses_of, weights)
    recovery = recovery or Recovery(checkpoints, writes=ranks.first)
    early = EarlyStopping(
        partial(_mean_loss, model, aside, config, pad_id, stop, Readings(checkpoints)) if aside else None,
        parameters,
        optimizer,
        config,
    )
    kept = Checkpoints(
        checkpoints, parameters, optimizer, config, recovery, ranks, {"best": early.weights, **methods.running}
    )
    log = _resumed(kept, ranks, track)
    with (
        stop.patient(),
        bar("training", len(steps), quiet) as advance,
        shares.side_by_side(parts) as compute_all,
    ):
        computed = partial(_computed, collate, config, ranks, compute_all, gradients_of, weights)
        advance(len(log))
        while _goes_on(log, len(steps), early, kept, track):
            started = time.perf_counter()
            step, factor = len(log) + 1, scaling.scale(log, dtype, scale)
            shares_of_all = ranks.count * parts * recovery.pieces(step)
            pieces = [
                [rows[id] for id in ids] for batch in steps[step - 1] for ids in shares.dealt(batch, shares_of_all)
            ]
            try:
                with _undone_on_failure(optimizer):
                    ranks.begin(config.seed, step)
                    own = _in_step(ranks, stop, partial(computed, step, factor, pieces))
                    summed = ranks.summed(own, names, [] if sharded else weights)
                    scaling.undo(weights, factor)
                    entry = {"step": float(step), **summed, **_penalized(methods, model, weights)}
                    entry |= {
                        **scaling.noted(sharding.clipped(weights, config.max_grad_norm), factor, dtype),
                        "lr": peak * share(step - 1) * recovery.rate,
                    }
                    check_loss(entry, log, model.get_output_embeddings().weight.shape[0])
                    _take(model, optimizer, methods, entry, ranks)
            except Exception as error:
                log = _after(error, pieces, log, kept, recovery, config, peak, partial(_loss_alone, losses_of, collate))
                advance(len(log) - step + 1)
                continue
            seconds = time.perf_counter() - started
            # The last token of a row is only predicted.
            entry["tokens_per_second"] = (
                sum(len(row.ids) - 1 for piece in pieces for row in preference.with_rejected(piece)) / seconds
            )
            log.append(entry)
            if track is not None and ranks.first:
                track(entry)
            advance(1, f"loss {entry['loss']:.3f}  {entry['tokens_per_second']:.0f} tokens/s")
            if ranks.any(kept.due(step) or step == len(steps)):
                kept.save(log)
    optimizers.finish(optimizer)
    early.take_best()
    return log


def _made_ready(model: PreTrainedModel, config: Config, accelerator: Accelerator) -> None:
    model.train()
    if config.gradient_checkpointing:
        _checkpoint_layers(model)
    if sharding.asked():
        sharding.shard(model, accelerator)


def _resumed(kept: Checkpoints, ranks: Ranks, track: Callable[[Mapping[str, float]], None] | None) -> Log:
    """The log of what an earlier run did, which is told again: nobody knows what of it was taken."""
    log = kept.resume()
    if track is not None and ranks.first:
        for entry in log:
            track(entry)
    return log


def _goes_on(
    log: Log,
    steps: int,
    early: EarlyStopping,
    kept: Checkpoints,
    track: Callable[[Mapping[str, float]], None] | None,
) -> bool:
    """Whether there is a step after those in `log`, once what is to be measured before it has been."""
    if early.due(log, steps):
        try:
            early.look(log)
        except UpdateInterruptedError:
            kept.save(log)
            raise
        if track is not None:
            track({name: log[-1][name] for name in ("step", LOSS)})
    if early.ended(log):
        kept.save(log)
    return len(log) < steps and not early.ended(log)


def _mean_loss(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    config: Config,
    pad_id: int,
    stop: Stop | None,
    readings: Readings,
    step: int,
) -> float:
    reading = readings.of("measuring the rows kept aside", step)
    return math.fsum(losses(model, rows, config, pad_id, stop, reading)) / len(rows)


def _checkpoint_layers(model: PreTrainedModel) -> None:
    """Gradient checkpointing (Chen et al. 2016, arXiv:1604.06174). Raises `ConfigError` where a model has none."""
    try:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": recomputed})
    except ValueError as error:
        raise ConfigError(f"gradient_checkpointing is true, but {error}; take the setting out") from None


@contextmanager
def _undone_on_failure(optimizer: Optimizer) -> Iterator[None]:
    """What fails inside leaves no gradients, and random numbers where they were: as if it had not begun.

    Only weights that were changed stay so.
    """
    before = random_state()
    try:
        yield
    except BaseException:
        set_random_state(before)
        optimizer.zero_grad()
        raise


def _after(
    error: Exception,
    pieces: Sequence[Sequence[Tokens]],
    log: Log,
    kept: Checkpoints,
    recovery: Recovery,
    config: Config,
    peak: float,
    loss_alone: Callable[[Tokens], float],
) -> Log:
    """What to go on from once the step after `log`, computed in `pieces`, has failed with `error`.

    `peak` is the rate without what was taken off it. Raises `error` itself where it is none of those that training
    survives, and else as `train` does.
    """
    step = len(log) + 1
    if isinstance(error, UpdateInterruptedError):
        kept.save(log)
    elif isinstance(error, HalfStepError):
        recovery.split(step, max(map(len, pieces)), error)
        give_back(error)
        if not kept.made:
            reason = f"out of memory at step {step} ({error}), with no checkpoint to go back to"
            raise HalfStepError(f"{reason}. {LESS_TO_LEARN}")
        return kept.resume()
    elif no_memory(error):
        recovery.split(step, max(map(len, pieces)), error)
        give_back(error)
        return log
    elif isinstance(error, LossError):
        back_to = kept.last_good(len(log))
        if back_to is not None and len(recovery.retries) < config.max_loss_retries:
            recovery.retry(step, back_to, str(error))
            return kept.resume()
        losses = {row.id: loss_alone(row) for piece in pieces for row in piece}
        raise LossError(
            f"{error} at step {step}, after {len(recovery.retries)} retries at lower rates (max_loss_retries is "
            f"{config.max_loss_retries}; a first step has none). Set a learning_rate below "
            f"{peak * recovery.rate:g}, or see to the rows of the step{_of_float16(config)}; {worst(losses)}"
        ) from None
    raise error


def _of_float16(config: Config) -> str:
    """What else may make a loss infinite."""
    said = ", or set fp16: false, for a model may make numbers above 65504, which float16 lacks"
    return said if precision(config)[0] == torch.float16 else ""


def _in_step(ranks: Ranks, stop: Stop, computed: Callable[[], Mapping[str, float]]) -> Mapping[str, float]:
    """What this process has `computed`, once all have, or one decision of all where one has not."""
    if not sharding.asked():
        return ranks.agreed(computed)
    ranks.agreed(stop.check)  # Before the passes, which nobody can leave alone.
    return computed()


def _computed(
    collate: Callable[[Sequence[Tokens]], Batch],
    config: Config,
    ranks: Ranks,
    compute_all: Callable[[Callable[[Batch], Gradients], Sequence[Batch]], Iterable[Gradients]],
    gradients_of: Callable[[float, Batch], Gradients],
    parameters: Sequence[Tensor],
    step: int,
    scale: float,
    pieces: Sequence[Sequence[Tokens]],
) -> Mapping[str, float]:
    """The losses of this process's share of `step`, whose gradients, times `scale`, `parameters` get."""
    batches = as_step([collate(piece) for piece in pieces])
    if config.neftune_noise_alpha:
        batches = with_noise(batches, config.neftune_noise_alpha, f"{config.seed}:{step}")
    if sharding.asked():
        batches = sharding.filled(batches, ranks.count)
    return _add_up(compute_all(partial(gradients_of, scale), ranks.own(batches)), parameters)


def _take(
    model: PreTrainedModel, optimizer: Optimizer, methods: Methods, entry: Mapping[str, float], ranks: Ranks
) -> None:
    """Change the weights by their gradients, in all processes, unless the log's `entry` says that the step is skipped.

    A step cannot be undone here: some optimisers take memory weight by weight, all write over weights, state or
    gradients, and a copy of these would cost as much memory again. Raises `HalfStepError` where memory runs out.
    """

    def take() -> None:
        for group in optimizer.param_groups:
            group["lr"] = entry["lr"]
        if scaling.SKIPPED not in entry:
            optimizer.step()
            methods.after_step(model)
        optimizer.zero_grad()

    short = ""
    try:
        ranks.agreed(take)
    except Exception as error:
        if not no_memory(error):
            raise
        short = first_line(error)  # Not the error itself: it would hold what the step took.
    if short:
        raise HalfStepError(f"while the weights were changed: {short}")


def _penalized(methods: Methods, model: PreTrainedModel, parameters: Sequence[Tensor]) -> dict[str, float]:
    """The losses of the weights alone, whose gradients `parameters` get as well."""
    penalties = methods.penalties(model)
    if penalties:
        total = torch.stack(list(penalties.values())).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        _add_up([({}, gradients)], parameters)
    return {name: float(penalty.detach()) for name, penalty in penalties.items()}


def _add_up(computed: Iterable[Gradients], parameters: Sequence[Tensor]) -> Counter[str]:
    """The losses of a step from those of its batches; `parameters` get the gradients, always in the same order."""
    losses: Counter[str] = Counter()
    for found, gradients in computed:
        losses.update(found)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
    return losses


def _gradients(
    stop: Stop,
    losses_of: Callable[[Batch], dict[str, Tensor]],
    parameters: Sequence[Tensor],
    scale: float,
    batch: Batch,
) -> Gradients:
    """What `batch` adds to the losses of its optimiser step, and times `scale` to the gradients of `parameters`.

    On a processor, where a batch of long rows takes minutes, `stop` is looked at many times in every layer, forward and
    backward; on an accelerator once, for there it would be a good part of the time.
    """

    def look(tensor: Tensor) -> Tensor:
        stop.check()
        return tensor.detach()  # As it is, it would hold on to the graph that holds on to it, and a failed pass to all.

    stop.check()
    with saved_tensors_hooks(look, look) if batch.targets.device.type == "cpu" else nullcontext():
        losses = losses_of(batch)
    total = scale * torch.stack(list(losses.values())).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    if switched_off():
        raise MemoryError(SWITCHED_OFF)
    return {name: float(loss.detach()) for name, loss in losses.items()}, gradients


def _losses(
    model: PreTrainedModel, methods: Methods, dtype: torch.dtype, beta: float, batch: Batch
) -> dict[str, Tensor]:
    """What `batch` adds to the losses of its optimiser step: that of its rows and pairs, and those of the methods."""
    with compute(batch.targets.device, dtype):
        logits = logits_at(model, **batch.inputs, at=batch.at, noise=batch.noise)
    plain = (logits, batch.targets) if batch.plain is None else (logits[batch.plain], batch.targets[batch.plain])
    loss = cross_entropy(*plain, reduction="sum") / max(1, batch.of)
    if batch.pairs is not None:
        loss = loss + preference.loss(batch.pairs, logits, batch.targets, beta)
    losses = {"loss": loss}
    return losses | methods.losses(model, batch, logits)


@torch.no_grad()
def _loss_alone(
    losses_of: Callable[[Batch], dict[str, Tensor]], collate: Callable[[Sequence[Tokens]], Batch], row: Tokens
) -> float:
    """All losses of a step that consists of `row` alone."""
    return float(sum(losses_of(collate([row])).values()))


def teach(
    model: PreTrainedModel,
    rows: Sequence[Tokens],
    config: Config,
    *,
    top_k: int,
    pad_id: int,
    temperature: float | None = None,
    stop: Stop | None = None,
    quiet: bool = False,
    reading: Reading | None = None,
) -> dict[str, Teacher]:
    """The model's `top_k` highest logits at every answer token of `rows`.

    With a `temperature` they are shifted so that `exp(logit / temperature)` are probabilities among all tokens: what
    these lack to 1 is what the other tokens have. Raises as `passes.in_parts` does.
    """
    model.eval()

    def highest(part: Sequence[Tokens], logits: Tensor) -> list[Teacher]:
        top = logits.topk(min(top_k, logits.shape[-1]))
        if temperature is not None:
            top.values.sub_(temperature * torch.logsumexp(logits / temperature, -1, keepdim=True))
        ids, values = top.indices.to(torch.int32).cpu(), top.values.half().cpu()
        counts = [len(row.answers) for row in part]
        pairs = zip(ids.split(counts), values.split(counts), strict=True)
        return [Teacher(row_ids.clone(), row_logits.clone()) for row_ids, row_logits in pairs]

    with bar("taking logits", len(rows), quiet) as advance:
        found = read(model, rows, highest, config, pad_id, advance, stop, reading)
    return {row.id: teacher for row, teacher in zip(rows, found, strict=True)}
