"""Where a running update stands: weights, optimiser, random state and log, in safetensors and JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from torch import Tensor

from treering.files import fsync_folder, fsync_tree, write_file, write_json


def save(
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
    write_file(partial / "state.safetensors", safetensors.torch.save(tensors))
    write_json(partial / "state.json", {"step": step, "log": log})
    fsync_tree(partial)
    shutil.rmtree(folder / f"step-{step}", ignore_errors=True)
    partial.rename(folder / f"step-{step}")
    fsync_folder(folder)
    for other in folder.glob("step-*"):
        if other.name != f"step-{step}":
            shutil.rmtree(other)


def resume(
    folder: Path, parameters: Mapping[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer
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
            # A weight that has had no gradient yet (an expert never chosen) has no such state.
            if f"step.{name}" in tensors:
                optimizer.state[parameter] = {
                    key: tensors[f"{key}.{name}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
                }
    state = json.loads((found[-1] / "state.json").read_text(encoding="utf-8"))
    return state["step"], state["log"]
