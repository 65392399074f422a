"""Parts of layers that learn, and layers chosen by how important they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.training import Run, same_bits, settings
from treering import Workspace
from treering.batches import Batch, make_batch
from treering.config import Config
from treering.errors import ConfigError
from treering.methods import Methods
from treering.methods import freeze as module
from treering.methods.freeze import Freeze, importance
from treering.model import load_base
from treering.testing import tiny_model, toy_rows


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("deep"), hidden_size=16, layers=4)


def frozen(folder: Path, **values: Any) -> Config:
    return settings(folder, finetuning_type="freeze", **values)


def learns(model: Any) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


@pytest.mark.parametrize(
    ("parts", "names"),
    [("mlp", {"mlp"}), ("self_attn", {"self_attn"}), ("mlp, input_layernorm", {"mlp", "input_layernorm"})],
)
def test_parts_of_the_chosen_layers_learn(deep: Path, parts: str, names: set[str]) -> None:
    config = frozen(deep, freeze_trainable_modules=parts)
    model = Methods(config).prepare(load_base(deep, config).bfloat16(), {})
    assert {tuple(name.split(".")[2:4]) for name in learns(model)} == {(n, name) for n in "23" for name in names}
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("by", ["position", "importance"])
def test_a_part_that_no_layer_has(deep: Path, by: str) -> None:
    config = frozen(deep, freeze_trainable_modules="mlp,moe", freeze_by=by)
    told = r"freeze_trainable_modules names 'moe', but a layer of the model has self_attn, mlp, input_layernorm"
    with pytest.raises(ConfigError, match=told):
        Methods(config).prepare(load_base(deep, config), {})
    with pytest.raises(ConfigError, match=r"freeze_trainable_modules: no name would train nothing; write all"):
        frozen(deep, freeze_trainable_modules=" ,")


def known(**by_part: list[float]) -> dict[str, Tensor]:
    return {f"importance.{part}": torch.tensor(values, dtype=torch.float64) for part, values in by_part.items()}


STATE = known(mlp=[1.0, 9.0, 2.0, 0.0], self_attn=[8.0, 0.0, 1.0, 7.5])


@pytest.mark.parametrize(
    ("values", "state", "chosen", "told"),
    [
        ({}, STATE, [2, 3], "36.8%"),  # (3 + 7.5) / 28.5
        ({"freeze_trainable_layers": -1}, STATE, [2], "10.5%"),
        ({"freeze_trainable_modules": "mlp"}, STATE, [0, 3], "8.3%"),
        ({"freeze_trainable_modules": "self_attn"}, STATE, [1, 2], "6.1%"),
        ({}, known(mlp=[0.0, 0.0, 0.0, 0.0]), [0, 1], "0.0%"),
        ({}, {}, [2, 3], "by position"),
        ({"freeze_trainable_layers": -1}, {}, [0], "by position"),
    ],
)
def test_the_least_important_layers_learn(
    deep: Path, values: dict[str, Any], state: Mapping[str, Tensor], chosen: list[int], told: str
) -> None:
    config = frozen(deep, freeze_by="importance", **values)
    methods = Methods(config)
    model = methods.prepare(load_base(deep, config), {f"freeze.{key}": tensor for key, tensor in state.items()})
    assert sorted({int(name.split(".")[2]) for name in learns(model)}) == chosen
    choice = methods.choices["freeze_trainable_layers"]
    assert choice["value"] == chosen and told in choice["reason"]
    by_place = Methods(frozen(deep, **values))
    by_place.prepare(load_base(deep, config), {})
    assert by_place.choices == {}


def batches(run: Run) -> list[Batch]:
    return [make_batch([row], run.pad_id) for row in run.rows.values()]


def by_hand(model: Any, found: list[Batch]) -> dict[str, list[float]]:
    """Whole gradients, a row at a time, by torch alone."""
    sums: dict[str, list[float]] = {}
    weights = {name: p for name, p in model.named_parameters() if ".layers." in name}
    model.requires_grad_(True)
    for batch in found:
        logits = model(input_ids=batch.inputs["ids"]).logits[0][batch.at]
        likelihood = -cross_entropy(logits, batch.targets, reduction="sum")
        for name, gradient in zip(weights, torch.autograd.grad(likelihood, list(weights.values())), strict=True):
            layer, part = name.split(".")[2:4]
            sums.setdefault(f"importance.{part}", [0.0] * 4)[int(layer)] += float(gradient.square().sum())
    return sums


def test_importance_by_hand(deep: Path) -> None:
    run = Run(deep, frozen(deep))
    before, rows = learns(run.model), batches(run)[:5]
    found = importance(run.model, rows, torch.float32)
    assert learns(run.model) == before
    assert all(weight.grad is None for weight in run.model.parameters())
    wanted = by_hand(load_base(deep, run.config), rows)
    assert found.keys() == wanted.keys() and len(found) == 4
    for key, values in wanted.items():
        assert found[key].tolist() == pytest.approx(values, rel=1e-4)


def test_some_of_many_rows_stand_for_all(deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(deep, frozen(deep))
    rows = batches(run)
    monkeypatch.setattr(module, "ROWS", 10)
    taken = importance(run.model, rows, torch.float32)  # 24 rows: every third.
    monkeypatch.setattr(module, "ROWS", 8)
    wanted = importance(run.model, rows[::3], torch.float32)
    for key, tensor in wanted.items():
        torch.testing.assert_close(taken[key], 3 * tensor)
    assert not importance(run.model, [], torch.float32)["importance.mlp"].any()


def test_it_adds_up_from_update_to_update(deep: Path) -> None:
    run = Run(deep, frozen(deep, freeze_by="importance"))
    rows = batches(run)[:3]
    own = importance(run.model, rows, torch.float32)
    run.methods.prepare(run.model, {f"freeze.{key}": tensor for key, tensor in STATE.items()})
    kept = run.methods.after_update(run.model, lambda: rows)
    for key, tensor in own.items():
        torch.testing.assert_close(kept[f"freeze.{key}"], tensor + STATE.get(key, 0))
    assert Freeze(frozen(deep)).after_update(run.model, rows) == {}


def test_layers_of_little_importance_cost_old_rows_less(deep: Path) -> None:
    """The same small step in every weight of the layers chosen: old rows lose least where they are the least important.

    Rows are first learned, so that their gradients are those of what is known.
    """
    run = Run(deep, settings(deep, finetuning_type="full", learning_rate=3e-3, max_steps=40))
    run.train()
    rows = batches(run)[:12]
    found = importance(run.model, rows, torch.float32)
    ranked = torch.stack(list(found.values())).sum(0).argsort().tolist()

    @torch.no_grad()
    def cost(number: int) -> float:
        layer: Any = run.model.model.layers[number]
        start = {p: p.clone() for p in layer.parameters()}
        costs = []
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            for p, value in start.items():
                p.copy_(value + 3e-3 * torch.randn(p.shape, generator=generator).sign())
            costs.append(sum(losses(run, rows)))
        for p, value in start.items():
            p.copy_(value)
        return sum(costs)

    assert cost(ranked[0]) < cost(ranked[-1])


def losses(run: Run, rows: list[Batch]) -> list[float]:
    return [float(cross_entropy(run.model(input_ids=row.inputs["ids"]).logits[0][row.at], row.targets)) for row in rows]


def test_an_update_tells_which_layers_it_chose(workspace: Callable[..., Workspace], deep: Path) -> None:
    def made(name: str) -> list[Any]:
        ws = workspace(
            name,
            model_name_or_path=str(deep),
            finetuning_type="freeze",
            freeze_by="importance",
            freeze_trainable_layers=1,
            max_steps=2,
        )
        found = []
        for task in ("pens", "cups", "hats"):
            ws.ingest(toy_rows(task, 10), task=task)
            version = ws.update()
            assert version is not None and version.problems() == []
            ws.promote(version.name, force=True)
            found.append(version)
        return found

    versions = made("one")
    base = dict(load_base(deep, settings(deep)).named_parameters())
    state: dict[str, Tensor] = {}
    for version in versions:
        choice = version.manifest["choices"]["freeze_trainable_layers"]
        kept = load_file(version.folder / "state.safetensors")
        if state:
            assert all((kept[key] >= state[key]).all() and kept[key].sum() > state[key].sum() for key in kept)
            assert choice["value"] == [int(torch.stack(list(state.values())).sum(0).argmin())]
            assert "least important" in choice["reason"]
        else:
            assert choice["value"] == [3] and "by position" in choice["reason"]
        weights = dict(load_base(version.folder, settings(deep)).named_parameters())
        changed = {int(name.split(".")[2]) for name in weights if not torch.equal(weights[name], base[name])}
        assert changed == set(choice["value"])
        base, state = weights, kept
    again = made("two")
    for one, other in zip(versions, again, strict=True):
        assert same_bits(load_file(one.folder / "state.safetensors"), load_file(other.folder / "state.safetensors"))
        assert same_bits(load_file(one.folder / "model.safetensors"), load_file(other.folder / "model.safetensors"))
