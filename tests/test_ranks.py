"""Processes that train together: the losses and weights of one, and one decision whatever happens to any of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.together import COUNT, ROWS, SCENARIOS, SIZES
from tests.training import Run, examples, same_bits, settings
from treering.recovery import LOWER

ROOT = Path(__file__).parents[1]


@dataclass
class Found:
    """What came of a scenario, process by process."""

    told: list[list[dict[str, float]]]
    errors: list[list[str] | None]
    weights: list[dict[str, Tensor]]
    checkpoints: Path

    @property
    def log(self) -> list[dict[str, float]]:
        """Each step once, as it was last told: one that is resumed tells all again."""
        return list({entry["step"]: entry for entry in self.told[0]}.values())

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.log]


@pytest.fixture(scope="module")
def scenarios(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    folder = tmp_path_factory.mktemp("together")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, ROOT / "tests" / "together.py", model_folder, folder], env=environment, check=True)
    found = {}
    for name, (_, checkpoints, _) in SCENARIOS.items():
        ranks = [rank for rank in range(COUNT) if (folder / f"{name}.{rank}.json").exists()]
        said = [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in ranks]
        weights = [load_file(folder / f"{name}.{rank}.safetensors") for rank in ranks]
        told, errors = ([one[key] for one in said] for key in ("told", "error"))
        found[name] = Found(told, errors, weights, folder / checkpoints)
    return found


TWICE: dict[str, Any] = {**SIZES, "per_device_train_batch_size": COUNT * SIZES["per_device_train_batch_size"]}


def alone(folder: Path, **values: Any) -> tuple[list[float], dict[str, Tensor]]:
    """What one process makes of twice the batch."""
    run = Run(folder, settings(folder, **{**TWICE, **values}), examples(ROWS))
    return [entry["loss"] for entry in run.train()], run.weights()


@pytest.mark.parametrize("name", ["plain", "full", "shards", "shards, full", "shards, reptile", "shards, held"])
def test_the_same_as_one_with_twice_the_batch(scenarios: dict[str, Found], model_folder: Path, name: str) -> None:
    found = scenarios[name]
    losses, weights = alone(model_folder, **SCENARIOS[name][2])
    assert found.losses == pytest.approx(losses, rel=1e-4)
    assert losses[-1] < losses[0]
    for key, weight in weights.items():
        torch.testing.assert_close(found.weights[0][key], weight, rtol=1e-2, atol=2e-3)


def test_averages_of_shards_are_those_of_the_whole(scenarios: dict[str, Found], model_folder: Path) -> None:
    kept = load_file(scenarios["shards, ema"].checkpoints / "step-8" / "state.safetensors")
    found = {name.removeprefix("ema."): weight for name, weight in kept.items() if name.startswith("ema.")}
    run = Run(model_folder, settings(model_folder, **TWICE, protect=["ema"]), examples(ROWS))
    run.train()
    averages = run.methods.running["ema"]
    assert found.keys() == averages.keys() and int(found["steps"]) == 8
    for name, weight in averages.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=2e-3)


@pytest.mark.parametrize("name", ["float16", "shards, float16"])
def test_a_step_that_overflows_in_one_is_skipped_by_all(
    scenarios: dict[str, Found], model_folder: Path, name: str
) -> None:
    """That of the row that is left, which alone has the weight of a batch."""
    found = scenarios[name]
    losses, _ = alone(model_folder, **SCENARIOS[name][2])
    assert found.losses == pytest.approx(losses, rel=0.02)
    assert [entry["step"] for entry in found.log if "skipped" in entry] == [2]


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name != "gone"])
def test_all_have_the_same_weights(scenarios: dict[str, Found], name: str) -> None:
    first, second = scenarios[name].weights
    assert same_bits(first, second)


def test_the_same_bits_each_time(scenarios: dict[str, Found]) -> None:
    assert same_bits(scenarios["plain"].weights[0], scenarios["again"].weights[0])


def test_one_writes_and_tells(scenarios: dict[str, Found]) -> None:
    told = scenarios["plain"].told
    assert [entry["step"] for entry in told[0]] == list(range(1, 9)) and told[1] == []
    assert sorted(path.name for path in scenarios["plain"].checkpoints.glob("step-*")) == ["step-0", "step-6", "step-8"]


def test_dropout_is_the_same_when_interrupted(scenarios: dict[str, Found]) -> None:
    """And stops everywhere at the same step, though one alone was asked."""
    stopped, resumed, whole = (scenarios[f"dropout{what}"] for what in (", stopped", ", resumed", ""))
    assert [error and error[0] for error in stopped.errors] == ["UpdateInterruptedError"] * COUNT
    done = len(stopped.told[0])
    assert 0 < done < 8
    assert resumed.told[0][:done] == stopped.told[0] and [entry["step"] for entry in resumed.told[0]] == [*range(1, 9)]
    assert same_bits(resumed.weights[0], whole.weights[0])
    assert not same_bits(whole.weights[0], scenarios["plain"].weights[0])


def test_memory_that_runs_out_in_one_splits_the_batches_of_all(scenarios: dict[str, Found]) -> None:
    found = scenarios["short of memory"]
    assert found.errors == [None, None]
    (split,) = json.loads((found.checkpoints / "recovery.json").read_text())["splits"]
    assert (split["step"], split["pieces"]) == (4, 2) and "can't allocate memory" in split["reason"]
    assert found.losses == pytest.approx(scenarios["plain"].losses, rel=1e-4)


def test_a_loss_that_is_not_finite_in_one_takes_all_back(scenarios: dict[str, Found]) -> None:
    found = scenarios["mad"]
    assert found.errors == [None, None]
    (retry,) = json.loads((found.checkpoints / "recovery.json").read_text())["retries"]
    assert (retry["step"], retry["back_to"]) == (5, 2) and "nan" in retry["reason"]
    assert [entry["step"] for entry in found.told[0]] == [1, 2, 3, 4, 3, 4, 5, 6, 7, 8]
    assert found.told[0][4]["lr"] == LOWER * found.told[0][2]["lr"]


def test_a_bug_in_one_ends_all(scenarios: dict[str, Found]) -> None:
    others, own = scenarios["broken"].errors
    assert own == ["ZeroDivisionError", "a bug"]
    assert others == ["TreeringError", "process 2 of the 2 that train failed: ZeroDivisionError: a bug"]


def test_one_that_dies_is_missed(scenarios: dict[str, Found]) -> None:
    (error,) = scenarios["gone"].errors
    assert error is not None and error[0] == "TreeringError"
    assert "lost each other" in error[1] and "run `treering update` again" in error[1]
