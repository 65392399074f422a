"""Weights between the parent's and those trained: where, who chose it and why, and never twice."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.training import Run, same_bits, settings
from treering import Workspace, registry
from treering.config import Config
from treering.errors import ConfigError, UpdateInterruptedError
from treering.lesson import Lesson
from treering.memory import Memory
from treering.methods import Losses
from treering.methods import trained as trained_weights
from treering.methods.interpolate import SHARES
from treering.model import encode, load, load_tokenizer
from treering.passes import losses
from treering.testing import toy_rows

VALUES: dict[str, Any] = {
    "learning_rate": 2e-2,
    "max_steps": 20,
    "per_device_train_batch_size": 8,
    "eval": {"max_new_tokens": 2},
    "memory": {"size": 12},
    "protect": ["interpolate"],
}


def made(folder: Path, **values: Any) -> Run:
    sizes = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_steps": 4}
    return Run(folder, settings(folder, **{**sizes, "protect": ["interpolate"], **values}))


def ended(run: Run, measure: Callable[[], Losses] = lambda: Losses(0.0, 0.0), **options: Any) -> dict[str, Tensor]:
    run.train(**options)
    run.methods.after_training(run.model, measure)
    return run.weights()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_share_that_is_set(model_folder: Path, kind: str) -> None:
    plain = made(model_folder, protect=[], finetuning_type=kind)
    start, trained = plain.weights(), ended(plain)
    for share in (0.3, 0.8):
        run = made(model_folder, interpolate={"share": share}, finetuning_type=kind)
        for name, weight in ended(run, lambda: pytest.fail("nothing is to be chosen")).items():
            wanted = (1 - share) * start[name] + share * trained[name]
            torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-6)
        assert run.methods.choices == {}
    assert same_bits(ended(made(model_folder, interpolate={"share": 1}, finetuning_type=kind)), trained)


def test_products_of_lora_are_bent(model_folder: Path) -> None:
    """As the documentation says: less than the interpolated product, by `share (1 - share) dB dA`."""
    plain = made(model_folder, protect=[])
    start, trained = plain.weights(), ended(plain)
    found = ended(made(model_folder, interpolate={"share": 0.4}))
    for name in [name for name in found if "lora_A" in name]:
        other = name.replace("lora_A", "lora_B")
        assert not start[other].any()  # The first update.
        product = found[other].double() @ found[name].double()
        change = trained[other].double() @ (trained[name] - start[name]).double()
        wanted = 0.4 * trained[other].double() @ trained[name].double() - 0.4 * 0.6 * change
        torch.testing.assert_close(product, wanted, rtol=1e-4, atol=1e-7)
        assert change.norm() > 0


@pytest.mark.parametrize(
    ("old", "share"),
    [
        ((1.0, 0.9, 0.7, 0.6, 0.5), 0.6),  # Sums with the new: 1.1, 1.1, 1.0, 1.1, 1.4.
        ((0.3, 0.2, 0.1, 0.1, 0.1), 1.0),  # 0.4, 0.4, ...: of equals the one that learned most.
        ((9.0, 8.0, 5.0, 2.0, 0.1), 0.2),
    ],
)
def test_auto_takes_the_lowest_sum(model_folder: Path, old: tuple[float, ...], share: float) -> None:
    new, asked = (0.1, 0.2, 0.3, 0.5, 0.9), []
    run = made(model_folder)

    def measure() -> Losses:
        asked.append(run.weights())
        return Losses(new[len(asked) - 1], old[len(asked) - 1])

    found = ended(run, measure)
    assert len(asked) == len(SHARES) == 5
    for at, each in enumerate(SHARES):
        assert same_bits(asked[at], ended(made(model_folder, interpolate={"share": each})))
    assert same_bits(found, asked[SHARES.index(share)])
    said = run.methods.choices["interpolate.share"]
    assert said["value"] == share
    assert f"0.4: 0.5 and {old[3]:.3g}" in said["reason"]


def test_with_nothing_remembered_all_is_taken(model_folder: Path) -> None:
    run, asked = made(model_folder), []

    def measure() -> Losses:
        asked.append(1)
        return Losses(5.0, 0.0)

    assert same_bits(ended(run, measure), ended(made(model_folder, protect=[])))
    assert len(asked) == 1
    assert run.methods.choices["interpolate.share"]["value"] == 1.0
    assert "nothing is remembered" in run.methods.choices["interpolate.share"]["reason"]


@pytest.fixture
def second(workspace: Callable[..., Workspace]) -> Callable[..., Workspace]:
    """Makes a workspace whose v1 knows pens, with cups to learn."""

    def make(name: str = "ws", **values: Any) -> Workspace:
        ws = workspace(name, **{**VALUES, **values})
        ws.ingest(toy_rows("pens", 40), task="pens")
        version = ws.update()
        assert version is not None
        assert version.manifest["choices"]["interpolate.share"]["value"] == 1.0
        ws.promote("v1", force=True)
        ws.ingest(toy_rows("cups", 40), task="cups")
        return ws

    return make


def adapter(ws: Workspace, name: str) -> dict[str, Tensor]:
    return load_file(registry.get(ws, name).folder / "adapter_model.safetensors")


def test_an_update_says_what_was_chosen_and_forgets_less(second: Callable[..., Workspace], model_folder: Path) -> None:
    """The choice against the same sums over the same rows, of adapters interpolated here."""
    ws = second()
    chosen, plain = ws.update(promote=False), ws.update(promote=False, protect=[])
    assert chosen is not None and plain is not None
    said = chosen.manifest["choices"]["interpolate.share"]
    assert 0 < said["value"] < 1 and "interpolate.share" not in plain.manifest["choices"]
    assert "interpolate.share" in (chosen.folder / "report.html").read_text(encoding="utf-8")

    v1, config = registry.get(ws, "v1"), settings(model_folder)
    start, found, trained = (adapter(ws, name) for name in ("v1", chosen.name, plain.name))
    model, tokenizer = load(model_folder, config, v1), load_tokenizer(model_folder)
    weights = {name.replace(".default", ""): weight for name, weight in trained_weights(model).items()}
    assert weights.keys() == start.keys()
    pens, cups = [*Memory.load(v1.folder).rows], chosen.manifest["rows"]["cups"]
    rows = {id: encode(tokenizer, example) for id, example in ws.catalog.examples([*pens, *cups]).items()}
    sums = {}
    for share in SHARES:
        with torch.no_grad():
            for name, value in weights.items():
                value.copy_((1 - share) * start[name] + share * trained[name])
        parts = (losses(model, [rows[id] for id in ids], config, 0) for ids in (pens, cups))
        sums[share] = sum(math.fsum(part) / len(part) for part in parts)
    assert len(pens) == 12 and said["value"] == min(sums, key=lambda share: sums[share])
    for name, weight in found.items():
        wanted = (1 - said["value"]) * start[name] + said["value"] * trained[name]
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-6)
    forgotten, kept = (version.manifest["scores"]["pens"]["loss"] for version in (plain, chosen))
    assert kept < forgotten
    assert chosen.manifest["scores"]["cups"]["loss"] < chosen.manifest["parent_scores"]["cups"]["loss"]


def test_killed_while_it_measures_it_is_not_applied_twice(
    second: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> None:
    ws, asked, measure = second(), [], Lesson._losses

    def killed(self: Lesson) -> Losses:
        asked.append(1)
        if len(asked) == 4:
            raise UpdateInterruptedError("asked")
        return measure(self)

    monkeypatch.setattr(Lesson, "_losses", killed)
    with pytest.raises(UpdateInterruptedError):
        ws.update(promote=False)
    resumed = ws.update(promote=False)
    assert len(asked) == 9
    monkeypatch.undo()
    whole = second("whole").update(promote=False)
    assert resumed is not None and whole is not None
    assert whole.manifest["choices"] == resumed.manifest["choices"]
    assert (
        whole.manifest["files"]["adapter_model.safetensors"] == resumed.manifest["files"]["adapter_model.safetensors"]
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"interpolate": {"share": 0}}, "interpolate.share: .*0.*auto.*got 0"),
        ({"interpolate": {"share": 1.5}}, "interpolate.share: .*1.*auto.*got 1.5"),
        ({"interpolate": {"share": "some"}}, "interpolate.share: .*auto.*got 'some'"),
        (
            {"memory": {"size": 0}},
            "interpolate.share is auto, but memory.size is 0.*set a number, or memory.size: auto",
        ),
        ({"memory": {"size": "0%"}}, "interpolate.share is auto, but memory.size is 0%"),
    ],
)
def test_settings_that_do_not_fit(values: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config.build({"protect": ["interpolate"], **values})
    assert re.search(told, str(caught.value)), caught.value
    fits = {"protect": ["interpolate"], "interpolate": {"share": 0.5}, "memory": {"size": 0}, "early_stopping_steps": 2}
    assert Config.build(fits).interpolate.share == 0.5
