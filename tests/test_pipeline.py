"""Whole updates on the tiny model, from rows to `current` and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from tests.training import Counted, StopAt
from treering import Workspace, pipeline, plan, registry
from treering.candidate import Candidate
from treering.config import Config
from treering.errors import ConfigError, LockError, ModelError, UpdateInterruptedError, UsageError, VersionError
from treering.evaluate import evaluate
from treering.files import write_json
from treering.memory import Memory
from treering.methods import PROTECT
from treering.model import fingerprint, load, load_tokenizer, resolve
from treering.registry import Version
from treering.results import Result, read_results
from treering.testing import tiny_model, toy_rows

MakeWorkspace = Callable[..., Workspace]
TASKS = ("pens", "cups", "hats")
LEARNS = {"learning_rate": 1e-2, "num_train_epochs": 8.0, "per_device_train_batch_size": 8}
ONE_STEP = {"max_steps": 1, "gate": {"floor": 1.0}}
"""Where only the pipeline matters, not what is learned. New data is measured all the same, so one step must help."""


def learned(ws: Workspace, task: str, *overrides: str, count: int = 20, **options: Any) -> Version:
    ws.ingest(toy_rows(task, count), task=task)
    version = ws.update(*overrides, **options)
    assert version is not None
    return version


def names(ws: Workspace) -> list[str]:
    return [version.name for version in registry.versions(ws)]


def current(ws: Workspace) -> str | None:
    here = registry.current(ws)
    return here.name if here else None


def waiting(ws: Workspace) -> dict[str, int]:
    rows = ws.catalog.waiting(registry.consumed(ws, registry.current(ws)))
    return {task: len(ids) for task, ids in rows.items()}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Names and contents of all files, but for locks and what SQLite keeps for readers."""
    files = (p for p in folder.rglob("*") if p.is_file() and not p.name.endswith((".lock", "-shm", "-wal")))
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Workspace:
    """A workspace that was taught three tasks. Tests only read it."""
    folder = tmp_path_factory.mktemp("three")
    settings: dict[str, Any] = {"model_name_or_path": str(model_folder), "bf16": False, **LEARNS}
    ws = Workspace.create(folder, **settings)
    for task in TASKS:
        learned(ws, task, count=40)
    return ws


@pytest.fixture
def copied(three: Workspace, tmp_path: Path) -> Workspace:
    """A copy of it that a test may change."""
    shutil.copytree(three.root, tmp_path / "copied", symlinks=True)
    return Workspace(tmp_path / "copied")


def test_three_tasks(three: Workspace) -> None:
    versions = registry.versions(three)
    assert [(v.name, v.parent, v.promote) for v in versions] == [
        ("v1", None, True),
        ("v2", "v1", True),
        ("v3", "v2", True),
    ]
    assert current(three) == "v3"
    last = versions[-1]
    assert list(last.scores) == list(TASKS)
    assert all(0 <= score <= 1 for score in last.scores.values())
    assert min(last.scores.values()) >= 0.75
    assert [event["version"] for event in registry.history(three)] == ["v1", "v2", "v3"]
    assert not list(three.versions.glob(".staging-*"))
    for version in versions:
        assert version.problems() == []


def test_the_manifest_tells_all(three: Workspace) -> None:
    manifest = registry.get(three, "v3").manifest
    assert manifest.keys() >= {
        *("format", "name", "created", "parent", "base", "plan", "config", "choices", "machine", "libraries", "rows"),
        *("held_out", "metrics", "evaluation", "scores", "parent_scores", "matrix", "summary", "verdict"),
        *("promote_wanted", "memory", "cost", "files", "digest"),
    }
    assert (manifest["name"], manifest["parent"]) == ("v3", "v2")
    assert {task: len(ids) for task, ids in manifest["rows"].items()} == {"hats": 36}
    assert {task: len(ids) for task, ids in manifest["held_out"].items()} == dict.fromkeys(TASKS, 4)
    assert manifest["metrics"] == dict.fromkeys(TASKS, "exact_match")
    assert manifest["config"]["learning_rate"] == 1e-2
    assert manifest["choices"]["learning_rate"] == {"value": 1e-2, "reason": "as set"}
    assert manifest["cost"]["rows_trained"] == 8 * 2 * 36
    assert manifest["memory"] == dict.fromkeys(TASKS, 8)
    assert {"adapter_config.json", "adapter_model.safetensors", "memory.json", "results.parquet", "report.html"} <= set(
        manifest["files"]
    )
    json.dumps(manifest, allow_nan=False)


def test_the_score_matrix_grows_along_the_lineage(three: Workspace) -> None:
    matrices = [version.manifest["matrix"] for version in registry.versions(three)]
    assert [matrix["tasks"] for matrix in matrices] == [list(TASKS[: n + 1]) for n in range(3)]
    last = matrices[-1]
    assert last["learned"] == [0, 1, 2]
    scores = [version.scores for version in registry.versions(three)]
    for update in range(3):
        for column, task in enumerate(TASKS[: update + 1]):
            assert last["R"][update][column] == scores[update][task]
    # What a parent scored on a task before it was taught, for forward transfer; nothing was measured earlier.
    assert last["R"][1][2] == registry.get(three, "v3").manifest["parent_scores"]["hats"]["score"]
    assert last["R"][0][2] is None
    assert registry.get(three, "v3").manifest["summary"]["average_accuracy"] == pytest.approx(
        sum(scores[2].values()) / 3
    )


def test_held_out_rows_are_never_consumed(three: Workspace) -> None:
    consumed = registry.consumed(three, registry.current(three))
    held_out = {id for ids in three.catalog.held_out().values() for id in ids}
    assert len(consumed) == 108
    assert len(held_out) == 12
    assert not consumed & held_out
    memory = Memory.load(registry.get(three, "v3").folder)
    assert consumed.issuperset(memory.rows)
    assert memory.teachers.keys() == memory.rows.keys()


def logits(model: Any, folder: Path) -> Tensor:
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer("pens item 1: sort b")["input_ids"]])
    with torch.no_grad():
        found = model.eval()(ids).logits
    assert isinstance(found, Tensor)
    return found


def test_plain_peft_loads_a_version(three: Workspace, model_folder: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    version = registry.get(three)
    base = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager")
    bare = logits(base, model_folder)
    adapted = logits(PeftModel.from_pretrained(base, str(version.folder)), model_folder)
    ours = logits(load(model_folder, three.config(), version), model_folder)
    torch.testing.assert_close(adapted, ours, rtol=1e-4, atol=1e-5)  # Joined layers sum in another order.
    assert not torch.allclose(adapted, bare, atol=0.1)
    named = json.loads((version.folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(model_folder)


VARIANTS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True, "lora_rank": 16},
    "head": {"additional_target": "lm_head"},
    "norms": {"additional_target": "norm", "use_dora": True, "lora_dropout": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("bf16", [False, True])
def test_every_kind_of_adapter_loads_in_plain_peft_and_goes_on(
    workspace: MakeWorkspace, model_folder: Path, variant: str, bf16: bool
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ws = workspace(**VARIANTS[variant], bf16=bf16, learning_rate=1e-2, max_steps=3)
    for task in ("pens", "cups"):
        version = learned(ws, task)
        ws.promote(version.name, force=True)
    dtype = torch.bfloat16 if bf16 else torch.float32
    base = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="eager", dtype=dtype)
    bare = logits(base, model_folder)
    peft = PeftModel.from_pretrained(base, str(version.folder))
    near: Any = {"rtol": 0.1, "atol": 0.3} if bf16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(
        logits(peft, model_folder), logits(load(model_folder, ws.config(), version), model_folder), **near
    )
    assert not torch.allclose(logits(peft, model_folder), bare, atol=0.5)


def test_an_update_goes_on_with_the_same_layers(workspace: MakeWorkspace) -> None:
    ws = workspace(lora_target="v_proj, q_proj", **ONE_STEP)
    learned(ws, "pens")
    ws.promote("v1", force=True)
    ws.ingest(toy_rows("cups", 20), task="cups")
    with pytest.raises(
        ConfigError, match="lora_target is all, but v1 was made with v_proj, q_proj: set lora_target: v"
    ):
        ws.update(lora_target="all")
    with pytest.raises(ConfigError, match="additional_target is norm, but v1 was made with None: leave it out"):
        ws.update(additional_target="norm")
    assert ws.update(lora_target="q_proj,v_proj") is not None


def test_dropout_is_a_matter_of_each_update(workspace: MakeWorkspace) -> None:
    ws = workspace(**ONE_STEP)
    for task, dropout in (("pens", 0.5), ("cups", 0.0), ("hats", 0.25)):
        version = learned(ws, task, f"lora_dropout={dropout}")
        ws.promote(version.name, force=True)
        assert json.loads((version.folder / "adapter_config.json").read_text())["lora_dropout"] == dropout
        model = load(Path(str(ws.config().model_name_or_path)), ws.config([f"lora_dropout={dropout}"]), version)
        drops = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
        joined = any("forward" in vars(m) for m in model.modules())
        assert (drops, joined) == (({dropout}, False) if dropout else (set(), True))


@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_plain_transformers_loads_a_version(workspace: MakeWorkspace, model_folder: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ws = workspace(finetuning_type=kind, learning_rate=1e-3, num_train_epochs=2.0, gate={"floor": 1.0, "margin": 1.0})
    first = learned(ws, "pens")
    second = learned(ws, "cups")
    assert (first.name, second.name, second.parent) == ("v1", "v2", "v1")
    plain = AutoModelForCausalLM.from_pretrained(second.folder, attn_implementation="eager")
    assert torch.equal(logits(plain, second.folder), logits(load(model_folder, ws.config(), second), model_folder))
    assert len(AutoTokenizer.from_pretrained(second.folder)) == len(load_tokenizer(model_folder))
    base = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    changed = {name for name, weight in plain.state_dict().items() if not torch.equal(weight, base[name])}
    if kind == "full":
        assert changed == set(base)
    else:
        assert changed == {name for name in base if ".layers." in name}


def test_the_same_seed_gives_the_same_bytes(workspace: MakeWorkspace) -> None:
    def adapter(name: str, **settings: Any) -> tuple[bytes, bytes]:
        ws = workspace(name, **ONE_STEP, **settings)
        made = [learned(ws, task, promote=True) for task in ("pens", "cups")]
        ws.promote("v2", force=True)
        torch.rand(7)  # Random numbers that other code draws do not matter.
        return tuple((v.folder / "adapter_model.safetensors").read_bytes() for v in made)  # type: ignore[return-value]

    one, same, other = adapter("one"), adapter("same"), adapter("other", seed=1)
    assert one == same
    assert one[0] != other[0]


def asked_first(measure: Callable[[Candidate], Any]) -> Callable[[Candidate], Any]:
    def asked(candidate: Candidate) -> Any:
        assert candidate.stop is not None
        candidate.stop.asked = True
        return measure(candidate)

    return asked


def test_an_interrupted_update_ends_in_the_same_bytes(
    workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_train_epochs": 1.0, "per_device_train_batch_size": 4, "lora_dropout": 0.2}
    counted = Counted()
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "stop_on_signals", lambda: nullcontext(counted))
        whole = learned(workspace("whole", **settings), "pens")
    ws = workspace("stopped", **settings)
    ws.ingest(toy_rows("pens", 20), task="pens")
    # While the parent is measured; then within steps of the training, further on each time.
    newest = []
    for looks in (2, *[counted.looks // 3] * 3):
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "stop_on_signals", lambda looks=looks: nullcontext(StopAt(looks)))
            with pytest.raises(UpdateInterruptedError):
                ws.update()
        newest.append(max((int(p.name[5:]) for p in ws.versions.glob(".staging-*/checkpoints/*")), default=None))
        assert names(ws) == []
        torch.rand(3)
    assert newest == [None, 1, 2, 3]
    # Once the training has ended, while the candidate is measured.
    with monkeypatch.context() as patch:
        patch.setattr(Candidate, "measure", asked_first(Candidate.measure))
        with pytest.raises(UpdateInterruptedError):
            ws.update()
    assert list(ws.versions.glob(".staging-*/checkpoints/step-5"))
    # What came since waits for the next update.
    ws.ingest(toy_rows("cups", 20), task="cups")
    version = ws.update()
    assert version is not None
    assert version.manifest["rows"].keys() == {"pens"}
    for name in ("adapter_model.safetensors", "memory.json", "memory.safetensors", "results.parquet"):
        assert (version.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_rolling_back_brings_everything_back(copied: Workspace) -> None:
    copied.rollback()
    assert current(copied) == "v2"
    assert waiting(copied) == {"hats": 36}
    assert Memory.load(registry.get(copied).folder).by_task() == {"pens": 8, "cups": 8}
    version = copied.update("max_steps=1", "gate.floor=1", "gate.margin=1")
    assert version is not None
    assert (version.name, version.parent) == ("v4", "v2")
    replayed = [id for task, ids in version.manifest["rows"].items() if task != "hats" for id in ids]
    assert replayed == []
    assert Memory.load(version.folder).by_task() == dict.fromkeys(TASKS, 8)


def test_the_memory_of_the_version_rolled_back_to_is_used(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    copied.rollback("v1")
    trained: list[str] = []

    def note(candidate: Candidate, *given: Any) -> list[dict[str, float]]:
        found = learn(candidate, *given)
        trained.extend(id for step in candidate.steps for ids in step for id in ids)
        return found

    learn = Candidate.learn
    monkeypatch.setattr(Candidate, "learn", note)
    learned(copied, "mugs", "num_train_epochs=1", "gate.floor=1")
    old = set(trained) - {id for ids in registry.versions(copied)[-1].manifest["rows"].values() for id in ids}
    assert old == set(Memory.load(registry.get(copied, "v1").folder).rows)


def test_nothing_new(copied: Workspace) -> None:
    before = snapshot(copied.versions)
    assert copied.update() is None
    assert pipeline.update(copied, quiet=True).status == "nothing new"
    assert snapshot(copied.versions) == before


def test_the_same_update_is_not_run_twice(workspace: MakeWorkspace) -> None:
    ws = workspace(**ONE_STEP, protect=[])
    first = learned(ws, "pens", "gate.min_gain=1")
    assert not first.promote
    again = pipeline.update(ws, ["gate.min_gain=1"], quiet=True)
    assert (again.status, again.version) == ("held", first)
    assert "v1 was already made of these rows, this parent and these settings" in again.reason
    assert first.summary in again.reason
    other = ws.update("gate.min_gain=0.9")
    assert other is not None
    assert names(ws) == ["v1", "v2"]


def test_a_held_candidate_is_kept_and_its_rows_stay_new(copied: Workspace) -> None:
    outcome = learned(copied, "mugs", "gate.min_gain=1", "max_steps=1", "protect=[]")
    assert (outcome.name, outcome.promote) == ("v4", False)
    assert outcome.summary.startswith("held: ")
    assert "new data" in outcome.summary
    assert current(copied) == "v3"
    assert waiting(copied) == {"mugs": 18}
    assert outcome.problems() == []
    with pytest.raises(UsageError, match=r"v4 was held by the gate: held: .* Use --force"):
        copied.promote("v4")
    assert copied.promote("v4", force=True).name == "v4"
    assert current(copied) == "v4"
    assert registry.history(copied)[-1]["forced"]
    assert waiting(copied) == {}


def test_a_name_is_never_given_twice(made: Path, tmp_path: Path) -> None:
    """What was noted of v2 and v3 (that v2 was current, canary figures, thumbs) is of no other version."""
    ws = Workspace(shutil.copytree(made, tmp_path / "ws", symlinks=True))
    ws.rollback()
    shutil.rmtree(ws.versions / "v2")
    held = ws.update("gate.min_gain=1")
    assert held is not None and (held.name, held.promote) == ("v3", False)
    with pytest.raises(UsageError, match="there is no version 'v2'"):
        ws.rollback("v2")
    shutil.rmtree(held.folder)  # Nothing but its folder told of it: it was never current.
    again = Workspace(ws.root)
    fourth = again.update("gate.min_gain=1")
    assert fourth is not None and (fourth.name, current(again)) == ("v4", "v1")
    again.promote("v4", force=True)
    again.rollback()
    shutil.rmtree(fourth.folder)
    again.highest.unlink()  # As in a workspace from before it was there.
    assert registry.next_name(again) == "v5"


def test_a_collapse_is_held(copied: Workspace) -> None:
    """A rate that ruins the model teaches it the new task and costs it all others."""
    version = learned(copied, "mugs", "protect=[]", "learning_rate=0.1", "num_train_epochs=8", count=40)
    assert not version.promote
    assert current(copied) == "v3"
    assert any(task in version.summary for task in TASKS)


def test_without_promote_current_stays(workspace: MakeWorkspace) -> None:
    ws = workspace(**LEARNS)
    version = learned(ws, "pens", promote=False, count=40)
    assert version.promote
    assert current(ws) is None
    assert current(Workspace(ws.root)) is None
    ws.promote("v1")
    assert current(ws) == "v1"


def test_the_inbox_is_taken_in(workspace: MakeWorkspace) -> None:
    ws = workspace(**ONE_STEP)
    (ws.inbox / "pens").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in toy_rows("pens", 20))
    (ws.inbox / "pens" / "monday.jsonl").write_text(text)
    version = ws.update()
    assert version is not None
    assert {task: len(ids) for task, ids in version.manifest["rows"].items()} == {"pens": 18}


def test_an_update_of_one_file_alone(workspace: MakeWorkspace) -> None:
    """It is judged by the file's own held-out rows; the rest waits as it was, and the inbox is not read."""
    ws = workspace(**ONE_STEP)
    for name, task in (("one", "pens"), ("two", "cups")):
        (ws.inbox / task).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in toy_rows(task, 20))
        (ws.inbox / task / f"{name}.jsonl").write_text(text)
    ws.ingest()
    (ws.inbox / "cups" / "three.jsonl").write_text(json.dumps(toy_rows("cups", 21)[20]) + "\n")
    outcome = pipeline.update(ws, file=str(ws.inbox / "cups" / "two.jsonl"), inbox=False, quiet=True)
    assert outcome.version is not None
    assert {task: len(ids) for task, ids in outcome.version.manifest["rows"].items()} == {"cups": 18}
    assert {task: len(ids) for task, ids in outcome.version.manifest["held_out"].items()} == {"cups": 2}
    assert waiting(ws) == {"pens": 18}
    assert pipeline.update(ws, file="none", inbox=False, quiet=True).status == "nothing new"


def test_held_out_files_of_the_users_own(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(**ONE_STEP)
    rows = toy_rows("pens", 24)
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    found = ws.ingest(rows[3:], task="pens", held_out=tmp_path / "test.jsonl")
    assert (found.accepted, found.duplicates, found.held_out) == (24, 3, 6)
    version = ws.update()
    assert version is not None
    assert len(version.rows) == 18
    held_out = version.manifest["held_out"]["pens"]
    assert len(held_out) == 6
    stored = ws.catalog.examples(held_out)
    assert [stored[id].prompt[-1].content for id in held_out] == [row["text"] for row in rows[:6]]


def test_a_new_slice_joins_its_task(copied: Workspace) -> None:
    rows = [{**row, "text": row["text"].replace("item ", "again item 100")} for row in toy_rows("pens", 20)]
    copied.ingest(rows, task="pens")
    version = copied.update("max_steps=1", "gate.floor=1")
    assert version is not None
    assert {task: len(ids) for task, ids in version.manifest["held_out"].items()} == {"pens": 6, "cups": 4, "hats": 4}
    assert version.manifest["scores"]["pens"]["rows"] == 6
    assert version.manifest["parent_scores"]["pens"]["rows"] == 6
    assert version.manifest["matrix"]["learned"] == [0, 1, 2]


def test_another_base_model_is_refused(workspace: MakeWorkspace, tmp_path: Path) -> None:
    ws = workspace(**LEARNS)
    assert learned(ws, "pens", count=40).promote
    other = tiny_model(tmp_path / "other", seed=1)
    ws.ingest(toy_rows("cups", 20), task="cups")
    with pytest.raises(ConfigError, match=r"model_name_or_path=.* would be for this command alone"):
        ws.update(model_name_or_path=str(other))
    file = ws.root / "treering.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"model_name_or_path": str(other)}))
    with pytest.raises(ModelError, match=r"v1 was made from the base model .* set model_name_or_path back"):
        ws.update()
    assert (names(ws), current(ws)) == (["v1"], "v1")


@pytest.mark.parametrize(
    ("first", "second"),
    [("lora", "full"), ("full", "lora"), ("lora", "freeze"), ("adapter", "full"), ("norm", "adapter")],
)
def test_adapters_and_whole_models_do_not_mix(workspace: MakeWorkspace, first: str, second: str) -> None:
    """A version is an adapter over the base or a whole model; an update cannot turn one into the other unseen."""
    ws = workspace(finetuning_type=first, **ONE_STEP)
    learned(ws, "pens")
    ws.promote("v1", force=True)
    ws.ingest(toy_rows("cups", 20), task="cups")
    with pytest.raises(ConfigError, match=f"finetuning_type is {second}, but v1 .* finetuning_type: {first}"):
        ws.update(finetuning_type=second)
    assert names(ws) == ["v1"]


def test_a_second_update_is_refused(workspace: MakeWorkspace) -> None:
    ws = workspace(**ONE_STEP)
    ws.ingest(toy_rows("pens", 20), task="pens")
    with ws.lock("update", "update"):
        with pytest.raises(LockError, match=r"in use by `treering update` \(process \d+ on .*, since .*\)"):
            Workspace(ws.root).update()
        # Rolling back, and looking, do not wait for an update.
        with pytest.raises(UsageError, match="no current version"):
            Workspace(ws.root).rollback()
    assert ws.update() is not None


def test_a_candidate_whose_parent_is_no_longer_current_is_held(
    copied: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Candidate.measure

    def roll_back_meanwhile(candidate: Candidate) -> list[Result]:
        Workspace(copied.root).rollback()
        return measure(candidate)

    monkeypatch.setattr(Candidate, "measure", roll_back_meanwhile)
    version = learned(copied, "mugs", "max_steps=1")
    assert (version.name, version.parent, version.promote) == ("v4", "v3", False)
    assert version.summary == "held: its parent v3 is no longer current"
    assert current(copied) == "v2"
    assert waiting(copied) == {"hats": 36, "mugs": 18}
    assert current(Workspace(copied.root)) == "v2"


def test_a_failed_update_leaves_the_workspace_as_it_was(copied: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    copied.ingest(toy_rows("mugs", 20), task="mugs")

    def fail(candidate: Candidate) -> list[Result]:
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Candidate, "measure", fail)
        with pytest.raises(RuntimeError, match="power cut"):
            copied.update("max_steps=1")
    assert (names(copied), current(copied)) == (["v1", "v2", "v3"], "v3")
    version = copied.update("max_steps=1")
    assert version is not None
    assert version.name == "v4"
    assert not list(copied.versions.glob(".staging-*"))


def test_a_changed_parent_is_refused(copied: Workspace) -> None:
    with (copied.versions / "v3" / "memory.json").open("a") as file:
        file.write(" ")
    copied.ingest(toy_rows("mugs", 20), task="mugs")
    with pytest.raises(VersionError, match=r"v3: memory\.json was changed"):
        copied.update()
    assert names(copied) == ["v1", "v2", "v3"]


def test_new_rows_are_held_against_what_the_parent_makes_of_them(copied: Workspace) -> None:
    """`lwf` needs a parent: the first version has no such term, later ones do."""
    first = [json.loads(line) for line in (registry.get(copied, "v1").folder / "log.jsonl").open()]
    assert not any("lwf" in entry for entry in first)
    version = learned(copied, "mugs", "protect=[lwf]", "max_steps=2")
    log = [json.loads(line) for line in (version.folder / "log.jsonl").open()]
    assert all(entry["lwf"] >= 0 for entry in log)
    assert log[0]["lwf"] < 1e-3 < log[0]["loss"]  # Before the first step the model is its parent.


def test_another_number_of_stored_logits(copied: Workspace) -> None:
    """`distill.top_k` may change between updates: old rows keep what was stored."""
    version = learned(copied, "mugs", "distill.top_k=4", "max_steps=2")
    memory = Memory.load(version.folder)
    assert memory.teachers.keys() == memory.rows.keys()
    assert learned(copied, "caps", "distill.top_k=16", "max_steps=2").problems() == []


def test_a_smaller_memory_is_kept_to(copied: Workspace) -> None:
    version = learned(copied, "mugs", "memory.size=8", "max_steps=1")
    memory = Memory.load(version.folder)
    assert memory.by_task() == {**dict.fromkeys(TASKS, 2), "mugs": 2}


def test_a_task_too_small_to_hold_rows_out(workspace: MakeWorkspace) -> None:
    ws = workspace(**ONE_STEP)
    version = learned(ws, "pens", count=4)
    assert version.promote
    assert version.scores == {}
    assert version.manifest["matrix"] == {"tasks": ["pens"], "learned": [0], "R": [[None]]}
    assert "its gain is not measured" in str(version.manifest["verdict"]["judgements"])


def test_an_existing_adapter_becomes_v1(three: Workspace, workspace: MakeWorkspace) -> None:
    adapter = registry.get(three, "v1").folder
    ws = workspace("adopted", adapter=adapter, **ONE_STEP)
    assert current(ws) == "v1"
    assert registry.get(ws).problems() == []
    version = learned(ws, "cups")
    assert (version.name, version.parent) == ("v2", "v1")
    assert version.manifest["matrix"]["learned"] == [1]
    assert version.manifest["matrix"]["R"][0] == [version.manifest["parent_scores"]["cups"]["score"]]


def test_an_adapter_that_does_not_fit_leaves_no_workspace(three: Workspace, tmp_path: Path, model_folder: Path) -> None:
    wide = tiny_model(tmp_path / "wide", hidden_size=32)
    with pytest.raises(VersionError, match="v1 does not fit the base model"):
        Workspace.create(tmp_path / "ws", adapter=registry.get(three, "v1").folder, model_name_or_path=str(wide))
    with pytest.raises(UsageError, match="no workspace"):
        Workspace(tmp_path / "ws")
    with pytest.raises(UsageError, match=r"no adapter_config\.json"):
        Workspace.create(tmp_path / "ws", adapter=model_folder)


def test_settings_are_checked_before_anything_happens(workspace: MakeWorkspace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="lora_rank"):
        Workspace.create(tmp_path / "wrong", lora_rnak=1)
    assert not (tmp_path / "wrong").exists()
    ws = workspace()
    with pytest.raises(UsageError, match="a workspace already"):
        Workspace.create(ws.root)
    assert isinstance(ws.config(["lora_rank=4"]), Config)


def test_results_are_kept_for_every_row(three: Workspace) -> None:
    folder = registry.get(three).folder
    results: Sequence[Result] = read_results(folder / "results.parquet")
    held_out = [(id, task) for task, ids in three.catalog.held_out().items() for id in ids]
    assert [(result.id, result.task) for result in results] == held_out
    assert [r.task for r in read_results(folder / "parent.parquet")] == ["hats"] * 4


def test_the_best_results_of_each_task_are_kept(copied: Workspace) -> None:
    def kept(name: str, file: str, task: str) -> list[Result]:
        return [r for r in read_results(registry.get(copied, name).folder / file) if r.task == task]

    for task in TASKS:
        each = [kept(name, "results.parquet", task) for name in ("v1", "v2", "v3")]
        assert kept("v3", "best.parquet", task) in each
        assert [r.id for r in kept("v3", "best.parquet", task)] == copied.catalog.held_out()[task]
    # Whatever was promoted since, forgetting a task is judged against what was best.
    loose = ["protect=[]", "gate.margin=1.0", "gate.floor=1.0"]
    forgot = learned(copied, "bags", *loose, count=40)
    assert forgot.promote and forgot.scores["pens"] < 0.75
    assert kept(forgot.name, "best.parquet", "pens") == kept("v3", "best.parquet", "pens")
    judged = learned(copied, "belts", "max_steps=1", *loose, "gate.best_margin=0.0").manifest["verdict"]["judgements"]
    [pens] = [found for found in judged if found["name"] == "pens at its best"]
    assert not pens["passed"] and pens["before"] > forgot.scores["pens"]


class Counting:
    """A user's own method that counts the rows of all updates."""

    def __init__(self, config: Config) -> None:
        self.before = 0

    def prepare(self, model: Any, state: dict[str, Tensor]) -> Any:
        self.before = int(state["rows"]) if state else 0
        return model

    def after_update(self, model: Any, batches: Sequence[Any]) -> dict[str, Tensor]:
        return {"rows": torch.tensor(self.before + len(batches))}


def test_the_state_of_a_method_of_ones_own_goes_with_the_version(
    workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    monkeypatch.setitem(PROTECT, "counting", f"{__name__}:Counting")
    ws = workspace(protect=["counting"], **ONE_STEP)
    for task, total in (("pens", 18), ("cups", 36)):
        version = learned(ws, task)
        ws.promote(version.name, force=True)
        assert load_file(version.folder / "state.safetensors")["counting.rows"].item() == total
    ws.rollback()
    version = learned(ws, "hats", "max_steps=2")
    assert load_file(version.folder / "state.safetensors")["counting.rows"].item() == 18 + 36


@pytest.mark.parametrize("kind", ["lora", "adapter", "norm", "full", "freeze"])
@pytest.mark.parametrize("half", [{}, {"bf16": True}, {"fp16": True}], ids=["float32", "bfloat16", "float16"])
def test_what_was_measured_is_what_serves(
    workspace: MakeWorkspace, model_folder: Path, kind: str, half: dict[str, bool]
) -> None:
    ws = workspace(finetuning_type=kind, max_steps=2, learning_rate=1e-2, **half)
    for task in ("pens", "cups"):
        version = learned(ws, task)
        ws.promote(version.name, force=True)
    config = ws.config()
    measured = read_results(version.folder / "results.parquet")
    stored = ws.catalog.examples([result.id for result in measured])
    rows = [(stored[result.id], result.task) for result in measured]
    model = load(model_folder, config, version)
    again = evaluate(model, load_tokenizer(model_folder), rows, version.manifest["metrics"], config, quiet=True)
    assert again == measured


def test_a_task_that_was_not_learned_better_than_by_chance_is_held(workspace: MakeWorkspace) -> None:
    """One step teaches none of three labels, and nothing is recalled; the loss on them falls all the same."""
    ws = workspace(max_steps=1, val_size=0.2, protect=[])
    ws.ingest(toy_rows("pens", 120, labels=3), task="pens")
    version = ws.update()
    assert version is not None and not version.promote
    assert [j["name"] for j in version.manifest["verdict"]["judgements"] if not j["passed"]] == ["pens against chance"]


def test_what_a_plan_left_is_not_taken_up(workspace: MakeWorkspace) -> None:
    """`treering plan` that was killed leaves a folder with a plan; nothing was learned by it."""
    ws = workspace(max_steps=1)
    ws.ingest(toy_rows("pens", 10), task="pens")
    left = ws.versions / f"{registry.TRIED}killed"
    left.mkdir()
    made = plan.make_plan(ws, None, ws.config(), fingerprint(resolve(ws.config().model_name_or_path)))
    write_json(left / "plan.json", asdict(made))
    ws.ingest(toy_rows("cups", 10), task="cups")
    version = ws.update()
    assert version is not None and version.manifest["rows"].keys() == {"pens", "cups"}
    assert not left.exists()
