"""What the engine must know of the base model, told by a process of its own: the server itself never imports torch."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from treering.errors import TreeringError
from treering.serve.engine import EngineError

Asked = Literal["workspace", "folder"]


class Base(BaseModel):
    """The base model of a workspace."""

    model_config = ConfigDict(frozen=True)

    name: str | None
    """As in `model_name_or_path`."""
    folder: str
    sha256: str
    dtype: str
    """What this machine computes in, as torch calls it."""
    tools: bool
    """Whether its chat template shows tools to the model."""
    marks: str | None = None
    """What its tokenizer reads as special tokens, as a pattern."""


async def find(root: Path) -> Base:
    """The base model of the workspace in `root`. Raises `EngineError` if it cannot be had."""
    return Base.model_validate(await _ask("workspace", root))


async def is_base(base: Base, served: str) -> bool:
    """Whether `served`, a folder here or a hub name, is the same model."""
    if served in (base.folder, base.name):
        return True
    if not Path(served).is_dir():
        return False
    return bool((await _ask("folder", Path(served)))["sha256"] == base.sha256)


async def _ask(what: Asked, path: Path) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, what, str(path), stdout=asyncio.subprocess.PIPE
    )
    printed, _ = await process.communicate()
    lines = printed.splitlines()
    if process.returncode or not lines:
        raise EngineError(f"the process that reads the base model ended with code {process.returncode}")
    answer: dict[str, Any] = json.loads(lines[-1])
    if "error" in answer:
        raise EngineError(answer["error"])
    return answer


def _tell(what: str, path: Path) -> dict[str, Any]:
    from treering import model
    from treering.config import Config
    from treering.data.marks import marks_of

    if what == "folder":
        return {"sha256": model.fingerprint(path)}
    config = Config.load(path / "treering.yaml")
    folder = model.resolve(config.model_name_or_path, config.trust_remote_code)
    tokenizer = model.load_tokenizer(folder, config.trust_remote_code)
    marks = marks_of(tokenizer)
    found = Base(
        name=config.model_name_or_path,
        folder=str(folder),
        sha256=model.fingerprint(folder),
        dtype=model.precision_name(config),
        tools="tools" in str(tokenizer.chat_template),
        marks=marks.pattern if marks else None,
    )
    return found.model_dump()


if __name__ == "__main__":
    try:
        told = _tell(sys.argv[1], Path(sys.argv[2]))
    except TreeringError as error:
        told = {"error": str(error)}
    sys.stdout.write(json.dumps(told) + "\n")
