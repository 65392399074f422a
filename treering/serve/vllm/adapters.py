"""Which versions the vLLM server has loaded, and under what names; the least recently used ones go.

vLLM on CPU gives rows of the base model the adapter of its last slot whenever they share a batch with rows of adapters.
So once any version is loaded, the base model answers through an adapter too: a stand-in whose matrices are all zero.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from treering.errors import TreeringError
from treering.files import write_file
from treering.registry import Version
from treering.serve.engine import BASE, EngineError
from treering.serve.vllm.client import DownError, MissingError

if TYPE_CHECKING:
    from treering.serve.vllm.base import Base
    from treering.serve.vllm.client import Client

STAND_INS = ".vllm"
"""Where the stand-in lies, in the workspace: what sees the versions sees it too."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Adapters:
    """Loads versions into the server when they are used, about `count` of them."""

    def __init__(self, client: Client, root: Path, base: Base, count: int) -> None:
        self._client = client
        self._root = root
        self._base = base
        self._count = count
        self.kept = BASE
        """Never unloaded; whatever else is loaded has the other places, or one where there is none."""
        self._plain = ""
        self._names: dict[str, str] = {}
        self._users: Counter[str] = Counter()
        self._left = asyncio.Event()
        self._lock = asyncio.Lock()

    def met(self, plain: str, there: Collection[str]) -> None:
        """The server calls the base model `plain`, and has the adapters `there`."""
        self._plain = plain
        self._names = {version: name for version, name in self._names.items() if name in there}

    @asynccontextmanager
    async def using(self, version: str) -> AsyncIterator[str]:
        """The server's name for `version`, which stays loaded meanwhile. Raises `EngineError` if it cannot be."""
        while version != BASE and version not in self._names:
            # Whoever gives up waiting does not leave the server with what nobody here knows of.
            await asyncio.shield(asyncio.ensure_future(self._load(version)))
        name = self._names.get(version, self._plain)
        if version in self._names:  # Most recently used last.
            self._names[version] = self._names.pop(version)
        self._users[name] += 1
        try:
            yield name
        finally:
            self._users[name] -= 1
            self._left.set()

    async def unload(self) -> None:
        """Leave the server as it was found."""
        for version in list(self._names):
            with suppress(EngineError):
                await self._drop(version)

    async def _load(self, version: str) -> None:
        async with self._lock:
            if version in self._names:
                return
            found = await asyncio.to_thread(self._checked, version)
            try:
                if BASE not in self._names:
                    name, folder = await asyncio.to_thread(stand_in, found.folder, self._root / STAND_INS)
                    self._names[BASE] = await self._put(name, folder)
                while self._users[self._plain]:  # Asked before there was a stand-in.
                    self._left.clear()
                    await self._left.wait()
                await self._make_room()
                name = f"{version}-{found.manifest['digest'][:16]}"
                self._names[version] = await self._put(name, found.folder)
            except DownError:
                raise
            except MissingError as error:
                raise _unavailable(
                    f"vLLM at {self._client.url} finds no {found.folder} ({error}); it has to see the workspace under "
                    "the same path: run it on this machine, or share the disk"
                ) from None
            except EngineError as error:
                raise _unavailable(f"vLLM cannot load {version}: {error}") from None

    async def _put(self, name: str, folder: Path) -> str:
        """Have the adapter in `folder` loaded as `name`, which tells its content: one that is there is the same.

        `load_inplace` only moves a name to another folder, because vLLM reads such an adapter again at every token.
        """
        there = {model["id"]: model["root"] for model in await self._client.models()}
        if there.get(name) != str(folder):
            await self._client.load(name, str(folder), inplace=name in there)
        return name

    async def _make_room(self) -> None:
        """Unload what was not used for longest, unless an answer under way needs it."""
        others = [version for version in self._names if version not in (BASE, self.kept)]
        idle = [version for version in others if not self._users[self._names[version]]]
        for version in idle[: max(0, len(others) + 1 - max(1, self._count - 1))]:
            with suppress(MissingError):
                await self._drop(version)

    async def _drop(self, version: str) -> None:
        await self._client.unload(self._names.pop(version))

    def _checked(self, name: str) -> Version:
        try:
            version = Version(name, self._root / "versions" / name).check()
            version.check_base(self._base.folder, self._base.sha256)
        except TreeringError as error:
            raise _unavailable(str(error)) from None
        if version.kind != "lora":
            what = "holds all weights" if version.kind == "full" else "is a bottleneck adapter"
            raise _unavailable(
                f"{name} {what}, and vLLM loads LoRA adapters only; train with finetuning_type: lora, "
                "or serve it with serve.engine: builtin"
            )
        if version.experts:
            raise _unavailable(
                f"{name} has several experts, and which of them answers is treering's to say: "
                "serve it with serve.engine: builtin"
            )
        if version.recalls:
            raise _unavailable(
                f"{name} answers with recall, in which vLLM has no part: serve it with serve.engine: builtin, or make "
                "a version without recall in protect"
            )
        made = json.loads((version.folder / CONFIG).read_text(encoding="utf-8"))
        if made.get("use_dora") or made.get("modules_to_save"):
            raise _unavailable(
                f"{name} is more than plain LoRA (use_dora or additional_target), which vLLM does not load; "
                "serve it with serve.engine: builtin"
            )
        return version


def stand_in(adapter: Path, parent: Path) -> tuple[str, Path]:
    """Write below `parent` an adapter of the same shape that changes nothing; returns its name and folder."""
    config, weights = (adapter / CONFIG).read_bytes(), (adapter / WEIGHTS).read_bytes()
    head = weights[: 8 + int.from_bytes(weights[:8], "little")]
    name = f"{BASE}-{hashlib.sha256(config + head).hexdigest()[:16]}"
    folder = parent / name
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / CONFIG, config)
    write_file(folder / WEIGHTS, head + bytes(len(weights) - len(head)))  # All bits zero are 0.0 in every format.
    return name, folder


def rank(folder: Path) -> int:
    """The rank of the adapter in `folder`; 0 for anything else."""
    try:
        return int(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["r"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _unavailable(message: str) -> EngineError:
    return EngineError(message, status=503, code="version_unavailable")
