"""Weights in shards (FSDP2): each process keeps a part of every weight, and gathers a layer to compute it.

Zhao et al. 2023 (arXiv:2304.11277). A pass is then one thing that all processes do together: none can leave it alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from treering.errors import TreeringError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

    from treering.batches import Batch

_ADDS_NOTHING = 2**62
"""A mean over so many tokens is lost beside any other."""


def asked() -> bool:
    """Whether accelerate started this process so. A shell that exports its settings starts nobody."""
    started = distributed.is_available() and distributed.is_initialized()
    return started and os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def shard(model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Leave this process its part of each weight, as accelerate's configuration says; gradients will be summed."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils import fsdp2_prepare_model
    from torch.distributed.fsdp import FSDPModule

    if not hasattr(accelerator.state, "fsdp_plugin"):  # On processors accelerate makes none.
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    fsdp2_prepare_model(accelerator, model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # Else gloo is asked for what it cannot do.


def filled(batches: Sequence[Batch], count: int) -> list[Batch]:
    """As many batches for each of `count` processes: passes that nobody needs are made all the same."""
    spare = replace(batches[0], of=_ADDS_NOTHING, teacher=None, parent=None)
    return [*batches, *[spare] * (-len(batches) % count)]


def gradients(
    losses_of: Callable[[Batch], dict[str, Tensor]], parameters: Sequence[Tensor], scale: float, batch: Batch
) -> tuple[dict[str, float], tuple[Tensor | None, ...]]:
    """What `batch` adds to the losses; to the gradients, times `scale`, all processes add it on the way together."""
    try:
        losses = losses_of(batch)
        (scale * torch.stack(list(losses.values())).sum()).backward()
    except Exception as error:
        raise TreeringError(
            f"a pass over weights in shards failed ({type(error).__name__}: {error}), and no process can try it again "
            "alone: where memory ran out, lower per_device_train_batch_size; the checkpoint is kept"
        ) from error
    return {name: float(loss.detach()) for name, loss in losses.items()}, (None,) * len(parameters)


def clipped(parameters: Sequence[Tensor], norm: float) -> float:
    """The norm of all gradients, which are clipped to `norm`."""
    return float(whole(nn.utils.clip_grad_norm_(parameters, norm)))


def whole(tensor: Tensor) -> Tensor:
    """All of it, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def parted(tensor: Tensor, like: Tensor) -> Tensor:
    """The reverse of `whole`: as `like` is kept."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def parted_state(state: dict[str, Any], parameters: Sequence[nn.Parameter]) -> dict[str, Any]:
    """The state of an optimiser of `parameters`, as they are kept."""
    if not any(isinstance(parameter, DTensor) for parameter in parameters):
        return state
    own = {
        at: {key: parted(value, parameters[at]) for key, value in values.items()}
        for at, values in state["state"].items()
    }
    return {**state, "state": own}
