"""Which remembered rows are drawn more often, and that all are drawn now and then."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.training import KilledError, Run, chat, same_bits, settings
from treering import Workspace, mix, scaling
from treering.brief import ROWS, STEPS
from treering.candidate import Candidate
from treering.config import Config
from treering.errors import ConfigError
from treering.features import features
from treering.memory import Memory, Remembered, by_weight
from treering.passes import losses
from treering.testing import toy_rows


def test_weights_by_hand() -> None:
    found = mix.weighed(["a", "b", "c", "d"], {"a": 0.0, "b": 1.0, "c": 5.0})
    assert found == {"a": 1.0, "b": 1.5, "c": 3.5, "d": 2.0}
    one = {"a": 9.0, **dict.fromkeys("bcdefghi", 0.0)}
    assert mix.weighed(list(one), one)["a"] == 1 + mix.MOST
    assert mix.weighed(["a", "b"], {"a": 0.0}) == mix.weighed(["a", "b"], {}) == {"a": 1.0, "b": 1.0}


@given(st.dictionaries(st.text(max_size=2), st.floats(1, 5), min_size=1, max_size=20), st.integers(0, 60))
def test_each_row_is_drawn_as_often_as_its_weight_says(weights: dict[str, float], count: int) -> None:
    drawn = by_weight(weights, count, "seed")
    assert drawn == by_weight(weights, count, "seed") and len(drawn) == count
    times, all_weights = Counter(drawn), sum(weights.values())
    for id, weight in weights.items():
        wanted = count * weight / all_weights
        assert math.floor(wanted - 1e-6) <= times[id] <= math.ceil(wanted + 1e-6)


def memory_of(ids: list[str]) -> Memory:
    memory = Memory(len(ids))
    memory.rows = {id: Remembered(id, "pens", "a") for id in ids}
    return memory


def test_every_row_comes_now_and_then() -> None:
    memory = memory_of([f"old {n}" for n in range(20)])
    alike = [memory.draw(10, epoch) for epoch in range(40)]
    memory.weights = dict.fromkeys(memory.rows, 1.0) | {"old 3": 5.0}
    times: Counter[str] = Counter()
    for epoch in range(40):
        times.update(memory.draw(10, epoch))
    assert len(times) == 20 and times["old 3"] == pytest.approx(400 * 5 / 24, abs=40)
    memory.weights = {}
    assert [memory.draw(10, epoch) for epoch in range(40)] == alike


def test_rows_that_new_ones_break_are_drawn_more(model_folder: Path) -> None:
    """New rows give questions of one kind another answer; that it is those whose loss rises is measured by hand."""
    same = [chat(("user", f"pens {n}"), ("assistant", "blue")) for n in range(6)]
    apart = [chat(("user", "?" * (20 + n)), ("assistant", "zz")) for n in range(6)]
    new = [chat(("user", f"pens {n}"), ("assistant", "red")) for n in range(10, 34)]
    config = settings(model_folder, protect=["replay"], learning_rate=1e-2)
    whole = settings(model_folder, learning_rate=1e-2, num_train_epochs=15.0, per_device_train_batch_size=16)
    taught = Run(model_folder, whole, [*same, *apart])
    taught.train()
    run = Run(model_folder, config, [*same, *apart, *new])
    run.model = taught.model
    old = [row.id for row in [*same, *apart]]
    start, state = run.weights(), torch.get_rng_state()
    arguments: Any = (run.model, run.rows, [row.id for row in new], memory_of(old), run.methods, config, run.pad_id)
    found = mix.interference(*arguments)
    assert same_bits(run.weights(), start) and torch.equal(torch.get_rng_state(), state)
    assert mix.interference(*arguments) == found
    tokens = [run.rows[id] for id in old]
    before = losses(run.model, tokens, config, run.pad_id)
    run.train(steps=[[[row.id for row in new[at : at + ROWS]]] for at in (0, 8, 16, 0, 8, 16)][:STEPS])
    after = losses(run.model, tokens, config, run.pad_id)
    rises = {id: now - then for id, then, now in zip(old, before, after, strict=True)}
    broken = sum(rises[row.id] for row in same) > sum(rises[row.id] for row in apart)
    weight = [sum(found.weights[row.id] for row in rows) for rows in (same, apart)]
    assert broken and weight[0] > weight[1] and min(found.weights.values()) >= 1
    assert "of 12 remembered ones rose" in found.reason


def test_steps_that_float16_skips_are_made_again(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = []
    for first in (2.0**10, 2.0**30):
        monkeypatch.setattr(scaling, "FIRST", first)
        run = Run(model_folder, settings(model_folder, fp16=True, bf16=False, learning_rate=1e-2))
        ids = list(run.rows)
        found = mix.interference(run.model, run.rows, ids[4:], memory_of(ids[:4]), run.methods, run.config, run.pad_id)
        reasons.append(found.reason.partition(", by")[0])
    assert reasons[0] == reasons[1] and "of 4 remembered ones rose" in reasons[0]


def test_a_training_that_fails_favours_nobody(model_folder: Path) -> None:
    run = Run(model_folder, settings(model_folder, learning_rate=1e38))
    ids = list(run.rows)
    found = mix.interference(run.model, run.rows, ids[4:], memory_of(ids[:4]), run.methods, run.config, run.pad_id)
    assert found.weights == dict.fromkeys(ids[:4], 1.0) and found.reason.startswith("all alike: ")


def test_rows_like_the_new_ones_are_drawn_more(model_folder: Path) -> None:
    like = [chat(("user", f"where is my parcel {n}"), ("assistant", "a")) for n in range(4)]
    unlike = [chat(("user", f"{n} 0101 #### 7777 ####"), ("assistant", "b")) for n in range(4)]
    new = [chat(("user", f"where is my parcel {n}"), ("assistant", "c")) for n in range(10, 18)]
    run = Run(model_folder, settings(model_folder), [*like, *unlike, *new])
    old = [row.id for row in [*like, *unlike]]
    prompts = {row.id: row.prompt for row in [*like, *unlike, *new]}

    def about(ids: Sequence[str]) -> Tensor:
        return features(run.model, run.tokenizer, [prompts[id] for id in ids], run.config)

    found = mix.similarity(about, [row.id for row in new], memory_of(old), run.config).weights
    assert min(found[row.id] for row in like) > max(found[row.id] for row in unlike)
    assert min(found.values()) == 1 and max(found.values()) <= 1 + mix.MOST


@pytest.mark.parametrize("way", ["interference", "similarity"])
def test_a_resumed_update_draws_the_same(
    workspace: Callable[..., Workspace], way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[Any] = []
    learn = Candidate.learn

    def noted(self: Candidate, *given: Any) -> Any:
        steps.append(self.steps)
        if len(steps) == 3:
            raise KilledError
        return learn(self, *given)

    monkeypatch.setattr(Candidate, "learn", noted)
    ws = workspace(
        learning_rate=1e-2, num_train_epochs=2, per_device_train_batch_size=8, memory={"mix": way}, gate={"floor": 1.0}
    )
    for task in ("pens", "cups"):
        ws.ingest(toy_rows(task, 20), task=task)
        version = ws.update()
        assert version is not None
        ws.promote(version.name, force=True)
        assert ("memory.mix" in version.manifest["choices"]) is (task == "cups")
    ws.ingest(toy_rows("hats", 20), task="hats")
    with pytest.raises(KilledError):
        ws.update()
    kept = next(ws.versions.glob(f".staging-*/{mix.FILE}"))
    assert len(mix.Mix(**json.loads(kept.read_text())).weights) == 16
    monkeypatch.setattr(mix, way, lambda *_: pytest.fail("it was found before"))
    version = ws.update()
    assert version is not None and steps[3] == steps[2] != steps[1]
    assert version.manifest["choices"]["memory.mix"]["value"] == way


def test_nothing_is_mixed_without_replay() -> None:
    with pytest.raises(ConfigError, match=r"memory.mix is similarity, but protect does not list replay.*: add replay"):
        Config.build({"protect": [], "memory": {"mix": "similarity"}})
