"""Going back part of the way, now and then: how far, from where, and the same however often it is interrupted."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training import Counted, Run, StopAt, chat, same_bits, settings
from treering.config import Config
from treering.errors import ConfigError, UpdateInterruptedError
from treering.methods import Losses, trained
from treering.methods.reptile import Reptile
from treering.model import Tokens
from treering.passes import losses
from treering.testing import toy_rows


def made(folder: Path, **values: Any) -> Run:
    sizes = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 8, "lr_scheduler_type": "constant"}
    return Run(folder, settings(folder, **{**sizes, "protect": ["reptile"], **values}))


def ended(run: Run, **options: Any) -> dict[str, Tensor]:
    run.train(**options)
    run.methods.after_training(run.model, lambda: Losses(0.0, 0.0))
    return run.weights()


def test_by_hand() -> None:
    """A weight goes up by 1 a step; every second step half of it is taken back."""
    layer = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.constant_(layer.weight, 10.0)
    model: Any = layer
    method = Reptile(Config.build({"reptile": {"steps": 2, "rate": 0.5}}))
    method.prepare(model, {})
    found = []
    for _ in range(5):
        torch.nn.init.constant_(layer.weight, layer.weight.item() + 1)
        method.after_step(model)
        found.append(layer.weight.item())
    assert found == [11.0, 11.0, 12.0, 12.0, 13.0]
    method.after_training(model, lambda: Losses(0.0, 0.0))
    assert layer.weight.item() == 12.5  # The fifth step was one alone.


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_it_is_training_up_to_the_first_time(model_folder: Path, kind: str) -> None:
    """Which the steps of training without it tell, for the optimiser is the same."""
    values = {"finetuning_type": kind, "learning_rate": 1e-2 if kind == "lora" else 1e-3}
    plain = made(model_folder, protect=[], **values)
    start = plain.weights()
    steps: list[dict[str, Tensor]] = []
    plain.train(track=lambda _: steps.append(plain.weights()))
    run = made(model_folder, reptile={"steps": 3, "rate": 0.25}, **values)
    found: list[dict[str, Tensor]] = []
    run.train(track=lambda _: found.append(run.weights()))
    assert same_bits(found[0], steps[0]) and same_bits(found[1], steps[1])
    moved = 0.0
    for name, weight in found[2].items():
        torch.testing.assert_close(weight, start[name] + 0.25 * (steps[2][name] - start[name]), rtol=1e-5, atol=1e-6)
        moved += float((steps[2][name] - start[name]).abs().sum())
    assert moved > 0
    # The second time, from where the first had come to.
    assert not same_bits(found[5], found[2])
    assert same_bits(run.methods.running["reptile"] | found[5], run.methods.running["reptile"])


def test_the_last_steps_count_too(model_folder: Path) -> None:
    """Fewer than `steps` of them, be it all there are, are followed by one way back; none, by none."""
    plain, few = made(model_folder, protect=[], max_steps=2), made(model_folder, max_steps=2)
    start, whole = plain.weights(), ended(plain)
    for name, weight in ended(few).items():
        torch.testing.assert_close(weight, start[name] + 0.5 * (whole[name] - start[name]), rtol=1e-5, atol=1e-6)
    run = made(model_folder, reptile={"steps": 4})
    run.train()
    before = run.weights()
    run.methods.after_training(run.model, lambda: Losses(0.0, 0.0))
    assert same_bits(before, run.weights())


def test_ended_anywhere_it_ends_in_the_same_bits(tmp_path: Path, model_folder: Path) -> None:
    values: dict[str, Any] = {"reptile": {"steps": 3}}
    whole, counted = made(model_folder, **values), Counted()
    wanted = ended(whole, checkpoints=tmp_path / "whole", stop=counted)
    looks = counted.looks // 8
    for step in (1, 3, 1):
        with pytest.raises(UpdateInterruptedError):
            made(model_folder, **values).train(checkpoints=tmp_path / "ended", stop=StopAt(step * looks + 1))
    last = made(model_folder, **values)
    assert same_bits(wanted, ended(last, checkpoints=tmp_path / "ended"))
    assert same_bits(whole.methods.running["reptile"], last.methods.running["reptile"])
    # Two steps were left over and gone back from: taken up again, that happens once, not twice.
    assert same_bits(wanted, ended(made(model_folder, **values), checkpoints=tmp_path / "whole"))


def test_what_was_known_is_forgotten_less(model_folder: Path) -> None:
    """Pens, then cups without it and with it: the less is kept of each way, the less pens are forgotten."""
    sizes = {"max_steps": 20, "per_device_train_batch_size": 8, "lr_scheduler_type": "cosine"}

    def loss(run: Run, rows: Mapping[str, Tokens]) -> float:
        return sum(losses(run.model, list(rows.values()), run.config, run.pad_id)) / len(rows)

    first = made(model_folder, protect=[], **sizes)
    parent = ended(first)
    lost = []
    for rate in (None, 0.5, 0.1):
        method: dict[str, Any] = {"protect": []} if rate is None else {"reptile": {"rate": rate}}
        cups = [chat(("user", row["text"]), ("assistant", row["label"])) for row in toy_rows("cups", 24)]
        run = Run(model_folder, made(model_folder, **sizes, **method).config, cups)
        with torch.no_grad():
            for name, weight in trained(run.model).items():
                weight.copy_(parent[name])
        run.methods.prepare(run.model, {})
        before = loss(run, run.rows)
        ended(run)
        assert loss(run, run.rows) < before - 1
        lost.append(loss(run, first.rows))
    assert lost[0] > 1.2 * lost[1] > 2 * lost[2]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"reptile": {"rate": 1}}, "reptile.rate: .*less than 1.*got 1"),
        ({"reptile": {"steps": 0}}, "reptile.steps: .*1.*got 0"),
        ({"early_stopping_steps": 2}, "early_stopping_steps is 2, but protect has reptile.*drop either"),
        (
            {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
            "optim is schedule_free_adamw.*but protect has reptile: drop either",
        ),
        ({"protect": ["interpolate", "reptile"]}, "protect has interpolate before reptile.*list it last"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.build({"protect": ["reptile"], **values})
    assert re.search(told, str(caught.value)), caught.value
