"""Merging: what becomes of the vectors of updates, however many there were, and what is kept for that."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft.utils import merge_utils
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.training import same_bits
from treering import Workspace, registry
from treering.candidate import Candidate
from treering.config import Config
from treering.errors import ConfigError, UpdateInterruptedError
from treering.methods import Losses, Methods
from treering.methods.merge import Merge, ties
from treering.testing import toy_rows


def measure() -> Losses:
    return Losses(0.0, 0.0)


def layer(numbers: Sequence[float] | Tensor) -> Any:
    made = nn.Linear(len(numbers), 1, bias=False)
    with torch.no_grad():
        made.weight.copy_(torch.as_tensor(numbers)[None])
    return made


def updated(
    model: Any, state: dict[str, Tensor], trained: Sequence[float] | Tensor, **values: Any
) -> tuple[dict[str, Tensor], Merge]:
    """An update that would end with those weights: its state, and `model` as it leaves it."""
    method = Merge(Config.build({"merge": values}))
    method.prepare(model, state)
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(trained)[None])
    method.after_training(model, measure)
    return method.after_update(model, []), method


def test_linear_is_the_mean_of_all_updates() -> None:
    """However often it was taken: what each update trained counts alike, and the first weights for nothing."""
    generator = torch.Generator().manual_seed(0)
    model, state = layer(torch.randn(7, generator=generator)), dict[str, Tensor]()
    trained: list[Tensor] = []
    first = model.weight.detach().clone()
    for number in range(1, 7):
        trained.append(torch.randn(7, generator=generator))
        state, method = updated(model, state, trained[-1], method="linear")
        torch.testing.assert_close(model.weight[0], torch.stack(trained).double().mean(0).float())
        assert method.choices["merge.weight"]["value"] == 1 / number
        assert state.keys() == {"updates", "first.weight"} and int(state["updates"]) == number
        assert torch.equal(state["first.weight"], first)
    assert "6 updates are merged" in method.choices["merge.weight"]["reason"]


def test_what_every_update_wants_is_not_halved() -> None:
    """As it would be, were the way from the parent the vector: after the first update nothing is left to learn."""
    for how in ("linear", "ties", "dare"):
        model, state = layer([0.0, 0.0]), dict[str, Tensor]()
        for _ in range(5):
            state, _ = updated(model, state, [1.0, -3.0], method=how, density=0.99 if how == "ties" else 0.5)
            if how == "ties":  # Of two numbers it keeps one.
                torch.testing.assert_close(model.weight[0, 1], torch.tensor(-3.0))
            else:
                torch.testing.assert_close(model.weight[0], torch.tensor([1.0, -3.0]))


def test_the_weight_that_is_set() -> None:
    model = layer([1.0, 1.0])
    state, method = updated(model, {}, [2.0, 0.0], method="linear", weight=0.25)
    assert model.weight[0].tolist() == [2.0, 0.0]  # As trained.
    state, method = updated(model, state, [6.0, 8.0], method="linear", weight=0.25)
    torch.testing.assert_close(model.weight[0], torch.tensor([3.0, 2.0]))
    assert method.choices == {}


@pytest.mark.parametrize("how", ["linear", "ties", "dare"])
def test_the_first_stays_as_trained_to_the_bit(how: str) -> None:
    generator = torch.Generator().manual_seed(1)
    model, trained = layer(torch.randn(50, generator=generator)), torch.randn(50, generator=generator)
    _, method = updated(model, {}, trained, method=how)
    assert torch.equal(model.weight[0], trained)
    assert method.choices["merge.weight"] == {"value": 1.0, "reason": "the first update that merges stays as trained"}


def test_ties_by_hand() -> None:
    """Of six numbers three stay. The history counts twice, as it is two updates."""
    history = torch.tensor([4.0, -5.0, 3.0, 1.0, 0.5, -0.5])  # Stay: 4, -5, 3.
    newest = torch.tensor([1.0, 11.0, 6.0, -7.0, 0.1, -1.0])  # Stay: 11, 6, -7.
    found = ties(history, newest, 1 / 3, 0.5)
    # One that stays alone is not scaled; 11 has more weight than twice -5; 3 and 6 agree; who has nothing gets 0.
    wanted = torch.tensor([4.0, 11.0, (2 * 3.0 + 6.0) / 3, -7.0, 0.0, 0.0])
    torch.testing.assert_close(found, wanted)
    lighter = ties(history, torch.tensor([1.0, 9.0, 6.0, -7.0, 0.1, -1.0]), 1 / 3, 0.5)
    assert lighter[1] == -5.0


def test_ties_of_two_that_count_alike_is_pefts() -> None:
    generator = torch.Generator().manual_seed(2)
    for shape in ((40,), (12, 9), (3, 4, 5)):
        one, other = (torch.randn(shape, generator=generator) for _ in range(2))
        for density in (0.2, 0.7):
            wanted = merge_utils.ties([one, other], torch.ones(2), density)
            torch.testing.assert_close(ties(one, other, 0.5, density), wanted)


def test_ties_merges_what_lies_between_the_first_weights_and_those_trained() -> None:
    model = layer([10.0, 10.0, 10.0, 10.0])
    state, _ = updated(model, {}, [14.0, 10.5, 7.0, 10.0])  # A history of 4, 0.5, -3 and 0.
    updated(model, state, [12.0, 15.0, 7.5, 10.0])  # 2, 5, -2.5, 0, of which 5 and -2.5 stay.
    torch.testing.assert_close(model.weight[0], torch.tensor([14.0, 15.0, 10 - 2.75, 10.0]))


def test_dare_drops_what_is_new_and_nothing_old() -> None:
    """What is dropped stays as the parent had it; the rest goes so much farther that the mean is that of `linear`."""
    generator = torch.Generator().manual_seed(3)
    start, parent, trained = (torch.randn(20_000, generator=generator) for _ in range(3))
    state = {"updates": torch.tensor(1), "first.weight": start[None]}
    found = []
    for values in ({}, {}, {"weight": 0.2}, {"density": 0.1}):
        model = layer(parent)
        updated(model, state, trained, **{"method": "dare", **values})
        found.append(model.weight.detach()[0])
    assert torch.equal(found[0], found[1])
    for each, share, density in ((found[0], 0.5, 0.5), (found[2], 0.2, 0.5), (found[3], 0.5, 0.1)):
        kept = (each - parent).abs() > 1e-4
        assert float(kept.float().mean()) == pytest.approx(density, abs=0.015)
        went = parent + (trained - parent) * share / density
        torch.testing.assert_close(torch.where(kept, went, parent), each, rtol=1e-3, atol=1e-3)
    later = layer(parent)
    updated(later, {**state, "updates": torch.tensor(2)}, trained, method="dare", weight=0.5)
    assert not torch.equal(later.weight[0], found[0])  # Other drops in another update.


def test_dare_drops_by_the_seed_and_leaves_the_random_state_alone() -> None:
    parent, trained = torch.zeros(100), torch.ones(100)
    found: list[Tensor] = []
    for seed in (1, 1, 2):
        model, method = layer(parent), Merge(Config.build({"merge": {"method": "dare"}, "seed": seed}))
        method.prepare(model, {"updates": torch.tensor(1), "first.weight": parent[None]})
        torch.manual_seed(len(found))
        before = torch.get_rng_state()
        with torch.no_grad():
            model.weight.copy_(trained[None])
        method.after_training(model, measure)
        assert torch.equal(torch.get_rng_state(), before)
        found.append(model.weight.detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_weights_that_learn_now_and_then() -> None:
    """Those that did not learn keep their first ones; those that never did have no history."""
    both: Any = nn.ModuleDict({"a": layer([1.0]), "b": layer([1.0])})
    state: dict[str, Tensor] = {}
    for learns, wanted in (("a", [3.0, 1.0]), ("b", [3.0, 2.0]), ("a", [3 + 2 / 3, 2.0])):
        method = Merge(Config.build({"merge": {"method": "linear"}}))
        for name in ("a", "b"):
            both[name].requires_grad_(name == learns)
        method.prepare(both, state)
        with torch.no_grad():
            both[learns].weight += 2.0
        method.after_training(both, measure)
        state = method.after_update(both, [])
        torch.testing.assert_close(torch.stack([both["a"].weight, both["b"].weight]).flatten(), torch.tensor(wanted))
    assert {name: kept.item() for name, kept in state.items()} == {
        "updates": 3,
        "first.a.weight": 1.0,
        "first.b.weight": 1.0,
    }


def test_another_model_is_refused() -> None:
    methods = Methods(Config(protect=("merge",)))
    del methods.by_name["lora"]
    told = r"protect has merge, but .* weight is \[1, 3\] there and \[1, 2\] here; drop merge from protect"
    with pytest.raises(ConfigError, match=told):
        methods.prepare(layer([1.0, 2.0]), {"merge.updates": torch.tensor(1), "merge.first.weight": torch.ones(1, 3)})


def test_the_range_test_has_no_copy() -> None:
    method = Merge(Config())
    assert copy.deepcopy({"method": method})["method"] is method


TASKS = ("pens", "cups", "hats")
VALUES: dict[str, Any] = {
    "max_steps": 20,
    "per_device_train_batch_size": 8,
    "eval": {"max_new_tokens": 2},
    "protect": ["merge"],
}
RATES = {"lora": 2e-2, "full": 2e-3, "freeze": 1e-2, "osf": 2e-3}


@pytest.fixture
def taught(workspace: Callable[..., Workspace]) -> Callable[..., Workspace]:
    """Makes a workspace that has learned those tasks one after the other, whatever the gate thinks of it."""

    def make(name: str, tasks: Sequence[str] = TASKS, **values: Any) -> Workspace:
        kind = values.setdefault("finetuning_type", "lora")
        ws = workspace(name, **{**VALUES, "learning_rate": RATES[kind], **values})
        for task in tasks:
            learn(ws, task)
        return ws

    return make


def learn(ws: Workspace, task: str) -> None:
    ws.ingest(toy_rows(task, 40), task=task)
    version = ws.update()
    assert version is not None
    ws.promote(version.name, force=True)


def weights(ws: Workspace, name: str) -> dict[str, Tensor]:
    folder = registry.get(ws, name).folder
    kind = "adapter_model" if (folder / "adapter_model.safetensors").exists() else "model"
    return {key.replace(".default", ""): tensor for key, tensor in load_file(folder / f"{kind}.safetensors").items()}


def losses(ws: Workspace, name: str) -> list[float]:
    return [registry.get(ws, name).manifest["scores"][task]["loss"] for task in TASKS]


@pytest.mark.parametrize("kind", ["lora", "full", "freeze", "osf"])
def test_a_second_update_goes_half_of_the_way(taught: Callable[..., Workspace], kind: str) -> None:
    """Against the same update without merging; the first weights are those of the base, or of a new adapter."""
    ws = taught("ws", TASKS[:1], finetuning_type=kind, merge={"method": "linear"})
    ws.ingest(toy_rows("cups", 40), task="cups")
    found, plain = (ws.update(promote=False, protect=protect) for protect in (["merge"], []))
    assert found is not None and plain is not None
    parent, trained, merged = (weights(ws, name) for name in ("v1", plain.name, found.name))
    assert any(not torch.equal(parent[name], trained[name]) for name in parent)
    for name, weight in merged.items():
        torch.testing.assert_close(weight, (parent[name] + trained[name]) / 2, rtol=1e-4, atol=1e-6)
    state = load_file(found.folder / "state.safetensors")
    assert int(state["merge.updates"]) == 2 and not (plain.folder / "state.safetensors").exists()
    assert found.manifest["choices"]["merge.weight"]["value"] == 0.5
    before = load_file(registry.get(ws, "v1").folder / "state.safetensors")
    first = {name for name in state if name != "merge.updates"}
    assert first == {name for name in before if name != "merge.updates"}
    for name in first:
        assert torch.equal(state[name], before[name])
        if "lora_B" in name:
            assert not state[name].any()
    assert first and any(before[name].any() for name in first)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_less_is_forgotten(taught: Callable[..., Workspace], kind: str) -> None:
    """The mean loss of all three tasks after the third, of which no row was replayed; the newest is learned, too."""
    plain = losses(taught("plain", finetuning_type=kind, protect=[]), "v3")
    for how in ("ties", "dare", "linear"):
        ws = taught(how, finetuning_type=kind, merge={"method": how})
        found = losses(ws, "v3")
        assert sum(found) < 0.9 * sum(plain), how
        scores = registry.get(ws, "v3").manifest
        assert found[2] < 0.7 * scores["parent_scores"][TASKS[2]]["loss"], how
        assert int(load_file(registry.get(ws, "v3").folder / "state.safetensors")["merge.updates"]) == 3


@pytest.mark.parametrize("how", ["ties", "dare"])
def test_killed_after_merging_it_merges_once(
    taught: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    whole, broken = (taught(name, TASKS[:1], merge={"method": how}) for name in ("whole", "broken"))
    learn(whole, "cups")
    broken.ingest(toy_rows("cups", 40), task="cups")

    def killed(self: Candidate) -> None:
        raise UpdateInterruptedError("asked")

    with monkeypatch.context() as patch:
        patch.setattr(Candidate, "measure", killed)
        with pytest.raises(UpdateInterruptedError):
            broken.update()
    assert broken.update() is not None
    assert same_bits(weights(whole, "v2"), weights(broken, "v2"))
    states = [load_file(registry.get(ws, "v2").folder / "state.safetensors") for ws in (whole, broken)]
    assert same_bits(*states)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"merge": {"method": "tis"}}, "merge.method: .*'ties', 'dare' or 'linear'.*got 'tis'"),
        ({"merge": {"density": 0}}, "merge.density: .*greater than 0.*got 0"),
        ({"merge": {"density": 1}}, "merge.density: .*less than 1.*got 1"),
        ({"merge": {"weight": 1}}, "merge.weight: .*less than 1.*auto.*got 1"),
        ({"protect": ["merge", "ema"]}, "protect has merge before ema.*list it last"),
        ({"protect": ["merge", "reptile"]}, "protect has merge before reptile.*list it last"),
        ({"protect": ["merge", "si"]}, "protect has merge before si.*list it last"),
        ({"protect": ["merge", "interpolate"]}, "protect has merge and interpolate.*drop either"),
        ({"protect": ["interpolate", "merge"]}, "protect has merge and interpolate.*drop either"),
        ({"finetuning_type": "osf"}, "merge.method is ties.*finetuning_type is osf.*set merge.method: linear"),
        ({"adapter_composition": "stack"}, "protect: merge keeps .*adapter_composition is stack.*drop either"),
        ({"adapter_composition": "experts"}, "protect: merge keeps .*adapter_composition is experts.*drop either"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.build({"protect": ["merge"], **values})
    assert re.search(told, str(caught.value)), caught.value


def test_settings_that_fit() -> None:
    for values in (
        {"protect": ["replay", "ema", "si", "merge"]},
        {"protect": ["merge", "ewc", "l2", "lwf"], "early_stopping_steps": 2},
        {"finetuning_type": "osf", "merge": {"method": "linear", "weight": 0.3}},
    ):
        assert "merge" in Config.build({"protect": ["merge"], **values}).protect
