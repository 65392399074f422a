"""The range test: which rate it takes, that it leaves no trace, and that a killed update chooses no other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import Counted, KillAt, KilledError, Run, StopAt, same_bits, settings
from treering import Workspace, rates, registry, scaling
from treering.automate import culprit
from treering.candidate import Candidate
from treering.config import Config
from treering.errors import UpdateInterruptedError
from treering.memory import Memory, Remembered
from treering.methods import Losses
from treering.model import Tokens
from treering.passes import losses
from treering.rates import Choice, RangeTest, Sample, Tried
from treering.schedule import LEARNING_RATES, default_rate
from treering.testing import toy_rows

LONG: dict[str, Any] = {"num_train_epochs": 15.0, "per_device_train_batch_size": 8, "eval": {"max_new_tokens": 4}}
"""Settings of updates that repay a range test."""

QUICK_GATE = {"margin": 1.0, "floor": 1.0}


def no_bar(steps: int = 1, note: str = "") -> None:
    pass


@pytest.mark.parametrize(
    ("gains", "rate", "asked"),
    [
        ({1: 5, 2: 4, 0.5: 3}, 1, [1, 2, 0.5]),
        ({1: 5, 2: 6, 4: 7}, 2, [1, 2]),  # Not above twice the default.
        ({1: 5, 2: 4, 0.5: 6, 0.25: 7}, 0.25, [1, 2, 0.5, 0.25]),
        ({1: 5, 2: 5, 0.5: 5}, 1, [1, 2, 0.5]),  # What gains nothing is not taken.
        ({1: -math.inf, 2: -math.inf, 0.5: -math.inf, 0.25: 1}, 0.25, [1, 2, 0.5, 0.25]),
        ({1: -math.inf, 2: -math.inf, 0.5: 1, 0.25: 0.5}, 0.5, [1, 2, 0.5, 0.25]),
        ({1: 5, 2: -math.inf, 0.5: 4}, 1, [1, 2, 0.5]),
    ],
)
def test_it_climbs_from_the_default(gains: Mapping[float, float], rate: float, asked: list[float]) -> None:
    found: list[float] = []

    def gain(rate: float) -> float:
        found.append(rate)
        return gains[rate]

    assert rates.search(1, gain) == rate
    assert found == asked and len(found) <= rates.RATES


def test_what_is_forgotten_counts() -> None:
    before = Losses(4.0, 0.5)
    assert rates.gained(before, Losses(1.0, 0.5)) == 3.0
    assert rates.gained(before, Losses(1.0, 2.5)) == 3.0 - 2 * rates.OLD_WEIGHT
    assert rates.gained(before, None) == -math.inf


def remembered(count: int) -> Memory:
    memory = Memory(count)
    memory.rows = {f"old {n}": Remembered(f"old {n}", "pens", "a") for n in range(count)}
    return memory


def test_what_it_learns_it_does_not_measure() -> None:
    new = [f"new {n}" for n in range(100)]
    sample = Sample.drawn(new, remembered(31), Config.build({}))
    assert sorted([*sample.new, *sample.new_measured]) == sorted(new)
    assert sorted([*sample.memory.rows, *sample.old_measured]) == sorted(remembered(31).rows)
    assert (len(sample.new_measured), len(sample.old_measured)) == (24, 16)
    again = Sample.drawn(new[::-1], remembered(31), Config.build({}))
    assert (again.new, again.old_measured) == (sample.new, sample.old_measured)
    assert Sample.drawn(new, remembered(31), Config.build({"seed": 1})).new_measured != sample.new_measured
    assert Sample.drawn(new, Memory(), Config.build({})).old_measured == []


def test_wide_models_begin_lower() -> None:
    from transformers import LlamaConfig

    found = [default_rate("lora", LlamaConfig(hidden_size=width)) for width in (64, 576, 1152, 4096)]
    assert found == pytest.approx([1.5e-3, 1.5e-3, 7.5e-4, 2.109375e-4])
    assert default_rate("full", LlamaConfig(hidden_size=4096)) == LEARNING_RATES["full"]


def test_a_short_update_takes_the_default() -> None:
    new = [f"new {n}" for n in range(100)]
    sample = Sample.drawn(new, remembered(48), Config.build({}))
    assert sample.cost == 4 * 6 * 8 + 5 * 48 / 3
    rows = math.ceil(sample.cost / 0.3)
    short, enough = [[["x"] * 7, ["x"] * (rows - 8)]], [[["x"] * 7, ["x"] * (rows - 7)]]
    for kind, rate in LEARNING_RATES.items():
        config = Config.build({"finetuning_type": kind})
        found = rates.given(config, rate, sample, short)
        assert found is not None and found.value == rate and found.tried == ()
        assert found.reason == (
            f"default for {kind}; training takes {rows - 1} rows, and a range test would cost as much as 272, "
            "more than 30%"
        )
        assert rates.given(config, rate, sample, enough) is None
    assert rates.given(Config.build({"learning_rate": 0.3}), 0.3, sample, enough) == Choice(0.3, "as set")
    few = rates.given(Config.build({}), 3e-3, Sample.drawn(new[:23], remembered(48), Config.build({})), enough)
    assert few is not None and few.reason == "default for lora; 23 new rows are too few for a range test"


def test_the_choice_is_kept_whole(tmp_path: Path) -> None:
    assert rates.saved(tmp_path) is None
    tried = (Tried(1e-3, Losses(1.25, 0.1)), Tried(2e-3, None))
    for choice in (Choice(1e-3, "why", Losses(2.5, 0.0), tried, 1.5), Choice(3e-4, "as set")):
        rates.save(tmp_path, choice)
        assert rates.saved(tmp_path) == choice


def range_test(run: Run, **options: Any) -> RangeTest:
    ids = list(run.rows)
    memory = Memory(8)
    memory.rows = {id: Remembered(id, "pens", "a") for id in ids[:8]}
    sample = Sample.drawn(ids[8:], memory, run.config)
    return RangeTest(run.model, run.rows, sample, run.methods, run.config, pad_id=run.pad_id, **options)


WAYS: dict[str, dict[str, Any]] = {
    "lora": {"protect": ["replay", "distill"], "lora_dropout": 0.1},
    "full": {"finetuning_type": "full", "gradient_checkpointing": True},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "gradient_accumulation_steps": 2},
    "adapter": {"finetuning_type": "adapter"},
    "norm": {"finetuning_type": "norm", "optim": "muon"},
    "importance": {"finetuning_type": "freeze", "freeze_trainable_layers": 1, "freeze_by": "importance"},
    "muon": {"optim": "muon", "neftune_noise_alpha": 5.0},
    "schedule-free": {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
}


@pytest.mark.parametrize("way", WAYS)
def test_it_leaves_no_trace(model_folder: Path, way: str) -> None:
    """Weights, random state and mode are as before, whatever came of it; and training ends in the same bits."""
    config = settings(model_folder, max_steps=4, per_device_train_batch_size=4, **WAYS[way])
    run, untested = Run(model_folder, config), Run(model_folder, config)
    start, frozen = run.weights(), {name: p.clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    torch.manual_seed(5)
    state = torch.get_rng_state()
    for mode in (True, False):
        run.model.train(mode)
        test = range_test(run)
        changed = test.after(1e-2)
        assert changed is not None and changed != test.measure()
        assert test.after(1e-2) == changed
        assert test.after(1e38) is None
        asked = range_test(run, stop=StopAt(20))
        with pytest.raises(UpdateInterruptedError):
            asked.after(1e-2)
        assert same_bits(run.weights(), start) and run.model.training is mode
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(p, frozen[name]) for name, p in run.model.named_parameters() if name in frozen)
        assert all(p.grad is None for p in run.model.parameters())
    log = run.train()
    assert [e["loss"] for e in untested.train()] == [e["loss"] for e in log]
    assert same_bits(run.weights(), untested.weights())


def test_a_loss_that_is_not_finite_is_a_failure(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    test = range_test(Run(model_folder, settings(model_folder)))
    monkeypatch.setattr(rates, "losses", lambda *_: [1.0, math.nan])
    assert test.after(1e-3) is None


def test_methods_keep_their_state(model_folder: Path) -> None:
    """Those of the update see nothing of the test."""

    class Counting:
        steps = 0

        def after_step(self, _: Any) -> None:
            self.steps += 1

    run = Run(model_folder, settings(model_folder))
    counting = Counting()
    run.methods.by_name["counting"] = counting
    range_test(run).choose(no_bar)
    assert counting.steps == 0
    run.train(steps=run.steps[:2])
    assert counting.steps == 2


def test_the_best_rate_is_taken(model_folder: Path) -> None:
    """From a default that is far too low it goes up, from one that is far too high down; the same each time."""
    for default, higher in ((1e-4, True), (3.0, False)):
        run = Run(model_folder, settings(model_folder, learning_rate=default))
        choice = range_test(run).choose(no_bar)
        assert (choice.value > default) is higher and choice.before is not None
        gains = {one.rate: rates.gained(choice.before, one.losses) for one in choice.tried}
        assert gains[choice.value] == max(gains.values()) > gains[default]
        assert list(gains) == [default, 2 * default] if higher else 3 <= len(gains) <= rates.RATES
        assert f"{default:g}, {2 * default:g}" in choice.reason and "remembered ones, which" in choice.reason
        again = range_test(run).choose(no_bar)
        assert replace(again, seconds=0) == replace(choice, seconds=0)


def update(workspace: Callable[..., Workspace], name: str, **values: Any) -> Workspace:
    ws = workspace(name, **{**LONG, "gate": QUICK_GATE, **values})
    ws.ingest(toy_rows("pens", 60), task="pens")
    return ws


def test_a_version_says_which_rate_and_why(workspace: Callable[..., Workspace]) -> None:
    ws = update(workspace, "ws")
    first = ws.update()
    assert first is not None
    ws.promote(first.name, force=True)
    ws.ingest(toy_rows("cups", 60), task="cups")
    second = ws.update()
    assert second is not None
    for version in (first, second):
        said, test = version.manifest["choices"]["learning_rate"], version.manifest["range_test"]
        assert said == {"value": test["value"], "reason": test["reason"]}
        assert said["reason"].startswith("range test of 0.0015, 0.003") and ("remembered" in said["reason"]) is (
            version is second
        )
        assert version.manifest["cost"]["seconds"] > test["seconds"] > 0
        log = (version.folder / "log.jsonl").read_text()
        assert f'"lr": {said["value"]!r}' in log
        assert version.manifest["config"]["learning_rate"] == "auto"
        page = (version.folder / "report.html").read_text()
        curve = f"other new rows: {test['before']['new']:.4g} before"
        assert f"Range test: loss after a few steps over the learning rate: {curve}" in page
        held_out = {id for ids in version.manifest["held_out"].values() for id in ids}
        assert held_out.isdisjoint(version.rows)
    ws.update("learning_rate=0.01") if ws.ingest(toy_rows("hats", 10), task="hats") else None
    last = registry.versions(ws)[-1].manifest
    assert last["range_test"] is None and last["choices"]["learning_rate"] == {"value": 0.01, "reason": "as set"}


def test_a_killed_update_chooses_no_other(workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed within the test it tests again, killed after it takes what was chosen; the bits are the same."""
    whole = update(workspace, "whole")
    wanted = whole.update()
    assert wanted is not None
    ws = update(workspace, "killed")
    tests: list[Choice] = []
    choose, learn, read = RangeTest.choose, Candidate.learn, losses

    def noted(self: RangeTest, *given: Any) -> Choice:
        tests.append(choose(self, *given))
        return tests[-1]

    looks = 0

    def killed(*given: Any, **options: Any) -> list[float]:
        nonlocal looks
        looks += 1
        if looks == 3:  # Before the test, after one rate, after two.
            raise KilledError
        return read(*given, **options)

    monkeypatch.setattr(RangeTest, "choose", noted)
    monkeypatch.setattr(rates, "losses", killed)
    with pytest.raises(KilledError):
        ws.update()
    assert tests == []
    monkeypatch.setattr(rates, "losses", read)
    counted = Counted()

    def interrupted(self: Candidate, *given: Any) -> Any:
        self.pupil.stop = KillAt(200) if len(tests) == 1 and not counted.looks else counted
        counted.looks += 1
        return learn(self, *given)

    monkeypatch.setattr(Candidate, "learn", interrupted)
    with pytest.raises(KilledError):
        ws.update()
    assert len(tests) == 1
    found = ws.update()
    assert found is not None and len(tests) == 1
    ours, theirs = found.manifest, wanted.manifest
    assert ours["choices"] == theirs["choices"]
    assert ours["range_test"] == {**theirs["range_test"], "seconds": ours["range_test"]["seconds"]}
    weights = "adapter_model.safetensors"
    assert (found.folder / weights).read_bytes() == (wanted.folder / weights).read_bytes()


def test_a_careful_second_try_has_half_the_rate_that_was_held(workspace: Callable[..., Workspace]) -> None:
    ws = workspace(learning_rate=0.5, max_steps=2, gate={"min_gain": 1.0}, protect=["replay"])
    ws.ingest(toy_rows("pens", 20), task="pens")
    held = ws.update()
    assert held is not None and not held.promote
    (file,) = culprit.files(ws, held)
    assert culprit.careful(ws, file)[0] == "learning_rate=0.25"
    assert culprit.careful(ws, "another")[0] == "learning_rate=0.25"
    (ws.root / "treering.yaml").write_text(
        (ws.root / "treering.yaml").read_text().replace("learning_rate: 0.5", "learning_rate: auto")
    )
    assert culprit.careful(ws, file)[0] == "learning_rate=0.25"
    assert culprit.careful(ws, "another") == ["memory.replay_share=0.75"]  # Of which no rate is known.


def test_only_the_rows_named_are_read(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured are the rows set apart, and the test needs no others than it was given."""
    run = Run(model_folder, settings(model_folder))
    ids = list(run.rows)
    sample = Sample.drawn(ids[:18], Memory(), run.config)
    known = {id: run.rows[id] for id in ids[:18]}
    seen: list[set[str]] = []

    def noted(model: Any, rows: list[Tokens], *others: Any) -> list[float]:
        seen.append({row.id for row in rows})
        return losses(model, rows, *others)

    monkeypatch.setattr(rates, "losses", noted)
    test = RangeTest(run.model, known, sample, run.methods, run.config, pad_id=run.pad_id)
    test.choose(no_bar)
    assert all(ids in (set(sample.new_measured), set()) for ids in seen) and len(seen) >= 6


def test_steps_that_overflow_speak_for_no_rate(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float16 each rate is tried with all its steps, however high the first scale is."""
    config = settings(model_folder, fp16=True)
    run = Run(model_folder, config)
    monkeypatch.setattr(scaling, "FIRST", 2.0**12)
    wanted = range_test(run).after(1e-2)
    monkeypatch.setattr(scaling, "FIRST", 2.0**30)
    before = run.weights()
    found = range_test(run).after(1e-2)
    assert found is not None and wanted is not None
    assert (found.new, found.old) == pytest.approx((wanted.new, wanted.old), rel=1e-2)
    assert same_bits(run.weights(), before)
