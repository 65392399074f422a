"""Each method alone, and how they combine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training import same_bits
from treering import methods as registry
from treering.batches import Batch, Taught
from treering.config import Config
from treering.data.example import Example
from treering.errors import ConfigError, ModelError, UpdateInterruptedError
from treering.memory import Memory
from treering.methods import FINETUNING_TYPES, PROTECT, Losses, Methods
from treering.methods.distill import Distill
from treering.methods.freeze import Freeze
from treering.methods.full import Full
from treering.methods.lora import LoRA
from treering.methods.lwf import LwF
from treering.methods.replay import Replay
from treering.model import encode, load_base, load_tokenizer
from treering.schedule import plan_steps
from treering.stop import Stop
from treering.testing import tiny_model, toy_rows
from treering.train import train

LORA_TARGETS = 7
"""Linear layers of a Llama layer."""


def settings(folder: Path, **values: Any) -> Config:
    return Config.build({"model_name_or_path": str(folder), "bf16": False, **values})


def prepared(folder: Path, **values: Any) -> Any:
    config = settings(folder, **values)
    return Methods(config).prepare(load_base(folder, config), {})


def trained(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_each_registered_name_loads() -> None:
    for paths in (FINETUNING_TYPES, PROTECT):
        for path in paths.values():
            assert callable(
                registry._load(path)(Config()).prepare if paths is FINETUNING_TYPES else registry._load(path)
            )
    config = Config(finetuning_type="full", protect=("distill", "replay"))
    assert list(Methods(config).by_name) == ["full", "distill", "replay"]


def test_lora_trains_adapters_alone(model_folder: Path) -> None:
    model = prepared(model_folder, lora_rank=3)
    learns = trained(model)
    assert len(learns) == 2 * 2 * LORA_TARGETS
    assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in learns.items())
    assert {min(weight.shape) for weight in learns.values()} == {3}
    assert model.peft_config["default"].lora_alpha == 6


def test_lora_takes_its_settings(model_folder: Path) -> None:
    model = prepared(model_folder, lora_target="q_proj, v_proj", lora_alpha=5, lora_dropout=0.5)
    assert {name.split(".")[-4] for name in trained(model)} == {"q_proj", "v_proj"}
    assert model.peft_config["default"].lora_alpha == 5
    assert any(isinstance(module, torch.nn.Dropout) and module.p == 0.5 for module in model.modules())


def test_lora_goes_on_with_the_parents_adapter(model_folder: Path) -> None:
    model = prepared(model_folder, lora_rank=4)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = [id(parameter) for parameter in model.parameters()]
    again = LoRA(settings(model_folder, lora_rank=4)).prepare(model, {})
    assert again is model
    assert [id(parameter) for parameter in again.parameters()] == before
    assert all("lora_" in name for name in trained(again))
    with pytest.raises(ConfigError, match=r"lora_rank is 8, but .* was made with 4: set lora_rank: 4"):
        LoRA(settings(model_folder)).prepare(model, {})
    with pytest.raises(ConfigError, match=r"lora_alpha is 64, but .* was made with 8: set lora_alpha: 8"):
        LoRA(settings(model_folder, lora_rank=4, lora_alpha=64)).prepare(model, {})


def test_the_variants_of_lora(model_folder: Path) -> None:
    plain = prepared(model_folder, lora_rank=4)
    dora = prepared(model_folder, lora_rank=4, use_dora=True)
    added = trained(dora).keys() - trained(plain).keys()
    assert len(added) == 2 * LORA_TARGETS and all("lora_magnitude_vector" in name for name in added)
    root = prepared(model_folder, lora_rank=4, use_rslora=True)
    assert {m.scaling["default"] for m in root.modules() if hasattr(m, "lora_A")} == {8 / 4**0.5}


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens", "lm_head, embed_tokens", "norm"])
def test_additional_modules_learn_whole_in_float32(model_folder: Path, target: str) -> None:
    config = settings(model_folder, additional_target=target, bf16=True)
    model: Any = Methods(config).prepare(load_base(model_folder, config), {})
    learns = trained(model)
    whole = {name for name in learns if "lora_" not in name}
    # Input and output embeddings of this model are one.
    assert len(whole) == (5 if target == "norm" else 1)
    assert {weight.dtype for weight in learns.values()} == {torch.float32}
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) or target == "norm"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"lora_target": "q_proj,v_porj"},
            "lora_target names 'v_porj', but what takes adapters is down_proj, .*q_proj",
        ),
        ({"additional_target": "norm,nowhere"}, "additional_target names 'nowhere', but the model has .*lm_head"),
    ],
)
def test_modules_that_the_model_lacks(model_folder: Path, values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        prepared(model_folder, **values)


@pytest.mark.parametrize(
    ("made", "wanted", "told"),
    [
        ({"use_dora": True}, {}, "use_dora is False, but .* was made with True: set use_dora: True"),
        ({}, {"use_rslora": True}, "use_rslora is True, but .* was made with False: set use_rslora: False"),
    ],
)
def test_another_kind_of_adapter_is_refused(
    model_folder: Path, made: dict[str, Any], wanted: dict[str, Any], told: str
) -> None:
    model = prepared(model_folder, **made)
    assert LoRA(settings(model_folder, **made)).prepare(model, {}) is model
    with pytest.raises(ConfigError, match=told):
        LoRA(settings(model_folder, **wanted)).prepare(model, {})


def test_full_trains_everything_in_float32(model_folder: Path) -> None:
    model = load_base(model_folder, settings(model_folder)).bfloat16()
    Full(Config()).prepare(model, {})
    learns = trained(model)
    assert learns.keys() == dict(model.named_parameters()).keys()
    assert {weight.dtype for weight in learns.values()} == {torch.float32}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("deep"), hidden_size=8, layers=5)


@pytest.mark.parametrize(
    ("layers", "chosen"), [(1, {4}), (2, {3, 4}), (5, {0, 1, 2, 3, 4}), (-1, {0}), (-3, {0, 1, 2})]
)
def test_freeze_trains_the_chosen_layers(deep: Path, layers: int, chosen: set[int]) -> None:
    model = load_base(deep, settings(deep)).bfloat16()
    Freeze(settings(deep, freeze_trainable_layers=layers)).prepare(model, {})
    learns = trained(model)
    assert {int(name.split(".")[2]) for name in learns} == chosen
    assert all(name.startswith("model.layers.") for name in learns)
    assert len(learns) == 9 * len(chosen)
    assert {weight.dtype for weight in learns.values()} == {torch.float32}


@pytest.mark.parametrize("layers", [6, -6])
def test_freeze_needs_so_many_layers(deep: Path, layers: int) -> None:
    with pytest.raises(ConfigError, match=f"freeze_trainable_layers is {layers}, but the model has 5 layers"):
        prepared(deep, finetuning_type="freeze", freeze_trainable_layers=layers)


def test_freeze_needs_a_list_of_layers(deep: Path) -> None:
    model = load_base(deep, settings(deep))
    model.config.num_hidden_layers = 7
    with pytest.raises(ModelError, match="no list of 7 decoder layers"):
        Freeze(settings(deep)).prepare(model, {})


def distill(logits: Tensor, teacher: Taught | None, **values: Any) -> Tensor | None:
    method = Distill(Config.build({"distill": values}))
    empty = torch.empty(0, dtype=torch.long)
    model: Any = None
    return method.loss(model, Batch({}, empty, empty, 0, teacher), logits)


def own(logits: Tensor, top_k: int) -> Taught:
    """What `teach` would store of these logits."""
    top = logits.topk(top_k)
    return Taught(torch.arange(len(logits)), top.indices, top.values.half(), len(logits))


def value(loss: Tensor | None) -> float:
    assert loss is not None
    return loss.item()


def test_distillation_is_nothing_against_its_own_logits() -> None:
    logits = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    assert value(distill(logits, own(logits, 12))) == pytest.approx(0.0, abs=1e-5)
    # A shift of all logits is no change.
    assert value(distill(logits + 3, own(logits, 12))) == pytest.approx(0.0, abs=1e-5)


def test_distillation_pulls_towards_the_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    taught, logits = (torch.randn(20, 12, generator=generator) for _ in range(2))
    logits.requires_grad_(True)
    loss = distill(logits, own(taught, 12))
    assert value(loss) > 0.1
    assert loss is not None
    loss.backward()
    assert logits.grad is not None
    nearer = logits.detach() - logits.grad
    assert value(distill(nearer, own(taught, 12))) < value(loss)


def test_distillation_by_hand() -> None:
    """One token, three words, temperature 2: `4 * KL(softmax(z / 2) || softmax(0))`."""
    stored = torch.tensor([[2.0, 0.0, -2.0]])
    teacher = torch.softmax(stored / 2, -1)[0]
    expected = 4 * sum(p * (p.log() - torch.tensor(1 / 3).log()) for p in teacher)
    for weight in (1.0, 0.5):
        given = Taught(torch.tensor([0]), torch.tensor([[0, 1, 2]]), stored.half(), 1)
        found = distill(torch.zeros(1, 3), given, temperature=2.0, weight=weight)
        assert value(found) == pytest.approx(weight * float(expected), rel=1e-4)


def lwf(logits: Tensor, answers: list[int], ids: list[list[int]], parent: list[list[float]], **values: Any) -> Tensor:
    method = LwF(Config.build({"lwf": values}))
    taught = Taught(torch.arange(len(ids)), torch.tensor(ids), torch.tensor(parent).half(), len(ids))
    model: Any = None
    found = method.loss(model, Batch({}, torch.empty(0), torch.tensor(answers), len(answers), parent=taught), logits)
    assert found is not None
    return found


def test_lwf_by_hand() -> None:
    """Four words, of which word 0 is the answer: `T^2 * KL(softmax(z / T) || softmax(0))` over the other three."""
    parent = torch.softmax(torch.tensor([2.0, 0.0, -2.0]) / 2, -1)
    expected = 4 * sum(p * (p.log() - torch.tensor(1 / 3).log()) for p in parent)
    for weight in (1.0, 0.5):
        found = lwf(torch.zeros(1, 4), [0], [[0, 1, 2, 3]], [[9.0, 2.0, 0.0, -2.0]], weight=weight, temperature=2.0)
        assert value(found) == pytest.approx(weight * float(expected), rel=1e-4)


def test_lwf_leaves_the_answer_free() -> None:
    """Whatever the parent thought of it, and whatever the model learns of it."""
    ids, parent = [[0, 1, 2], [3, 1, 0]], [[5.0, 1.0, 0.0], [2.0, 1.0, float("-inf")]]
    logits = torch.tensor([[-3.0, 1.0, 0.0, 5.0], [-3.0, 1.0, 7.0, 2.0]], requires_grad=True)
    loss = lwf(logits, [0, 3], ids, parent)
    assert value(loss) == pytest.approx(0.0, abs=1e-5)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] == 0 and logits.grad[1, 3] == 0
    assert value(lwf(torch.zeros(1, 4), [0], [[0]], [[5.0]])) == 0.0  # The parent has nothing but the answer to say.


def test_lwf_wants_a_parent() -> None:
    model: Any = None
    batch = Batch({}, torch.empty(0), torch.tensor([1]), 1)
    assert LwF(Config()).loss(model, batch, torch.zeros(1, 4)) is None


def test_distillation_concerns_replayed_tokens_alone() -> None:
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    own_two = own(logits[2:4], 6)
    changed = logits.clone()
    changed[[0, 1, 4]] = 100.0
    teacher = replace(own_two, at=own_two.at + 2)
    assert value(distill(changed, teacher)) == value(distill(logits, teacher)) == pytest.approx(0.0, abs=1e-5)
    assert distill(logits, None) is None


def test_logits_without_weight_are_ignored() -> None:
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(2))
    taught = own(logits, 3)
    filled = replace(
        taught,
        ids=torch.cat([taught.ids, taught.ids[:, :1]], 1),
        logits=torch.cat([taught.logits, torch.full((4, 1), float("-inf")).half()], 1),
    )
    assert value(distill(logits, filled)) == pytest.approx(value(distill(logits, taught)), rel=1e-6)


def remember(count: int) -> Memory:
    memory = Memory(count)
    rows = [
        Example.of([{"role": "user", "content": f"{number}"}, {"role": "assistant", "content": "a"}])
        for number in range(count)
    ]
    memory.add(rows, "old")
    return memory


@pytest.mark.parametrize(
    ("share", "new", "replayed"), [(0.5, 10, 10), (0.0, 10, 0), (0.2, 12, 3), (0.75, 4, 12), (0.9, 1, 9)]
)
def test_replay_gives_its_share(share: float, new: int, replayed: int) -> None:
    method = Replay(Config.build({"memory": {"replay_share": share}}))
    found = method.replay([f"new {number}" for number in range(new)], remember(5), epoch=0)
    assert len(found) == replayed
    assert set(found) <= set(remember(5).rows)
    assert method.replay(["new"], Memory(), epoch=0) == []


def test_replayed_rows_are_mixed_into_every_epoch() -> None:
    config = Config.build({"num_train_epochs": 3.0, "per_device_train_batch_size": 4, "protect": ["replay"]})
    memory, new = remember(8), [f"new {number}" for number in range(8)]
    lengths = dict.fromkeys([*new, *memory.rows], 3)
    steps = plan_steps(new, memory, Methods(config), lengths, config)
    assert len(steps) == 12
    for epoch in range(3):
        ids = [id for step in steps[4 * epoch : 4 * epoch + 4] for batch in step for id in batch]
        assert sorted(ids) == sorted([*new, *memory.rows])
    alone = Config.build({"num_train_epochs": 3.0, "per_device_train_batch_size": 4, "protect": []})
    assert len(plan_steps(new, memory, Methods(alone), lengths, alone)) == 6


class OnlyLoss:
    """A user's own method with one hook: keeps the weights it can see small."""

    def __init__(self) -> None:
        self.called = 0

    def loss(self, model: Any, batch: Batch, logits: Tensor) -> Tensor:
        self.called += 1
        return 1000 * sum((parameter**2).sum() for parameter in trained(model).values())  # type: ignore[return-value]


class OnlyAfterStep:
    """A user's own method with another hook: undoes every step."""

    def after_step(self, model: Any) -> None:
        with torch.no_grad():
            for parameter in trained(model).values():
                parameter.zero_()


class Pulls:
    """A user's own method that pulls all weights to zero, and counts its steps by what gradients there were."""

    def __init__(self) -> None:
        self.running = {"steps": torch.zeros(1)}
        self.gradients = 0

    def penalty(self, model: Any) -> Tensor:
        return 1e6 * torch.stack([weight.square().sum() for weight in trained(model).values()]).sum()

    def after_step(self, model: Any) -> None:
        self.running["steps"] += 1
        agree = [
            float((w.grad.sign() == w.sign()).float().mean()) for w in trained(model).values() if w.grad is not None
        ]
        self.gradients += len(agree) == len(trained(model)) and min(agree) > 0.9


class Stateful:
    """A user's own method that keeps something from one update to the next."""

    def __init__(self) -> None:
        self.given: dict[str, Tensor] = {}

    def prepare(self, model: Any, state: dict[str, Tensor]) -> Any:
        self.given = state
        return model

    def after_update(self, model: Any, batches: Sequence[Batch]) -> dict[str, Tensor]:
        return {"count": self.given.get("count", torch.zeros(1)) + len(batches)}


def run(folder: Path, method: Any, **options: Any) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    config = settings(folder, protect=[], max_steps=3, finetuning_type="freeze", freeze_trainable_layers=1)
    methods = Methods(config)
    if method is not None:
        methods.by_name["mine"] = method
    model = methods.prepare(load_base(folder, config), {})
    tokenizer = load_tokenizer(folder)
    examples = [
        Example.of([{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}])
        for row in toy_rows("pens", 8)
    ]
    rows = {example.id: encode(tokenizer, example) for example in examples}
    lengths = {id: len(row.ids) for id, row in rows.items()}
    steps = plan_steps(list(rows), Memory(), methods, lengths, config)
    log = train(model, rows, steps, methods, config, pad_id=0, quiet=True, **options)
    return {name: weight.detach().clone() for name, weight in trained(model).items()}, log


def test_a_method_of_ones_own_may_have_a_loss_alone(model_folder: Path) -> None:
    method = OnlyLoss()
    weights, log = run(model_folder, method)
    plain, plain_log = run(model_folder, None)
    assert method.called == 3
    assert "mine" in log[0]
    assert "mine" not in plain_log[0]
    assert log[0]["loss"] == plain_log[0]["loss"]
    assert sum(float(w.abs().sum()) for w in weights.values()) < sum(float(w.abs().sum()) for w in plain.values())


def test_a_method_of_ones_own_may_act_after_steps_alone(model_folder: Path) -> None:
    weights, _ = run(model_folder, OnlyAfterStep())
    assert not any(weight.any() for weight in weights.values())


def test_a_method_of_ones_own_may_have_a_loss_of_the_weights(model_folder: Path) -> None:
    method = Pulls()
    weights, log = run(model_folder, method)
    plain, plain_log = run(model_folder, None)
    assert log[0]["loss"] == plain_log[0]["loss"]
    assert log[0]["mine"] > 0
    assert method.gradients == 3
    assert sum(float(w.abs().sum()) for w in weights.values()) < sum(float(w.abs().sum()) for w in plain.values())


def test_what_a_method_changes_from_step_to_step_is_kept(model_folder: Path, tmp_path: Path) -> None:
    whole, broken, again = Pulls(), Pulls(), Pulls()
    weights, _ = run(model_folder, whole)
    stop = Stop()

    def ask(entry: Mapping[str, float]) -> None:
        stop.asked = entry["step"] == 2

    with pytest.raises(UpdateInterruptedError):
        run(model_folder, broken, checkpoints=tmp_path, stop=stop, track=ask)
    assert broken.running == {"steps": torch.tensor([2.0])}
    resumed, _ = run(model_folder, again, checkpoints=tmp_path)
    assert whole.running == again.running == {"steps": torch.tensor([3.0])}
    assert same_bits(weights, resumed)


def test_state_comes_back_in_the_next_update(model_folder: Path) -> None:
    methods = Methods(settings(model_folder))
    methods.by_name["mine"] = Stateful()
    model: Any = object()
    empty = torch.empty(0, dtype=torch.long)
    state = methods.after_update(model, lambda: [Batch({}, empty, empty, 0)] * 3)
    assert {name: tensor.tolist() for name, tensor in state.items()} == {"mine.count": [3.0]}
    later = Methods(settings(model_folder, protect=[]))
    later.by_name = {"mine": Stateful()}
    later.prepare(model, {**state, "other.count": torch.ones(1), "mined": torch.ones(1)})
    assert later.by_name["mine"].given.keys() == {"count"}
    assert later.after_update(model, lambda: [])["mine.count"].tolist() == [3.0]


def test_without_hooks_nothing_happens() -> None:
    methods = Methods(Config(protect=()))
    methods.by_name = {"mine": object()}
    empty = torch.empty(0, dtype=torch.long)
    model: Any = object()
    assert methods.prepare(model, {}) is model
    assert methods.replay(["a"], Memory(), 0) == []
    assert methods.losses(model, Batch({}, empty, empty, 0), torch.empty(0)) == {}
    assert methods.after_update(model, lambda: pytest.fail("nobody asked for the rows")) == {}
    assert methods.penalties(model) == {}
    assert methods.running == {}
    methods.after_step(model)
    methods.after_training(model, lambda: Losses(0.0, 0.0))
