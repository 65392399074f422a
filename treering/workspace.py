"""A workspace: its paths, its lock, and its recovery when opened."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from treering import registry
from treering.config import Config
from treering.errors import ConfigError, LockError, UsageError, full_disk_is_clear
from treering.files import timestamp, write_file
from treering.registry import Version
from treering.settings import as_yaml

if TYPE_CHECKING:
    from treering.data.catalog import Catalog
    from treering.data.intake import Ingested
    from treering.forget import Forgotten

SETTINGS = "treering.yaml"

_SHARED = ("model_name_or_path", "quantization_bit")
"""Settings that all commands need alike: on them a version is judged and served."""

DELETING = ".deleting"
"""This file is there while a deletion that was decided is not finished."""


class Workspace:
    """A folder that holds settings, data and versions. Open one with `Workspace(path)`, make one with `create`."""

    def __init__(self, root: str | Path = ".") -> None:
        self._lay_out(Path(root))
        if not (self.root / SETTINGS).is_file():
            raise UsageError(f"{self.root} is no workspace (it has no {SETTINGS}); make one with `treering init DIR`")
        with self.changing("recovery"):
            pass
        if (self.root / DELETING).exists():
            from treering.forget import finish

            finish(self)

    def _lay_out(self, root: Path) -> None:
        self.root = root.resolve()
        self.inbox = self.root / "inbox"
        self.versions = self.root / "versions"
        self.current = self.root / "current"
        self.history = self.root / "history.jsonl"
        self.consumed = self.root / "consumed.jsonl"
        self.highest = self.root / ".highest"
        self.told: set[str] = set()

    @classmethod
    def create(cls, root: str | Path, *, adapter: str | Path | None = None, **settings: Any) -> Workspace:
        """Make a workspace in `root`, which may exist but holds no workspace yet.

        `settings` go into `treering.yaml`; `adapter` is a PEFT folder that becomes v1. Raises `ConfigError` for wrong
        settings, `UsageError` if there is a workspace already; then nothing is left behind.
        """
        ws = cls.__new__(cls)
        ws._lay_out(Path(root))
        if (ws.root / SETTINGS).exists():
            raise UsageError(f"{ws.root} is a workspace already")
        if ws.versions.is_dir() and registry.versions(ws):
            raise UsageError(
                f"{ws.root} holds versions but no {SETTINGS}, as an `init` that was cut off leaves it; "
                f"put {SETTINGS} back, or remove {ws.versions}, {ws.consumed}, {ws.highest}, {ws.history} and "
                f"{ws.current}"
            )
        found = None
        if adapter is not None:
            found = Path(adapter)
            made = adapter_settings(found)
            for key in made.keys() & settings.keys():
                if settings[key] != made[key]:
                    raise ConfigError(f"{key} is {settings[key]}, but {found} has {made[key]}: leave it out")
            settings = {**made, **settings}
        config = Config.build(dict(settings))
        with full_disk_is_clear(ws.root):
            for folder in (ws.inbox, ws.versions):
                folder.mkdir(parents=True, exist_ok=True)
            if found is not None:
                from treering.adopt import adopt

                adopt(ws, found, config)
            # Written last: a folder is a workspace once it has this file.
            write_file(ws.root / SETTINGS, _settings_text(settings).encode())
        return cls(ws.root)

    def config(self, overrides: Iterable[str] = ()) -> Config:
        """The settings in `treering.yaml` with `key=value` overrides. Raises `ConfigError`.

        Also where an override is of one that a version and whatever serves it must share.
        """
        path, texts = self.root / SETTINGS, list(overrides)
        found = Config.load(path, texts)
        plain = Config.load(path) if texts else found
        for key in _SHARED:
            wanted, written = getattr(found, key), getattr(plain, key)
            if wanted != written:
                raise ConfigError(
                    f"{key}={wanted} would be for this command alone, and the version served with {written}, which it "
                    f"was not judged on; write it in {path}"
                )
        return found

    @cached_property
    def catalog(self) -> Catalog:
        """The rows and the quarantine."""
        from treering.data.catalog import Catalog

        return Catalog(self.root / "treering.db", self.root)

    def ingest(
        self,
        source: str | Path | Sequence[str | Path] | Iterable[Mapping[str, object]] | None = None,
        *,
        task: str | None = None,
        held_out: str | Path | Iterable[Mapping[str, object]] | None = None,
        format: str | None = None,
        columns: Mapping[str, str] | str | None = None,
        dataset: str | None = None,
        quiet: bool = True,
    ) -> Ingested:
        """Take in files, folders, URLs, `-` or rows (dictionaries in any known shape); the inbox by default.

        `format` and `columns` say how the files' rows are laid out, where that is not to be recognised, `dataset`
        which one of a LLaMA-Factory `dataset_info.json` to take.
        """
        from treering.data.fetch import local
        from treering.data.intake import ingest
        from treering.data.layout import told
        from treering.data.sources import How

        how = How(told(format, columns), dataset)
        if how != How() and source is None and held_out is None:
            raise UsageError("--format, --columns and --dataset are for files that are named; name them")
        with full_disk_is_clear(self.root), local(source, task) as here, local(held_out, task) as judged:
            return ingest(self, here, task=task, held_out=judged, how=how, quiet=quiet)

    def forget(self, ids: Iterable[str] | None = None, *, where: str | Sequence[str] = ()) -> Forgotten:
        """Delete rows for good: those with these ids, and of them, or of all, those for which all conditions hold.

        A condition is `task=coffee`, `text~jane@example.com`, `added<2026-01-31` and the like (docs/data.md).
        """
        from treering import forget

        texts = [where] if isinstance(where, str) else where
        return forget.forget(self, forget.find(self, None if ids is None else list(ids), texts))

    def update(self, *overrides: str, promote: bool = True, quiet: bool = True, **settings: Any) -> Version | None:
        """Run one update over everything new; returns the new version, or None if nothing was new.

        `overrides` are `key=value` texts, `settings` the same as keywords.
        """
        from treering import pipeline

        texts = [*overrides, *(f"{key}={json.dumps(value)}" for key, value in settings.items())]
        return pipeline.update(self, texts, promote=promote, quiet=quiet).version

    def promote(self, name: str, *, force: bool = False, passed: bool = False) -> Version:
        """Make a version current. Without `force`, one that the gate held or a trial showed worse is a `UsageError`.

        `passed`: by today's policy the gate does not hold it (`verdicts.judged`), whatever it said when it was made.
        """
        from treering import figures

        with self.changing("promote"):
            version = registry.get(self, name)
            name = version.name
            against = [] if version.promote or passed else [f"{name} was held by the gate: {version.summary}"]
            against += [f"{name} did worse when it was on trial: {words}" for words in figures.worse(self, name)]
            if registry.unlearned(self, version):
                against.append(f"{name} has learned rows that were deleted on request since")
            if against and not force:
                raise UsageError(f"{'; '.join(against)}. Use --force to promote it anyway")
            registry.promote(self, version, forced=bool(against))
            return version

    def rollback(self, name: str | None = None, *, quarantine_data: bool = False) -> Version | None:
        """Go back to the version promoted before the current one, or to the one named; None: the base model serves.

        With `quarantine_data` the rows that only versions since have learned, or were judged by, go to quarantine, but
        for held-out rows of the user's own; else they are new again.
        """
        if not quarantine_data:
            with self.changing("rollback"):
                return registry.rollback(self, name)
        with self.catalog.writing() as writer:  # First, for who cannot write there is not to roll back either.
            with self.changing("rollback"):
                before, after = registry.current(self), registry.rollback(self, name)
            assert before is not None  # Else there was nothing to roll back.
            learned, judged = registry.consumed(self, before), registry.measured(before)
            rows = (learned - registry.consumed(self, after)) | (judged - registry.measured(after))
            writer.set_aside(sorted(rows), f"{before.name}, which learned it, was rolled back")
        return after

    @contextmanager
    def changing(self, command: str) -> Iterator[None]:
        """Hold the lock to move `current` or make versions appear; what its last holder left is finished first."""
        with self.lock(command, "registry", wait=True), full_disk_is_clear(self.root):
            registry.recover(self)
            yield

    @contextmanager
    def lock(self, command: str, name: Literal["update", "registry", "watch"], wait: bool = False) -> Iterator[None]:
        """Hold one of the workspace's locks; it goes with the process that held it.

        `update` is held for as long as an update runs, `registry` while versions are committed or `current` is moved,
        so that rolling back never waits for an update; `watch` by the one loop that updates by itself.
        Raises `LockError` that says who holds it.
        """
        try:
            descriptor = os.open(self.root / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise LockError(
                f"{self.root} cannot be locked ({error}); every command needs to write there, if only its lock"
            ) from None
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise LockError(f"{self.root} is in use by {_holder(descriptor)}; wait for it or stop it") from None
            note = {
                "command": command,
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "since": timestamp(),
            }
            with suppress(OSError):  # On a full disk the lock holds all the same.
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(note).encode(), 0)
            yield
        finally:
            os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        note = json.loads(os.pread(descriptor, 4096, 0))
        return f"`treering {note['command']}` (process {note['pid']} on {note['host']}, since {note['since']})"
    except (ValueError, KeyError):
        return "another process"


def adapter_settings(folder: Path) -> dict[str, Any]:
    """What a LoRA folder settles for the updates that go on with it. Raises `UsageError` for any other folder."""
    from treering.adopt import ADAPTER_FILES

    for name in ADAPTER_FILES:
        if not (folder / name).is_file():
            raise UsageError(f"--adapter {folder}: no {name} in it; name a PEFT folder with safetensors weights")
    try:
        made = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        kind, targets = made["peft_type"], made.get("target_modules")
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"--adapter {folder}: its adapter_config.json cannot be read ({error})") from None
    if kind != "LORA":
        raise UsageError(f"--adapter {folder} is of type {kind}; updates can go on with LORA adapters only")
    settings = {
        "lora_rank": made.get("r"),
        "lora_alpha": made.get("lora_alpha"),
        # A pattern cannot be said in settings; the adapter keeps to it all the same.
        "lora_target": _listed(targets),
        "use_dora": made.get("use_dora"),
        "use_rslora": made.get("use_rslora"),
        "additional_target": _listed(made.get("modules_to_save")),
    }
    return {key: value for key, value in settings.items() if value or key in ("lora_rank", "lora_alpha")}


def _listed(names: Any) -> str | None:
    return ",".join(sorted(map(str, names))) if isinstance(names, list) else None


def _settings_text(settings: Mapping[str, Any]) -> str:
    head = "# Settings of this treering workspace; every key is described in docs/configuration.md.\n"
    return head + as_yaml(settings)
