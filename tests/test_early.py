"""Early stopping: when it ends, whose weights stay, and the same of both however often it is interrupted."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training import Counted, KillAt, KilledError, Run, StopAt, chat, same_bits, settings
from treering import Workspace, early, registry
from treering import train as train_module
from treering.config import Config
from treering.errors import UpdateInterruptedError
from treering.passes import losses
from treering.testing import toy_rows

VALUES: dict[str, Any] = {
    "learning_rate": 3e-2,
    "lr_scheduler_type": "constant",
    "max_steps": 40,
    "per_device_train_batch_size": 8,
    "early_stopping_steps": 2,
    "eval_steps": 3,
}


class Spared(Run):
    """Rows whose answers are drawn: there is nothing to learn but the rows themselves, so the others get worse."""

    def __init__(self, folder: Path, **values: Any) -> None:
        draw = random.Random(1)
        answers = ["red", "green", "blue and grey", "none of them"]
        rows = [chat(("user", f"item {n}"), ("assistant", draw.choice(answers))) for n in range(48)]
        config = settings(folder, **{**VALUES, **values})
        super().__init__(folder, config, rows)
        self.aside = early.aside(list(self.rows), config)
        learned = [id for id in self.rows if id not in self.aside]
        self.steps = [[learned[at % 40 : at % 40 + 8]] for at in range(0, 320, 8)]

    def train(self, **options: Any) -> list[dict[str, float]]:
        return super().train(aside=[self.rows[id] for id in self.aside], **options)


def looks(log: Sequence[dict[str, float]]) -> dict[int, float]:
    return {int(entry["step"]): entry["eval_loss"] for entry in log if "eval_loss" in entry}


def test_rows_kept_aside() -> None:
    ids = [f"row {n}" for n in range(100)]
    config = Config.build({"early_stopping_steps": 3})
    kept = early.aside(ids, config)
    assert len(kept) == 10 and set(kept) < set(ids)
    assert early.aside(ids[::-1], config) == kept
    assert set(early.aside(ids, config.model_copy(update={"seed": 1}))) != set(kept)
    assert early.aside(ids, Config.build({})) == []
    sizes = {31: 0, 32: 8, 80: 8, 640: 64, 5000: 64}
    assert {count: len(early.aside([str(n) for n in range(count)], config)) for count in sizes} == sizes


def test_when_it_is_over() -> None:
    config = Config.build({"early_stopping_steps": 2})

    def log(*found: float) -> list[dict[str, float]]:
        entries = [{"step": float(step)} for step in range(1, 2 * len(found) + 1)]
        for entry, loss in zip(entries[1::2], found, strict=True):
            entry["eval_loss"] = loss
        return entries

    ends = [(), (3.0,), (3.0, 2.0), (3.0, 4.0), (3.0, 2.0, 2.0)]
    goes_on = {found: early.over(log(*found), config) for found in ends}
    assert not any(goes_on.values()), goes_on
    for found, best in (((3.0, 2.0, 2.0, 2.5), (4, 2.0)), ((3.0, 4.0, 5.0), (2, 3.0))):
        assert early.over(log(*found), config)
        assert early.best(log(*found)) == best
    assert not early.over(log(1.0, 2.0, 3.0), Config.build({}))


def test_it_ends_with_the_weights_of_the_lowest_loss(model_folder: Path) -> None:
    run = Spared(model_folder)
    seen: list[dict[str, float]] = []
    weights: dict[int, dict[str, Tensor]] = {}

    def track(entry: Any) -> None:
        seen.append(dict(entry))
        weights[int(entry["step"])] = run.weights()

    log = run.train(track=track)
    found = looks(log)
    step, loss = early.best(log) or (0, 0.0)
    assert len(log) < 40 and early.over(log, run.config)
    assert list(found) == list(range(3, len(log) + 1, 3)) and 0 < step < len(log)
    assert loss == min(found.values()) and list(found)[-3] == step
    assert same_bits(run.weights(), weights[step]) and not same_bits(run.weights(), weights[len(log)])
    assert {int(e["step"]): e["eval_loss"] for e in seen if set(e) == {"step", "eval_loss"}} == found
    aside = [run.rows[id] for id in run.aside]
    assert sum(losses(run.model, aside, run.config, run.pad_id)) / len(aside) == pytest.approx(loss, rel=1e-6)


def test_to_its_end_it_takes_the_same_steps(model_folder: Path) -> None:
    """Measuring changes nothing but which weights are taken."""
    plain, spared = Spared(model_folder, early_stopping_steps=None), Spared(model_folder, early_stopping_steps=99)
    plain.steps, plain.aside = spared.steps, []
    wanted, found = plain.train(), spared.train()
    assert [e["loss"] for e in found] == [e["loss"] for e in wanted]
    assert max(looks(found)) == len(found) == 40  # Forty is no multiple of three.
    best = early.best(found)
    assert best is not None and best[0] < 40 and not same_bits(plain.weights(), spared.weights())


@pytest.mark.parametrize(
    ("count", "values"),
    [
        (2, {"save_steps": 4}),
        (1, {"lora_dropout": 0.3, "save_minutes": 1e-9}),
        (1, {"optim": "schedule_free_adamw", "save_steps": 5}),
    ],
    ids=["threads", "dropout", "averaged"],
)
def test_ended_anywhere_it_ends_in_the_same_bits(
    tmp_path: Path, model_folder: Path, threads: Callable[[int], None], count: int, values: dict[str, Any]
) -> None:
    threads(count)
    whole, counted = Spared(model_folder, **values), Counted()
    log = whole.train(checkpoints=tmp_path / "whole", stop=counted)
    rng = random.Random(str(values))
    ended = 0
    for attempt in range(60):
        last = Spared(model_folder, **values)
        end = rng.choice([KillAt, StopAt])(rng.randint(1, counted.looks // 2))
        try:
            resumed = last.train(checkpoints=tmp_path / "ended", stop=end)
        except (UpdateInterruptedError, KilledError):
            ended += 1
            torch.manual_seed(attempt)
        else:
            break
    assert ended >= 2
    assert looks(resumed) == looks(log) and [e["loss"] for e in resumed] == [e["loss"] for e in log]
    assert same_bits(whole.weights(), last.weights())
    # A run that had ended, taken up again, is where it was.
    once_more = Spared(model_folder, **values)
    assert looks(once_more.train(checkpoints=tmp_path / "ended")) == looks(log)
    assert same_bits(whole.weights(), once_more.weights())


def test_a_loss_that_is_not_finite_is_no_better(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([2.0, math.nan, math.inf])
    monkeypatch.setattr(train_module, "losses", lambda model, rows, *_: [next(found)] * len(rows))
    log = Spared(model_folder).train()
    assert looks(log) == {3: pytest.approx(2.0), 6: early.BOUNDLESS, 9: early.BOUNDLESS}
    assert len(log) == 9


def test_stopped_while_it_measures(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step before is kept, and measured when training goes on."""
    whole = Spared(model_folder)
    log = whole.train()
    look = early.EarlyStopping.look

    def asked(self: early.EarlyStopping, log: list[dict[str, float]]) -> None:
        if len(log) == 6:
            raise UpdateInterruptedError("asked")
        look(self, log)

    monkeypatch.setattr(early.EarlyStopping, "look", asked)
    with pytest.raises(UpdateInterruptedError):
        Spared(model_folder).train(checkpoints=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0", "step-6"]
    monkeypatch.setattr(early.EarlyStopping, "look", look)
    last = Spared(model_folder)
    assert looks(last.train(checkpoints=tmp_path)) == looks(log)
    assert same_bits(whole.weights(), last.weights())


def test_a_version_says_where_it_stopped_and_why(workspace: Callable[..., Workspace]) -> None:
    ws = workspace(**{**VALUES, "early_stopping_steps": 1, "eval_steps": 2, "learning_rate": 0.1, "max_steps": 30})
    ws.ingest(toy_rows("pens", 60), task="pens")
    version = ws.update()
    assert version is not None
    manifest = version.manifest
    said, cost = manifest["choices"]["early_stopping_steps"], manifest["cost"]
    log = [line for line in (version.folder / "log.jsonl").read_text().splitlines() if line]
    assert said["value"] == cost["steps"] == len(log) < 30
    assert 0 < cost["rows_trained"] <= 8 * len(log)
    new = len(manifest["rows"]["pens"])
    assert f"stopped after step {len(log)} of 30" in said["reason"]
    assert f"on 8 of {new} new rows" in said["reason"]
    assert "cross entropy on rows kept aside" in (version.folder / "report.html").read_text()
    assert len(manifest["aside"]) == 8 and set(manifest["aside"]) < set(manifest["rows"]["pens"])
    assert registry.consumed(ws, version) == {id for ids in manifest["rows"].values() for id in ids}


def test_too_few_rows_are_all_learned(workspace: Callable[..., Workspace]) -> None:
    ws = workspace(**{**VALUES, "max_steps": 2})
    ws.ingest(toy_rows("pens", 20), task="pens")
    version = ws.update()
    assert version is not None
    said = version.manifest["choices"]["early_stopping_steps"]
    assert said == {
        "value": 2,
        "reason": f"{len(version.rows)} new rows are fewer than 32, so none was kept aside and training ran to its end",
    }
    assert all("eval_loss" not in line for line in (version.folder / "log.jsonl").read_text().splitlines())
