"""Features of prompts: the base model's own hidden states, whatever adapter is on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training import Run, StopAt, chat, settings
from treering.errors import UpdateInterruptedError
from treering.features import LARGEST, features
from treering.model import load_base
from treering.testing import tiny_model

ROWS = [chat(("user", "pens " * n), ("assistant", "yes"), ("user", "more"), ("assistant", "no")) for n in (1, 9, 4, 2)]


PROMPTS = [row.prompt for row in ROWS]


def by_hand(folder: Path, run: Run, *layers: int) -> Tensor:
    """Each prompt alone through the bare base model, by transformers' own list of hidden states."""
    model: Any = load_base(folder, run.config)
    tokenizer: Any = run.tokenizer
    found = []
    for prompt in PROMPTS:
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        before, after = (
            tokenizer(part)["input_ids"] for part in (text[: text.rindex("more")], text[text.rindex("more") :])
        )
        with torch.no_grad():
            hidden = model(input_ids=torch.tensor([before + after]), output_hidden_states=True).hidden_states
        means = [hidden[layer][0, len(before) :].mean(0) for layer in layers]
        found.append(torch.cat([mean * len(mean) ** 0.5 / mean.norm() for mean in means]))
    return torch.stack(found)


@pytest.mark.parametrize(("layers", "read"), [(2, [1]), (5, [1, 2]), (8, [2, 4])])
def test_they_are_means_in_the_middle_of_the_base_model(tmp_path: Path, layers: int, read: list[int]) -> None:
    folder = tiny_model(tmp_path, hidden_size=8, layers=layers)
    run = Run(folder, settings(folder, eval={"batch_size": 3}), ROWS)
    for weight in run.weights():
        run.model.get_parameter(weight).data += 0.3  # An adapter that says much.
    found = features(run.model, run.tokenizer, PROMPTS, run.config)
    assert found.shape == (4, 8 * len(read)) and found.dtype == torch.float32
    assert torch.allclose(found, by_hand(folder, run, *read), atol=1e-4)


def test_those_of_wide_models_are_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(tmp_path, hidden_size=256, layers=4)
    run = Run(folder, settings(folder), ROWS)
    whole = features(run.model, run.tokenizer, PROMPTS, run.config).double()
    assert whole.shape[1] == 512 < LARGEST
    monkeypatch.setattr("treering.features.LARGEST", 384)
    folded = features(run.model, run.tokenizer, PROMPTS, run.config).double()
    assert folded.shape == (4, 384)
    assert torch.equal(folded, features(run.model, run.tokenizer, PROMPTS, run.config).double())
    # About the same length, and angles between prompts are kept: 1 / sqrt(384) is what chance alone would move.
    assert torch.allclose(folded @ folded.T, whole @ whole.T, rtol=0, atol=4 * 512 / 384**0.5)
    assert not torch.allclose(folded, whole[:, :384])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_they_leave_no_trace(model_folder: Path, kind: str) -> None:
    run = Run(model_folder, settings(model_folder, finetuning_type=kind), ROWS)
    run.model.train()
    some = next(iter(run.weights()))
    run.model.get_parameter(some).requires_grad_(False)
    state = torch.get_rng_state()
    learns = [p.requires_grad for p in run.model.parameters()]
    found = features(run.model, run.tokenizer, PROMPTS, run.config)
    assert torch.equal(found, features(run.model, run.tokenizer, PROMPTS[::-1], run.config).flip(0))
    with pytest.raises(UpdateInterruptedError):
        features(run.model, run.tokenizer, PROMPTS, run.config, stop=StopAt(1))
    assert run.model.training and learns == [p.requires_grad for p in run.model.parameters()]
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.requires_grad
    assert features(run.model, run.tokenizer, [], run.config).shape == (0, found.shape[1])
    model: Any = run.model  # It passes through to the end again, with its adapter.
    ids = next(iter(run.rows.values())).ids
    assert model(input_ids=torch.tensor([ids])).logits.shape[1] == len(ids)
