"""Elastic weight consolidation: the importance it finds, and what it makes of an older one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training import Run, StopAt, same_bits, settings
from treering.batches import Batch, make_batch
from treering.errors import UpdateInterruptedError
from treering.methods import ewc as module
from treering.model import logits_at

KINDS: list[dict[str, Any]] = [{"learning_rate": 1e-2}, {"finetuning_type": "full", "learning_rate": 1e-3}]


def taught(folder: Path, state: dict[str, Tensor] | None = None, **values: Any) -> Run:
    run = Run(folder, settings(folder, protect=["ewc"], num_train_epochs=2.0, **values), state=state)
    run.train()
    return run


def batches(run: Run) -> list[Batch]:
    return [make_batch([row], run.pad_id) for row in run.rows.values()]


def kept(run: Run, rows: list[Batch] | None = None) -> dict[str, Tensor]:
    found = batches(run) if rows is None else rows
    return run.methods.by_name["ewc"].after_update(run.model, found)  # type: ignore[no-any-return]


@pytest.mark.parametrize("values", KINDS, ids=["lora", "full"])
def test_importance_is_the_squared_gradient_of_each_row(model_folder: Path, values: dict[str, Any]) -> None:
    """Row by row through the bare model: the sum over answer tokens of `-log p`; the whole has a mean of 1."""
    run = taught(model_folder, **values)
    found = kept(run)
    wanted = {name: torch.zeros_like(weight) for name, weight in run.weights().items()}
    for row in run.rows.values():
        run.model.zero_grad()
        said = run.model(input_ids=torch.tensor([row.ids])).logits[0].log_softmax(-1)
        for at in row.answers:
            (-said[at - 1, row.ids[at]]).backward(retain_graph=True)
        for name, weight in run.model.named_parameters():
            if weight.grad is not None:
                wanted[name] += weight.grad**2
    mean = torch.cat([each.flatten() for each in wanted.values()]).mean()
    assert found.keys() == wanted.keys()
    for name, each in wanted.items():
        torch.testing.assert_close(found[name], each / mean, rtol=1e-2, atol=1e-3)
    assert torch.cat([each.flatten() for each in found.values()]).mean().item() == pytest.approx(1.0, rel=1e-4)
    assert same_bits(found, kept(run))


def test_old_importance_fades_and_new_is_added(model_folder: Path) -> None:
    names = Run(model_folder, settings(model_folder)).weights()
    generator = torch.Generator().manual_seed(0)
    old = {name: torch.rand(weight.shape, generator=generator) for name, weight in names.items()}
    state = {f"ewc.{name}": each for name, each in old.items()}
    run = taught(model_folder, state, ewc={"gamma": 0.5, "weight": 0.1})
    both = kept(run)
    run.methods.by_name["ewc"].anchor = None  # As in a first update.
    alone = kept(run)
    for name, each in old.items():
        torch.testing.assert_close(both[name], 0.5 * each + alone[name])


def test_the_term_is_what_it_says(model_folder: Path) -> None:
    """`weight / 2 * sum(F * (w - start)^2)` of the step before."""
    steady = {"learning_rate": 1e-2, "warmup_ratio": 0, "lr_scheduler_type": "constant"}
    config = settings(model_folder, protect=["ewc"], ewc={"weight": 3.0}, **steady)
    start = Run(model_folder, config).weights()
    importance = {name: torch.rand(weight.shape) for name, weight in start.items()}
    state = {f"ewc.{name}": each for name, each in importance.items()}
    before, run = Run(model_folder, config, state=state), Run(model_folder, config, state=state)
    before.train(steps=before.steps[:2])
    log = run.train(steps=run.steps[:3])
    away = {name: weight - start[name] for name, weight in before.weights().items()}
    wanted = 3 / 2 * sum(float((importance[name] * each**2).sum()) for name, each in away.items())
    assert log[2]["ewc"] == pytest.approx(wanted, rel=1e-4)


def test_weights_of_no_importance_learn_freely(model_folder: Path) -> None:
    """Held is what has importance, and no more."""
    names = Run(model_folder, settings(model_folder)).weights()
    state = {f"ewc.{name}": torch.full_like(weight, 1e4 * ("q_proj" in name)) for name, weight in names.items()}
    run = taught(model_folder, state, ewc={"weight": 1.0}, max_grad_norm=1e9, learning_rate=1e-2)
    free = taught(model_folder, learning_rate=1e-2)
    ways = {name: float((weight - names[name]).norm()) for name, weight in run.weights().items()}
    held = [way / float((free.weights()[name] - names[name]).norm()) for name, way in ways.items() if "q_proj" in name]
    others = [
        way / float((free.weights()[name] - names[name]).norm()) for name, way in ways.items() if "q_proj" not in name
    ]
    assert max(held) < 0.5 < min(others)


def test_a_sample_of_many_rows(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = taught(model_folder)
    whole = kept(run)
    rows, read = batches(run), list[int]()

    def noted(model: Any, ids: Tensor, **others: Any) -> Tensor:
        read.extend(at for at, row in enumerate(rows) if row.inputs["ids"] is ids)
        return logits_at(model, ids, **others)

    monkeypatch.setattr(module, "logits_at", noted)
    monkeypatch.setattr(module, "ROWS", 5)
    some = kept(run, rows)
    assert len(set(read)) == len(read) == 5
    assert not same_bits(some, whole)
    assert same_bits(some, kept(run, rows)) and read[:5] == read[5:]


def test_a_loss_of_nothing_gives_no_importance(model_folder: Path) -> None:
    """Rather than a division by zero."""
    assert not any(each.any() for each in kept(taught(model_folder), []).values())


def test_the_model_is_left_as_it_was(model_folder: Path) -> None:
    run = taught(model_folder, lora_dropout=0.5)
    before = run.weights()
    run.model.train()
    first = kept(run)
    assert run.model.training
    assert same_bits(first, kept(run))  # Without dropout.
    assert same_bits(before, run.weights())
    assert all(weight.grad is None for weight in run.model.parameters())


def test_ended_and_resumed_it_ends_in_the_same_bits(model_folder: Path, tmp_path: Path) -> None:
    first = taught(model_folder, learning_rate=1e-2)
    state = {f"ewc.{name}": each for name, each in kept(first).items()}
    values: dict[str, Any] = {"protect": ["ewc"], "ewc": {"weight": 1.0}, "learning_rate": 1e-2, "save_steps": 1}
    config = settings(model_folder, num_train_epochs=2.0, **values)
    whole, broken, again = (Run(model_folder, config, state=state) for _ in range(3))
    log = whole.train()
    with pytest.raises(UpdateInterruptedError):
        broken.train(checkpoints=tmp_path, stop=StopAt(200))
    resumed = again.train(checkpoints=tmp_path)
    assert [entry["ewc"] for entry in resumed] == [entry["ewc"] for entry in log]
    assert same_bits(whole.weights(), again.weights()) and same_bits(kept(whole), kept(again))


def test_importance_of_a_model_that_is_saved_in_bfloat16(model_folder: Path) -> None:
    """As `full` is by then where bfloat16 is computed in: its gradients have fewer bits, their squares have not."""
    run = taught(model_folder, finetuning_type="full", learning_rate=1e-3)
    whole = kept(run)
    run.model.bfloat16()
    run.methods.by_name["ewc"].config = run.config.model_copy(update={"bf16": True})
    found = kept(run)
    assert {each.dtype for each in found.values()} == {torch.float32}
    near, far = (torch.cat([each.flatten() for each in kind.values()]) for kind in (found, whole))
    assert torch.corrcoef(torch.stack([near, far]))[0, 1] > 0.95
