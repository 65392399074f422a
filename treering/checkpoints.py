"""Where a running update stands: weights, optimiser, random state and log, in safetensors and JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from treering.files import fsync_folder, fsync_tree, write_file, write_json
from treering.optimizers import Optimizer


def save(
    folder: Path,
    step: int,
    parameters: Mapping[str, Tensor],
    optimizer: Optimizer,
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
    state = {"step": step, "log": log, "optimizer": _packed(optimizer.state_dict(), tensors, {})}
    write_file(partial / "state.safetensors", safetensors.torch.save(tensors))
    write_json(partial / "state.json", state)
    fsync_tree(partial)
    shutil.rmtree(folder / f"step-{step}", ignore_errors=True)
    partial.rename(folder / f"step-{step}")
    fsync_folder(folder)
    for other in folder.glob("step-*"):
        if other.name != f"step-{step}":
            shutil.rmtree(other)


def resume(
    folder: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: Optimizer
) -> tuple[int, list[dict[str, float]]]:
    """Steps done and their log, with weights, optimiser and random state as they were; (0, []) without a checkpoint."""
    found = sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    if not found:
        return 0, []
    tensors = safetensors.torch.load_file(found[-1] / "state.safetensors")
    torch.set_rng_state(tensors["rng"])
    if "cuda_rng" in tensors:
        torch.cuda.set_rng_state(tensors["cuda_rng"])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
    state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    optimizer.load_state_dict(_unpacked(state["optimizer"], tensors))
    return state["step"], state["log"]


def _packed(value: Any, tensors: dict[str, Tensor], seen: dict[int, str]) -> Any:
    """`value` as JSON has it; what is a tensor goes into `tensors`, once however often it occurs."""
    if isinstance(value, Tensor):
        name = seen.setdefault(id(value), f"optimizer.{len(seen)}")
        tensors[name] = value.detach().cpu().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):  # In pairs, because keys may be numbers.
        return {"items": [[key, _packed(each, tensors, seen)] for key, each in value.items()]}
    if isinstance(value, list | tuple):
        return [_packed(each, tensors, seen) for each in value]
    return value


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {key: _unpacked(each, tensors) for key, each in value["items"]}
    return [_unpacked(each, tensors) for each in value] if isinstance(value, list) else value
