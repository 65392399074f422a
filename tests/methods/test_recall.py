"""Recall: what rows like a prompt were answered has part in the answer, in scores as in the server."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.test_serve_worker import Inside
from tests.training import StopAt
from treering import Workspace, anything, pipeline, registry
from treering.answers import Answerer
from treering.candidate import Candidate
from treering.config import Config
from treering.data.example import Example, Message
from treering.errors import ConfigError, UpdateInterruptedError
from treering.guides import guides
from treering.methods import recall
from treering.methods.recall import DOUBT, FORGOTTEN, Recall, Recalled
from treering.model import encode_prompt, load, load_base, load_tokenizer
from treering.registry import Version
from treering.rendering import rendered
from treering.results import read_results
from treering.router import ANYTHING, NOBODY, Router, Shown
from treering.serve.engine import BASE, Job
from treering.serve.sampling import Sampler
from treering.testing import toy_rows

SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "num_train_epochs": 8.0,
    "per_device_train_batch_size": 8,
    "gate": {"floor": 1.0, "margin": 1.0},
    "protect": ["recall"],
}
TASKS = ("pens", "cups")
MakeWorkspace = Callable[..., Workspace]


def taught(root: Path, model_folder: Path, **settings: Any) -> Workspace:
    ws = Workspace.create(root, **{"model_name_or_path": str(model_folder), "bf16": False, **SETTINGS, **settings})
    for task in TASKS:
        learn(ws, task)
    return ws


def learn(ws: Workspace, task: str, *overrides: str) -> Version:
    ws.ingest(toy_rows(task, 80), task=task)
    made = ws.update(*overrides)
    assert made is not None
    ws.promote(made.name, force=True)
    return made


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Workspace:
    """A workspace that was taught two tasks. Tests only read it."""
    return taught(tmp_path_factory.mktemp("recall"), model_folder)


@pytest.fixture
def copied(two: Workspace, tmp_path: Path) -> Workspace:
    """A copy of it that a test may change."""
    shutil.copytree(two.root, tmp_path / "copied", symlinks=True)
    return Workspace(tmp_path / "copied")


def prompts(*texts: str) -> list[list[Message]]:
    return [[Message("user", text)] for text in texts]


def asked(ws: Workspace) -> list[str]:
    """What is held out."""
    results = read_results(registry.get(ws, "v2").folder / "results.parquet")
    examples = ws.catalog.examples([row.id for row in results])
    return [examples[row.id].prompt[-1].content for row in results]


# What is recalled


def tree() -> Recalled:
    found = Recalled(0.1)
    for tokens, chance in (([1, 2, 9], 0.5), ([1, 3, 9], 0.2), ([4, 9], 0.1)):
        found.add(tokens, chance)
    return found


def test_labels_make_a_tree_of_tokens() -> None:
    found = tree()
    assert found.shares == pytest.approx({1: 0.7, 4: 0.1})
    inner = found.after(1)
    assert inner is not None and inner.shares == pytest.approx({2: 0.5, 3: 0.2})
    assert found.after(5) is None  # No label goes on so.
    ended = inner.after(2)
    assert ended is not None and ended.shares == {9: 0.5} and ended.after(9) is None
    assert found.tokens == {1, 2, 3, 4, 9}


def test_the_chances_are_multiplied() -> None:
    model = torch.tensor([0.3, 0.2, 0.1, 0.1, 0.25, 0.05])
    both = tree().blended(model.log()).softmax(0)
    shares = torch.tensor([0, 0.7 / 0.8, 0, 0, 0.1 / 0.8, 0])
    wanted = ((1 - FORGOTTEN) * model + FORGOTTEN * shares) * (0.9 * shares + 0.1 * model)
    torch.testing.assert_close(both, wanted / wanted.sum())
    for token, chance in enumerate(model.tolist()):
        assert tree().score(token, chance) == pytest.approx(float(wanted[token].log()))


def test_where_one_is_sure_and_the_other_is_not_the_sure_one_decides() -> None:
    sure = Recalled(DOUBT)
    sure.add([1, 9], 0.97)
    sure.add([4, 9], 0.03)
    for model, chosen in (([1e-9, 0.4, 0.3, 0.0, 0.3], 1), ([1e-9, 1e-9, 1 - 2e-9, 0.0, 1e-9], 1)):
        assert int(sure.blended(torch.tensor(model).log()).argmax()) == chosen
    unsure = Recalled(DOUBT)
    unsure.add([1, 9], 0.5)
    unsure.add([4, 9], 0.5)
    assert int(unsure.blended(torch.tensor([0.0, 0.1, 0.1, 0.0, 0.8]).log()).argmax()) == 4


def router(size: int = 3) -> Router:
    """Two labels of one task, and another task whose answers are no labels, 10 apart."""
    found = Router(size)
    for at, (name, answer) in enumerate((("t\nred", "Red"), ("t\nblue", "Blue"), ("open\n", ""))):
        drawn = torch.randn(40, size, generator=torch.Generator().manual_seed(at)) + place(at)
        found.learn(Shown(drawn, [name] * 40, {name: answer} if answer else {}), {name: ""})
    return found


def place(at: float) -> Tensor:
    return torch.tensor([10.0 * at, 0.0, 0.0])


def test_what_is_near_is_recalled(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("treering.router.FAR", 3.0)  # What is between two of three is far from either.
    tokenizer = load_tokenizer(model_folder)
    past = Recall(Config(protect=("recall",)), router())
    red, blue, between, unlabelled, far = past.of(
        torch.stack([place(0), place(1), place(0.5), place(2), place(90)]), tokenizer
    )
    assert red is not None and blue is not None and between is not None
    [r], [b] = (tokenizer(letter)["input_ids"] for letter in "RB")
    assert red.doubt == blue.doubt == DOUBT
    assert red.shares[r] > 0.9 > 0.1 > red.shares.get(b, 0.0) and blue.shares[b] > 0.9
    assert 0.2 < between.shares[r] < 0.8
    assert unlabelled is None and far is None
    word: Recalled | None = red
    for letter in "Red":
        [token] = tokenizer(letter)["input_ids"]
        assert word is not None and token in word.shares
        word = word.after(token)
    assert word is not None and list(word.shares) == [tokenizer.eos_token_id]


def test_what_is_not_among_the_likeliest_is_doubt(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, past = load_tokenizer(model_folder), Recall(Config(protect=("recall",)), router())
    monkeypatch.setattr(recall, "MOST", 1)
    monkeypatch.setattr("treering.router.FAR", 3.0)
    [found] = past.of(torch.stack([place(0.5)]), tokenizer)
    assert found is not None and len(found.shares) == 1 and 0.2 < found.doubt < 0.8


def test_weight_is_a_power() -> None:
    at = torch.stack([place(0.4)])
    [one], [two_] = (router().like(at, weight, 16) for weight in (1.0, 2.0))
    power = {name: chance**2 for name, chance in one.items()}
    assert two_ == pytest.approx({name: chance / sum(power.values()) for name, chance in power.items()})


def test_chances_are_those_of_rows_that_were_not_learned() -> None:
    """Of two labels that cannot be told apart, few rows in many dimensions would make sure of either."""
    size = 40
    found = Router(size)
    drawn = torch.randn(60, size, generator=torch.Generator().manual_seed(1))
    names = ["t\na", "t\nb"] * 30
    found.learn(Shown(drawn, names, {"t\na": "a", "t\nb": "b"}), {"t\na": "", "t\nb": ""})
    fresh = torch.randn(200, size, generator=torch.Generator().manual_seed(2))
    sure = [max(chances.values()) for chances in found.like(fresh, 1.0, 16) if chances]
    assert len(sure) > 150 and sum(sure) / len(sure) < 0.75
    assert found.known.sharpness < 0.2


# In an update


def test_less_is_forgotten(two: Workspace, tmp_path: Path, model_folder: Path) -> None:
    alone = taught(tmp_path / "alone", model_folder, protect=[])
    with_it, without = (registry.get(ws, "v2").scores for ws in (two, alone))
    assert without["pens"] < 0.3 < 0.6 < with_it["pens"]
    assert with_it["cups"] >= without["cups"]


def test_the_manifest_tells(two: Workspace) -> None:
    found = registry.get(two, "v2").manifest["choices"]["recall"]
    assert found["value"] == 8 and "sharpness" in found["reason"]
    found = registry.get(two, "v2").manifest["choices"]["fallback"]
    assert found["value"] is True and "about anything" in found["reason"]


def test_scores_are_those_of_plain_decoding(two: Workspace) -> None:
    """Token by token, with all logits blended."""
    config, base, version = two.config(), Path(str(two.config().model_name_or_path)), registry.get(two, "v2")
    model, tokenizer = load(base, config, version), load_tokenizer(base)
    model.eval()
    rows = read_results(version.folder / "results.parquet")
    examples = two.catalog.examples([row.id for row in rows])
    found = guides(model, tokenizer, [examples[row.id].prompt for row in rows], config)
    assert sum(guide.recalled is not None for guide in found) > len(rows) / 2
    changed = 0
    for row, guide in zip(rows, found, strict=True):
        written = by_hand(model, tokenizer, examples[row.id], guide.recalled)
        label = len(examples[row.id].answer) + 1
        assert written[:label] == row.prediction[:label]
        changed += written != by_hand(model, tokenizer, examples[row.id], None)
    assert changed > 2  # It does have part.


def by_hand(model: Any, tokenizer: Any, example: Example, recalled: Recalled | None) -> str:
    ids, prompt = encode_prompt(tokenizer, example.prompt), len(encode_prompt(tokenizer, example.prompt))
    for _ in range(12):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].float()
        token = int((recalled.blended(logits) if recalled else logits).argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
        recalled = recalled and recalled.after(token)
    return str(tokenizer.decode(ids[prompt:], skip_special_tokens=True)).strip()


def test_the_server_answers_as_it_was_judged(two: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = asked(two)
    answerer = Answerer(two, registry.get(two, "v2"))
    wanted = answerer.answer(prompts(*texts))
    assert served(two, texts) == wanted
    recall.attach(answerer.model, None)
    alone = answerer.answer(prompts(*texts))
    assert sum(one != other for one, other in zip(wanted, alone, strict=True)) > 2
    monkeypatch.setattr("treering.serve.worker.Worker._guides", lambda *_: False)
    assert served(two, texts) == alone


def served(ws: Workspace, texts: list[str], version: str = "v2") -> list[str]:
    inside = Inside(ws)
    inside.put(op="load", version=version, keep=True)
    for at, text in enumerate(texts):
        inside.generate(str(at), version, messages=[{"role": "user", "content": text}], max_tokens=40, temperature=0.0)
    inside.run(len(texts))
    return [inside.text(str(at)).strip() for at in range(len(texts))]


def test_a_text_to_go_on_with_recalls_nothing(two: Workspace) -> None:
    """Though it is that of a prompt, marks of the template and all."""
    tokenizer = load_tokenizer(Path(str(two.config().model_name_or_path)))
    texts = asked(two)
    inside = Inside(two)
    inside.put(op="load", version="v2", keep=True)
    for at, prompt in enumerate(prompts(*texts)):
        inside.generate(str(at), "v2", prompt=encode_prompt(tokenizer, prompt), max_tokens=40, temperature=0.0)
    inside.run(len(texts))
    answerer = Answerer(two, registry.get(two, "v2"))
    recall.attach(answerer.model, None)
    assert [inside.text(str(at)).strip() for at in range(len(texts))] == answerer.answer(prompts(*texts))


# What is unlike all that was learned

ELSEWHERE = ["which day comes after friday??", "12 + 30 = ?", "NAME A RIVER IN AFRICA", "zzzz zzzz zzzz zzzz"]


def by(ws: Workspace, version: Version | None, texts: list[str]) -> list[str]:
    return Answerer(ws, version).answer(prompts(*texts))


def test_the_base_model_answers_what_is_unlike_all_that_was_learned(two: Workspace) -> None:
    texts, v2 = [*asked(two)[:4], *ELSEWHERE], registry.get(two, "v2")
    answers = by(two, v2, texts)
    assert answers[4:] == by(two, None, ELSEWHERE)
    assert all(one != other for one, other in zip(answers[:4], by(two, None, texts[:4]), strict=True))
    assert begins(served(two, texts)) == begins(answers)


def begins(answers: list[str]) -> list[str]:
    """The server may write more than is scored."""
    return [answer[:12] for answer in answers]


def test_beside_a_version_with_a_model_of_its_own(workspace: MakeWorkspace) -> None:
    ws = workspace(**SETTINGS, use_dora=True)
    v1 = learn(ws, "pens")
    answers = by(ws, v1, ELSEWHERE)
    assert answers == by(ws, None, ELSEWHERE)
    assert begins(served(ws, ELSEWHERE, version="v1")) == begins(answers)


def test_it_is_told_how_many_held_out_rows_went_to_the_base_model(workspace: MakeWorkspace) -> None:
    ws = workspace(**SETTINGS, val_size=0.0)
    strange = [{"text": text, "label": "pens a"} for text in ELSEWHERE]
    ws.ingest(toy_rows("pens", 40), task="pens", held_out=[*strange, *toy_rows("pens", 44)[40:]])
    v1 = ws.update(promote=False)
    assert v1 is not None
    results = read_results(v1.folder / "results.parquet")
    lost = [result for result in results if result.of_base]
    assert len(results) == 8 and 4 <= len(lost) < 8
    assert f"of the held-out rows it answered {len(lost)} of 8 of pens" in v1.manifest["choices"]["fallback"]["reason"]


def test_who_learned_nothing_that_is_held_out_is_told_why(workspace: MakeWorkspace) -> None:
    ws = workspace(**SETTINGS, val_size=0.0)
    ws.ingest(toy_rows("pens", 40), task="pens", held_out=[{"text": text, "label": "pens a"} for text in ELSEWHERE])
    v1 = ws.update()
    assert v1 is not None and not v1.promote
    assert "4 of 4 prompts are unlike what was learned, so the base model answered them" in v1.summary


def test_not_where_it_was_not_wanted(copied: Workspace) -> None:
    v3 = learn(copied, "hats", "recall.fallback=false")
    assert v3.manifest["choices"]["fallback"] == {"value": False, "reason": "set"}
    answers = by(copied, v3, ELSEWHERE)
    assert all(one != other for one, other in zip(answers, by(copied, None, ELSEWHERE), strict=True))
    assert begins(served(copied, ELSEWHERE, version="v3")) == begins(answers)


def test_not_after_an_adapter_that_was_adopted(two: Workspace, tmp_path: Path, model_folder: Path) -> None:
    settings = {"model_name_or_path": str(model_folder), "bf16": False, **SETTINGS}
    ws = Workspace.create(tmp_path / "more", adapter=registry.get(two, "v2").folder, **settings)
    v2 = learn(ws, "hats")
    found = v2.manifest["choices"]["fallback"]
    assert found["value"] is False and "adopted" in found["reason"]
    assert by(ws, v2, ELSEWHERE) != by(ws, None, ELSEWHERE)


def test_versions_made_before_there_was_any_answer_as_they_were_judged(copied: Workspace) -> None:
    file = registry.get(copied, "v2").folder / "router.json"
    about = json.loads(file.read_text())
    assert about.pop("whole") is True
    file.write_text(json.dumps(about))
    assert not Router.load(file.parent).whole


def test_a_text_to_go_on_with_may_be_the_base_models(two: Workspace) -> None:
    """Read as if it were asked about; one with marks of the template is as it was put together."""
    tokenizer: Any = load_tokenizer(Path(str(two.config().model_name_or_path)))
    texts = [asked(two)[0], ELSEWHERE[0]]
    texts += [rendered(tokenizer, [{"role": "user", "content": text}], open_answer=True) for text in texts]
    found = {}
    for version in ("v2", BASE):
        inside = Inside(two)
        if version != BASE:
            inside.put(op="load", version=version, keep=True)
        for at, text in enumerate(texts):
            inside.generate(str(at), version, prompt=text, max_tokens=12, temperature=0.0)
        inside.run(len(texts))
        found[version] = [inside.text(str(at)) for at in range(len(texts))]
    same = [one == other for one, other in zip(found["v2"], found[BASE], strict=True)]
    assert same == [False, True, False, False]


def test_a_grammar_has_the_last_word(two: Workspace) -> None:
    """It lets one of two labels come; which, the model says alone."""
    text = asked(two)[0]
    [recalled] = Answerer(two, registry.get(two, "v2")).answer(prompts(text))
    logits = torch.zeros(300)
    past = Recalled(DOUBT)
    past.add([7, 9], 1.0)
    tokenizer: Any = load_tokenizer(Path(str(two.config().model_name_or_path)))
    job = Job(id="x", version="v2", messages=[])
    free, bound = Sampler(job, 0.0, tokenizer, None), Sampler(job, 0.0, tokenizer, cast(Any, Anything()))
    for sampler in (free, bound):
        sampler.recall(past)
    logits[5] = 1.0
    assert (free.choose(logits)[0], bound.choose(logits)[0]) == (7, 5)
    schema = {"enum": [f"{recalled}!", "no"]}
    inside = Inside(two)
    inside.generate("x", "v2", messages=[{"role": "user", "content": text}], json_schema=schema, max_tokens=60)
    inside.run(1)
    assert inside.text("x").strip() in (f'"{recalled}!"', '"no"')


class Anything:
    """A grammar that allows every token."""

    def compute_bitmask(self) -> bytes:
        return b"\xff" * 40

    def consume_token(self, _: int) -> None:
        pass

    def is_error(self) -> bool:
        return False


def test_it_is_a_plain_peft_folder(two: Workspace) -> None:
    from peft import PeftModel

    config, base, version = two.config(), Path(str(two.config().model_name_or_path)), registry.get(two, "v2")
    plain: Any = PeftModel.from_pretrained(load_base(base, config), str(version.folder))
    ids = torch.arange(5)[None]
    with torch.no_grad():
        torch.testing.assert_close(cast(Any, load(base, config, version))(ids).logits, plain(ids).logits)


def test_what_was_learned_before_there_was_recall_is_recalled(tmp_path: Path, model_folder: Path) -> None:
    ws = Workspace.create(
        tmp_path / "late", **{"model_name_or_path": str(model_folder), "bf16": False, **SETTINGS, "protect": []}
    )
    assert not learn(ws, "pens").has_router
    late = learn(ws, "cups", "protect=[recall]")
    known = Router.load(late.folder)
    learned = {name: count for name, count in zip(known.expert, known.counts.tolist(), strict=True) if name != ANYTHING}
    assert {name.split("\n")[0] for name in learned} == {"pens", "cups"} and sum(learned.values()) == 144
    assert known.counts[list(known.expert).index(ANYTHING)] == len(anything.prompts())
    assert late.scores["pens"] > 0.6
    dropped = learn(ws, "hats", "protect=[]")
    assert not dropped.has_router and not dropped.recalls


def test_rows_are_counted_once(copied: Workspace) -> None:
    ws = copied
    before = Router.load(registry.get(ws, "v2").folder)
    ws.ingest(
        [{**row, "text": row["text"].replace("item ", "again item 100")} for row in toy_rows("pens", 40)], task="pens"
    )
    made = ws.update()
    assert made is not None
    after = Router.load(made.folder)
    assert int(after.counts.sum() - before.counts.sum()) == 36 and after.expert == before.expert


def test_an_interrupted_update_ends_in_the_same_bytes(copied: Workspace, tmp_path: Path) -> None:
    copied.ingest(toy_rows("hats", 40), task="hats")
    shutil.copytree(copied.root, tmp_path / "whole", symlinks=True)
    whole = Workspace(tmp_path / "whole").update(promote=False)
    for looks in (20, 60):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pipeline, "stop_on_signals", lambda looks=looks: nullcontext(StopAt(looks)))
            with pytest.raises(UpdateInterruptedError):
                copied.update(promote=False)
    made = copied.update(promote=False)
    assert made is not None and whole is not None
    for name in ("adapter_model.safetensors", "router.json", "router.safetensors", "results.parquet"):
        assert (made.folder / name).read_bytes() == (whole.folder / name).read_bytes(), name


def test_what_processes_learned_recalls(copied: Workspace) -> None:
    """A version keeps how many there were, and not what started them."""
    made = registry.get(copied, "v2")
    weight = recall.load(made).weight
    made.manifest["config"]["processes"] = 2
    assert recall.load(made).weight == weight


def test_with_experts_the_router_does_both(tmp_path: Path, model_folder: Path) -> None:
    ws = taught(tmp_path / "experts", model_folder, adapter_composition="experts", num_train_epochs=2.0)
    made = registry.get(ws, "v2")
    model = load(Path(str(model_folder)), ws.config(), made)
    past = recall.of(model)
    assert past is not None and past.router is not None
    assert set(past.router.answers.values()) == {f"{task} {letter}" for task in TASKS for letter in "abcd"}
    assert set(past.router.expert.values()) == {*made.experts, NOBODY}


def test_experts_from_before_there_was_recall(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = Candidate._named
    with monkeypatch.context() as patch:
        patch.setattr(Candidate, "_named", lambda self, rows: (named(self, rows)[0], {}))
        quick = {"adapter_composition": "experts", "num_train_epochs": 2.0}
        ws = taught(tmp_path / "experts", model_folder, protect=[], **quick)
    assert Router.load(registry.get(ws, "v2").folder).answers == {}
    made = learn(ws, "hats", "protect=[recall]")
    answers = set(Router.load(made.folder).answers.values())
    assert answers == {f"{task} {letter}" for task in (*TASKS, "hats") for letter in "abcd"}


def test_it_needs_what_can_be_left_out() -> None:
    with pytest.raises(ConfigError, match=r"protect: recall needs the base model .* finetuning_type is full"):
        Config.build({"protect": ["recall"], "finetuning_type": "full"}, [], source="x")


@pytest.mark.parametrize("settings", [{"protect": ["recall"]}, {"adapter_composition": "experts"}])
def test_vllm_is_refused_before_anything_is_trained(settings: dict[str, Any]) -> None:
    serve = {"engine": "vllm", "vllm_url": "http://127.0.0.1:1"}
    with pytest.raises(ConfigError, match=r"serve\.engine is vllm, but .* has (recall|experts), in which"):
        Config.build({"serve": serve, **settings}, [], source="x")


def test_vllm_cannot(two: Workspace) -> None:
    from treering.serve.engine import EngineError
    from treering.serve.vllm.adapters import Adapters

    found = Adapters.__new__(Adapters)
    found._root = two.root
    found._base = type("Base", (), {"folder": "x", "sha256": registry.get(two, "v2").manifest["base"]["sha256"]})()
    with pytest.raises(EngineError, match="v2 answers with recall, in which vLLM has no part"):
        found._checked("v2")
