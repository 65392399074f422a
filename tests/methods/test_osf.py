"""OSF: what weights use most stays, to the precision of numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import OSFConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.conftest import QUICK
from tests.training import KillAt, KilledError, Run, same_bits, settings
from treering import Workspace, registry
from treering.config import Config
from treering.errors import ConfigError
from treering.methods import Losses
from treering.methods.osf import OSF, _High
from treering.model import load, load_base
from treering.testing import toy_rows

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
OSFT: dict[str, Any] = {"finetuning_type": "osf", "max_steps": 4, "learning_rate": 1e-2}


def moved(before: dict[str, Tensor], after: dict[str, Tensor], share: float) -> tuple[float, float]:
    """How far weights moved, relative to their largest singular value: in what is to stay, and in all."""
    kept, total = 0.0, 0.0
    for name, weight in before.items():
        w, change = weight.double().numpy(), (after[name].double() - weight.double()).numpy()
        u, s, v = np.linalg.svd(w, full_matrices=False)
        k = int(min(w.shape) * share)
        kept = max(kept, abs(u[:, :k].T @ change).max() / s[0], abs(change @ v[:k].T).max() / s[0])
        total = max(total, abs(change).max() / s[0])
    return kept, total


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"weight_decay": 0.5},
        {"optim": "muon"},
        {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
        {"osf": {"effective_rank": 0.9}},
        {"early_stopping_steps": 1, "eval_steps": 1},
    ],
    ids=str,
)
def test_what_weights_use_most_stays(model_folder: Path, values: dict[str, Any]) -> None:
    run = Run(model_folder, settings(model_folder, **{**OSFT, **values}))
    before = run.weights()
    assert len(before) == 2 * 7 and all("_proj" in name for name in before)
    run.train()
    run.methods.after_training(run.model, lambda: Losses(0.0, 0.0))
    kept, total = moved(before, run.weights(), values.get("osf", {}).get("effective_rank", 0.5))
    assert kept < 1e-5 and total > 1e-3


def test_full_fine_tuning_moves_it(model_folder: Path) -> None:
    run = Run(model_folder, settings(model_folder, **{**OSFT, "finetuning_type": "full"}))
    before = {name: weight for name, weight in run.weights().items() if "_proj" in name}
    run.train()
    kept, total = moved(before, run.weights(), 0.5)
    assert kept > 1e-3 and total > 1e-3


def test_all_that_peft_can_learn_can_be_learned(model_folder: Path) -> None:
    """What its factors become in a step of its own training is left as it is here."""
    ours = load_base(model_folder, settings(model_folder))
    method = OSF(settings(model_folder, finetuning_type="osf"))
    method.prepare(ours, {})
    peft: Any = get_peft_model(
        load_base(model_folder, settings(model_folder)), OSFConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    )
    learns = [weight for weight in peft.parameters() if weight.requires_grad]
    optimizer = torch.optim.SGD(learns, lr=1e-2)
    for _ in range(3):
        peft(input_ids=IDS).logits.logsumexp(-1).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    learned = peft.merge_and_unload().state_dict()
    for name, weight in ours.named_parameters():
        if weight.requires_grad:
            assert not torch.allclose(learned[name], weight, atol=1e-3)
            torch.testing.assert_close(method.high[name].restored(learned[name]), learned[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (7, 7)])
def test_a_projection_by_hand(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, change = (torch.randn(shape, generator=generator) for _ in range(2))
    u, s, v = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    high = _High(*(torch.from_numpy(part).float() for part in (u[:, :2], s[:2], v[:2])))
    p, q = np.eye(shape[0]) - u[:, :2] @ u[:, :2].T, np.eye(shape[1]) - v[:2].T @ v[:2]
    allowed = p @ change.double().numpy() @ q
    np.testing.assert_allclose(high.without(change).numpy(), allowed, atol=1e-5)
    np.testing.assert_allclose(high.restored(weight + change).numpy(), weight.numpy() + allowed, atol=1e-5)


def test_gradients_have_nothing_of_what_stays(model_folder: Path) -> None:
    model: Any = load_base(model_folder, settings(model_folder))
    method = OSF(settings(model_folder, finetuning_type="osf"))
    method.prepare(model, {})
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss = model(input_ids=IDS).logits.logsumexp(-1).sum()
    for (name, _), gradient in zip(weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True):
        high, largest = method.high[name], gradient.abs().max()
        assert largest > 0
        assert (high.u.T @ gradient).abs().max() < 1e-4 * largest
        assert (gradient @ high.v.T).abs().max() < 1e-4 * largest


@pytest.mark.parametrize("rank", [1, 20, 0.25])
def test_how_much_stays_is_set(model_folder: Path, rank: float) -> None:
    method = OSF(settings(model_folder, finetuning_type="osf", osf={"effective_rank": rank}))
    method.prepare(load_base(model_folder, settings(model_folder)), {})
    smaller = {name: min(high.u.shape[0], high.v.shape[1]) for name, high in method.high.items()}
    wanted = {name: rank if isinstance(rank, int) else int(size * rank) for name, size in smaller.items()}
    assert {name: len(high.s) for name, high in method.high.items()} == wanted


def test_an_interrupted_update_resumes_to_the_same_bits(model_folder: Path, tmp_path: Path) -> None:
    def run() -> Run:
        return Run(model_folder, settings(model_folder, **OSFT, save_steps=1))

    whole, broken, resumed = run(), run(), run()
    whole.train()
    with pytest.raises(KilledError):
        broken.train(checkpoints=tmp_path, stop=KillAt(400))
    assert 0 < max(int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*")) < 4
    resumed.train(checkpoints=tmp_path)
    assert same_bits(whole.weights(), resumed.weights())


@pytest.mark.parametrize("bf16", [False, True])
def test_versions_are_plain_folders_and_go_on(
    workspace: Callable[..., Workspace], model_folder: Path, bf16: bool
) -> None:
    ws = workspace(**{**QUICK, "finetuning_type": "osf", "learning_rate": "auto", "bf16": bf16})
    for task in ("pens", "cups"):
        ws.ingest(toy_rows(task, 20), task=task)
        version = ws.update()
        assert version is not None
        ws.promote(version.name, force=True)
    version = registry.get(ws)
    assert version.parent == "v1"
    plain: Any = AutoModelForCausalLM.from_pretrained(version.folder, attn_implementation="eager")
    ours: Any = load(model_folder, ws.config(), version)
    assert same_bits(plain.state_dict(), ours.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=IDS).logits, ours(input_ids=IDS).logits, rtol=1e-3, atol=1e-4)
    base = AutoModelForCausalLM.from_pretrained(model_folder).state_dict()
    changed = {
        name for name, weight in plain.state_dict().items() if not torch.equal(weight, base[name].to(weight.dtype))
    }
    assert changed == {name for name in base if "_proj" in name}


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, "half"])
def test_ranks_that_are_none(rank: object) -> None:
    with pytest.raises(ConfigError, match=r"osf\.effective_rank"):
        Config.build({"finetuning_type": "osf", "osf": {"effective_rank": rank}})


def test_something_has_to_be_left(model_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"osf\.effective_rank is 64, .* lower it"):
        OSF(settings(model_folder, osf={"effective_rank": 64})).prepare(
            load_base(model_folder, settings(model_folder)), {}
        )
