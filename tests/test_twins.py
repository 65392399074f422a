"""Experts that answer the rows of both as well as each its own become one; others do not."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from tests.serving import greedy
from tests.test_experts import SETTINGS, cluster, unlike, version
from tests.test_serve_worker import Inside
from tests.training import KilledError, StopAt
from treering import Workspace, experts, registry, twins
from treering.candidate import Candidate
from treering.data.example import Example
from treering.errors import UpdateInterruptedError
from treering.experts import FEW, Experts, class_of
from treering.memory import Memory
from treering.registry import Version
from treering.router import NOBODY, Router, Shown
from treering.testing import toy_rows
from treering.twins import MARGIN, MEAN, Merged, alike, mean, merge, twin_of

WEIGHTS = "adapter_model.safetensors"
CHOICE = "alike experts"
GENTLY = "learning_rate=3e-3"
"""So that what the second expert has from the first is not lost to it."""


def asked(*tasks: tuple[str, float, int]) -> tuple[dict[str, str], dict[str, float]]:
    """The class of each row by its id, and what the row wants to hear, for so many rows of each task."""
    ids = {f"{task}-{at}": (task, wanted) for task, wanted, count in tasks for at in range(count)}
    return {id: class_of(task, "") for id, (task, _) in ids.items()}, {id: wanted for id, (_, wanted) in ids.items()}


class Number(nn.Module):
    """A model whose adapter is a number, which it answers; a row's loss is how far that is from what it wants."""

    def __init__(self, **says: float) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.wanted: dict[str, float] = {}
        self.asked = 0
        self.router = Router(2)
        experts.attach(
            cast(Any, self),
            Experts(
                self.router, {name: {"lora_A": torch.tensor([x], dtype=torch.float64)} for name, x in says.items()}
            ),
        )

    def knows(self, task: str, expert: str, at: float) -> None:
        """Prompts of `task` lie at `at`, and are for `expert`."""
        self.router.learn(Shown(cluster(at), [class_of(task, "")] * 40), {class_of(task, ""): expert})

    def losses(self, ids: Sequence[str]) -> list[float]:
        self.asked += len(ids)
        return [abs(self.lora_A.item() - self.wanted[id]) for id in ids]

    @property
    def says(self) -> dict[str, float]:
        found = experts.of(cast(Any, self))
        assert found is not None
        return {name: float(weights["lora_A"]) for name, weights in found.adapters.items()}

    def merge(self, *tasks: tuple[str, float, int], taught: Sequence[str], before: Sequence[str] = ()) -> Merged:
        new, self.wanted = asked(*tasks)
        return merge(cast(Any, self), taught, new, Memory(), before, self.losses)


def test_of_two_that_are_alike_the_older_name_stays() -> None:
    model = Number(e1=0.0, e2=0.01, e3=5.0)
    for task, name, at in (("t0", "e1", 0), ("t1", "e2", 10), ("t2", "e3", 100)):
        model.knows(task, name, at)
    merged = model.merge(("t0", 0.0, 20), ("t1", 0.01, 20), ("t2", 5.0, 20), taught=["e2"])
    assert merged.kept == {"e2": "e1"} and merged.now(["e2", "e3", "e1"]) == ["e1", "e3"]
    assert model.says == {"e1": 0.0, "e3": 5.0}
    assert list(model.router.expert.values()) == ["e1", "e1", "e3"]
    assert merged.found == [
        "e1 and e2 are alike: e1 answers both as e1, losses in nats of 20 and 20 rows 0 -> 0 and 0 -> 0.01"
    ]


def test_the_mean_answers_both_where_neither_does() -> None:
    model = Number(e1=0.0, e2=1.5 * MARGIN)
    model.knows("t0", "e1", 0)
    model.knows("t1", "e2", 10)
    merged = model.merge(("t0", 0.0, 20), ("t1", 1.5 * MARGIN, 20), taught=["e1", "e2"])
    assert model.says == {"e1": pytest.approx(0.75 * MARGIN)}
    assert f"e1 and e2 are alike: {MEAN} answers both as e1" in merged.found[0]


def test_unlike_ones_stay_as_they_are() -> None:
    model = Number(e1=0.0, e2=0.1)
    model.knows("t0", "e1", 0)
    model.knows("t1", "e2", 10)
    merged = model.merge(("t0", 0.0, 20), ("t1", 0.1, 20), taught=["e1", "e2"])
    assert model.says == {"e1": 0.0, "e2": 0.1} and not merged.kept
    assert model.router.expert == {class_of("t0", ""): "e1", class_of("t1", ""): "e2"}
    [found] = merged.found  # Two that are each other's twins are compared once.
    assert found.startswith("e1 and e2 are not alike: at best, with ")


def test_several_become_one() -> None:
    """The third is compared with what the first two became."""
    model = Number(e1=0.0, e2=0.0, e10=0.01)
    for name, at in (("e1", 0), ("e2", 10), ("e10", 25)):
        model.knows(f"of {name}", name, at)
    merged = model.merge(
        *((f"of {name}", wanted, 20) for name, wanted in (("e1", 0.0), ("e2", 0.0), ("e10", 0.01))),
        taught=["e10", "e2"],
    )
    assert merged.kept == {"e2": "e1", "e10": "e1"}
    assert [found.partition(" are")[0] for found in merged.found] == ["e1 and e2", "e1 and e10"]
    assert merged.now(["e10", "e2"]) == ["e1"] and set(model.says) == {"e1"}


def test_what_it_costs_does_not_grow_with_the_experts() -> None:
    says = {f"e{at}": float(at) for at in range(1, 31)}
    model = Number(**says)
    for name, at in says.items():
        model.knows(f"of {name}", name, 10 * at)
    model.merge(*((f"of {name}", at, 200) for name, at in says.items()), taught=["e30"])
    assert model.asked == 3 * 2 * 64


def test_what_was_there_and_is_not_remembered_cannot_be_compared() -> None:
    model = Number(e1=0.0, e2=0.0)
    model.knows("t0", "e1", 0)
    model.knows("t1", "e2", 10)
    merged = model.merge(("t0", 0.0, 20), ("t1", 0.0, 20), taught=["e2"], before=["e1"])
    assert merged.found == [f"e1 and e2 were not compared: of e1 0 rows can be asked, fewer than {FEW}"]
    assert set(model.says) == {"e1", "e2"} and not model.asked


def test_the_twin_has_the_nearest_classes() -> None:
    router = Router(2)
    for name, owner, at in (("a", "e1", 0), ("b", "e2", 10), ("c", "e3", 18), ("d", "e4", 200), ("e", "e4", 14)):
        router.learn(Shown(cluster(at), [name] * 40), {name: owner})
    assert [twin_of(router, f"e{at}") for at in range(1, 5)] == ["e2", "e4", "e4", "e3"]
    # What most rows are nearest to.
    router.learn(Shown(cluster(202).repeat(3, 1), ["f"] * 120), {"f": "e1"})
    assert twin_of(router, "e1") == "e4"
    alone = Router(2)
    alone.learn(Shown(cluster(0), ["a"] * 40), {"a": "e1"})
    assert twin_of(alone, "e1") is None


def test_what_is_as_good() -> None:
    own, tasks = [0.1] * 40, ["t", "u"] * 20
    assert alike(own, own, tasks)
    assert alike(own, [0.1 + 0.9 * MARGIN] * 40, tasks) and not alike(own, [0.1 + 1.1 * MARGIN] * 40, tasks)
    # As high a mean, but by chance it may be higher.
    uneven = [0.1 + 0.9 * MARGIN * (2 if at // 2 % 2 else 0) for at in range(40)]
    assert not alike(own, uneven, tasks)
    # Nothing in all is lost, but one task loses.
    assert not alike(own, [0.0, 0.1 + 2 * MARGIN] * 20, tasks)
    assert not alike(own, [*own[1:], float("nan")], tasks) and not alike(own, [*own[1:], float("inf")], tasks)


def test_the_mean_lies_halfway() -> None:
    one, other = {"a": torch.tensor([1.0, 4.0])}, {"a": torch.tensor([3.0, 4.0])}
    assert mean(one, other)["a"].tolist() == [2.0, 4.0] and one["a"].tolist() == [1.0, 4.0]


def said(text: str) -> Example:
    return Example.of([{"role": "user", "content": text}, {"role": "assistant", "content": "x"}])


def test_rows_of_all_tasks_are_asked() -> None:
    router, memory = Router(2), Memory(400)
    for task, at in (("big", 0), ("small", 5)):
        router.learn(Shown(cluster(at), [class_of(task, "")] * 40), {class_of(task, ""): "e1"})
    for task, count in (("big", 300), ("small", 20)):
        memory.add([said(f"{task} {at}") for at in range(count)], task, labelled=False)
    new, _ = asked(("big", 0.0, 300))
    found = twins._rows("e1", router, new, memory, was_there=True)
    counts = Counter((id in new, task) for id, task in found.items())
    assert counts.keys() == {(True, "big"), (False, "big"), (False, "small")}
    assert sum(counts.values()) == len(found) == 64
    assert min(counts.values()) == 20
    assert twins._rows("e1", router, new, Memory(), was_there=True) == {}
    assert len(twins._rows("e1", router, new, Memory(), was_there=False)) == 64


# On the tiny model: the same rule, asked in other words.


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Workspace:
    """A workspace whose v1 knows pens. Only to be copied."""
    settings = {"model_name_or_path": str(model_folder), "bf16": False, **SETTINGS}
    ws = Workspace.create(tmp_path_factory.mktemp("twins"), **settings, memory={"size": 60})
    ws.ingest(toy_rows("pens", 80), task="pens")
    made = ws.update()
    assert made is not None
    ws.promote(made.name, force=True)
    return ws


@pytest.fixture(scope="module")
def waiting(taught: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The same with cups in store, which want what pens want. Only to be copied."""
    ws = copy(taught, tmp_path_factory.mktemp("waiting") / "ws")
    take(ws, cups())
    return ws


@pytest.fixture(scope="module")
def whole(waiting: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Version:
    """What becomes of it when nobody disturbs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("treering.router.FAR", 4.0)
        return updated(copy(waiting, tmp_path_factory.mktemp("whole") / "ws"), promote=False)


@pytest.fixture
def copied(waiting: Workspace, tmp_path: Path) -> Workspace:
    return copy(waiting, tmp_path / "copied")


@pytest.fixture(autouse=True)
def near(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two tasks of random features, what one does to the covariance moves the other's rows; not what is tested."""
    monkeypatch.setattr("treering.router.FAR", 4.0)


def copy(ws: Workspace, target: Path) -> Workspace:
    shutil.copytree(ws.root, target, symlinks=True)
    return Workspace(target)


def cups(count: int = 80, start: int = 0) -> list[dict[str, str]]:
    """Rows of other letters with the answers that pens have."""
    return unlike(toy_rows("pens", start + count))[start:]


def take(ws: Workspace, rows: list[dict[str, str]], task: str = "cups") -> None:
    """Ingest rows that say what others say: that such are left out is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("treering.data.alike.Said.like", lambda *_: False)
        ws.ingest(rows, task=task)


def updated(ws: Workspace, *overrides: str, **options: Any) -> Version:
    made = ws.update(GENTLY, *overrides, **options)
    assert made is not None
    if options.get("promote", True):
        ws.promote(made.name, force=True)
    return made


def never(patch: pytest.MonkeyPatch) -> None:
    """No two experts are alike."""
    patch.setattr(twins, "MARGIN", -1.0)


def same_files(one: Version, other: Version) -> None:
    different = one.manifest["files"].items() ^ other.manifest["files"].items()
    assert {name for name, _ in different} <= {"log.jsonl", "report.html"}
    assert one.manifest["choices"] == other.manifest["choices"]


def test_two_alike_tasks_end_in_one_expert(copied: Workspace, whole: Version) -> None:
    with pytest.MonkeyPatch.context() as patch:
        never(patch)
        apart = updated(copied)
    made = whole
    assert apart.experts.keys() == {"e1", "e2"} and apart.manifest["choices"][CHOICE]["value"] == "none"
    assert made.experts.keys() == {"e1"} and made.problems() == []
    assert set(Router.load(made.folder).expert.values()) == {"e1", NOBODY}
    assert (made.folder / WEIGHTS).samefile(made.folder / "experts" / "e1" / WEIGHTS)
    choice = made.manifest["choices"][CHOICE]
    assert choice["value"] == "e1 for e2"
    assert choice["reason"].startswith("e1 and e2 are alike: ") and "nats of " in choice["reason"]
    assert made.manifest["choices"]["expert"]["value"] == "e2"  # The lesson was that of a new one.
    assert made.scores == apart.scores == {"pens": 1.0, "cups": 1.0}


def test_two_unlike_tasks_do_not(taught: Workspace, tmp_path: Path) -> None:
    ws = copy(taught, tmp_path / "ws")
    ws.ingest(unlike(toy_rows("cups", 80)), task="cups")
    made = updated(ws)
    assert made.experts.keys() == {"e1", "e2"}
    choice = made.manifest["choices"][CHOICE]
    assert choice["value"] == "none" and choice["reason"].startswith("e1 and e2 are not alike: at best, with ")
    assert (made.folder / "experts" / "e1" / WEIGHTS).samefile(version(ws, "v1").folder / "experts/e1" / WEIGHTS)


def test_without_a_memory_none_is_merged(workspace: Callable[..., Workspace]) -> None:
    ws = workspace(**SETTINGS, memory={"size": 0})
    for task, rows in (("pens", toy_rows("pens", 40)), ("cups", cups(40))):
        take(ws, rows, task)
        made = updated(ws, "max_steps=2")
    assert made.experts.keys() == {"e1", "e2"}
    assert "of e1 0 rows can be asked, fewer than 8" in made.manifest["choices"][CHOICE]["reason"]


@pytest.mark.parametrize("when", ["before", "amid"])
def test_killed_while_experts_are_compared_it_ends_in_the_same_bytes(
    copied: Workspace, whole: Version, when: str
) -> None:
    assert whole.experts.keys() == {"e1"}
    run: Callable[..., Merged] = twins.merge

    def killed(model: Any, taught: Any, new: Any, memory: Any, before: Any, measure: Any) -> Merged:
        if when == "before":
            raise KilledError
        seen = 0

        def measured(ids: Sequence[str]) -> Sequence[float]:
            nonlocal seen
            seen += 1
            if seen == 4:
                raise KilledError
            return cast(Sequence[float], measure(ids))

        return run(model, taught, new, memory, before, measured)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twins, "merge", killed)
        with pytest.raises(KilledError):
            updated(copied, promote=False)
    same_files(updated(copied, promote=False), whole)


def test_stopped_while_experts_are_compared_it_ends_in_the_same_bytes(copied: Workspace, whole: Version) -> None:
    begin = Candidate.merge_alike

    def stopped(self: Candidate) -> None:
        self.pupil.stop = StopAt(3)
        begin(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Candidate, "merge_alike", stopped)
        with pytest.raises(UpdateInterruptedError):
            updated(copied, promote=False)
    same_files(updated(copied, promote=False), whole)


@pytest.fixture(scope="module")
def merged(waiting: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """v2 has two experts that are alike, with logits of the rows they remember; in v3 they are one. Only to be read."""
    ws = copy(waiting, tmp_path_factory.mktemp("merged") / "ws")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("treering.router.FAR", 4.0)
        with pytest.MonkeyPatch.context() as inner:
            never(inner)
            updated(ws, "protect=[replay, distill]")
        take(ws, cups(40, start=80))
        updated(ws, "protect=[replay, distill]")
    return ws


def test_experts_that_were_apart_become_one(merged: Workspace) -> None:
    before, made = version(merged, "v2"), version(merged, "v3")
    assert made.manifest["choices"]["expert"]["value"] == "e2"
    assert before.experts.keys() == {"e1", "e2"} and made.experts.keys() == {"e1"}
    assert made.manifest["choices"][CHOICE]["value"] == "e1 for e2"
    assert min(made.scores.values()) == 1.0


def test_logits_that_were_stored_stay_and_new_ones_are_the_merged_experts(merged: Workspace) -> None:
    before, after = (Memory.load(version(merged, name).folder) for name in ("v2", "v3"))
    stayed = after.rows.keys() & before.rows.keys()
    assert {after.rows[id].task for id in stayed} == {"pens", "cups"}
    for id in stayed:
        assert torch.equal(before.teachers[id].logits, after.teachers[id].logits)
    assert after.teachers.keys() == after.rows.keys()


def test_a_merged_version_is_served(merged: Workspace) -> None:
    asked: Mapping[str, list[dict[str, Any]]] = {
        "pens": [{"role": "user", "content": toy_rows("pens", 1)[0]["text"]}],
        "cups": [{"role": "user", "content": cups(1)[0]["text"]}],
    }
    inside = Inside(merged)
    inside.put(op="load", version="v3", keep=True)
    for name, messages in asked.items():
        inside.generate(name, "v3", messages=messages)
    inside.run(2)
    wanted = {name: greedy(merged, "v3/experts/e1", messages, 12) for name, messages in asked.items()}
    assert {name: inside.text(name) for name in asked} == wanted == dict.fromkeys(asked, "pens a")
    assert greedy(merged, "v3", asked["cups"], 12) == wanted["cups"]  # It is the version's own adapter.


def test_a_rollback_brings_both_back(merged: Workspace, tmp_path: Path) -> None:
    ws = copy(merged, tmp_path / "back")
    ws.rollback()
    now = registry.current(ws)
    assert now is not None and now.name == "v2" and now.problems() == [] and now.experts.keys() == {"e1", "e2"}
    assert set(Router.load(now.folder).expert.values()) == {"e1", "e2", NOBODY}
    with pytest.MonkeyPatch.context() as patch:
        never(patch)
        made = ws.update(GENTLY, "seed=7", promote=False)  # The rows of v3 are new again.
    assert made is not None and made.experts.keys() == {"e1", "e2"}


def test_what_comes_after_a_merge_is_taught_the_one(merged: Workspace, tmp_path: Path) -> None:
    ws = copy(merged, tmp_path / "on")
    ws.ingest(
        [{**row, "text": row["text"].replace("item ", "again item 100")} for row in toy_rows("pens", 40)], task="pens"
    )
    ws.ingest(cups(40, start=120), task="cups")
    made = ws.update(GENTLY, "max_steps=2", promote=False)
    assert made is not None and made.manifest["choices"]["expert"]["value"] == "e1"
    assert CHOICE not in made.manifest["choices"]  # There is no other.
