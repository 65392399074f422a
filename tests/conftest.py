"""What many tests share: the tiny model, made once, and workspaces on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from treering import Workspace


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its tokenizer. Torch gets one thread: on so small a model a second one only costs time."""
    import torch

    from treering.testing import tiny_model

    torch.set_num_threads(1)
    return tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def workspace(tmp_path: Path, model_folder: Path) -> Callable[..., Workspace]:
    """Makes a workspace on the tiny model: `workspace("name", lora_rank=4)`."""

    def make(name: str = "ws", **settings: Any) -> Workspace:
        return Workspace.create(tmp_path / name, **{"model_name_or_path": str(model_folder), "bf16": False, **settings})

    return make
