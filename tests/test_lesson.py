"""An update with experts is split among them: each lesson begins at the parent's experts and touches no other."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.test_experts import SETTINGS, expert, unlike, version
from tests.training import KillAt, KilledError
from treering import Workspace, experts, optimizers
from treering.automate import culprit
from treering.candidate import Candidate
from treering.experts import class_of
from treering.forecast import forecast
from treering.lesson import Lesson
from treering.memory import Memory
from treering.model import encode, load, load_tokenizer
from treering.registry import Version
from treering.router import NOBODY, Router
from treering.testing import toy_rows
from treering.train import teach

WEIGHTS = "adapter_model.safetensors"
MORE: dict[str, Any] = {"num_train_epochs": 3.0, "save_steps": 2}
Learn = Callable[[Lesson, Any], None]


def other(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Unlike both plain rows and those of `unlike`."""
    return [{**row, "text": " ".join(f"{ord(letter)}" for letter in row["text"][:12])} for row in rows]


def again(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**row, "text": row["text"].replace("item ", "again item 100")} for row in rows]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Workspace:
    """A workspace whose first update was three tasks unlike each other. Tests only read it."""
    settings = {"model_name_or_path": str(model_folder), "bf16": False, **SETTINGS, **MORE}
    ws = Workspace.create(tmp_path_factory.mktemp("lessons"), **settings)
    for task, rows in (("pens", toy_rows("pens", 80)), ("cups", unlike(toy_rows("cups", 60))), ("hats", hats(40))):
        ws.ingest(rows, task=task)
    made = ws.update()
    assert made is not None
    ws.promote(made.name, force=True)
    return ws


@pytest.fixture(scope="module")
def whole(three: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """What comes of `mixed` rows where nothing interrupts it."""
    root = tmp_path_factory.mktemp("whole") / "ws"
    shutil.copytree(three.root, root, symlinks=True)
    made = mixed(Workspace(root)).update(promote=False)
    assert made is not None
    return made


def hats(count: int) -> list[dict[str, str]]:
    return other(toy_rows("hats", count))


@pytest.fixture
def copied(three: Workspace, tmp_path: Path) -> Workspace:
    """A copy of it that a test may change."""
    shutil.copytree(three.root, tmp_path / "copied", symlinks=True)
    return Workspace(tmp_path / "copied")


def of_expert(made: Version, name: str) -> bytes:
    return (made.folder / "experts" / name / WEIGHTS).read_bytes()


def steps(made: Version) -> list[float]:
    return [json.loads(line)["step"] for line in (made.folder / "log.jsonl").read_text().splitlines()]


def test_unlike_tasks_in_one_update_get_an_expert_each(three: Workspace) -> None:
    made = version(three, "v1")
    owners = Router.load(made.folder).expert
    assert {name.partition("\n")[0]: owner for name, owner in owners.items() if owner != NOBODY} == {
        "cups": "e1",  # By their names.
        "hats": "e2",
        "pens": "e3",
    }
    assert expert(made)["value"] == "e3, e1, e2"  # By their rows.
    assert "e1: the first" in expert(made)["reason"]
    assert "e2: of hats, 36 of 36 new rows have labels or a task that no expert knows, and" in expert(made)["reason"]
    assert made.experts.keys() == {"e1", "e2", "e3"} and made.problems() == []
    assert (made.folder / WEIGHTS).samefile(made.folder / "experts" / "e3" / WEIGHTS)
    assert len({of_expert(made, name) for name in made.experts}) == 3


def test_what_is_counted_is_the_sum_of_all_lessons(three: Workspace) -> None:
    manifest = version(three, "v1").manifest
    own = {"pens": 72, "cups": 54, "hats": 36}
    assert {task: len(ids) for task, ids in manifest["rows"].items()} == own
    assert manifest["cost"]["rows_trained"] == 3 * sum(own.values())
    assert manifest["cost"]["steps"] == 3 * sum(-(-count // 8) for count in own.values())
    assert steps(version(three, "v1")) == list(range(1, manifest["cost"]["steps"] + 1))
    reasons = {name: manifest["choices"][f"num_train_epochs{name}"]["reason"] for name in ("", " of e1", " of e2")}
    assert set(reasons.values()) == {"as set"}
    assert manifest["choices"]["learning_rate"] == manifest["choices"]["learning_rate of e1"]
    assert culprit.careful(three, "any")[0] == "learning_rate=0.005"


def test_alike_tasks_in_one_update_share_an_expert(workspace: Callable[..., Workspace]) -> None:
    ws = workspace(**{**SETTINGS, "max_steps": 1})
    rows = toy_rows("pens", 80)
    ws.ingest(rows[:40], task="pens")
    ws.ingest(rows[40:], task="cups")
    made = ws.update()
    assert made is not None
    assert expert(made)["value"] == "e1" and made.experts.keys() == {"e1"}
    assert "the first; of pens, 36 of 36 new rows have labels" in expert(made)["reason"]


def mixed(ws: Workspace) -> Workspace:
    ws.ingest(again(toy_rows("pens", 60)), task="pens")
    ws.ingest(other([{**row, "text": row["text"][::-1]} for row in toy_rows("hats", 40)]), task="hats")
    return ws


def test_a_mixed_update_teaches_those_whose_rows_it_has(copied: Workspace) -> None:
    before, made = version(copied, "v1"), mixed(copied).update()
    assert made is not None and made.problems() == []
    assert expert(made)["value"] == "e3, e2"
    assert (made.folder / "experts" / "e1" / WEIGHTS).samefile(before.folder / "experts" / "e1" / WEIGHTS)
    for name in ("e2", "e3"):
        assert of_expert(made, name) != of_expert(before, name)
    assert (made.folder / WEIGHTS).samefile(made.folder / "experts" / "e3" / WEIGHTS)
    assert Router.load(made.folder).expert == Router.load(before.folder).expert


def test_the_order_of_lessons_does_not_matter(
    copied: Workspace, whole: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = experts.split
    monkeypatch.setattr(experts, "split", lambda *given: split(*given)[::-1])
    another = mixed(copied).update(promote=False)
    assert another is not None
    assert (expert(whole)["value"], expert(another)["value"]) == ("e3, e2", "e2, e3")
    for name in ("e1", "e2", "e3"):
        assert of_expert(whole, name) == of_expert(another, name)
    for name in ("router.safetensors", "memory.json"):
        assert (whole.folder / name).read_bytes() == (another.folder / name).read_bytes()


def test_each_lesson_replays_the_rows_of_its_expert(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {}
    learn = Lesson.learn

    def noted(self: Lesson, track: Any = None) -> None:
        assert self.expert is not None
        seen[self.expert.expert] = {id for step in self.steps for ids in step for id in ids} - set(self.ids)
        learn(self, track)

    monkeypatch.setattr(Lesson, "learn", noted)
    remembered = Memory.load(version(copied, "v1").folder).rows
    mixed(copied).update()
    tasks = {name: {remembered[id].task for id in ids} for name, ids in seen.items()}
    assert tasks == {"e3": {"pens"}, "e2": {"hats"}}


def test_a_task_that_returns_with_a_few_new_labels_stays_with_its_expert(copied: Workspace) -> None:
    rows = again(toy_rows("pens", 40))
    ws = copied
    ws.ingest([{**row, "label": f"odd-{at % 2}"} if at < 8 else row for at, row in enumerate(rows)], task="pens")
    made = ws.update()
    assert made is not None and expert(made)["value"] == "e3"
    owners = Router.load(made.folder).expert
    assert [owners[class_of("pens", f"odd-{at}")] for at in range(2)] == ["e3", "e3"]
    assert "new rows have labels or a task that no expert knows; " in expert(made)["reason"]
    assert made.experts.keys() == {"e1", "e2", "e3"}


@pytest.mark.parametrize("looks", [0, 100, 900])
def test_killed_in_the_second_lesson_it_ends_in_the_same_bytes(
    copied: Workspace, whole: Version, monkeypatch: pytest.MonkeyPatch, looks: int
) -> None:
    """With no look it dies between the lessons."""
    mixed(copied)
    learn: Learn = Lesson.learn
    begun: list[str] = []

    def killed(self: Lesson, track: Any = None) -> None:
        begun.append(self.of)
        if len(begun) == 2:
            if not looks:
                raise KilledError
            self.pupil.stop = KillAt(looks)
        learn(self, track)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lesson, "learn", killed)
        with pytest.raises(KilledError):
            copied.update(promote=False)
    assert begun == [" of e3", " of e2"]
    (staging,) = copied.versions.glob(".staging-*")
    newest = max((int(path.name[5:]) for path in staging.glob("e2/checkpoints/step-*")), default=None)
    assert {0: newest is None, 100: newest == 0, 900: newest is not None and newest >= 2}[looks], newest
    ended = max(staging.glob("checkpoints/step-*"), key=lambda path: int(path.name[5:]))
    first = json.loads((ended / "state.json").read_text())["log"]
    told: list[Mapping[str, float]] = []
    follow = Candidate.learn
    monkeypatch.setattr(Candidate, "learn", lambda self, track=None: follow(self, told.append))
    made = copied.update(promote=False)
    assert made is not None
    assert first and told[: len(first)] == first  # As fast as it was: nothing of the first lesson was learned again.
    assert [entry["step"] for entry in told] == steps(made)
    assert sorted(made.manifest["files"].items() - whole.manifest["files"].items()) == [
        pair for pair in sorted(made.manifest["files"].items()) if pair[0] in ("log.jsonl", "report.html")
    ]
    assert made.manifest["choices"] == whole.manifest["choices"]


@pytest.mark.usefixtures("no_children")
def test_a_lesson_has_a_range_test_an_end_and_a_mix_of_its_own(copied: Workspace) -> None:
    mixed(copied)
    settings = ("learning_rate=auto", "early_stopping_steps=1", "eval_steps=2", "memory.mix=interference")
    planned = forecast(copied, [*settings, "num_train_epochs=20"], quiet=True).estimate
    made = copied.update(*settings, "num_train_epochs=20", promote=False)
    assert made is not None and planned is not None
    choices = made.manifest["choices"]
    for name in ("learning_rate", "early_stopping_steps", "memory.mix"):
        assert choices[name]["reason"] != choices[f"{name} of e2"]["reason"]
    assert choices["learning_rate of e2"]["reason"].startswith("range test of")
    taken = sum(choices[f"early_stopping_steps{name}"]["value"] for name in ("", " of e2"))
    assert taken == made.manifest["cost"]["steps"] == len(steps(made)) <= planned.steps
    rows = made.manifest["rows"]
    assert len(set(made.manifest["aside"])) == 16 and set(made.manifest["aside"]) < {*rows["pens"], *rows["hats"]}


@pytest.mark.usefixtures("no_children")
def test_its_steps_are_planned(copied: Workspace) -> None:
    mixed(copied)
    planned = forecast(copied, quiet=True).estimate
    made = copied.update(promote=False)
    assert made is not None and planned is not None
    cost = made.manifest["cost"]
    assert (planned.steps, planned.rows_trained) == (cost["steps"], cost["rows_trained"])


def test_logits_are_those_of_a_rows_own_expert(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored ones when it is remembered, for distillation; and the parent's, which new rows are asked for."""
    asked: list[dict[str, Any]] = []

    def noted(model: Any, *given: Any, **options: Any) -> Any:
        asked.append(experts.weights(model))
        return teach(model, *given, **options)

    monkeypatch.setattr("treering.lesson.teach", noted)
    made = mixed(copied).update("protect=[replay, distill, lwf]")
    assert made is not None
    config, base = copied.config(), Path(str(copied.config().model_name_or_path))
    model, tokenizer, memory = load(base, config, made), load_tokenizer(base), Memory.load(made.folder)
    found = experts.of(model)
    assert found is not None and isinstance(tokenizer.pad_token_id, int)
    parents = experts.of(load(base, config, version(copied, "v1")))
    assert parents is not None
    for weights, name in zip(asked, ("e3", "e2"), strict=True):
        assert all(weights[key].equal(weight) for key, weight in parents.adapters[name].items())
    assert {row.task for row in memory.rows.values()} == {"pens", "cups", "hats"}
    examples = copied.catalog.examples(list(memory.rows))
    fresh = {id for ids in made.manifest["rows"].values() for id in ids}
    for id, row in memory.rows.items():
        own = found.router.expert[class_of(row.task, row.label)]
        with experts.using(model, found, own):
            [wanted] = teach(
                model, [encode(tokenizer, examples[id])], config, top_k=16, pad_id=tokenizer.pad_token_id, quiet=True
            ).values()
        if id in fresh or row.task == "cups":
            assert (memory.teachers[id].logits - wanted.logits).abs().max() < 0.05
            assert memory.teachers[id].ids.shape == wanted.ids.shape


def test_a_few_stray_rows_are_a_lesson(copied: Workspace) -> None:
    copied.ingest(again(toy_rows("pens", 40)), task="pens")
    copied.ingest(unlike(again(toy_rows("cups", 3))), task="cups")
    made = copied.update()
    assert made is not None
    assert "e1" in expert(made)["value"] and made.manifest["choices"]["learning_rate of e1"]["value"] == 1e-2
    weights = load_file(made.folder / "experts" / "e1" / WEIGHTS)
    assert all(weight.isfinite().all() for weight in weights.values())


def test_the_optimizer_of_a_lesson_is_gone_before_the_next(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Any]] = []
    learn, optimizer = Lesson.learn, optimizers.optimizer
    alive: list[int] = []

    def noted(*given: Any) -> Any:
        found = optimizer(*given)
        made.append(weakref.ref(found))
        return found

    def looked(self: Lesson, track: Any = None) -> None:
        alive.append(sum(ref() is not None for ref in made))
        learn(self, track)

    monkeypatch.setattr(optimizers, "optimizer", noted)
    monkeypatch.setattr(Lesson, "learn", looked)
    assert mixed(copied).update("max_steps=1", promote=False) is not None
    assert alive == [0, 0] and len(made) == 2
