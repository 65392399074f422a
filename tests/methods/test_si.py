"""Synaptic intelligence: the path it sums up, whatever else acts on the weights, and the importance it makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.training import Run, StopAt, same_bits, settings
from treering.config import Config
from treering.errors import UpdateInterruptedError
from treering.methods import Losses
from treering.methods.si import DAMPING, SI


def measure() -> Losses:
    return Losses(0.0, 0.0)


def layer(*numbers: float) -> Any:
    made = nn.Linear(len(numbers), 1, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.tensor([numbers]))
    return made


def step(method: SI, model: Any, gradient: list[float], way: list[float]) -> Tensor | None:
    """One step of some optimiser, with a gradient that penalties and clipping change before it is taken."""
    model.weight.grad = torch.tensor([gradient])
    penalty = method.penalty(model)
    model.weight.grad = model.weight.grad.add_(3.0).mul_(0.1)
    with torch.no_grad():
        model.weight += torch.tensor([way])
    method.after_step(model)
    return penalty


def test_importance_by_hand() -> None:
    """Three weights: one lowers the loss on its way, one raises it, one comes back to where it was."""
    method, model = SI(Config.build({"si": {"weight": 2.0}})), layer(1.0, 2.0, 3.0)
    assert method.prepare(model, {}) is model
    assert step(method, model, [1.0, -1.0, 2.0], [-0.5, -0.2, -0.4]) is None
    step(method, model, [0.5, 0.0, 1.0], [-0.1, 0.1, 0.4])
    paths = torch.tensor([1.0 * 0.5 + 0.5 * 0.1, -1.0 * 0.2, 2.0 * 0.4 - 1.0 * 0.4])
    torch.testing.assert_close(method.running["weight"][0], paths)
    method.after_training(model, measure)
    ways = torch.tensor([0.36, 0.01, 0.0])
    wanted = (paths / (ways + DAMPING * ways.mean())).clamp_min(0)
    state = method.after_update(model, [])
    torch.testing.assert_close(state["weight"][0], wanted)
    assert state["weight"][0, 1] == 0

    later = SI(Config.build({"si": {"weight": 2.0}}))
    later.prepare(model, state)
    step(later, model, [0.0, 0.0, 0.0], [0.3, 0.0, -0.1])
    found = step(later, model, [0.0, 1.0, 0.0], [0.0, -1.0, 0.0])
    assert found is not None
    assert found.item() == pytest.approx(2 * float(wanted[0] * 0.09 + wanted[2] * 0.01), rel=1e-4)
    later.after_training(model, measure)
    ways = torch.tensor([0.09, 1.0, 0.01])
    gained = torch.tensor([0.0, 1.0, 0.0]) / (ways + DAMPING * ways.mean())
    torch.testing.assert_close(later.after_update(model, [])["weight"][0], wanted + gained)


def test_nothing_moved_nothing_gained() -> None:
    method, model = SI(Config()), layer(1.0, 2.0)
    method.prepare(model, {"weight": torch.ones(1, 2)})
    step(method, model, [1.0, 1.0], [0.5, 0.5])
    step(method, model, [1.0, 1.0], [-0.5, -0.5])
    method.after_training(model, measure)
    assert method.after_update(model, [])["weight"].tolist() == [[1.0, 1.0]]


def test_a_step_that_is_not_taken_leaves_nothing() -> None:
    """Such as one for which there was no memory: it is asked again."""
    method, model = SI(Config()), layer(1.0, 2.0)
    method.prepare(model, {})
    model.weight.grad = torch.full((1, 2), 100.0)
    method.penalty(model)
    step(method, model, [1.0, 1.0], [-0.5, 0.0])
    assert method.running["weight"].tolist() == [[0.5, 0.0]]


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"learning_rate": 2e-3},
    "full": {"finetuning_type": "full", "learning_rate": 5e-5},
    "accumulated": {"learning_rate": 2e-3, "gradient_accumulation_steps": 3},
}


@pytest.mark.parametrize("values", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("held", [False, True], ids=["alone", "beside a penalty and clipped"])
def test_the_paths_add_up_to_the_fall_of_the_loss(model_folder: Path, values: dict[str, Any], held: bool) -> None:
    """Whatever else is in the gradients that the optimiser is given, it is the loss of the rows that is explained."""
    others: dict[str, Any] = {"protect": ["l2", "si"], "l2": {"weight": 30.0}, "max_grad_norm": 0.01} if held else {}
    config = settings(model_folder, **{"protect": ["si"], "warmup_ratio": 0, **values, **others})
    run = Run(model_folder, config)
    ids = list(run.rows)
    size = len(ids) // config.gradient_accumulation_steps
    whole = [ids[at : at + size] for at in range(0, len(ids), size)]
    log = run.train(steps=[whole] * 21)
    paths = sum(float(path.sum()) for path in run.methods.by_name["si"].running.values())
    # The path of the last step is that to a loss which the log does not have.
    fall = log[0]["loss"] - (log[-1]["loss"] - (log[-2]["loss"] - log[-1]["loss"]))
    assert fall > 0.05
    assert paths == pytest.approx(fall, rel=0.1)
    if held:
        assert log[-1]["l2"] > 1e-4 and log[-1]["grad_norm"] > 10 * config.max_grad_norm


def test_ended_and_resumed_it_ends_in_the_same_bits(model_folder: Path, tmp_path: Path) -> None:
    names = Run(model_folder, settings(model_folder)).weights()
    state = {f"si.{name}": torch.full_like(weight, 0.1) for name, weight in names.items()}
    config = settings(model_folder, protect=["si"], num_train_epochs=2.0, learning_rate=1e-2, save_steps=1)
    whole, broken, again = (Run(model_folder, config, state=state) for _ in range(3))
    log = whole.train()
    with pytest.raises(UpdateInterruptedError):
        broken.train(checkpoints=tmp_path, stop=StopAt(200))
    resumed = again.train(checkpoints=tmp_path)
    assert [entry["si"] for entry in resumed] == [entry["si"] for entry in log]
    assert same_bits(whole.weights(), again.weights())
    once_more = Run(model_folder, config, state=state)  # Of which an update that was killed later has only this.
    once_more.train(checkpoints=tmp_path)
    kept = []
    for run in (whole, again, once_more):
        run.methods.after_training(run.model, measure)
        kept.append(run.methods.after_update(run.model, lambda: []))
    assert same_bits(kept[0], kept[1]) and same_bits(kept[0], kept[2])
    assert any(not torch.equal(each, state[name]) for name, each in kept[0].items())


def test_importance_does_not_hang_on_how_weights_are_saved(model_folder: Path) -> None:
    """`full` is cast to bfloat16 after training: the ways are taken before."""
    config = settings(model_folder, protect=["si"], finetuning_type="full", learning_rate=1e-3, max_steps=2)
    run = Run(model_folder, config)
    run.train()
    run.methods.after_training(run.model, measure)
    exact = run.methods.after_update(run.model, lambda: [])
    for weight in run.model.parameters():
        weight.data = weight.data.bfloat16()
    assert same_bits(exact, run.methods.after_update(run.model, lambda: []))
