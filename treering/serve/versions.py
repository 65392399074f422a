"""Which versions are loaded in the worker, and where; the least recently used ones go."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering.config import Config
from treering.features import vectors
from treering.methods import recall
from treering.methods.recall import Recall, Recalled
from treering.model import fingerprint, load, load_base, tell_of_bits
from treering.registry import Version
from treering.router import OWN, Router
from treering.serve.adapters import Adapter, Slots, read_adapter
from treering.serve.batch import Batch
from treering.serve.engine import BASE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(eq=False)
class Home:
    """Where a version runs: a batch, and its slot there, or those of its experts; and where the `base` model runs.

    A `router` says which expert answers, if there are any, or that the base model does. With `recall` prompts recall
    what rows like them were answered.
    """

    batch: Batch[Any]
    base: Batch[Any]
    slot: int = 0
    experts: dict[str, int] = field(default_factory=dict)
    router: Router | None = None
    recall: Recall | None = None

    def guide(
        self,
        prompt: Sequence[int],
        question: int,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        *,
        by_hand: bool = False,
    ) -> tuple[int | None, Recalled | None]:
        """The slot for `prompt`, whose last turn begins at `question`, and what it recalls. None: the base model's.

        Where its turns were put together `by_hand`, it looks like nothing that was learned: the nearest expert answers.
        """
        if self.batch.slots is not None:
            self.batch.slots.use([0])
        read = vectors(self.batch.model, [(prompt, question)], config)
        slot: int | None = self.slot
        recalled = None
        if self.router is not None:
            [expert] = self.router.nearest(read)[0] if by_hand else self.router.route(read)
            slot = None if expert is None else self.experts.get(expert, self.slot)
        if self.recall is not None:
            [recalled] = self.recall.of(read, tokenizer)
        return slot, recalled

    @property
    def slots(self) -> set[int]:
        """All that it takes."""
        return {self.slot, *self.experts.values()}


@dataclass(frozen=True)
class Read:
    """A version as it was read: its weights (adapters by expert, `OWN` without), and who answers, if that is asked."""

    weights: dict[str, Adapter] | Batch[Any]
    router: Router | None
    recall: Recall | None

    @property
    def adapters(self) -> list[Adapter]:
        """Those that are to share the base model."""
        return list(self.weights.values()) if isinstance(self.weights, dict) else []


class Loaded:
    """The base model and up to `count` versions, one of which may be kept: it goes only for the next to be kept.

    Files are read beside the generation, in a thread, one version at a time; what was read is put in place between two
    tokens (`settle`). Plain LoRA adapters share the base model; any other version gets a model of its own. `begun` is
    told each version that begins to be read.
    """

    def __init__(self, versions: Path, base: Path, config: Config, pad_id: int, begun: Callable[[str], None]) -> None:
        self._versions = versions
        self._base = base
        self._config = config
        self._pad_id = pad_id
        self._begun = begun
        self._count = config.serve.max_loaded_versions
        self._hash = fingerprint(base)
        self._model = load_base(base, config).eval()
        self._slots = Slots(self._model, self._count + 1)
        batch = Batch[Any](self._model, self._slots, pad_id)
        self._homes = {BASE: Home(batch, batch)}
        self._wanted: deque[str] = deque()
        self._reading: tuple[str, Future[Read]] | None = None
        self._kept = BASE
        self._next: str | None = None  # To be kept, once it is there.
        self._leaving: str | None = None
        self._thread = ThreadPoolExecutor(1)

    def has(self, version: str) -> bool:
        """Whether `version` is loaded; does not count as a use."""
        return version in self._homes

    def home(self, version: str) -> Home | None:
        """Where a new answer of `version` may run, or None if it has to wait."""
        found = self._homes.get(version)
        if found is None or version == self._leaving:
            return None
        self._homes[version] = self._homes.pop(version)  # Most recently used last.
        return found

    def batches(self) -> list[Batch[Any]]:
        """All batches, each once."""
        return list({id(home.batch): home.batch for home in self._homes.values()}.values())

    def want(self, version: str, keep: bool = False) -> None:
        """Have `version` read, unless it is there or will be; what is to be kept goes first."""
        if keep:
            self._next = version
        if version in self._homes:
            self._keep_next(version)
        elif self._reading is None or self._reading[0] != version:
            if keep and version in self._wanted:
                self._wanted.remove(version)
            if keep:
                self._wanted.appendleft(version)
            elif version not in self._wanted:
                self._wanted.append(version)
        self._read_on()

    @property
    def busy(self) -> bool:
        """Whether files are being read, or what was read waits for a place."""
        return self._reading is not None

    def settle(self, running: Set[str], waiting: Set[str]) -> dict[str, str | None]:
        """Put in place what was read; returns each version with the reason why it failed, or None.

        Versions with answers `running` stay. So do those that answers are `waiting` for, unless all places are taken:
        then the one used least recently takes no new answers and leaves with its last one. A version that waits for a
        place stays read, except when one to be kept is to be read.
        """
        self._trim(self._count, running | waiting)
        if self._reading is None or not self._reading[1].done():
            return {}
        version, reading = self._reading
        reason = None
        try:
            read = reading.result()
            for adapter in read.adapters:
                self._slots.check(adapter)
            if not self._make_room(version, running, waiting):
                if self._next in self._wanted:
                    self._wanted.append(version)
                    self._reading = None
                    self._read_on()
                return {}
            self._homes[version] = self._place(read)
        except Exception as error:  # Whatever a version's files make libraries raise, the others go on.
            reason = str(error) or type(error).__name__
            if version == self._next:
                self._next = None
        self._reading = self._leaving = None
        self._keep_next(version)
        self._read_on()
        return {version: reason}

    def _keep_next(self, loaded: str) -> None:
        if loaded == self._next:
            self._kept, self._next = loaded, None
        if loaded == self._leaving == self._kept:
            self._leaving = None

    def _read_on(self) -> None:
        if self._reading is None and self._wanted:
            version = self._wanted.popleft()
            self._begun(version)
            self._reading = version, self._thread.submit(self._read, version)

    def _read(self, name: str) -> Read:
        version = Version(name, self._versions / name).check()
        tell_of_bits(version, self._config)
        made_from = version.manifest["base"]
        router = Router.load(version.folder) if version.has_router else None
        past = recall.load(version, router) if version.recalls else None
        if not version.experts and not (past and past.falls_back):
            router = None
        if made_from["sha256"] == self._hash and version.kind == "lora":
            folders = version.experts or {OWN: version.folder}
            found = {name: read_adapter(folder, self._model.dtype) for name, folder in folders.items()}
            adapters = {name: adapter for name, adapter in found.items() if adapter is not None}
            if len(adapters) == len(found):
                return Read(adapters, router, past)
            if version.experts:
                raise ValueError(
                    f"an expert of {version.name} is more than plain LoRA, which cannot answer beside others"
                )
        # It also says what is wrong with another base model.
        return Read(Batch(load(self._base, self._config, version).eval(), None, self._pad_id), router, past)

    def _place(self, read: Read) -> Home:
        base = self._homes[BASE].batch
        if isinstance(read.weights, Batch):
            return Home(read.weights, base, router=read.router, recall=read.recall)
        slots: dict[str, int] = {}
        for name, adapter in read.weights.items():
            slots[name] = self._put(adapter, set(slots.values()))
        return Home(base, base, slots.pop(OWN, 0), slots, read.router, read.recall)

    def _put(self, adapter: Adapter, also_taken: Set[int]) -> int:
        """Copy `adapter` into a free slot, the number of which is returned."""
        batch = self._homes[BASE].batch
        taken = set(also_taken).union(*(home.slots for home in self._homes.values() if home.batch is batch))
        slot = next(number for number in itertools.count(1) if number not in taken)
        batch.forget(slot)
        self._slots.put(slot, adapter)
        return slot

    def _make_room(self, version: str, running: Set[str], waiting: Set[str]) -> bool:
        """Drop what is in the way of `version`; False if all is in use, and then one takes no new answers.

        There is a place more than `count` for the next version to be kept, so that it need not wait for answers to end;
        and for any, while the only place is the kept one's.
        """
        most = self._count + (version == self._next or (self._count == 1 and self._kept != BASE))
        if self._trim(most - 1, running | (waiting - {self._leaving})):
            return True
        if self._leaving not in self._homes:
            self._leaving = next((name for name in self._homes if name not in (BASE, self._kept)), None)
        return False

    def _trim(self, most: int, used: Set[str | None]) -> bool:
        """Drop the versions that were not used for longest until `most` are left; False if more are in use."""
        idle = [name for name in self._homes if name not in (BASE, self._kept) and name not in used]
        surplus = len(self._homes) - 1 - most
        for name in idle[: max(surplus, 0)]:
            del self._homes[name]
        return surplus <= len(idle)
