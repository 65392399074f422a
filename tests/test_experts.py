"""Experts: an update that is unlike what is known touches nothing of it, and prompts find who answers them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.serving import greedy
from tests.test_serve_worker import Inside
from tests.training import StopAt
from treering import Workspace, experts, pipeline, registry
from treering.config import Config
from treering.data.example import Example, Message
from treering.errors import ConfigError, UpdateInterruptedError
from treering.experts import FEW, Experts, class_of
from treering.forecast import forecast
from treering.guides import guides
from treering.memory import Memory
from treering.methods import Methods
from treering.model import load, load_base, load_tokenizer
from treering.progress import silent
from treering.registry import Version
from treering.rendering import rendered
from treering.results import read_results
from treering.router import Router, Shown
from treering.testing import toy_rows

SETTINGS: dict[str, Any] = {
    "adapter_composition": "experts",
    "learning_rate": 1e-2,
    "num_train_epochs": 8.0,
    "per_device_train_batch_size": 8,
    "gate": {"floor": 1.0, "margin": 1.0},
}
UNLIKE = "QXZJ!"
"""Of other letters than the first task, so that even the tiny model sees it is another."""


def unlike(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{**row, "text": f"{UNLIKE * 3} {row['text'].upper()} {UNLIKE * 3}"} for row in rows]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Workspace:
    """A workspace that was taught two unlike tasks. Tests only read it."""
    settings = {"model_name_or_path": str(model_folder), "bf16": False, **SETTINGS}
    ws = Workspace.create(tmp_path_factory.mktemp("experts"), **settings)
    with pytest.MonkeyPatch.context() as patch:
        # With two tasks of random features, what one does to the covariance moves the other's rows; not what is tested.
        patch.setattr("treering.router.FAR", 4.0)
        for task, rows in (("pens", toy_rows("pens", 80)), ("cups", unlike(toy_rows("cups", 80)))):
            ws.ingest(rows, task=task)
            version = ws.update()
            assert version is not None
            ws.promote(version.name, force=True)
    return ws


@pytest.fixture
def copied(two: Workspace, tmp_path: Path) -> Workspace:
    """A copy of it that a test may change."""
    shutil.copytree(two.root, tmp_path / "copied", symlinks=True)
    return Workspace(tmp_path / "copied")


def version(ws: Workspace, name: str) -> Version:
    return registry.get(ws, name)


def expert(made: Version) -> dict[str, Any]:
    found: dict[str, Any] = made.manifest["choices"]["expert"]
    return found


def test_what_is_unlike_gets_an_expert_of_its_own(two: Workspace) -> None:
    first, second = version(two, "v1"), version(two, "v2")
    assert expert(first) == {"value": "e1", "reason": "the first"}
    assert expert(second)["value"] == "e2"
    assert "of cups, 72 of 72 new rows have labels or a task that no expert knows" in expert(second)["reason"]
    assert sorted(path.name for path in (second.folder / "experts").iterdir()) == ["e1", "e2"]
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        kept, before = second.folder / "experts" / "e1" / name, first.folder / "experts" / "e1" / name
        assert kept.samefile(before)  # What did not change costs nothing.
        assert (second.folder / name).samefile(second.folder / "experts" / "e2" / name)
    assert second.problems() == []


def test_nothing_is_forgotten(two: Workspace) -> None:
    before = {row.id: row for row in read_results(version(two, "v1").folder / "results.parquet") if row.task == "pens"}
    after = {row.id: row for row in read_results(version(two, "v2").folder / "results.parquet")}
    assert len(before) == 8
    assert all((after[id].prediction, after[id].loss) == (row.prediction, row.loss) for id, row in before.items())
    assert version(two, "v2").scores["cups"] > 0.5


def test_each_expert_is_a_plain_peft_folder(two: Workspace) -> None:
    from peft import PeftModel

    config, base = two.config(), Path(str(two.config().model_name_or_path))
    model: Any = load(base, config, version(two, "v2"))
    found = experts.of(model)
    assert found is not None
    ids = torch.arange(5)[None]
    for name in ("e1", "e2"):
        plain: Any = PeftModel.from_pretrained(
            load_base(base, config), str(version(two, "v2").folder / "experts" / name)
        )
        with torch.no_grad(), experts.using(model, found, name):
            torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_task_that_returns_goes_on_with_its_expert(copied: Workspace) -> None:
    ws = copied
    ws.ingest(
        [{**row, "text": row["text"].replace("item ", "again item 100")} for row in toy_rows("pens", 40)], task="pens"
    )
    made = ws.update()
    assert made is not None
    assert expert(made)["value"] == "e1"
    assert expert(made)["reason"] == "36 of 36 new rows are of what it knows"
    one, other = (made.folder / "experts" / name / "adapter_model.safetensors" for name in ("e1", "e2"))
    assert other.samefile(version(ws, "v2").folder / "experts" / "e2" / "adapter_model.safetensors")
    assert one.read_bytes() != (version(ws, "v2").folder / "experts" / "e1" / "adapter_model.safetensors").read_bytes()


@pytest.mark.usefixtures("no_children")
def test_it_is_planned_as_any_other(copied: Workspace) -> None:
    copied.ingest(unlike(toy_rows("hats", 40)), task="hats")
    planned = forecast(copied, quiet=True).estimate
    made = copied.update(promote=False)
    assert made is not None and planned is not None
    assert planned.steps == made.manifest["cost"]["steps"]


def test_an_interrupted_update_ends_in_the_same_bytes(copied: Workspace, tmp_path: Path) -> None:
    copied.ingest(unlike(toy_rows("hats", 40)), task="hats")
    shutil.copytree(copied.root, tmp_path / "whole", symlinks=True)
    whole = Workspace(tmp_path / "whole").update(promote=False)
    for looks in (150, 300):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "stop_on_signals", lambda looks=looks: nullcontext(StopAt(looks)))
            with pytest.raises(UpdateInterruptedError):
                copied.update(promote=False)
    made = copied.update(promote=False)
    assert made is not None and whole is not None
    for name in ("adapter_model.safetensors", "router.json", "router.safetensors", "memory.json", "results.parquet"):
        assert (made.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_prompts_find_their_experts_and_answers_their_order(two: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treering.router.FAR", 4.0)
    config, base = two.config(), Path(str(two.config().model_name_or_path))
    model, tokenizer = load(base, config, version(two, "v2")), load_tokenizer(base)
    found = experts.of(model)
    assert found is not None
    asked = [row["text"] for pair in zip(toy_rows("pens", 6), unlike(toy_rows("cups", 6)), strict=True) for row in pair]
    prompts = [[Message("user", text)] for text in asked]
    before = {name: p.data_ptr() for name, p in model.named_parameters()}

    def work(part: Any) -> list[tuple[int, str]]:
        places = {name: p.data_ptr() for name, p in model.named_parameters()}
        [who] = [e for e, own in found.adapters.items() if all(places[n] == own[n].data_ptr() for n in own)]
        return [(at, who) for at in part]

    rows = [[1, 2, 3]] * len(prompts)
    chosen = [guide.expert for guide in guides(model, tokenizer, prompts, config)]
    assert experts.routed(model, chosen, rows, work, config, silent) == [
        (at, ("e1", "e2")[at % 2]) for at in range(len(prompts))
    ]
    assert before == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_where_no_expert_is_near_the_base_model_answers(model_folder: Path) -> None:
    config = Config(bf16=False)
    model = Methods(config).prepare(load_base(model_folder, config), {})
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    ids = torch.arange(5)[None]
    experts.attach(model, Experts(Router(4), {"e1": {n: p.data for n, p in model.named_parameters() if "lora_" in n}}))
    found = experts.of(model)
    assert found is not None
    with torch.no_grad():
        with experts.using(model, found, None):
            bare = model(ids).logits
        torch.testing.assert_close(bare, load_base(model_folder, config)(ids).logits)
        assert not torch.allclose(bare, model(ids).logits)


def known(**owners: str) -> Experts:
    """Experts whose classes lie 10 apart on a line."""
    router = Router(2)
    for at, (name, owner) in enumerate(owners.items()):
        router.learn(Shown(cluster(10 * at), [name] * 40), {name: owner})
    return Experts(router, {owner: {} for owner in owners.values()})


def cluster(at: float, seed: int = 0) -> Tensor:
    return torch.randn(40, 2, generator=torch.Generator().manual_seed(seed)) + torch.tensor([at, 0.0])


def given(both: Experts | None, rows: Sequence[tuple[str, str, Tensor]]) -> dict[str, tuple[str | None, int]]:
    """By expert, in their order, what it begins from and how many of the rows (task, label, vectors) it is taught."""
    tasks = [task for task, _, vectors in rows for _ in vectors]
    classes = [label for _, label, vectors in rows for _ in vectors]
    found = experts.split(both, torch.cat([vectors for *_, vectors in rows]), tasks, classes)
    assert sorted(at for choice in found for at in choice.rows) == list(range(len(classes)))
    return {choice.expert: (choice.begins, len(choice.rows)) for choice in found}


def test_who_is_chosen() -> None:
    both = known(a="e1", b="e2")
    assert given(None, [("t", "a", cluster(0))]) == {"e1": (None, 40)}
    assert given(both, [("t", "b", cluster(10))]) == {"e2": ("e2", 40)}
    # Who knows the label counts, wherever its rows lie now.
    assert list(given(both, [("t", "b", cluster(0)[:21]), ("t", "a", cluster(0)[21:])]).items()) == [
        ("e2", ("e2", 21)),
        ("e1", ("e1", 19)),
    ]
    assert given(both, [("t", "c", cluster(10, 1))]) == {"e2": ("e2", 40)}
    assert given(both, [("t", "c", cluster(40))]) == {"e3": ("e2", 40)}


def test_few_new_labels_go_with_their_task() -> None:
    both = known(a="e1", b="e2")
    few = [("t", "a", cluster(0)[:30]), ("t", "new", cluster(60)[:10])]
    assert given(both, few) == {"e1": ("e1", 40)}
    many = [("t", "a", cluster(0)[:10]), ("t", "new", cluster(60)[:30])]
    assert given(both, many) == {"e3": ("e2", 30), "e1": ("e1", 10)}


def test_new_tasks_that_are_alike_share_an_expert() -> None:
    both = known(a="e1", b="e2")
    found = given(both, [("z", "z", cluster(40)), ("y", "y", cluster(80)), ("x", "x", cluster(40, 1))])
    assert found == {"e3": ("e2", 80), "e4": ("e2", 40)}  # x comes first, z is like it.
    assert given(None, [("z", "z", cluster(40)), ("y", "y", cluster(80)), ("x", "x", cluster(40, 1))]) == {
        "e1": (None, 80),
        "e2": (None, 40),
    }


def test_a_few_rows_get_no_expert_of_their_own() -> None:
    both = known(a="e1", b="e2")
    found = experts.split(both, cluster(40)[: FEW - 1], ["t"] * (FEW - 1), ["c"] * (FEW - 1))
    assert [(choice.expert, choice.begins) for choice in found] == [("e2", "e2")]
    assert "of t, 7 of 7 new rows have labels or a task that no expert knows, too few for an expert" in found[0].reason
    assert given(both, [("t", "c", cluster(40)[:FEW])]) == {"e3": ("e2", FEW)}
    # But the first of all.
    assert given(None, [("t", "c", cluster(40)[:2])]) == {"e1": (None, 2)}


def test_few_rows_go_with_a_new_task_that_they_are_like() -> None:
    """Though it comes later by its name."""
    found = given(known(a="e1", b="e2"), [("a few", "y", cluster(80, 1)[:3]), ("z", "z", cluster(80))])
    assert found == {"e3": ("e2", 43)}


def test_numbers_go_on_after_one_was_merged() -> None:
    both = known(a="e1", b="e3")
    assert given(both, [("t", "c", cluster(40))]) == {"e4": ("e3", 40)}


def test_only_rows_of_the_expert_are_replayed() -> None:
    both, memory = known(**{class_of("t", "a"): "e1", class_of("t", "b"): "e2"}), Memory(100)
    rows = [
        Example.of([{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "ab"[n % 2]}])
        for n in range(8)
    ]
    memory.add(rows, "t")
    for name, labels in (("e1", {"a"}), ("e2", {"b"}), ("e3", set[str]())):
        assert {row.label for row in experts.part(memory, name, both).rows.values()} == labels
    assert not len(experts.part(memory, "e1", None))


@pytest.mark.parametrize(
    "other", [{"finetuning_type": "full"}, {"launcher": "ray"}, {"additional_target": "lm_head"}], ids=str
)
def test_what_does_not_go_together(other: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"adapter_composition is experts, but {next(iter(other))} is"):
        Config.build({"adapter_composition": "experts", **other})


@pytest.mark.parametrize("policy", ["hard", "forgotten"])
def test_no_expert_can_say_which_of_all_rows_are_hard(policy: str) -> None:
    with pytest.raises(ConfigError, match=f"memory.policy is {policy}, which asks one model about all rows"):
        Config.build({"adapter_composition": "experts", "memory": {"policy": policy}})


def test_the_composition_stays(copied: Workspace) -> None:
    ws = copied
    ws.ingest(toy_rows("hats"), task="hats")
    with pytest.raises(ConfigError, match="is continue, but v2 has experts: set adapter_composition: experts"):
        ws.update("adapter_composition=continue")


def test_they_answer_side_by_side_in_the_server(two: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treering.router.FAR", 2.5)
    asked: dict[str, list[dict[str, Any]]] = {
        "pens": [{"role": "user", "content": toy_rows("pens", 1)[0]["text"]}],
        "cups": [{"role": "user", "content": unlike(toy_rows("cups", 1))[0]["text"]}],
        "far": [{"role": "system", "content": "~" * 300}, {"role": "user", "content": "\u4e16" * 100}],
    }
    whose = {"pens": "v2/experts/e1", "cups": "v2/experts/e2", "far": "base"}
    wanted = {name: greedy(two, whose[name], messages, 12) for name, messages in asked.items()}
    assert len(set(wanted.values())) == 3
    inside, slots = Inside(two), set()

    def note(_: Any) -> None:
        slots.add(tuple(sorted(row.slot for row in inside.worker._loaded.batches()[0].rows)))

    inside.then = note
    inside.put(op="load", version="v2", keep=True)
    for name, messages in asked.items():
        inside.generate(name, "v2", messages=messages)
    inside.run(3)
    assert {name: inside.text(name) for name in asked} == wanted
    assert (0, 1, 2) in slots


def test_turns_put_together_elsewhere_are_their_own_question(two: Workspace) -> None:
    """The same tokens as a chat's, read otherwise: neither is answered by what was found for the other."""
    tokenizer: Any = load_tokenizer(Path(str(two.config().model_name_or_path)))
    messages = [{"role": "user", "content": unlike(toy_rows("cups", 1))[0]["text"]}]
    text = rendered(tokenizer, messages, open_answer=True)
    orders: tuple[tuple[str, ...], ...] = (("chat",), ("text",), ("text", "chat", "text"))
    found: dict[str, set[str]] = {"chat": set(), "text": set(), "base": set()}
    for order in orders:
        inside = Inside(two)
        inside.put(op="load", version="v2", keep=True)
        for at, kind in enumerate(order):
            inside.generate(str(at), "v2", **({"messages": messages} if kind == "chat" else {"prompt": text}))
        inside.generate("base", prompt=text)
        inside.run(len(order) + 1)
        for at, kind in enumerate(order):
            found[kind].add(inside.text(str(at)))
        found["base"].add(inside.text("base"))
    assert all(len(texts) == 1 for texts in found.values())
    assert found["text"] != found["base"]  # Whoever wrote the marks asks the version: an expert answers.
