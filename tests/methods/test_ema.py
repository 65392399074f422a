"""The average of the weights over the last steps: which weights it has of which step, and the same however it ends."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training import Counted, Run, StopAt, same_bits, settings
from treering.config import Config
from treering.errors import ConfigError, UpdateInterruptedError
from treering.methods import Losses
from treering.methods.ema import EMA
from treering.passes import losses

NO_LOSSES = Losses(0.0, 0.0)


def made(folder: Path, **values: Any) -> Run:
    sizes = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 12}
    return Run(folder, settings(folder, **{**sizes, "protect": ["ema"], **values}))


def ended(run: Run, **options: Any) -> dict[str, Tensor]:
    run.train(**options)
    run.methods.after_training(run.model, lambda: NO_LOSSES)
    return run.weights()


@pytest.mark.parametrize("decay", [0.999, 0.3])
@pytest.mark.parametrize("kind", ["lora", "freeze"])
def test_what_each_step_counts(model_folder: Path, kind: str, decay: float) -> None:
    """Against the closed form: step i of T has the share `(1 - d_i) d_(i+1) ... d_T`."""
    run = made(model_folder, finetuning_type=kind, ema={"decay": decay})
    steps: list[dict[str, Tensor]] = []
    found = ended(run, track=lambda _: steps.append(run.weights()))
    decays = [min(decay, (step - 1) / (step + 9)) for step in range(1, 13)]
    shares = [(1 - d) * float(torch.tensor(decays[at + 1 :]).double().prod()) for at, d in enumerate(decays)]
    assert sum(shares) == pytest.approx(1.0)
    assert not same_bits(found, steps[-1])
    for name, weight in found.items():
        wanted = sum(share * step[name].double() for share, step in zip(shares, steps, strict=True))
        torch.testing.assert_close(weight.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 10, 100, 1000])
def test_a_short_update_is_averaged_over_less(steps: int) -> None:
    """A weight that is 1, 2, 3, ... after each step: the average is as old as an eleventh of the steps, at most."""
    model: Any = torch.nn.Linear(1, 1, bias=False)
    short, long = (EMA(Config.build({"ema": {"decay": decay}})) for decay in (0.9, 0.9999))
    for step in range(1, steps + 1):
        torch.nn.init.constant_(model.weight, step)
        short.after_step(model)
        long.after_step(model)
    assert steps - long.running["weight"].item() == pytest.approx((steps - 1) / 11, abs=1e-2)
    assert steps - short.running["weight"].item() == pytest.approx(min((steps - 1) / 11, 9.0), abs=0.4)


def test_the_average_is_better_than_the_last_step_where_steps_are_large(model_folder: Path) -> None:
    """Over a few seeds: one last step may lie well by chance."""
    last = average = 0.0
    sizes = {"per_device_train_batch_size": 2, "learning_rate": 0.02, "max_steps": 60}
    for seed in range(1, 5):
        run = made(model_folder, **sizes, lr_scheduler_type="constant", seed=seed)
        run.train()
        last += sum(losses(run.model, list(run.rows.values()), run.config, run.pad_id))
        run.methods.after_training(run.model, lambda: NO_LOSSES)
        average += sum(losses(run.model, list(run.rows.values()), run.config, run.pad_id))
    assert average < 0.8 * last


def test_ended_anywhere_it_ends_in_the_same_bits(tmp_path: Path, model_folder: Path) -> None:
    whole, counted = made(model_folder), Counted()
    wanted = ended(whole, checkpoints=tmp_path / "whole", stop=counted)
    looks = counted.looks // 12
    for step in (1, 4, 3):
        with pytest.raises(UpdateInterruptedError):
            made(model_folder).train(checkpoints=tmp_path / "ended", stop=StopAt(step * looks + 1))
    last = made(model_folder)
    assert same_bits(wanted, ended(last, checkpoints=tmp_path / "ended"))
    assert same_bits(whole.methods.running["ema"], last.methods.running["ema"])
    # All steps were done, and the averages put in place: taken up again, that comes to the same.
    assert same_bits(wanted, ended(made(model_folder), checkpoints=tmp_path / "whole"))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"ema": {"decay": 1}}, "ema.decay: .*less than 1.*got 1"),
        ({"early_stopping_steps": 2}, "early_stopping_steps is 2, but protect has ema.*drop either"),
        (
            {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
            "optim is schedule_free_adamw.*but protect has ema: drop either",
        ),
        ({"protect": ["ema", "reptile"]}, "protect has ema and reptile.*drop either"),
        ({"protect": ["interpolate", "ema"]}, "protect has interpolate before ema.*list it last"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.build({"protect": ["ema"], **values})
    assert re.search(told, str(caught.value)), caught.value
    assert Config.build({"protect": ["ema", "interpolate"]}).protect == ("ema", "interpolate")
