"""L2 to the parent's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training import Run, StopAt, same_bits, settings
from treering.errors import UpdateInterruptedError

STEADY: dict[str, Any] = {"learning_rate": 1e-2, "warmup_ratio": 0, "lr_scheduler_type": "constant", "save_steps": 2}


def distance(run: Run, start: Run) -> float:
    before = start.weights()
    return sum(float((weight - before[name]).double().square().sum()) for name, weight in run.weights().items())


@pytest.mark.parametrize("values", [{}, {"finetuning_type": "full"}, {"use_dora": True}], ids=["lora", "full", "dora"])
def test_the_term_is_what_it_says(model_folder: Path, values: dict[str, Any]) -> None:
    """Half the squared distance to where the first update began: the base model, or a new adapter."""
    config = settings(model_folder, protect=["l2"], l2={"weight": 3.0}, **STEADY, **values)
    start, before, run = (Run(model_folder, config) for _ in range(3))
    before.train(steps=before.steps[:2])
    log = run.train(steps=run.steps[:3])
    assert log[0]["l2"] == 0.0
    assert log[2]["l2"] == pytest.approx(3 / 2 * distance(before, start), rel=1e-4)


def test_more_weight_holds_more(model_folder: Path) -> None:
    ways = []
    for weight in (0.0, 0.1, 1.0, 10.0):
        config = settings(model_folder, protect=["l2"], l2={"weight": weight}, **STEADY, num_train_epochs=4.0)
        start, run = Run(model_folder, config), Run(model_folder, config)
        run.train()
        ways.append(distance(run, start))
    plain, start = (Run(model_folder, settings(model_folder, **STEADY, num_train_epochs=4.0)) for _ in range(2))
    plain.train()
    assert ways[0] == distance(plain, start)
    assert ways == sorted(ways, reverse=True) and ways[-1] < 0.1 * ways[0]


def test_resumed_it_pulls_to_where_the_update_began(model_folder: Path, tmp_path: Path) -> None:
    """Not to where it was broken off."""
    config = settings(model_folder, protect=["l2"], l2={"weight": 3.0}, **STEADY, num_train_epochs=4.0)
    whole, broken, again = (Run(model_folder, config) for _ in range(3))
    log = whole.train()
    with pytest.raises(UpdateInterruptedError):
        broken.train(checkpoints=tmp_path, stop=StopAt(300))
    resumed = again.train(checkpoints=tmp_path)
    assert [entry["l2"] for entry in resumed] == [entry["l2"] for entry in log]
    assert same_bits(whole.weights(), again.weights())
