"""Many LoRA adapters over one base model, mixed freely within a batch.

Every adapted linear layer holds the matrices of all loaded adapters, stacked; each row of a batch picks its own. A
batch of one adapter and a batch of many take the same path, and loading an adapter is a copy into a free place.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear

from treering.adopt import ADAPTER_FILES

_WEIGHT = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter: per module A `[rank, in]` and B `[out, rank]`, the scale already in B."""

    weights: dict[str, tuple[Tensor, Tensor]]


def read_adapter(folder: Path, dtype: torch.dtype) -> Adapter | None:
    """The adapter in a PEFT folder; None if it is more than plain LoRA on linear layers (DoRA, biases, ...)."""
    settings, weights = (folder / name for name in ADAPTER_FILES)
    made = json.loads(settings.read_text(encoding="utf-8"))
    if made["peft_type"] != "LORA" or made.get("use_dora") or made.get("alpha_pattern") or made.get("lora_bias"):
        return None
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(weights).items():
        match = _WEIGHT.fullmatch(name)
        if match is None or tensor.ndim != 2:
            return None
        found.setdefault(match["module"], {})[match["side"]] = tensor
    scaled = {}
    for module, sides in found.items():
        if set(sides) != {"A", "B"}:
            return None
        rank = len(sides["A"])
        scale = made["lora_alpha"] / (math.sqrt(rank) if made.get("use_rslora") else rank)
        scaled[module] = (sides["A"].to(dtype), (sides["B"].float() * scale).to(dtype))
    return Adapter(scaled)


class Slots:
    """Places for `count` adapters on `model`, numbered from 1; slot 0 is the base model without any.

    `rows` says which slot each row of the next forward pass uses.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        self.model = model
        self.count = count
        self.rows: Tensor | int = 0
        self._layers: dict[str, _Adapted] = {}

    def check(self, adapter: Adapter) -> None:
        """Raises `ValueError` for an adapter of another model."""
        for name, (a, b) in adapter.weights.items():
            layer = self._layers.get(name)
            base = layer.base if layer else _linear(self.model, name)
            if a.shape[1] != base.in_features or b.shape[0] != base.out_features:
                raise ValueError(f"the adapter's weights {tuple(a.shape)}, {tuple(b.shape)} do not fit {base}")

    def put(self, slot: int, adapter: Adapter) -> None:
        """Replace what `slot` holds. Raises `ValueError` for an adapter of another model."""
        self.check(adapter)
        for name in adapter.weights:
            if name not in self._layers:
                self._layers[name] = _Adapted.around(self.model, name, self)
        for name, layer in self._layers.items():
            layer.put(slot, adapter.weights.get(name))

    def use(self, slots: list[int]) -> None:
        """Row r of the next forward passes uses adapter `slots[r]`."""
        device = next(self.model.parameters()).device
        self.rows = slots[0] if len(set(slots)) == 1 else torch.tensor(slots, device=device)


class _Adapted(nn.Module):
    """A linear layer and the matrices of all adapters: A `[slots, rank, in]`, B `[slots, out, rank]`."""

    def __init__(self, base: nn.Linear, slots: Slots) -> None:
        super().__init__()
        self.base = base
        self._slots = slots
        self.A = base.weight.new_zeros(slots.count + 1, 0, base.in_features)
        self.B = base.weight.new_zeros(slots.count + 1, base.out_features, 0)

    @classmethod
    def around(cls, model: nn.Module, name: str, slots: Slots) -> _Adapted:
        """Put one around the linear layer `name` of `model`."""
        parent, _, last = name.rpartition(".")
        layer = cls(_linear(model, name), slots)
        setattr(model.get_submodule(parent), last, layer)
        return layer

    def put(self, slot: int, weights: tuple[Tensor, Tensor] | None) -> None:
        """Fill a slot; what is left of a larger rank stays zero."""
        self.A[slot] = 0
        self.B[slot] = 0
        if weights is None:
            return
        a, b = weights
        missing = len(a) - self.A.shape[1]
        if missing > 0:
            self.A = nn.functional.pad(self.A, (0, 0, 0, missing))
            self.B = nn.functional.pad(self.B, (0, missing))
        self.A[slot, : len(a)] = a
        self.B[slot, :, : len(a)] = b

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, length, in]` to `[rows, length, out]`."""
        y: Tensor = self.base(x)
        rows = self._slots.rows
        if isinstance(rows, int):
            return y if rows == 0 else y + linear(linear(x, self.A[rows]), self.B[rows])
        return y + (x @ self.A[rows].mT) @ self.B[rows].mT


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        found = model.get_submodule(name)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        raise ValueError(f"the adapter has weights for {name}, which is no linear layer of this base model")
    return found
