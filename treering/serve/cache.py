"""Keys and values of the sequences in a batch, padded on the left so that all end in the same column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

SPARE = 64
"""Columns that are reserved at once, so that not every token copies all those before."""


class _Spacious(DynamicLayer):
    """Keys and values of a layer, `[rows, heads, columns, size]`, in tensors with columns to spare."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        cast(Any, super()).__init__()
        self.lazy_initialization(keys, values)
        self._all_keys, self._all_values, self._length = keys, values, keys.shape[2]
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append columns; returns all."""
        start, end = self._length, self._length + key_states.shape[2]
        missing = end - self._all_keys.shape[2]
        if missing > 0:
            more = 0, 0, 0, missing + SPARE
            self._all_keys, self._all_values = pad(self._all_keys, more), pad(self._all_values, more)
        self._all_keys[:, :, start:end] = key_states
        self._all_values[:, :, start:end] = value_states
        self.keys, self.values, self._length = self._all_keys[:, :, :end], self._all_values[:, :, :end], end
        return self.keys, self.values


def made(cache: DynamicCache, make: Callable[[Tensor], Tensor]) -> DynamicCache:
    """A cache of what `make` makes of the keys and of the values of each layer."""
    return joined([cache], lambda tensors: make(tensors[0]))


def joined(caches: Sequence[DynamicCache], make: Callable[[list[Tensor]], Tensor]) -> DynamicCache:
    """A cache of what `make` makes of the keys, and of the values, that each layer has in all `caches`."""
    new = DynamicCache()
    for layers in zip(*(cast("list[Any]", cache.layers) for cache in caches), strict=True):
        if all(layer.is_initialized for layer in layers):  # Else it has seen no token.
            keys, values = [layer.keys for layer in layers], [layer.values for layer in layers]
            new.layers.append(_Spacious(make(keys), make(values)))
    return new
