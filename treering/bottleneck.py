"""Bottleneck adapters: two small layers beside or behind the sub-layers of a frozen model, and their files.

One adds `scale * up(relu(down(h)))` to what its sub-layer makes, before the residual sum; `h` is, by `placement`,

- `parallel`: what the feed-forward reads, with scale 4 (He et al. 2021, arXiv:2110.04366);
- `pfeiffer`: what the feed-forward makes (Pfeiffer et al. 2020, arXiv:2005.00247);
- `houlsby`: what attention makes, and, in another one, what the feed-forward makes (Houlsby et al. 2019,
  arXiv:1902.00751).

`up` begins at zero, so that the model begins as its base. peft has no such adapter, and its folders cannot say it:
hence files of its own, `bottleneck.json` (a `Kind`) and `bottleneck.safetensors` (the weights, by their names in the
model, such as `model.layers.0.mlp.bottleneck.down.weight`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn.functional import relu

from treering.errors import ConfigError
from treering.files import write_file, write_json
from treering.model import decoder_layers
from treering.registry import BOTTLENECK_FILES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCALES = {"parallel": 4.0, "pfeiffer": 1.0, "houlsby": 1.0}
"""What new adapters are multiplied by, as the papers have it."""

FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
"""What models call these parts of a decoder layer."""


@dataclass(frozen=True)
class Kind:
    """All that there is to know of adapters but their weights; `size` is the width of the bottleneck."""

    size: int
    placement: str
    scale: float


class Bottleneck(nn.Module):
    """One adapter: `down` `[size, hidden]`, `up` `[hidden, size]`, a bias each."""

    def __init__(self, kind: Kind, hidden: int) -> None:
        super().__init__()
        self.kind = kind
        self.down, self.up = nn.Linear(hidden, kind.size), nn.Linear(kind.size, hidden)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for tensor in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(tensor)

    def forward(self, hidden: Tensor) -> Tensor:
        """What is added, for `hidden` `[..., hidden]`: of the same shape."""
        return cast(Tensor, self.up(relu(self.down(hidden)))) * self.kind.scale


def kind(model: nn.Module) -> Kind | None:
    """That of the adapters in `model`; None where it has none."""
    return next((module.kind for module in model.modules() if isinstance(module, Bottleneck)), None)


def weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of all adapters in `model`, by their names there."""
    return {
        f"{name}.{key}": weight
        for name, module in model.named_modules()
        if isinstance(module, Bottleneck)
        for key, weight in module.named_parameters()
    }


def attach(model: PreTrainedModel, kind: Kind) -> None:
    """Give each decoder layer new adapters, in the model's dtype. Raises `ConfigError` for layers of unknown parts."""
    hidden = model.config.get_text_config().hidden_size
    hook = _beside if kind.placement == "parallel" else _behind
    for part in [part for layer in decoder_layers(model) for part in _parts(layer, kind)]:
        made = Bottleneck(kind, hidden)  # Drawn on the processor, so that it is the same on every device.
        part.add_module("bottleneck", made.to(model.device, model.dtype))
        part.register_forward_hook(hook)


def save_adapters(model: PreTrainedModel, folder: Path, base_name: str) -> None:
    """Write the adapters of `model` into `folder`, for `load_adapters`."""
    about, tensors = BOTTLENECK_FILES
    found = kind(model)
    assert found is not None
    write_json(folder / about, {"base_model_name_or_path": base_name, **asdict(found)})
    kept = {name: weight.detach().cpu().contiguous() for name, weight in weights(model).items()}
    write_file(folder / tensors, save(kept))


@torch.no_grad()
def load_adapters(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model`, the base, with the adapters in `folder`."""
    about, tensors = (folder / name for name in BOTTLENECK_FILES)
    made: Mapping[str, Any] = json.loads(about.read_text(encoding="utf-8"))
    attach(model, Kind(made["size"], made["placement"], made["scale"]))
    saved = load_file(tensors)
    for name, weight in weights(model).items():
        weight.copy_(saved[name])
    return model


def _parts(layer: nn.Module, kind: Kind) -> Iterator[nn.Module]:
    children = dict(layer.named_children())
    for names in (ATTENTION, FEED_FORWARD) if kind.placement == "houlsby" else (FEED_FORWARD,):
        found = [children[name] for name in names if name in children]
        if not found:
            raise ConfigError(
                f"finetuning_type is adapter with adapter_placement {kind.placement}, but the layers of the model have "
                f"none of {', '.join(names)}, only {', '.join(children)}: take finetuning_type: lora"
            )
        yield found[0]


def _beside(part: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    return _plus(output, cast(Bottleneck, part.bottleneck)(inputs[0]))


def _behind(part: nn.Module, _: tuple[Any, ...], output: Any) -> Any:
    made = output[0] if isinstance(output, tuple) else output
    return _plus(output, cast(Bottleneck, part.bottleneck)(made))


def _plus(output: Any, added: Tensor) -> Any:
    """`output` of a sub-layer, which may be a tuple whose first is meant, and what is `added` to it."""
    return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added
