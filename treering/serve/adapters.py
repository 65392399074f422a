"""Many LoRA adapters over one base model, mixed freely within a batch.

Linear layers that read the same input are computed together, and so are all adapters on them: a batch of many
adapters costs hardly more than a batch of one. Loading an adapter is a copy into a free place.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from treering.adopt import ADAPTER_FILES
from treering.model import TOGETHER
from treering.serve.product import plain, product

_WEIGHT = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter: per module A `[rank, in]` and B `[out, rank]`, the scale already in B."""

    weights: dict[str, tuple[Tensor, Tensor]]


def read_adapter(folder: Path, dtype: torch.dtype) -> Adapter | None:
    """The adapter in a PEFT folder; None if it is more than plain LoRA on linear layers (DoRA, biases, ...).

    Raises `ValueError` for weights that are not numbers: they would reach the others of a batch.
    """
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
        a, b = scaled[module] = sides["A"].to(dtype), (sides["B"].float() * scale).to(dtype)
        if not (a.isfinite().all() and b.isfinite().all()):
            raise ValueError(f"the adapter's weights for {module} are not all finite in {dtype}; ask another version")
    return Adapter(scaled)


class Slots:
    """Places for adapters on `model`, numbered from 1; slot 0 is the base model without any. There are `count`, or more
    once more are used.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        self.model = model
        self.count = count
        self.one: int | None = 0
        """The slot that all rows of the next forward passes use, if it is the same."""
        self.others = torch.ones(0, count, dtype=torch.bool)
        """Which slots each of those rows does not use, `[rows, count]`."""
        self._groups: dict[str, _Group] = {}

    def check(self, adapter: Adapter) -> None:
        """Raises `ValueError` for an adapter of another model."""
        for name, (a, b) in adapter.weights.items():
            group = self._groups.get(name)
            shape = group.shapes[group.names.index(name)] if group else _shape(_linear(self.model, name))
            if (a.shape[1], b.shape[0]) != shape:
                raise ValueError(
                    f"the adapter's weights {tuple(a.shape)}, {tuple(b.shape)} do not fit {name}, "
                    f"which makes {shape[1]} numbers of {shape[0]}"
                )

    def put(self, slot: int, adapter: Adapter) -> None:
        """Replace what `slot` holds. Raises `ValueError` for an adapter of another model."""
        self.check(adapter)
        self.count = max(self.count, slot)
        for name in adapter.weights:
            if name not in self._groups:
                group = _Group(self, _together(self.model, name))
                self._groups.update(dict.fromkeys(group.names, group))
        for group in set(self._groups.values()):
            group.grow(self.count)
            group.put(slot, [adapter.weights.get(name) for name in group.names])

    def use(self, slots: list[int]) -> None:
        """Row r of the next forward passes uses adapter `slots[r]`."""
        device = next(self.model.parameters()).device
        self.one = slots[0] if len(set(slots)) == 1 else None
        self.others = torch.tensor(slots, device=device)[:, None] != torch.arange(1, self.count + 1, device=device)


class _Group:
    """Linear layers of `slots.model` that read the same input, and the matrices of all adapters for them.

    A `[slots, layers, rank, in]` and B `[slots, layers, rank, out of all layers]`: a layer's part of B is zero in the
    columns of the others.
    """

    def __init__(self, slots: Slots, names: Sequence[str]) -> None:
        layers = [_linear(slots.model, name) for name in names]
        self.names = names
        self.shapes = [_shape(layer) for layer in layers]
        self._slots = slots
        self._sizes = [size for _, size in self.shapes]
        like = next(weight for weight in slots.model.parameters() if weight.is_floating_point())  # Not quantised.
        places = like.new_zeros(slots.count, len(names), 0, 0)
        self._a, self._b = pad(places, (0, layers[0].in_features)), pad(places, (0, sum(self._sizes)))
        self._base = product(layers)
        self._input: Tensor | None = None
        self._outputs: tuple[Tensor, ...] = ()
        for at, name in enumerate(names):
            parent, _, last = name.rpartition(".")
            setattr(slots.model.get_submodule(parent), last, _Member(self, at))

    def grow(self, count: int) -> None:
        """Have places for so many."""
        more = count - len(self._a)
        if more:
            self._a, self._b = (pad(part, (0, 0, 0, 0, 0, 0, 0, more)) for part in (self._a, self._b))

    def put(self, slot: int, weights: Sequence[tuple[Tensor, Tensor] | None]) -> None:
        """Fill a slot; what is left of a larger rank stays zero."""
        self._a[slot - 1] = 0
        self._b[slot - 1] = 0
        start = 0
        for at, (pair, size) in enumerate(zip(weights, self._sizes, strict=True)):
            if pair is not None:
                a, b = pair
                rank = len(a)
                missing = max(rank - self._a.shape[2], 0)
                self._a, self._b = pad(self._a, (0, 0, 0, missing)), pad(self._b, (0, 0, 0, missing))
                self._a[slot - 1, at, :rank] = a
                self._b[slot - 1, at, :rank, start : start + size] = b.mT
            start += size

    def output(self, at: int, x: Tensor) -> Tensor:
        """What layer `at` makes of `x`, `[rows, length, in]` to `[rows, length, out]`. The first asked computes all."""
        if self._input is not x:
            self._input, self._outputs = x, self._compute(x).split(self._sizes, -1)
        found = self._outputs[at]
        if at == len(self.names) - 1:
            self._input, self._outputs = None, ()
        return found

    def _compute(self, x: Tensor) -> Tensor:
        if self._slots.one == 0:
            return self._base(x, None)
        if self._slots.one is not None:
            a, b = (part[self._slots.one - 1].flatten(0, 1) for part in (self._a, self._b))
            inner = linear(x, a)
        else:
            a, b = self._a.flatten(0, 2), self._b.flatten(0, 2)
            inner = linear(x, a).unflatten(-1, (self._slots.count, -1))
            inner = inner.masked_fill_(self._slots.others[:, None, :, None], 0).flatten(2)
        return self._base(x, inner @ b)


class _Member(nn.Module):
    """A layer of a group, in the model's place for it."""

    def __init__(self, group: _Group, at: int) -> None:
        super().__init__()
        self._group, self._at = group, at

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, length, in]` to `[rows, length, out]`."""
        return self._group.output(self._at, x)


def _together(model: nn.Module, name: str) -> list[str]:
    """The layers that are computed with `name`: those of `TOGETHER` that are alike, or itself."""
    parent, _, last = name.rpartition(".")
    for lasts in TOGETHER:
        if last in lasts:
            children = dict(model.get_submodule(parent).named_children())
            layers = [children.get(each) for each in lasts]
            if all(plain(layer) for layer in layers):
                alike = {(layer.in_features, layer.bias is None) for layer in cast("list[nn.Linear]", layers)}
                if len(alike) == 1:
                    return [f"{parent}.{each}" if parent else each for each in lasts]
    return [name]


def _shape(layer: nn.Linear) -> tuple[int, int]:
    return layer.in_features, layer.out_features


def _linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        found = model.get_submodule(name)
    except AttributeError:
        found = None
    if not isinstance(found, nn.Linear):
        raise ValueError(f"the adapter has weights for {name}, which is no linear layer of this base model")
    return found
