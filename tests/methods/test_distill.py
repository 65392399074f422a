"""Distillation against the parent: what it makes of which rows, and when it is asked. `test_methods.py` has more."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from tests.training import Run, StopAt, settings
from treering import Workspace, candidate, lesson, registry
from treering.batches import Batch, Taught
from treering.config import Config
from treering.errors import ConfigError, UpdateInterruptedError
from treering.memory import Memory, Teacher
from treering.methods.distill import Distill
from treering.model import logits_at
from treering.registry import Version
from treering.testing import toy_rows
from treering.train import teach, train


def shifted(logits: Tensor, top_k: int, temperature: float) -> Taught:
    """What is asked of a parent with these logits."""
    top = logits.topk(top_k)
    whole = temperature * (logits / temperature).exp().sum(-1, keepdim=True).log()
    return Taught(torch.arange(len(logits)), top.indices, (top.values - whole).half(), len(logits))


def distill(logits: Tensor, taught: Taught, **values: Any) -> Tensor:
    method = Distill(Config.build({"distill": {"teacher": "parent", "weight": 1.0, **values}}))
    empty, model = torch.empty(0, dtype=torch.long), None
    found = method.loss(model, Batch({}, empty, empty, 0, taught), logits)  # type: ignore[arg-type]
    assert found is not None
    return found


def test_by_hand() -> None:
    """Five words of which the parent's two highest are known: its half, its quarter, and a quarter for the rest."""
    parent = torch.tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]).log()[None]
    taught = shifted(parent, 2, 1.0)
    student = torch.tensor([0.1, 0.3, 0.2, 0.2, 0.2]).log()[None]
    wanted = (
        0.5 * torch.tensor(5.0).log() + 0.25 * torch.tensor(0.25 / 0.3).log() + 0.25 * torch.tensor(0.25 / 0.6).log()
    )
    assert distill(student, taught, temperature=1.0).item() == pytest.approx(wanted.item(), abs=1e-3)
    assert distill(student, taught, temperature=1.0, weight=0.5).item() == pytest.approx(wanted.item() / 2, abs=1e-3)
    # Which of the rest it is makes no difference.
    other = torch.tensor([0.1, 0.3, 0.05, 0.05, 0.5]).log()[None]
    assert distill(other, taught, temperature=1.0).item() == pytest.approx(wanted.item(), abs=1e-3)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_of_all_words_it_is_the_divergence(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    parent, student = (3 * torch.randn(20, 12, generator=generator) for _ in range(2))
    own, theirs = (log_softmax(each / temperature, -1) for each in (student, parent))
    wanted = temperature**2 * kl_div(own, theirs, reduction="batchmean", log_target=True)
    found = distill(student, shifted(parent, 12, temperature), temperature=temperature)
    assert found.item() == pytest.approx(wanted.item(), rel=2e-2)
    assert distill(parent, shifted(parent, 12, temperature), temperature=temperature).item() < 2e-2
    # Of some it is less, and never less than nothing.
    fewer = distill(student, shifted(parent, 4, temperature), temperature=temperature)
    assert 0 < fewer.item() < found.item() + 1e-2


def test_what_the_parent_gave_to_others_is_kept_for_them() -> None:
    """Stored logits alone draw all that is likely to themselves."""
    parent = torch.randn(20, 200, generator=torch.Generator().manual_seed(1))
    gradients = []
    for values in ({"teacher": "parent"}, {"teacher": "stored"}):
        student = parent.clone().requires_grad_(True)
        distill(student, shifted(parent, 8, 2.0), temperature=2.0, **values).backward()
        assert student.grad is not None
        gradients.append(float(student.grad.abs().sum()))
    assert gradients[0] < 0.02 * gradients[1]


def test_what_is_asked_of_the_model(model_folder: Path) -> None:
    """Probabilities at the temperature, of the highest logits at each answer token."""
    run = Run(model_folder, settings(model_folder))
    row = next(iter(run.rows.values()))
    ids = torch.tensor([row.ids[:-1]])
    with torch.no_grad():
        at = torch.tensor(row.answers) - 1
        wanted = (logits_at(run.model, ids, torch.ones_like(ids), at) / 3).softmax(-1).topk(5)
    kept: dict[str, Any] = {"top_k": 5, "pad_id": run.pad_id, "quiet": True}
    found = teach(run.model, [row], run.config, temperature=3.0, **kept)[row.id]
    assert torch.equal(found.ids, wanted.indices.int())
    torch.testing.assert_close((found.logits.float() / 3).exp(), wanted.values, rtol=5e-3, atol=1e-5)
    plain = teach(run.model, [row], run.config, **kept)[row.id].logits.float()
    shift = plain - found.logits.float()
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), rtol=1e-2, atol=2e-2)


PARENT = ("distill.teacher=parent", "protect=[replay, distill]")
QUICK: dict[str, Any] = {
    "learning_rate": 1e-2,
    "max_steps": 6,
    "per_device_train_batch_size": 8,
    "eval": {"max_new_tokens": 2},
    "memory": {"size": 12},
}


@pytest.fixture
def second(workspace: Callable[..., Workspace]) -> Callable[..., Workspace]:
    """Makes a workspace whose v1 knows pens, with cups to learn."""

    def make(name: str = "ws", **values: Any) -> Workspace:
        ws = workspace(name, **{**QUICK, **values})
        ws.ingest(toy_rows("pens", 40), task="pens")
        assert ws.update() is not None
        ws.promote("v1", force=True)
        ws.ingest(toy_rows("cups", 40), task="cups")
        return ws

    return make


def updated(ws: Workspace, *overrides: str) -> Version:
    version = ws.update(*overrides, promote=False)
    assert version is not None
    return version


def log(version: Version) -> list[dict[str, float]]:
    return [json.loads(line) for line in (version.folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("rows", ["replayed", "new", "both"])
def test_the_rows_that_are_held(
    second: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch, rows: str, kind: str
) -> None:
    ws, asked = second(finetuning_type=kind, learning_rate=1e-2 if kind == "lora" else 1e-3), list[set[str]]()

    def noted(model: Any, given: Any, *others: Any, **named: Any) -> dict[str, Teacher]:
        asked.append({row.id for row in given})
        return teach(model, given, *others, **named)

    for module in (lesson, candidate):
        monkeypatch.setattr(module, "teach", noted)
    version = updated(ws, *PARENT, f"distill.rows={rows}", "max_steps=9")
    old = {*Memory.load(registry.get(ws, "v1").folder).rows}
    new = {*version.manifest["rows"]["cups"]}
    # 72 rows in 9 steps: all that are replayed come. Nothing more is asked when training is over.
    assert asked == [{"replayed": old, "new": new, "both": old | new}[rows]]
    entries = log(version)
    # Before the first step the model is its parent, then it goes away.
    assert entries[0]["distill"] < 1e-2 < 3e-2 < entries[-1]["distill"]


def test_a_first_update_has_no_parent(second: Callable[..., Workspace]) -> None:
    ws = second(distill={"teacher": "parent", "rows": "both"})
    assert not any("distill" in entry for entry in log(registry.get(ws, "v1")))
    assert Memory.load(registry.get(ws, "v1").folder).teachers == {}
    assert any("distill" in entry for entry in log(updated(ws)))


def test_rows_that_were_kept_without_logits_get_them_when_wanted(second: Callable[..., Workspace]) -> None:
    ws = second(distill={"teacher": "parent"})
    kept = Memory.load(updated(ws, "distill.teacher=stored").folder)
    assert kept.rows and kept.teachers.keys() == kept.rows.keys()
    assert {teacher.ids.shape[1] for teacher in kept.teachers.values()} == {16}


def test_more_weight_holds_more(second: Callable[..., Workspace]) -> None:
    """New rows alone, no old one replayed: the more they are held, the less is learned, and the less forgotten."""
    ws, way = (
        second(max_steps=20, learning_rate=2e-2),
        ("protect=[distill]", "distill.teacher=parent", "distill.rows=new"),
    )
    free, held = (updated(ws, *way, f"distill.weight={weight}").manifest["scores"] for weight in (0.0, 3.0))
    assert held["pens"]["loss"] < free["pens"]["loss"]
    assert held["cups"]["loss"] > free["cups"]["loss"]


@pytest.mark.parametrize("rate", ["1e-2", "auto"])
def test_stopped_while_it_trains_it_ends_in_the_same_bits(
    second: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch, rate: str
) -> None:
    """The parent is asked again, and not what it had become by then."""
    overrides = (*PARENT, "distill.rows=both", "save_steps=1", f"learning_rate={rate}", "max_steps=30")
    whole, broken = second("whole"), second("broken")
    wanted = updated(whole, *overrides)

    def stopped(*given: Any, **named: Any) -> Any:
        return train(*given, **{**named, "stop": StopAt(500)})

    with monkeypatch.context() as patch:
        patch.setattr(lesson, "train", stopped)
        with pytest.raises(UpdateInterruptedError):
            broken.update(*overrides, promote=False)
    (staging,) = broken.versions.glob(".staging-*")
    assert max(int(path.name.removeprefix("step-")) for path in (staging / "checkpoints").glob("step-*")) >= 1
    found = updated(broken, *overrides)
    assert [entry["distill"] for entry in log(found)] == [entry["distill"] for entry in log(wanted)]
    name = "adapter_model.safetensors"
    assert found.manifest["files"][name] == wanted.manifest["files"][name]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"distill": {"rows": "new"}},
            "distill.rows is new, but distill.teacher is stored.*set distill.teacher: parent, or .*lwf",
        ),
        ({"distill": {"rows": "both"}}, "distill.rows is both, but distill.teacher is stored"),
        ({"protect": ["distill"], "distill": {"teacher": "parent"}}, "works on replayed rows.*distill.rows: new"),
        ({"protect": ["distill"], "distill": {"teacher": "parent", "rows": "both"}}, "works on replayed rows"),
        ({"distill": {"teacher": "live"}}, "distill.teacher: .*'stored' or 'parent'.*got 'live'"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.build(values)
    assert re.search(told, str(caught.value)), caught.value
    fits = Config.build({"protect": ["distill"], "distill": {"teacher": "parent", "rows": "new"}})
    assert fits.protect == ("distill",)
