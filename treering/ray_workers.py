"""The processes that train as workers of Ray Train: `python -m treering.ray_workers FOLDER`.

Ray starts all of them again when one dies, and they resume from treering's own checkpoint.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from treering.handover import Handover
from treering.progress import say
from treering.worker import wanted, work

TRIES = 3
"""Times that the workers are started again."""


def _work(given: dict[str, Any]) -> None:
    """What each worker does."""
    work(Path(given["folder"]))


def run(folder: Path) -> None:
    """Have the workers train: in the cluster that RAY_ADDRESS names, or in one of this machine alone that then ends."""
    import ray
    import torch
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    config = Handover.load(folder).config
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        cores = max(config.processes, os.cpu_count() or 1)  # Fewer cores than workers are shared, not waited for.
        ray.init(address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
    say(f"waiting for {config.processes} workers of Ray, which may take a minute or two")
    TorchTrainer(
        _work,
        train_loop_config={"folder": str(folder)},
        scaling_config=ScalingConfig(num_workers=config.processes, use_gpu=torch.cuda.is_available()),
        run_config=RunConfig(
            name="training", storage_path=str(folder / "ray"), failure_config=FailureConfig(max_failures=TRIES)
        ),
    ).fit()
    ray.shutdown()


def main() -> None:
    """Have them train as told in the folder that is named; ends when they are wanted no more."""
    folder = Path(sys.argv[1])
    with wanted(folder):
        run(folder)


if __name__ == "__main__":
    main()
