"""Which versions are loaded in the worker, and where; the least recently used ones go."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering.config import Config
from treering.model import fingerprint, load, load_base
from treering.registry import Version
from treering.serve.adapters import Adapter, Slots, read_adapter
from treering.serve.batch import Batch
from treering.serve.engine import BASE

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Home:
    """Where a version runs: a batch, and its slot there."""

    batch: Batch[Any]
    slot: int = 0


class Loaded:
    """The base model and up to `count` versions.

    Files are read beside the generation, in a thread; what was read is put in place between two tokens (`settle`).
    Plain LoRA adapters share the base model; any other version gets a model of its own.
    """

    def __init__(self, versions: Path, base: Path, config: Config, pad_id: int) -> None:
        self._versions = versions
        self._base = base
        self._config = config
        self._pad_id = pad_id
        self._count = config.serve.max_loaded_versions
        self._hash = fingerprint(base)
        self._model = load_base(base, config).eval()
        self._slots = Slots(self._model, self._count)
        self._homes = {BASE: Home(Batch(self._model, self._slots, pad_id))}
        self._reading: dict[str, Future[Adapter | PreTrainedModel]] = {}
        self._thread = ThreadPoolExecutor(1)

    def has(self, version: str) -> bool:
        """Whether `version` is loaded; does not count as a use."""
        return version in self._homes

    def home(self, version: str) -> Home | None:
        """Where `version` runs, or None if it is not there (yet)."""
        found = self._homes.get(version)
        if found is not None:  # Most recently used last.
            self._homes[version] = self._homes.pop(version)
        return found

    def batches(self) -> list[Batch[Any]]:
        """All batches, each once."""
        return list({id(home.batch): home.batch for home in self._homes.values()}.values())

    def want(self, version: str) -> None:
        """Begin to read `version`, unless that was begun."""
        if version not in self._homes and version not in self._reading:
            self._reading[version] = self._thread.submit(self._read, version)

    @property
    def busy(self) -> bool:
        """Whether files are being read."""
        return bool(self._reading)

    def settle(self, used: Callable[[], set[str]]) -> dict[str, str | None]:
        """Put in place what was read; returns each version with the reason why it failed, or None.

        `used` names the versions that running answers need. A version for which there is no room yet stays read.
        """
        done: dict[str, str | None] = {}
        for version, reading in list(self._reading.items()):
            if not reading.done() or not self._make_room(used):
                continue
            del self._reading[version]
            try:
                self._homes[version] = self._place(reading.result())
                done[version] = None
            except Exception as error:  # Whatever a version's files make libraries raise, the others go on.
                done[version] = str(error) or type(error).__name__
        return done

    def _read(self, name: str) -> Adapter | PreTrainedModel:
        version = Version(name, self._versions / name).check()
        made_from = version.manifest["base"]
        if made_from["sha256"] == self._hash and (version.folder / "adapter_config.json").exists():
            adapter = read_adapter(version.folder, self._model.dtype)
            if adapter is not None:
                return adapter
        return load(self._base, self._config, version)  # It also says what is wrong with another base model.

    def _place(self, read: Adapter | PreTrainedModel) -> Home:
        if not isinstance(read, Adapter):
            return Home(Batch(read.eval(), None, self._pad_id))
        taken = {home.slot for home in self._homes.values() if home.batch is self._homes[BASE].batch}
        slot = next(number for number in range(1, self._count + 1) if number not in taken)
        self._slots.put(slot, read)
        return Home(self._homes[BASE].batch, slot)

    def _make_room(self, used: Callable[[], set[str]]) -> bool:
        """Drop the version that was not used for longest; False if all are in use."""
        versions = [name for name in self._homes if name != BASE]
        if len(versions) < self._count:
            return True
        needed = used()
        idle = next((name for name in versions if name not in needed), None)
        if idle is None:
            return False
        del self._homes[idle]
        return True
