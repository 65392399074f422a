"""What is computed in, by the settings and by the hardware, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from treering.config import Config
from treering.model import compute, precision, precision_name

Hardware = Callable[[str], None]


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch) -> Hardware:
    """This machine has a GPU or none, with or without bfloat16: `GPU with`, `processor without`."""

    def has(what: str) -> None:
        where, bf16 = what.split(maxsplit=1)[0], what.endswith(" with")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: where == "GPU")
        # What is merely emulated is no hardware.
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16
        )
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)

    return has


@pytest.mark.parametrize(
    ("what", "settings", "wanted", "reason"),
    [
        ("GPU with", {}, "bfloat16", "the GPU has it in hardware"),
        ("GPU without", {}, "float16", "the GPU lacks bfloat16 in hardware"),
        ("processor with", {}, "bfloat16", "the processor has it in hardware"),
        ("processor without", {}, "float32", "the processor lacks bfloat16 in hardware"),
        ("GPU without", {"fp16": False}, "float32", "the GPU lacks bfloat16 in hardware"),
        ("GPU without", {"bf16": True}, "bfloat16", "as set"),
        ("GPU without", {"bf16": False}, "float32", "as set"),
        ("GPU with", {"fp16": True}, "float16", "as set"),
        ("GPU with", {"fp16": False}, "bfloat16", "the GPU has it in hardware"),
        ("processor with", {"fp16": True}, "float16", "as set"),
        ("processor without", {"bf16": False, "fp16": True}, "float16", "as set"),
    ],
)
def test_the_hardware_decides_where_nothing_is_set(
    hardware: Hardware, what: str, settings: dict[str, Any], wanted: str, reason: str
) -> None:
    hardware(what)
    config = Config.build(settings)
    assert precision(config) == (getattr(torch, wanted), reason)
    assert precision_name(config) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_in_it(dtype: torch.dtype) -> None:
    x = torch.randn(2, 8, 8)
    with compute(x.device, dtype):
        assert (x @ x).dtype == dtype
