"""Ended at any moment, by whatever: training goes on from a checkpoint and ends in the same bits."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.training import Counted, KillAt, KilledError, Run, StopAt, same_bits, settings
from treering import shares
from treering.checkpoints import Checkpoints
from treering.errors import TreeringError, UpdateInterruptedError, full_disk_is_clear
from treering.recovery import Recovery

WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {"per_device_train_batch_size": 4}),
    "threads": (2, {"per_device_train_batch_size": 4}),
    "accumulation and dropout": (
        1,
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "lora_dropout": 0.3},
    ),
    "threads and accumulation": (2, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    "noise": (2, {"per_device_train_batch_size": 4, "neftune_noise_alpha": 5.0, "use_dora": True}),
    "adapter": (2, {"per_device_train_batch_size": 4, "finetuning_type": "adapter"}),
    "norm": (2, {"per_device_train_batch_size": 4, "finetuning_type": "norm"}),
    "freeze": (1, {"per_device_train_batch_size": 4, "finetuning_type": "freeze", "freeze_trainable_layers": 1}),
}
EACH_STEP, NEVER = 1e-9, 1e9
"""`save_minutes` that have passed after every step, or after none."""


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in folder.glob("step-*"))


@pytest.mark.parametrize(
    ("way", "save"),
    [
        *((way, {"save_steps": 2}) for way in WAYS),
        ("threads and accumulation", {"save_minutes": EACH_STEP}),
        ("accumulation and dropout", {}),
    ],
)
def test_ended_anywhere_it_ends_in_the_same_bits(
    tmp_path: Path,
    model_folder: Path,
    threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    save: dict[str, Any],
) -> None:
    """At any look at `stop`, of which each batch has hundreds, asked to end or killed."""
    count, values = WAYS[way]
    threads(count)
    monkeypatch.setattr(shares, "LEAST_ROWS", 2)
    config = settings(model_folder, num_train_epochs=1.0, **values, **save)
    assert shares.count(config, torch.device("cpu")) == count
    whole, counted = Run(model_folder, config), Counted()
    log = whole.train(checkpoints=tmp_path / "whole", stop=counted)
    rng = random.Random(f"{way} {save}")
    ended = 0
    for attempt in range(100):
        last = Run(model_folder, config)
        # Killed with no checkpoint on the way nothing is gained, so it is asked at times.
        end = rng.choice([KillAt, StopAt])(rng.randint(1, counted.looks // 2))
        try:
            resumed = last.train(checkpoints=tmp_path / "ended", stop=end)
        except (UpdateInterruptedError, KilledError):
            ended += 1
            torch.manual_seed(attempt)  # Whatever random numbers other code draws in between do not matter.
        else:
            break
    assert ended >= 2
    assert same_bits(whole.weights(), last.weights())
    kept = ("step", "loss", "grad_norm", "lr")
    assert [[entry[key] for key in kept] for entry in resumed] == [[entry[key] for key in kept] for entry in log]


@pytest.mark.parametrize("part", [0.25, 0.75], ids=["forward", "backward"])
def test_a_step_under_way_is_given_up(tmp_path: Path, model_folder: Path, part: float) -> None:
    """Asked to end in the middle of the third step, it takes no look more, and keeps where that step began."""
    config = settings(model_folder, num_train_epochs=1.0, per_device_train_batch_size=4)
    counted = Counted()
    log = Run(model_folder, config).train(stop=counted)
    looks = counted.looks // len(log)
    stop = StopAt(int((2 + part) * looks))
    with pytest.raises(UpdateInterruptedError, match="last checkpoint"):
        Run(model_folder, config).train(checkpoints=tmp_path, stop=stop)
    assert stop.left == 0
    assert steps(tmp_path) == [0, 2]


def test_which_checkpoints_stay(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first, the last two by count, and the newest."""
    seen: list[list[int]] = []
    save = Checkpoints.save

    def noted(self: Checkpoints, log: Any) -> None:
        save(self, log)
        seen.append(steps(tmp_path / str(minutes)))

    monkeypatch.setattr(Checkpoints, "save", noted)
    wanted = {
        EACH_STEP: [[0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 4], [0, 2, 4, 5], [0, 4, 6], [0, 4, 6, 7]],
        NEVER: [[0], [0, 2], [0, 2, 4], [0, 4, 6], [0, 4, 6, 7]],
    }
    for minutes, found in wanted.items():
        seen.clear()
        values = {"per_device_train_batch_size": 4, "max_steps": 7, "save_steps": 2, "save_minutes": minutes}
        Run(model_folder, settings(model_folder, **values)).train(checkpoints=tmp_path / str(minutes))
        assert seen == found


def test_nothing_is_pickled(tmp_path: Path, model_folder: Path) -> None:
    Run(model_folder, settings(model_folder, max_steps=1)).train(checkpoints=tmp_path)
    for folder in tmp_path.iterdir():
        assert sorted(path.name for path in folder.iterdir()) == ["state.json", "state.safetensors"]
    state = json.loads((tmp_path / "step-1" / "state.json").read_text())
    assert (state["step"], len(state["log"])) == (1, 1)


def test_a_checkpoint_that_was_not_finished_is_not_used(tmp_path: Path, model_folder: Path) -> None:
    config = settings(model_folder, num_train_epochs=1.0, per_device_train_batch_size=4, save_minutes=EACH_STEP)
    whole, counted = Run(model_folder, config), Counted()
    whole.train(stop=counted)
    with pytest.raises(KilledError):
        Run(model_folder, config).train(checkpoints=tmp_path, stop=KillAt(counted.looks // 2))
    newest = steps(tmp_path)[-1]
    assert newest > 0
    shutil.copytree(tmp_path / f"step-{newest}", tmp_path / ".step-5")
    (tmp_path / ".step-5" / "state.safetensors").write_bytes(b"half")
    last = Run(model_folder, config)
    last.train(checkpoints=tmp_path)
    assert same_bits(whole.weights(), last.weights())
    assert steps(tmp_path) == [0, 6]
    assert not list(tmp_path.glob(".step-*"))


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, model_folder: Path) -> None:
    """The system's own limit on a file's size: the first checkpoint fits, the next, with the optimiser's state, not."""
    config = settings(model_folder, num_train_epochs=1.0, per_device_train_batch_size=4, save_steps=2)
    whole = Run(model_folder, config)
    whole.train(checkpoints=tmp_path / "whole")
    first, later = ((tmp_path / "whole" / f"step-{n}" / "state.safetensors").stat().st_size for n in (0, 6))
    assert first < later / 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    folder = tmp_path / "full"
    resource.setrlimit(resource.RLIMIT_FSIZE, (later - 1, limits[1]))
    try:
        with (
            pytest.raises(TreeringError, match="a file-size limit is met"),
            full_disk_is_clear(folder),
        ):
            Run(model_folder, config).train(checkpoints=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert steps(folder) == [0]
    kept = (folder / "step-0" / "state.safetensors").read_bytes()
    assert kept == (tmp_path / "whole" / "step-0" / "state.safetensors").read_bytes()
    last = Run(model_folder, config)
    last.train(checkpoints=folder)
    assert same_bits(whole.weights(), last.weights())


@pytest.mark.parametrize("index", [0, 1])
def test_the_clock_is_that_of_the_first_process(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    """Where one of several finds a checkpoint due, all make it; the others do not write, so their clock would stand."""
    now = [0.0]
    monkeypatch.setattr("treering.checkpoints.time.monotonic", lambda: now[0])
    run = Run(model_folder, settings(model_folder, save_steps=1000, save_minutes=1.0))
    weights = {name: p for name, p in run.model.named_parameters() if p.requires_grad}
    ranks = cast(Any, SimpleNamespace(first=index == 0))
    kept = Checkpoints(tmp_path, weights, torch.optim.AdamW(weights.values()), run.config, Recovery(None), ranks, {})
    assert not kept.due(1)
    now[0] = 61.0
    assert kept.due(2) is (index == 0)
    kept.save([{"step": 1.0}, {"step": 2.0}])
    assert steps(tmp_path) == ([2] if index == 0 else [])
    assert not kept.due(3)
    now[0] = 122.0
    assert kept.due(4) is (index == 0)
    assert kept.due(2000)
