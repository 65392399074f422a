"""Two processes that train together: a process that has imported all that is slow forks two for each scenario.

`python tests/together.py MODEL FOLDER`: each scenario's log, weights and errors go to FOLDER, by its name.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import distributed

from tests.training import Run, StopAt, examples, settings
from treering.errors import TreeringError, UpdateInterruptedError
from treering.model import logits_at
from treering.sharding import whole

loop: Any = importlib.import_module("treering.train")

COUNT = 2
ROWS = 25
"""One more than fill the batches: a step of each epoch has a row for one process and none for the other."""

SIZES: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_train_epochs": 2.0,
    "learning_rate": 1e-2,
    "save_steps": 2,
}
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 123456789 bytes."


def plain(rank: int, run: Callable[..., list[dict[str, float]]]) -> None:
    run()


def sharded(rank: int, run: Callable[..., list[dict[str, float]]]) -> None:
    """As `accelerate launch` has it with FSDP; stopped once, as one process was asked to."""
    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    }
    with suppress(UpdateInterruptedError):
        run(stop=StopAt(4) if rank else None)
    run()


def stopped(rank: int, run: Callable[..., list[dict[str, float]]]) -> None:
    """One of them is asked to stop, in the middle of a step."""
    run(stop=StopAt(1000) if rank else None)


def short(rank: int, run: Callable[..., list[dict[str, float]]]) -> None:
    """One of them has no memory for more than two rows at once, after its second pass."""
    passes: list[int] = []

    def forward(model: Any, ids: torch.Tensor, *rest: Any, **others: Any) -> torch.Tensor:
        passes.append(1)
        torch.rand(1)  # As dropout would.
        if rank and len(passes) > 2 and len(ids) > 2:
            raise RuntimeError(NO_MEMORY)
        return logits_at(model, ids, *rest, **others)

    loop.logits_at = forward
    run()


def mad(rank: int, run: Callable[..., list[dict[str, float]]]) -> None:
    """The loss of one of them is NaN in its fourth pass."""
    passes: list[int] = []

    def forward(*given: Any, **others: Any) -> torch.Tensor:
        passes.append(1)
        return logits_at(*given, **others) * (float("nan") if rank and len(passes) == 4 else 1.0)

    loop.logits_at = forward
    run()


def broken(rank: int, run: Callable[..., list[dict[str, float]]]) -> None:
    """One of them meets a bug."""

    def forward(*given: Any, **others: Any) -> torch.Tensor:
        if rank:
            raise ZeroDivisionError("a bug")
        return logits_at(*given, **others)

    loop.logits_at = forward
    run()


def gone(rank: int, run: Callable[..., list[dict[str, float]]]) -> None:
    """One of them dies."""

    def forward(*given: Any, **others: Any) -> torch.Tensor:
        if rank:
            os._exit(9)
        return logits_at(*given, **others)

    loop.logits_at = forward
    run()


SCENARIOS: dict[str, tuple[Callable[..., None], str, dict[str, Any]]] = {
    # What happens, the folder of the checkpoints, settings.
    "plain": (plain, "plain", {}),
    "again": (plain, "again", {}),
    "full": (plain, "full", {"finetuning_type": "full", "gradient_accumulation_steps": 2}),
    "shards": (sharded, "shards", {}),
    "shards, full": (sharded, "shards, full", {"finetuning_type": "full", "gradient_accumulation_steps": 2}),
    "shards, reptile": (sharded, "shards, reptile", {"protect": ["reptile"], "reptile": {"steps": 3}}),
    "shards, ema": (sharded, "shards, ema", {"protect": ["ema"]}),
    "shards, held": (sharded, "shards, held", {"protect": ["l2", "si"], "l2": {"weight": 10.0}}),
    "float16": (plain, "float16", {"fp16": True}),
    "shards, float16": (sharded, "shards, float16", {"fp16": True}),
    "dropout": (plain, "dropout", {"lora_dropout": 0.2}),
    "dropout, stopped": (stopped, "dropout, resumed", {"lora_dropout": 0.2}),
    "dropout, resumed": (plain, "dropout, resumed", {"lora_dropout": 0.2}),
    "short of memory": (short, "short of memory", {}),
    "mad": (mad, "mad", {}),
    "broken": (broken, "broken", {}),
    "gone": (gone, "gone", {}),
}


def one(rank: int, name: str, model: Path, folder: Path) -> None:
    """What one process does in a scenario."""
    happens, checkpoints, values = SCENARIOS[name]
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(COUNT), "LOCAL_WORLD_SIZE": str(COUNT)}
    meeting = f"file://{folder / checkpoints}.{happens.__name__}"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=COUNT)
    made = Run(model, settings(model, launcher="accelerate", processes=COUNT, **SIZES, **values), examples(ROWS))
    told: list[dict[str, float]] = []
    error = None
    try:
        happens(rank, lambda **options: made.train(checkpoints=folder / checkpoints, track=told.append, **options))
    except Exception as raised:
        error = [type(raised).__name__, str(raised)]
        if not isinstance(raised, TreeringError | ZeroDivisionError):
            traceback.print_exc()
    save_file({key: whole(weight) for key, weight in made.weights().items()}, folder / f"{name}.{rank}.safetensors")
    (folder / f"{name}.{rank}.json").write_text(json.dumps({"told": told, "error": error}))


def main() -> None:
    model, folder = (Path(text) for text in sys.argv[1:])
    torch.set_num_threads(1)
    Run(model, settings(model))  # Imports the model's own code, and the method's.
    for name in SCENARIOS:
        pids = []
        for rank in range(COUNT):
            pid = os.fork()
            if not pid:
                one(rank, name, model, folder)
                os._exit(0)
            pids.append(pid)
        for pid in pids:
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
