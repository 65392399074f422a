"""Attention of our own gives what transformers' does, however the batch is laid out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from treering import attention
from treering.config import Config
from treering.model import load_base, pad

PROMPTS = [list(b"a long prompt, of many bytes"), list(b"short"), list(b"x")]


def logits(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    mask = inputs["attention_mask"]
    found: Tensor = model(**inputs, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    return found[mask.bool()]


@pytest.mark.parametrize("left", [False, True])
def test_a_padded_batch(model_folder: Path, left: bool) -> None:
    model: Any = load_base(model_folder, Config(bf16=False))
    assert model.config._attn_implementation == attention.NAME
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    inputs = pad(PROMPTS, 0, left=left)
    ours = logits(model, inputs)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(ours, logits(model, inputs), rtol=1e-4, atol=1e-5)


def test_padding_is_a_number_in_float16() -> None:
    """It sees nothing, whatever its scores; what it made would reach others' sums, if only times zero."""
    config = SimpleNamespace(_attn_implementation=attention.NAME)
    hidden = torch.tensor([[True, True, False, False]])
    seen = ~hidden
    mask = attention._mask(
        1, 4, 4, 0, 0, mask_function=lambda b, h, q, kv: (kv <= q) & seen[b, kv], dtype=torch.float16, config=config
    )
    query, key = torch.full((1, 2, 4, 64), 3.0).half(), torch.full((1, 1, 4, 64), -3.0).half()
    found, _ = attention.attend(torch.nn.Module(), query, key, key, mask, 1.0)
    assert found.isfinite().all()


def test_tokens_written_one_by_one(model_folder: Path) -> None:
    model: Any = load_base(model_folder, Config(bf16=False))
    inputs = pad(PROMPTS, 0, left=True)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(**inputs, **settings)
    model.set_attn_implementation("eager")
    assert torch.equal(ours, model.generate(**inputs, **settings))


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, True),
        ({"layer_types": ["full_attention"] * 2, "sliding_window": None, "attention_dropout": 0.0}, True),
        ({"layer_types": ["full_attention", "sliding_attention"]}, False),
        ({"sliding_window": 512}, False),
        ({"attn_logit_softcapping": 50.0}, False),
        ({"attention_dropout": 0.1}, False),
    ],
)
def test_only_plain_attention_is_replaced(settings: dict[str, Any], wanted: bool) -> None:
    assert attention.suits(SimpleNamespace(**settings)) is wanted
