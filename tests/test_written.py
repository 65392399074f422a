"""What the parent writes: rows of what it learned, each filter, its own answers, and that it ends in the same bits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from tests.training import KillAt, KilledError, StopAt, chat
from treering import Workspace, registry, written
from treering.calibrate import calibrate
from treering.candidate import Candidate
from treering.config import Config
from treering.data.example import Example
from treering.errors import ConfigError, ModelError, UpdateInterruptedError
from treering.experts import Choice
from treering.lesson import Lesson, Pupil
from treering.memory import Memory, Remembered, Teacher
from treering.model import encode, fingerprint, load, load_tokenizer
from treering.passes import losses
from treering.plan import make_plan
from treering.readings import Readings
from treering.testing import toy_rows
from treering.written import FILE, PREFIX, Writer, Written

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "num_train_epochs": 20.0,
    "per_device_train_batch_size": 8,
    "train_on_prompt": True,
    "protect": ["replay"],
    "memory": {"size": 0},
    "eval": {"max_new_tokens": 16},
    "gate": {"floor": 1.0, "margin": 1.0},
}
ROWS = 60


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Workspace:
    """A workspace whose v1 learned pens with their prompts, and keeps no row; cups wait. Tests only read it."""
    ws = Workspace.create(
        tmp_path_factory.mktemp("written") / "ws", model_name_or_path=str(model_folder), bf16=False, **SETTINGS
    )
    ws.ingest(toy_rows("pens", ROWS), task="pens")
    assert ws.update() is not None
    ws.promote("v1", force=True)
    ws.ingest(toy_rows("cups", ROWS), task="cups")
    return ws


@pytest.fixture
def copied(taught: Workspace, tmp_path: Path) -> Workspace:
    """A copy of it that a test may change."""
    shutil.copytree(taught.root, tmp_path / "copied", symlinks=True)
    return Workspace(tmp_path / "copied")


class Asked:
    """v1, asked to write for a lesson on cups."""

    def __init__(self, ws: Workspace, folder: Path, *overrides: str, remembered: Sequence[Example] = ()) -> None:
        self.config, v1 = ws.config(overrides), registry.get(ws, "v1")
        base = Path(str(self.config.model_name_or_path))
        self.tokenizer = load_tokenizer(base)
        pad_id = cast(int, self.tokenizer.pad_token_id)
        self.pupil = Pupil(load(base, self.config, v1), base, v1, ws.root, 1, pad_id, {}, [], None, True)
        self.held_out = v1.manifest["held_out"]["pens"]
        self.new = ws.catalog.train_ids("cups")
        self.examples = ws.catalog.examples([*self.held_out, *self.new]) | {row.id: row for row in remembered}
        self.memory = Memory()
        self.memory.rows = {row.id: Remembered(row.id, "pens", "") for row in remembered}
        folder.mkdir(exist_ok=True)
        self.lesson = Lesson(self.pupil, self.config, self.new, self.memory, folder, Readings(folder))

    @property
    def writer(self) -> Writer:
        return Writer(self.lesson, self.tokenizer, self.examples, self.held_out)

    def said(self, text: str) -> list[int]:
        return cast("list[int]", self.tokenizer(text, add_special_tokens=False)["input_ids"])


def texts(found: Written) -> list[tuple[str, str]]:
    return [(row.messages[-2].content, row.answer) for row in found.rows.values()]


def test_it_writes_rows_of_the_task_it_learned(taught: Workspace, tmp_path: Path) -> None:
    asked = Asked(taught, tmp_path / "one", "memory.generate=16", "memory.generate_temperature=0.7")
    found = asked.writer.write()
    assert len(found.rows) == 16 and all(id == f"{PREFIX}{row.id}" for id, row in found.rows.items())
    assert all(len(row.messages) == 2 for row in found.rows.values())
    of_pens = [(said, answer) for said, answer in texts(found) if said.startswith("pens item ")]
    right = [answer == f"pens {said[-1]}" for said, answer in of_pens]
    assert len(of_pens) >= 13 and sum(right) >= 8  # By chance a quarter would be right.
    held_out = {asked.examples[id].messages[-2].content for id in asked.held_out}
    assert not held_out & {said for said, _ in texts(found)}
    measured = [encode(asked.tokenizer, row) for row in found.rows.values()]
    assert max(losses(asked.pupil.model, measured, asked.config, asked.pupil.pad_id)) <= 0.5 + 1e-3
    kept = json.loads((asked.lesson.folder / FILE).read_text())
    assert kept["drawn"] == sum(kept["dropped"].values()) + sum(answer is not None for _, answer in kept["turns"])
    choice = found.choices["memory.generate"]
    assert choice["value"] == 16
    assert choice["reason"].startswith(f"16 wanted; v1 drew {kept['drawn']} turns at temperature 0.7 and top_p 0.95")
    for reason, count in kept["dropped"].items():
        assert f"{count} {reason}" in choice["reason"]
    # Where those it has written are held out, it writes none of them.
    asked.examples |= found.rows
    asked.held_out += found.rows
    asked.lesson.folder = tmp_path / "other"
    asked.lesson.folder.mkdir()
    others = asked.writer.write()
    assert not {said for said, _ in texts(others)} & {said for said, _ in texts(found)}
    assert "like a held-out row" in others.choices["memory.generate"]["reason"]


def test_each_filter(taught: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = chat(("user", "pens item 91: sort a"), ("assistant", "pens a"))
    asked = Asked(taught, tmp_path / "one", "memory.generate=14", remembered=[remembered])
    held_out = asked.examples[asked.held_out[0]].messages[-2].content
    new = asked.examples[asked.new[0]].messages[-2].content
    long = "pens item 77: sort c"
    turns: list[list[int] | None] = [
        asked.said("pens item 92: sort b"),
        None,
        [],
        asked.said("  "),
        [*asked.said("pens"), asked.said("<|im_start|>")[0], *asked.said("item 3")],
        asked.said("é")[:1],
        asked.said(held_out),
        asked.said(f" {held_out.upper()}?"),
        asked.said(new),
        asked.said("pens item 91: sort a."),
        asked.said("pens item 92: sort b"),
        asked.said("pens item 92: sort B!"),
        asked.said(long),
        asked.said("pens item 78: sort d"),
    ]
    answers = {"pens item 92: sort b": "pens b", long: None, "pens item 78: sort d": "pens item 78: sort d"}
    monkeypatch.setattr(written, "TURNS_A_ROW", 1)
    monkeypatch.setattr(written, "draw", lambda *_: turns)
    monkeypatch.setattr(Writer, "_answered", lambda self, prompts, *_: [answers[p[-1].content] for p in prompts])
    monkeypatch.setattr(written, "losses", lambda model, rows, *_: [0.49 for _ in rows])
    found = asked.writer.write()
    assert texts(found) == [("pens item 92: sort b", "pens b")]
    dropped = {
        "without an end within 256 tokens": 1,
        "empty": 2,
        "with what is no text": 2,
        "like a held-out row": 2,
        "like a new row": 1,
        "like a remembered row": 1,
        "like one drawn before": 2,
        "without an answer that ended by itself and broke no rule of rows": 2,
    }
    kept = json.loads((asked.lesson.folder / FILE).read_text())
    assert kept["dropped"] == dropped and kept["drawn"] == 14
    for name, loss, count in (("sure", 0.5, 1), ("unsure", 0.51, 0), ("unknown", float("nan"), 0)):
        asked.lesson.folder = tmp_path / name
        asked.lesson.folder.mkdir()
        monkeypatch.setattr(written, "losses", lambda model, rows, *_, loss=loss: [loss for _ in rows])
        found = asked.writer.write()
        assert len(found.rows) == count
        told = "1 with an answer less sure than -0.5 nats a token" in found.choices["memory.generate"]["reason"]
        assert told is (count == 0)


def test_an_answer_that_does_not_end_is_none(taught: Workspace, tmp_path: Path) -> None:
    asked = Asked(taught, tmp_path / "one", "memory.generate=4", "eval.max_new_tokens=3")
    found = asked.writer.write()
    assert not found.rows and found.choices["memory.generate"]["value"] == 0
    assert "without an answer that ended by itself" in found.choices["memory.generate"]["reason"]


def test_a_system_turn_is_that_of_the_settings(taught: Workspace, tmp_path: Path) -> None:
    asked = Asked(taught, tmp_path / "one", "memory.generate=4", "default_system=Sort these.")
    beginning, end = asked.writer._opening()
    told = "<|im_start|>system\nSort these.<|im_end|>\n<|im_start|>user\n"
    assert asked.tokenizer.decode(beginning) == told and end == asked.tokenizer.eos_token_id
    row = asked.writer._row("a", "b")
    assert [turn.role for turn in row.messages] == ["system", "user", "assistant"]
    asked.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    with pytest.raises(ModelError, match=r"memory.generate is 4, but .* no mark at the end .*: set memory.generate: 0"):
        asked.writer.write()


def test_killed_while_it_writes_it_ends_with_the_same_rows(
    taught: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "BLOCK", 4)
    options = ("memory.generate=10", "memory.answers=own", "memory.size=9")
    remembered = [chat(("user", f"pens item {n}: sort a"), ("assistant", "?")) for n in range(200, 209)]
    whole = Asked(taught, tmp_path / "whole", *options, remembered=remembered).writer.write()
    assert whole.rows and whole.answers
    asked = Asked(taught, tmp_path / "killed", *options, remembered=remembered)
    stages = set()
    for looks in (2, 30, 90, 60, 60, 120, 40, 60):
        asked.pupil.stop = KillAt(looks)
        with pytest.raises(KilledError):
            asked.writer.write()
        kept = asked.writer._kept()
        stages.add((kept.drawn, len(kept.own)))
        assert kept.drawn % 4 == 0 and len(kept.own) in (0, 4, 8, 9)
    assert len(stages) > 2 and (0, 0) in stages
    asked.pupil.stop = StopAt(2)
    with pytest.raises(UpdateInterruptedError):
        asked.writer.write()
    asked.pupil.stop = None
    assert asked.writer.write() == whole
    monkeypatch.setattr(written, "draw", lambda *_: pytest.fail("it was written before"))
    assert asked.writer.write() == whole


def test_its_own_answers_take_the_place_of_stored_ones(taught: Workspace, tmp_path: Path) -> None:
    right = chat(("user", "pens item 4: sort a"), ("assistant", "pens a"))
    wrong = [chat(("user", f"pens item {n}: sort b"), ("assistant", "blue")) for n in (5, 9)]
    options = ("memory.answers=own", "memory.size=3")
    asked = Asked(taught, tmp_path / "one", *options, remembered=[right, *wrong])
    found = asked.writer.write()
    assert set(found.answers) == {row.id for row in wrong} and not found.rows
    for row in wrong:
        own = found.answers[row.id]
        assert own.prompt == row.prompt and own.answer.startswith("pens ")
    told = "of 3 remembered rows 2 have another answer of the parent's, 1 the same as stored; 0 keep the stored one"
    assert found.choices["memory.answers"] == {"value": "own", "reason": found.choices["memory.answers"]["reason"]}
    assert told in found.choices["memory.answers"]["reason"]
    # What was stored of the other answer is no teacher of this one.
    teacher = cast(Teacher, None)
    asked.memory.teachers = {row.id: teacher for row in (right, *wrong)}
    tokens = {id: replace(encode(asked.tokenizer, row), id=id) for id, row in found.answers.items()}
    asked.lesson.take(found, tokens)
    assert set(asked.lesson.memory.teachers) == {right.id} and asked.pupil.rows == tokens
    # Where the parent does not end, the stored answer stays.
    asked = Asked(taught, tmp_path / "short", *options, "eval.max_new_tokens=2", remembered=[right, *wrong])
    found = asked.writer.write()
    assert not found.answers and "3 keep the stored one" in found.choices["memory.answers"]["reason"]


def test_no_more_turns_are_drawn_than_four_a_row(
    taught: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def none(_: Any, __: Any, seeds: Sequence[str], *___: Any) -> list[None]:
        sizes.append(len(seeds))
        return [None] * len(seeds)

    monkeypatch.setattr(written, "draw", none)
    monkeypatch.setattr(written, "BLOCK", 7)
    found = Asked(taught, tmp_path / "one", "memory.generate=9").writer.write()
    assert sizes == [7, 7, 7, 7, 7, 1] and found.choices["memory.generate"]["value"] == 0
    assert "of which 36 without an end within 256 tokens" in found.choices["memory.generate"]["reason"]


def test_what_begins_anew_has_nothing_to_write(taught: Workspace, tmp_path: Path) -> None:
    for choice, wanted in ((Choice("e2", "e1", "", (0,)), 0), (Choice("e1", "e1", "", (0,)), 5), (None, 5)):
        asked = Asked(taught, tmp_path / "one", "memory.generate=5")
        asked.lesson.expert = choice
        assert asked.writer.wanted == wanted
    asked.pupil.parent = None
    found = asked.writer.write()
    assert asked.writer.wanted == 0 and not found.rows
    assert found.choices["memory.generate"] == {"value": 0, "reason": "nothing was learned before that could be lost"}


@pytest.mark.parametrize(("count", "wanted"), [("7", 7), ("50%", 27), ("0%", 0)])
def test_a_share_is_one_of_the_new_rows(taught: Workspace, tmp_path: Path, count: str, wanted: int) -> None:
    asked = Asked(taught, tmp_path / "one", f"memory.generate={count}")
    assert len(asked.lesson.new) == 54 and asked.writer.wanted == wanted


def test_less_is_forgotten_and_nothing_of_it_is_kept(copied: Workspace, tmp_path: Path) -> None:
    """With no stored row; and the plan says the steps that it takes."""
    config = copied.config(["memory.generate=32"])
    base = Path(str(config.model_name_or_path))
    plan = make_plan(copied, registry.get(copied, "v1"), config, fingerprint(base))
    (tmp_path / "plan").mkdir()
    planned = calibrate(copied, plan, config, tmp_path / "plan")
    nothing = copied.update(promote=False)
    before = copied.catalog.counts()
    made = copied.update("memory.generate=32", promote=False)
    assert nothing is not None and made is not None
    forgotten, kept = (version.manifest["scores"]["pens"]["loss"] for version in (nothing, made))
    assert kept < forgotten / 3  # Measured: 0.09 and 3.62 nats.
    assert made.manifest["scores"]["pens"]["score"] > nothing.manifest["scores"]["pens"]["score"]
    assert made.manifest["scores"]["cups"]["score"] >= 0.8
    found, cost = made.manifest["written"], made.manifest["cost"]
    assert nothing.manifest["written"] is None and "memory.generate" not in nothing.manifest["choices"]
    assert made.manifest["choices"]["memory.generate"]["value"] == found["rows"] == cost["rows_written"]
    assert 16 <= found["rows"] <= planned.rows_written == 32 and len(found["sha256"]) == 64
    assert (planned.steps, planned.rows_trained) == (cost["steps"], cost["rows_trained"])
    assert cost["rows_trained"] == 2 * nothing.manifest["cost"]["rows_trained"]
    assert Memory.load(made.folder).rows == {} and made.manifest["memory"] == {"pens": 0, "cups": 0}
    assert copied.catalog.counts() == before and not any(id.startswith(PREFIX) for id in made.rows)
    assert not list(copied.versions.glob(".staging-*")) and not list(made.folder.rglob(FILE))
    manifest = (made.folder / "manifest.json").read_text()
    assert "item" not in manifest and made.problems() == []


def test_killed_in_an_update_nothing_is_lost(
    copied: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(written, "BLOCK", 8)
    options = ("memory.generate=16", "max_steps=4", "distill.teacher=parent", "protect=[replay, distill]")
    shutil.copytree(copied.root, tmp_path / "whole", symlinks=True)
    whole = Workspace(tmp_path / "whole").update(*options, promote=False)
    block: Callable[..., None] = Writer._block
    blocks: list[int] = []

    def killed(self: Writer, kept: Any, *given: Any) -> None:
        blocks.append(kept.drawn)
        if len(blocks) == 2:
            raise KilledError
        block(self, kept, *given)

    monkeypatch.setattr(Writer, "_block", killed)
    with pytest.raises(KilledError):
        copied.update(*options, promote=False)
    assert [version.name for version in registry.versions(copied)] == ["v1"]
    assert json.loads(next(copied.versions.glob(f".staging-*/{FILE}")).read_text())["drawn"] == 8
    held: list[set[str]] = []
    teachers = Lesson._teachers

    def noted(self: Lesson, *given: Any) -> Any:
        found = teachers(self, *given)
        held.append(set(found or ()))
        return found

    monkeypatch.setattr(Lesson, "_teachers", noted)
    made = copied.update(*options, promote=False)
    assert made is not None and whole is not None and blocks[:3] == [0, 8, 8]
    assert made.manifest["written"] == whole.manifest["written"] is not None
    assert made.manifest["choices"] == whole.manifest["choices"]
    weights = "adapter_model.safetensors"
    assert (made.folder / weights).read_bytes() == (whole.folder / weights).read_bytes()
    assert held[-1] and all(id.startswith(PREFIX) for id in held[-1])  # The parent's view of them is held.
    assert not list(copied.versions.glob(".staging-*"))


def test_stored_logits_are_those_of_stored_rows_alone(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """And rows of experts are written by the expert that learned such rows."""
    seen: list[Lesson] = []
    learn = Candidate.learn

    def noted(self: Candidate, *given: Any) -> Any:
        seen.extend(self.lessons)
        return learn(self, *given)

    monkeypatch.setattr(Candidate, "learn", noted)
    made = copied.update(
        "memory.generate=8", "memory.size=4", "max_steps=2", "protect=[replay, distill]", "memory.mix=similarity"
    )
    assert made is not None
    [lesson] = seen
    assert lesson.written.rows and set(lesson.memory.rows) == set(lesson.written.rows)  # v1 has stored nothing.
    assert set(lesson.mix.weights if lesson.mix else {}) == set(lesson.written.rows)
    stored = Memory.load(made.folder)
    assert len(stored.rows) == 4 and set(stored.teachers) == set(stored.rows)


def test_each_lesson_has_rows_of_its_own_expert(workspace: Callable[..., Workspace]) -> None:
    from tests.test_experts import unlike

    ws = workspace(
        adapter_composition="experts",
        learning_rate=1e-2,
        max_steps=2,
        per_device_train_batch_size=8,
        gate={"floor": 1.0, "margin": 1.0},
        memory={"generate": 2},
        eval={"max_new_tokens": 4},
    )
    ws.ingest(toy_rows("pens", 40), task="pens")
    first = ws.update()
    assert first is not None
    ws.promote(first.name, force=True)
    ws.ingest(
        [{**row, "text": row["text"].replace("item ", "again item 100")} for row in toy_rows("pens", 20)], task="pens"
    )
    ws.ingest(unlike(toy_rows("cups", 40)), task="cups")
    made = ws.update(promote=False)
    assert made is not None
    assert first.manifest["choices"]["memory.generate"]["reason"] == written._NOTHING
    choices = made.manifest["choices"]
    assert choices["expert"]["value"] == "e2, e1"
    assert choices["memory.generate"]["reason"] == written._NOTHING  # Of the new expert.
    assert choices["memory.generate of e1"]["reason"].startswith("2 wanted; v1 drew ")
    assert choices["memory.generate of e1"]["reason"].endswith("; v1 did not learn prompts")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"protect": [], "memory": {"generate": 5}}, r"memory.generate is 5, but protect does not list replay.*: add"),
        (
            {"protect": ["ewc"], "memory": {"answers": "own"}},
            r"memory.answers is own, but protect does not list replay",
        ),
        ({"memory": {"answers": "own", "size": 0}}, r"memory.answers is own, but memory.size is 0.*: set memory.size"),
        ({"memory": {"generate": "auto"}}, r"memory.generate: write a number of rows or a share .* \(got 'auto'\)"),
        ({"memory": {"generate": -1}}, r"memory.generate: write"),
        ({"memory": {"generate_confidence": 0.1}}, r"memory.generate_confidence: "),
        ({"memory": {"generate_top_p": 0}}, r"memory.generate_top_p: "),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Config.build(values)
    Config.build({"protect": [], "memory": {"generate": 0, "answers": "stored", "size": 0}})
