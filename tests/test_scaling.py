"""Float16: the losses of float32, gradients of their own size everywhere, and a step that overflows is skipped."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_serve_worker import Inside
from tests.training import Counted, KillAt, KilledError, Run, StopAt, same_bits, settings
from treering import Workspace, registry, scaling, sharding, shares
from treering.batches import make_batch
from treering.errors import TreeringError, UpdateInterruptedError
from treering.evaluate import evaluate
from treering.lesson import rounded
from treering.methods.freeze import importance
from treering.model import load, load_tokenizer
from treering.recovery import LossError
from treering.report import write
from treering.results import read_results
from treering.scaling import FIRST, LEAST, SCALE, SKIPPED, noted, scale
from treering.testing import toy_rows

F16, F32 = torch.float16, torch.float32


def half(folder: Path, **values: Any) -> Any:
    return settings(folder, **{"fp16": True, "learning_rate": 1e-2, "per_device_train_batch_size": 8, **values})


KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "lora": (1, {}),
    "threads and accumulation": (2, {"gradient_accumulation_steps": 2}),
    "layers again, with noise": (1, {"gradient_checkpointing": True, "neftune_noise_alpha": 5.0}),
    "full, held": (1, {"finetuning_type": "full", "learning_rate": 1e-3, "protect": ["l2", "si"]}),
    "adapter": (1, {"finetuning_type": "adapter"}),
    "norm": (1, {"finetuning_type": "norm"}),
    "muon": (1, {"optim": "muon"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_those_of_float32(model_folder: Path, kind: str, threads: Callable[[int], None]) -> None:
    count, values = KINDS[kind]
    threads(count)
    logs = [
        Run(model_folder, half(model_folder, num_train_epochs=4.0, fp16=fp16, **values)).train()
        for fp16 in (True, False)
    ]
    found, wanted = ([entry["loss"] for entry in log] for log in logs)
    assert found == pytest.approx(wanted, rel=0.02) and wanted[-1] < wanted[0]
    # The norms as well: gradients are as large as they would be without a scale.
    found, wanted = ([entry["grad_norm"] for entry in log] for log in logs)
    assert found == pytest.approx(wanted, rel=0.1)
    assert {entry[SCALE] for entry in logs[0]} == {FIRST} and SCALE not in logs[1][0]


def test_an_overflow_skips_the_step(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight changes, whatever methods do after steps; the rate goes on, and the guard sees a good loss."""
    monkeypatch.setattr(scaling, "FIRST", 2.0**100)
    protect = ["si", "ema", "l2"]
    run = Run(model_folder, half(model_folder, max_steps=3, protect=protect, lr_scheduler_type="constant"))
    before = run.weights()
    log = run.train()
    assert same_bits(run.weights(), before)
    assert [entry[SCALE] for entry in log] == [2.0**100, 2.0**99, 2.0**98]
    for entry in log:
        assert entry[SKIPPED] == 1 and "grad_norm" not in entry and entry["lr"] > 0
        assert all(math.isfinite(value) for value in entry.values())
    choice = scaling.choices(log)[SCALE]
    assert choice == {
        "value": 2.0**98,
        "reason": "gradients overflowed in 3 of 3 steps, which were skipped: 1, 2, 3",
    }
    run.methods.after_training(run.model, lambda: pytest.fail("nobody asks"))
    assert same_bits(run.weights(), before)


def test_rules_of_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of `GradScaler`, step by step."""
    monkeypatch.setattr(scaling, "GOOD", 3)
    theirs, rng = torch.amp.GradScaler("cpu", growth_interval=3), random.Random(0)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], 0.0)
    log: list[dict[str, float]] = []
    for step in range(200):
        theirs.scale(weight.sum())
        assert scale(log, F16) == theirs.get_scale()
        norm = math.inf if rng.random() < 0.2 else 1.0
        weight.grad = torch.tensor([norm])
        theirs.step(optimizer)
        theirs.update()
        log.append({"step": step, **noted(norm, scale(log, F16), F16)})
    assert len({entry[SCALE] for entry in log}) > 4
    assert scale(log, F32) == scale(log, torch.bfloat16) == 1.0
    assert noted(math.inf, 8.0, F32) == {"grad_norm": math.inf}


def test_at_the_lowest_scale_the_guard_decides(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert noted(math.nan, 2 * LEAST, F16) == {SCALE: 2 * LEAST, SKIPPED: 1.0}
    monkeypatch.setattr(scaling, "FIRST", LEAST)
    monkeypatch.setattr(sharding, "clipped", lambda weights, norm: math.inf)
    with pytest.raises(LossError, match=r"grad_norm is inf at step 1.*set fp16: false.*65504"):
        Run(model_folder, half(model_folder, max_steps=1)).train()


@pytest.mark.parametrize("protect", [[], ["si", "reptile"]], ids=["plain", "held"])
def test_interrupted_or_not_it_ends_in_the_same_bits(
    tmp_path: Path,
    model_folder: Path,
    threads: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
    protect: list[str],
) -> None:
    """Steps are skipped before the first checkpoint, and after some; in between the scale rises."""
    threads(2)
    monkeypatch.setattr(shares, "LEAST_ROWS", 2)
    monkeypatch.setattr(scaling, "GOOD", 2)
    monkeypatch.setattr(scaling, "FIRST", 2.0**22)
    values = {"per_device_train_batch_size": 4, "num_train_epochs": 4.0, "save_steps": 4, "protect": protect}
    config = half(model_folder, **values)
    whole, counted = Run(model_folder, config), Counted()
    log = whole.train(checkpoints=tmp_path / "whole", stop=counted)
    skipped = [entry["step"] for entry in log if SKIPPED in entry]
    assert skipped[0] == 1 and skipped[-1] > 4 and len(skipped) < len(log) / 2
    rng, ended = random.Random(0), 0
    for _ in range(100):
        last = Run(model_folder, config)
        end = rng.choice([KillAt, StopAt])(rng.randint(1, counted.looks // 2))
        try:
            resumed = last.train(checkpoints=tmp_path / "ended", stop=end)
        except (UpdateInterruptedError, KilledError):
            ended += 1
        else:
            break
    assert ended
    for entry in [*log, *resumed]:
        del entry["tokens_per_second"]
    assert resumed == log
    assert same_bits(last.weights(), whole.weights())


@pytest.mark.parametrize("first", [FIRST, 2.0**60])
def test_importance_has_the_size_of_the_gradients(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch, first: float
) -> None:
    monkeypatch.setattr(scaling, "FIRST", first)
    run = Run(model_folder, half(model_folder, protect=["ewc"], finetuning_type="full", learning_rate=1e-3))
    batches = [make_batch([row], run.pad_id) for row in run.rows.values()]
    own = importance(run.model, batches, F16)
    fisher = run.methods.by_name["ewc"].after_update(run.model.half(), batches)  # As `full` is by then.
    plain = Run(model_folder, half(model_folder, fp16=False, protect=["ewc"], finetuning_type="full"))
    for key, tensor in importance(plain.model, batches, F32).items():
        torch.testing.assert_close(own[key], tensor, rtol=0.05, atol=0.0)
    wanted = plain.methods.by_name["ewc"].after_update(plain.model, batches)
    near, far = (torch.cat([each.flatten() for each in kind.values()]) for kind in (fisher, wanted))
    assert torch.corrcoef(torch.stack([near, far]))[0, 1] > 0.999


def test_weights_that_float16_lacks_are_told() -> None:
    weight = torch.tensor([1.0, 7e4])
    with pytest.raises(TreeringError, match=r"lm_head has learned 70000, and torch.float16 ends at 65504: .*fp16: f"):
        rounded("lm_head", weight, F16)
    assert rounded("lm_head", weight, torch.bfloat16).dtype == torch.bfloat16


def test_an_update_is_judged_kept_and_served(workspace: Callable[..., Workspace], model_folder: Path) -> None:
    ws = workspace(fp16=True, learning_rate=1e-2, max_steps=12, eval={"max_new_tokens": 8})
    for task in ("pens", "cups"):
        ws.ingest(toy_rows(task, 24), task=task)
        made = ws.update()
        assert made is not None and made.problems() == []
        ws.promote(made.name, force=True)
    version = registry.get(ws)
    choices, machine = version.manifest["choices"], version.manifest["machine"]
    assert choices["precision"] == {"value": "float16", "reason": "as set"}
    assert choices[SCALE] == {"value": FIRST, "reason": "no gradient overflowed"}
    assert machine["precision"] == "float16"
    log = [json.loads(line) for line in (version.folder / "log.jsonl").read_text().splitlines()]
    assert {entry[SCALE] for entry in log} == {FIRST}
    page = write(version.folder, version.name, version.manifest, [{**entry, SKIPPED: 1.0} for entry in log])
    assert "loss_scale" in page.read_text()

    model = load(model_folder, ws.config(), version)
    assert model.dtype == F16
    measured = read_results(version.folder / "results.parquet")
    stored = ws.catalog.examples([result.id for result in measured])
    rows = [(stored[result.id], result.task) for result in measured]
    again = evaluate(model, load_tokenizer(model_folder), rows, version.manifest["metrics"], ws.config(), quiet=True)
    assert again == measured

    inside = Inside(ws)
    inside.put(op="load", version="v2", keep=False)
    inside.generate("v2", "v2")
    inside.run(1)
    assert inside.text("v2") and not any(event["event"] == "failed" for event in inside.events)
