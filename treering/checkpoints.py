"""Where a running update stands: weights, optimiser, random state and log, in safetensors and JSON.

What else there is to know follows from the number of steps done: the rows of the next step and its rate.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import safetensors.torch
import torch
from torch import Tensor

from treering.files import fsync_folder, fsync_tree, write_json
from treering.optimizers import Optimizer
from treering.ranks import Ranks
from treering.recovery import Recovery
from treering.sharding import parted, parted_state, whole

if TYPE_CHECKING:
    from treering.config import Config

Log = list[dict[str, float]]


def random_state() -> dict[str, Tensor]:
    """Where torch's random numbers stand."""
    state = {"rng": torch.get_rng_state()}
    return state | {"cuda_rng": torch.cuda.get_rng_state()} if torch.cuda.is_available() else state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Have torch's random numbers go on from `random_state`."""
    torch.set_rng_state(state["rng"])
    if "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"])


class Checkpoints:
    """The checkpoints of one update, `step-N` in `folder` after N steps; with no folder there are none.

    Three kinds stay: the first of all, for which nothing was learned yet; the last two at a multiple of `save_steps`;
    and the newest, whatever it was made for. Training goes back to those of the first two kinds alone, when a loss runs
    away, so that no clock decides what becomes of it. What is `beside` the weights, by name, is kept with them.
    Of the processes in `ranks` the first writes, all read.
    """

    def __init__(
        self,
        folder: Path | None,
        parameters: Mapping[str, torch.nn.Parameter],
        optimizer: Optimizer,
        config: Config,
        recovery: Recovery,
        ranks: Ranks,
        beside: Mapping[str, dict[str, Tensor]],
    ) -> None:
        self._ranks = ranks
        self._folder, self._parameters, self._optimizer, self._recovery = folder, parameters, optimizer, recovery
        self._beside = beside
        self._every, self._seconds = config.save_steps, 60 * config.save_minutes
        self._saved = time.monotonic()

    @property
    def made(self) -> bool:
        """Whether there are any: where there is a folder for them, there is always that of the beginning."""
        return self._folder is not None

    def due(self, step: int) -> bool:
        """Whether there is to be a checkpoint after `step` steps, by their number or by the clock of the first process.

        Where one of several processes finds it due, all make it.
        """
        by_clock = self._ranks.first and time.monotonic() - self._saved >= self._seconds
        return step % self._every == 0 or by_clock

    def save(self, log: Log) -> None:
        """Keep where training stands after the steps in `log`. It appears under its name whole; older ones go then."""
        step = len(log)
        if self._folder is None or step in self._steps():
            return
        tensors = random_state()
        for name, parameter in self._parameters.items():
            tensors[f"weight.{name}"] = whole(parameter.detach()).cpu().contiguous()
        for kind, kept in self._beside.items():
            tensors |= {f"{kind}.{name}": whole(tensor.detach()).cpu().contiguous() for name, tensor in kept.items()}
        state = {"step": step, "retries": len(self._recovery.retries), "log": log}
        state["optimizer"] = _packed(self._optimizer.state_dict(), tensors, {})
        if not self._ranks.first:
            return
        partial = self._folder / f".step-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        safetensors.torch.save_file(tensors, partial / "state.safetensors")  # As bytes they would take memory twice.
        write_json(partial / "state.json", state)
        fsync_tree(partial)
        partial.rename(self._folder / f"step-{step}")
        fsync_folder(self._folder)
        self._saved = time.monotonic()
        steps = self._steps()
        counted = [step for step in steps if step % self._every == 0]
        for other in set(steps) - {0, *counted[-2:], steps[-1]}:
            self._remove(other)

    def resume(self) -> Log:
        """Put weights, optimiser and random state where the newest checkpoint has them; returns the log up to there.

        Those that a retry has left behind go first. With none, there is one of the beginning now.
        """
        if self._folder is None:
            return []
        self._ranks.wait()  # All have read what they wanted of those that go.
        if self._ranks.first:
            for partial in self._folder.glob(".step-*"):
                shutil.rmtree(partial)
            for step in self._steps():
                if not self._recovery.holds(step, self._state(step)["retries"]):
                    self._remove(step)
        self._ranks.wait()
        self.save([])
        self._ranks.wait()
        return self._load(self._steps()[-1])

    def last_good(self, step: int) -> int | None:
        """The step of the checkpoint to go back to once the one after `step` has failed; None: there is none.

        It is the newest by count with steps after it that can be taken otherwise. After a retry it has to have been
        made since, for those from before did not help, or it is the first.
        """
        if self._folder is None or step == 0:
            return None
        retries = len(self._recovery.retries)
        made = [found for found in self._steps() if found < step and found % self._every == 0]
        return max([0, *(found for found in made if self._state(found)["retries"] == retries)])

    @torch.no_grad()
    def _load(self, step: int) -> Log:
        state, tensors = self._state(step), safetensors.torch.load_file(self._path(step) / "state.safetensors")
        set_random_state(tensors)
        for name, parameter in self._parameters.items():
            parameter.copy_(parted(tensors[f"weight.{name}"], parameter))
        device = next(iter(self._parameters.values())).device
        for kind, kept in self._beside.items():
            kept.clear()
            kept |= {
                name.removeprefix(f"{kind}."): tensor.to(device)
                for name, tensor in tensors.items()
                if name.startswith(f"{kind}.")
            }
        state_of_optimizer = _unpacked(state["optimizer"], tensors)
        self._optimizer.load_state_dict(parted_state(state_of_optimizer, list(self._parameters.values())))
        return cast(Log, state["log"])

    def _steps(self) -> list[int]:
        assert self._folder is not None
        return sorted(int(path.name.removeprefix("step-")) for path in self._folder.glob("step-*"))

    def _state(self, step: int) -> dict[str, Any]:
        return cast("dict[str, Any]", json.loads((self._path(step) / "state.json").read_text(encoding="utf-8")))

    def _remove(self, step: int) -> None:
        """It loses its name before its files, so that none is ever half there."""
        gone = self._path(step).rename(self._path(step).with_name(f".step-{step}"))
        shutil.rmtree(gone)

    def _path(self, step: int) -> Path:
        assert self._folder is not None
        return self._folder / f"step-{step}"


def _packed(value: Any, tensors: dict[str, Tensor], seen: dict[int, str]) -> Any:
    """`value` as JSON has it; what is a tensor goes into `tensors`, once however often it occurs."""
    if isinstance(value, Tensor):
        name = seen.setdefault(id(value), f"optimizer.{len(seen)}")
        tensors[name] = whole(value.detach()).cpu().contiguous()
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
