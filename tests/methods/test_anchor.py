"""The pull to the parent's weights, and what the three methods that have it protect."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from treering import Workspace, registry
from treering.config import Config
from treering.errors import ConfigError
from treering.methods import Methods
from treering.methods.anchor import Anchor
from treering.registry import Version
from treering.results import read_results
from treering.testing import toy_rows


def small() -> Any:
    """Six weights that learn and two that do not."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    return layer


def test_the_pull_by_hand() -> None:
    model = small()
    importance = {"weight": torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 4.0]]), "gone": torch.ones(5)}
    anchor = Anchor(model, importance, "ewc")
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += torch.tensor([[1.0, 5.0, -1.0], [7.0, 0.0, 0.5]])
    found = anchor.pull(model)
    assert found is not None
    assert found.item() == pytest.approx((1 * 1 + 2 * 1 + 4 * 0.25) / 2)
    (3 * found).backward()
    away = model.weight.detach() - start
    torch.testing.assert_close(model.weight.grad, 3 * importance["weight"] * away)
    assert model.bias.grad is None
    alike = Anchor(model, None, "l2")
    alike.start = {"weight": start}
    assert (alike.pull(model) or torch.zeros(())).item() == pytest.approx((1 + 25 + 1 + 49 + 0.25) / 2)


def test_nothing_of_importance_pulls_nowhere() -> None:
    model = small()
    assert Anchor(model, {}, "ewc").pull(model) is None
    assert Anchor(model, {"bias": torch.ones(2)}, "ewc").pull(model) is None  # It does not learn.


def test_the_range_test_has_no_copy_of_the_anchor() -> None:
    anchor = Anchor(small(), None, "l2")
    assert copy.deepcopy({"anchor": anchor})["anchor"] is anchor


@pytest.mark.parametrize("method", ["ewc", "si"])
def test_importance_of_another_shape_is_refused(method: str) -> None:
    methods = Methods(Config(protect=(method,)))
    del methods.by_name["lora"]
    told = rf"protect has {method}, but .* weight is \[2, 4\] there and \[2, 3\] here; drop {method} from protect"
    with pytest.raises(ConfigError, match=told):
        methods.prepare(small(), {f"{method}.weight": torch.ones(2, 4)})


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"ewc": {"weight": -1}}, r"ewc\.weight: .*greater than or equal to 0 \(got -1\)"),
        ({"ewc": {"gamma": 1.5}}, r"ewc\.gamma: .*less than or equal to 1 \(got 1\.5\)"),
        ({"l2": {"weight": -1}}, r"l2\.weight: .*greater than or equal to 0 \(got -1\)"),
        ({"si": {"weight": "much"}}, r"si\.weight: .*number.* \(got 'much'\)"),
        ({"si": {"damping": 0.1}}, r"si\.damping"),
        ({"protect": ["ewv"]}, "did you mean 'ewc'"),
    ],
)
def test_bad_settings(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        Config.build(values)


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"finetuning_type": "lora", "learning_rate": 1e-2},
    "full": {"finetuning_type": "full", "learning_rate": 1e-3},
}
STRONG = {"ewc": 1.0, "l2": 1.0, "si": 1.0}


@pytest.fixture(scope="module", params=KINDS)
def taught(request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose v1 has learned pens, with what `ewc` and `si` keep, and cups that wait."""
    ws = Workspace.create(
        tmp_path_factory.mktemp(request.param) / "ws",
        model_name_or_path=str(model_folder),
        bf16=False,
        protect=["ewc", "si"],
        per_device_train_batch_size=8,
        num_train_epochs=4,
        eval={"max_new_tokens": 4},
        gate={"margin": 1.0, "floor": 1.0},
        **KINDS[request.param],
    )
    ws.ingest(toy_rows("pens", 40), task="pens")
    assert ws.update() is not None
    ws.ingest(toy_rows("cups", 40), task="cups")
    return ws


def weights(version: Version) -> dict[str, Tensor]:
    (path,) = [
        version.folder / name
        for name in ("adapter_model.safetensors", "model.safetensors")
        if (version.folder / name).exists()
    ]
    return load_file(path)


def log_of(version: Version) -> list[dict[str, float]]:
    return [json.loads(line) for line in (version.folder / "log.jsonl").open()]


def second(taught: Workspace, folder: Path, *settings: str) -> tuple[float, float, Version]:
    """The loss of pens after cups, how far the weights went, and the version."""
    shutil.copytree(taught.root, folder, symlinks=True)
    ws = Workspace(folder)
    version = ws.update(*settings)
    assert version is not None
    losses = [row.loss for row in read_results(version.folder / "results.parquet") if row.task == "pens"]
    first, last = weights(registry.get(ws, "v1")), weights(version)
    way = sum(float((last[name] - first[name]).double().square().sum()) for name in first)
    return sum(losses) / len(losses), way**0.5, version


def test_a_first_update_has_nothing_to_protect_but_learns_what_is_of_importance(taught: Workspace) -> None:
    version = registry.get(taught, "v1")
    assert not {"ewc", "si"} & {key for entry in log_of(version) for key in entry}
    state = load_file(version.folder / "state.safetensors")
    for method in ("ewc", "si"):
        own = {name: tensor for name, tensor in state.items() if name.startswith(f"{method}.")}
        assert sum(tensor.numel() for tensor in own.values()) == version.manifest["cost"]["trainable_parameters"]
        assert all(tensor.dtype == torch.float32 and (tensor >= 0).all() for tensor in own.values())
        assert any(tensor.any() for tensor in own.values())


def test_what_was_learned_is_held(taught: Workspace, tmp_path: Path) -> None:
    """With each of the methods the old task's loss rises less, and the weights go less far."""
    plain, far, _ = second(taught, tmp_path / "plain", "protect=[]")
    for method, weight in STRONG.items():
        loss, way, version = second(taught, tmp_path / method, f"protect=[{method}]", f"{method}.weight={weight}")
        log = log_of(version)
        assert log[0][method] == 0.0 < log[-1][method]  # Before the first step the model is its parent.
        assert loss < 0.8 * plain, method
        assert way < far, method
        kept = version.folder / "state.safetensors"
        assert kept.exists() == (method != "l2")
        if method != "l2":
            before = load_file(taught.versions / "v1" / "state.safetensors")
            assert load_file(kept).keys() == {name for name in before if name.startswith(method)}


def test_methods_combine(taught: Workspace, tmp_path: Path) -> None:
    _, _, version = second(taught, tmp_path / "all", "protect=[replay, distill, lwf, ewc, l2, si]", "max_steps=3")
    assert {"ewc", "l2", "si", "lwf"} <= log_of(version)[-1].keys()
    assert version.problems() == []


@pytest.fixture
def frozen(workspace: Callable[..., Workspace]) -> Workspace:
    ws = workspace(
        finetuning_type="freeze",
        freeze_trainable_layers=1,
        protect=["ewc", "si"],
        max_steps=2,
        learning_rate=1e-3,
        eval={"max_new_tokens": 2},
        gate={"margin": 1.0, "floor": 1.0},
    )
    ws.ingest(toy_rows("pens", 10), task="pens")
    assert ws.update() is not None
    ws.ingest(toy_rows("cups", 10), task="cups")
    return ws


def test_other_layers_that_learn(frozen: Workspace) -> None:
    """Those that learn no more keep their importance, and those that are new to it are not held yet."""
    first = load_file(registry.get(frozen, "v1").folder / "state.safetensors")
    version = frozen.update("freeze_trainable_layers=-1")
    assert version is not None
    assert not {"ewc", "si"} & log_of(version)[-1].keys()
    state = load_file(version.folder / "state.safetensors")
    assert {name.split(".")[3] for name in first} == {"1"} and {name.split(".")[3] for name in state} == {"0", "1"}
    gamma = Config().ewc.gamma
    for name, tensor in first.items():
        torch.testing.assert_close(state[name], gamma * tensor if name.startswith("ewc") else tensor)
