"""An adapter that exists becomes v1."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from treering import registry
from treering.errors import VersionError
from treering.manifest import of_adoption
from treering.registry import Version

if TYPE_CHECKING:
    from treering.config import Config
    from treering.workspace import Workspace

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def adopt(ws: Workspace, adapter: Path, config: Config) -> Version:
    """Copy a PEFT folder into the workspace as v1 and make it current. Raises `VersionError` if it does not fit."""
    from peft import PeftModel

    from treering.model import fingerprint, load_base, resolve

    base = resolve(config.model_name_or_path, config.trust_remote_code)
    staging = ws.versions / ".staging-adopted"
    registry.discard(staging)
    staging.mkdir()
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter / name, staging / name)
    model = load_base(base, config)
    try:
        PeftModel.from_pretrained(model, str(staging))
    except Exception as error:
        registry.discard(staging)
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise VersionError(f"{adapter} does not fit the base model {base}: {first}") from None
    version = registry.commit(ws, staging, of_adoption(adapter, config, fingerprint(base)))
    registry.promote(ws, version)
    return version
