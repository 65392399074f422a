"""Versions: read, checked, committed, promoted, rolled back.

A version is a folder that never changes. Which of them serves is told by the symbolic link `current`; every promotion
and rollback is first noted in `history.jsonl`, so that a crash between the two is finished by the next command. Before
that, `consumed.jsonl` is told which rows a version brings: what was rolled back stays so when its folder is gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering import remarks
from treering.errors import ModelError, UsageError, VersionError
from treering.files import (
    append_line,
    fsync_folder,
    fsync_tree,
    json_line,
    sha256,
    timestamp,
    whole_lines,
    write_file,
    write_json,
)
from treering.progress import say

if TYPE_CHECKING:
    from treering.workspace import Workspace

FORMAT = 1
EXPERTS = "experts"
"""In the folder of a version that has some: a PEFT folder for each expert."""

ROUTER = "router.json"
"""In the folder of a version that knows what the rows were like that were learned (`treering/router.py`)."""

MANIFEST = "manifest.json"
PLAN = "plan.json"
TRIED = ".staging-plan-"
"""Before the name of a folder where `treering plan` tries an update: what a crash leaves of it is never taken up."""

REPLACED, REPLACING = ".replaced-", ".replacing-"
"""Before the name of a version's folder that is about to go, and of the one that is to take its place (`exchange`)."""

BOTTLENECK_FILES = ("bottleneck.json", "bottleneck.safetensors")
"""What a version of bottleneck adapters has (`treering/bottleneck.py`), where others have PEFT's files."""

_NAME = re.compile(r"v[1-9][0-9]*")
_NUMBER = re.compile(rb"[1-9][0-9]{0,8}")


@dataclass(frozen=True)
class Version:
    """One version: its name (`v3`) and its folder."""

    name: str
    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What the version says of itself. Raises `VersionError` if it is damaged, edited or too new."""
        path = self.folder / MANIFEST
        try:
            manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            stated, number = manifest["digest"], int(manifest["format"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise VersionError(
                f"{self.name}: {path} cannot be read ({error}); restore the folder from a backup"
            ) from None
        if number > FORMAT:
            raise VersionError(f"{self.name} has format {number}, newer than {FORMAT}: update treering")
        if stated != _digest(manifest):
            raise VersionError(f"{self.name}: {path} was edited; restore the folder from a backup")
        parent = manifest.get("parent")
        if parent is not None and not (_NAME.fullmatch(str(parent)) and int(parent[1:]) < self.number):
            raise VersionError(f"{self.name}: its parent {parent!r} is no earlier version; restore the folder")
        if manifest["name"] != self.name:
            raise VersionError(f"{self.name}: {path} is that of {manifest['name']}; give the folder its name back")
        return manifest

    @property
    def number(self) -> int:
        """3 for `v3`."""
        return int(self.name[1:])

    @property
    def parent(self) -> str | None:
        """Name of the version this one was trained from; None: the base model."""
        parent: str | None = self.manifest["parent"]
        return parent

    @property
    def kind(self) -> str:
        """What its weights are: a PEFT folder (`lora`), bottleneck adapters (`adapter`), or all weights (`full`)."""
        if (self.folder / "adapter_config.json").exists():
            return "lora"
        return "adapter" if (self.folder / BOTTLENECK_FILES[0]).exists() else "full"

    @property
    def scores(self) -> dict[str, float]:
        """Score per task, a fraction between 0 and 1."""
        return {task: found["score"] for task, found in self.manifest["scores"].items()}

    @property
    def promote(self) -> bool:
        """Whether the gate said promote."""
        return bool(self.manifest["verdict"]["promote"])

    @property
    def summary(self) -> str:
        """The verdict in a sentence."""
        return str(self.manifest["verdict"]["summary"])

    @property
    def overtaken(self) -> bool:
        """Whether it was held unjudged, for what happened while its update ran: another try may end otherwise."""
        return not self.promote and not self.manifest["verdict"]["judgements"]

    @property
    def pruned(self) -> bool:
        """Whether only its records are left (`treering/prune.py`)."""
        return "pruned" in self.manifest

    @property
    def has_weights(self) -> bool:
        """Whether it was not pruned, told by its files alone."""
        return any(
            (self.folder / name).exists() for name in ("adapter_config.json", BOTTLENECK_FILES[0], "config.json")
        )

    @property
    def adopted(self) -> bool:
        """Whether it is an adapter that was made elsewhere."""
        return self.manifest["plan"] is None

    @property
    def rows(self) -> list[str]:
        """Ids of the rows that this version's own update consumed."""
        return [id for ids in self.manifest["rows"].values() for id in ids]

    @property
    def deleted_rows(self) -> set[str]:
        """Tombstones of the rows that its own update consumed, and that were deleted on request since."""
        return {stone for redaction in self.manifest.get("redactions", ()) for stone in redaction["rows"]}

    @property
    def experts(self) -> dict[str, Path]:
        """The folder of each expert by its name, in the order they were made; empty: it answers by one adapter."""
        return {
            path.name: path for path in sorted(self.folder.glob(f"{EXPERTS}/*"), key=lambda p: (len(p.name), p.name))
        }

    @property
    def has_router(self) -> bool:
        """Whether it knows what the rows were like that were learned."""
        return (self.folder / ROUTER).exists()

    @property
    def recalls(self) -> bool:
        """Whether labels that prompts recall have part in its answers."""
        return self.has_router and "recall" in self.manifest["config"]["protect"]

    def problems(self) -> list[str]:
        """What `manifest.json` promises and the folder does not hold, file by file."""
        try:
            promised: dict[str, str] = self.manifest["files"]
        except VersionError as error:
            return [str(error)]
        found = {str(p.relative_to(self.folder)): p for p in self.folder.rglob("*") if p.is_symlink() or not p.is_dir()}
        problems = []
        for name, digest in promised.items():
            path = found.get(name)
            if path is None:
                problems.append(f"{self.name}: {name} is missing")
            elif path.is_symlink() or not path.is_file():
                problems.append(f"{self.name}: {name} is not a plain file")
            elif sha256(path) != digest:
                problems.append(f"{self.name}: {name} was changed since the version was made")
        problems += [f"{self.name}: {name} may be a pickle, which is never loaded" for name in found if _pickled(name)]
        problems += [
            f"{self.name}: {name} does not belong to it" for name in sorted(found) if name not in {*promised, MANIFEST}
        ]
        return problems

    def check_base(self, folder: Path | str, sha256: str) -> None:
        """Raises `ModelError` unless the version was made from the base model in `folder`, whose hash is `sha256`."""
        made_from = self.manifest["base"]
        if made_from["sha256"] != sha256:
            raise ModelError(
                f"{self.name} was made from the base model {made_from['name']!r} "
                f"(SHA-256 {made_from['sha256'][:12]}...), but {folder} is another; "
                "set model_name_or_path back, or start a new workspace"
            )

    def check(self) -> Version:
        """The version itself, if it is whole. Raises `VersionError` as `check_files`, and where it was pruned."""
        self.check_files()
        if self.pruned:
            raise VersionError(
                f"{self.name} was pruned ({self.manifest['pruned']}): its records are left, its weights are not; name "
                "another version, or restore the folder from a backup"
            )
        return self

    def check_files(self) -> None:
        """Raise `VersionError` that names every file which is not as it was made."""
        problems = self.problems()
        if problems:
            raise VersionError("refused to load:\n  " + "\n  ".join(problems) + "\nrestore the folder from a backup")


def versions(ws: Workspace) -> list[Version]:
    """All versions, oldest first."""
    found = [Version(p.name, p) for p in ws.versions.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda version: version.number)


def readable(ws: Workspace) -> list[Version]:
    """All versions whose manifests can be read, oldest first; of each other it is told once, on standard error.

    Raises `VersionError` if one that cannot be read is `current` or an ancestor of it.
    """
    line = [version.name for version in lineage(ws, current(ws))]  # Each was read to find its parent.
    found = []
    for version in versions(ws):
        try:
            assert version.name in line or version.manifest
        except VersionError as error:
            if version.name not in ws.told:
                say(
                    f"{error}, or remove {version.folder}. It is passed over, for the current version does not come "
                    "from it; `treering verify` names all that is damaged"
                )
            ws.told.add(version.name)
        else:
            found.append(version)
    return found


def get(ws: Workspace, name: str | None = None) -> Version:
    """The version of that name or alias, or `current`. Raises `UsageError` if there is none."""
    if name is None or name == "current":
        version = current(ws)
        if version is None:
            raise UsageError(f"{ws.root} has no current version yet; run `treering update` first")
        return version
    known = [version.name for version in versions(ws)]
    aliases = {} if name in known else remarks.read(ws.root).aliases
    if name in aliases and aliases[name] not in known:
        raise UsageError(f"the alias {name!r} names {aliases[name]}, which is not there; set it anew")
    name = aliases.get(name, name)
    if name not in known:
        raise UsageError(f"there is no version {name!r}; there are: {', '.join([*known, *aliases]) or 'none yet'}")
    return Version(name, ws.versions / name)


def current(ws: Workspace) -> Version | None:
    """The version that serves, or None: the base model."""
    name = _linked(ws)
    if name is None:
        return None
    if not (ws.versions / name).is_dir():
        raise VersionError(f"current points to {name}, which is missing; restore it, or `treering promote` another")
    return Version(name, ws.versions / name)


def lineage(ws: Workspace, version: Version | None) -> Iterator[Version]:
    """`version`, its parent, and so on."""
    while version is not None:
        yield version
        version = Version(version.parent, ws.versions / version.parent) if version.parent else None


def consumed(ws: Workspace, version: Version | None) -> set[str]:
    """Ids of all rows that `version` and its ancestors learned."""
    return {id for ancestor in lineage(ws, version) for id in ancestor.rows}


def known(ws: Workspace, version: Version | None) -> set[str]:
    """Of these rows those that need not be learned again.

    One that was superseded and is said anew needs it where something else was learned since.
    """
    age: dict[str, int] = {}
    for number, ancestor in enumerate(lineage(ws, version)):
        for id in ancestor.rows:
            age.setdefault(id, number)
    untaught = {id for id, rival in ws.catalog.rivals() if id in age and rival in age and age[rival] < age[id]}
    return age.keys() - untaught


def given_back(ws: Workspace) -> set[str]:
    """Ids of the rows, to train on and held out, of versions that were current once, less those of what is now."""
    here = current(ws)
    return _once_consumed(ws) - consumed(ws, here) - measured(here)


def measured(version: Version | None) -> set[str]:
    """Ids of the held-out rows that `version` was scored on."""
    return {id for ids in version.manifest["held_out"].values() for id in ids} if version else set()


def commit(ws: Workspace, staging: Path, manifest: dict[str, Any]) -> Version:
    """Turn a finished staging folder into the next version: hash, write the manifest last, fsync, rename."""
    fsync_tree(staging)
    name = next_name(ws)
    seal(staging, {"format": FORMAT, "name": name, **manifest})
    folder = ws.versions / name
    staging.rename(folder)
    fsync_folder(ws.versions)
    _note_highest(ws)
    return Version(name, folder)


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest` into a folder that has all else, with the hashes of its files and its own."""
    files = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    whole = {**manifest, "files": files}
    write_json(folder / MANIFEST, {**whole, "digest": _digest(whole)})


def replacing(version: Version) -> Path:
    """Where a folder is made that is to take its place (`exchange`); what a crash left of one is gone."""
    folder = version.folder.with_name(REPLACING + version.name)
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def exchange(version: Version, manifest: dict[str, Any]) -> None:
    """Put the folder that was made for it (`replacing`), with this manifest, in the place of `version`.

    It appears whole: until then the old one stays, and `recover` finishes what a crash cuts off.
    """
    old, new = (version.folder.with_name(prefix + version.name) for prefix in (REPLACED, REPLACING))
    fsync_tree(new)
    seal(new, manifest)
    version.folder.rename(old)
    new.rename(version.folder)
    fsync_folder(new.parent)
    shutil.rmtree(old)


def staging_folder(ws: Workspace, plan: str) -> Path:
    """Where the update with the plan of that digest works; it goes once its version is committed and promoted."""
    return ws.versions / f".staging-{plan[:12]}"


def next_name(ws: Workspace) -> str:
    """The name that the next committed version gets: one that none ever had, though its folder may be gone."""
    once = [int(event["version"][1:]) for event in history(ws) if event["version"] is not None]
    return f"v{max(_newest(ws), _highest(ws), *once) + 1}"


def promote(ws: Workspace, version: Version, *, forced: bool = False) -> None:
    """Make `version` current."""
    version.check()
    _note_rows(ws, version)
    _move(ws, "promote", version.name, forced)


def rollback(ws: Workspace, name: str | None) -> Version | None:
    """Make the version promoted before `current`, or the one named, current.

    Before the first promoted version there is the base model, whose name is `base`: then nothing is current, and None
    is returned. Raises `UsageError` if no version is current, or if the one named never was: the gate has its say in
    `promote` alone.
    """
    stack = promoted(ws)
    if not stack:
        raise UsageError(f"{ws.root} has no current version, so there is nothing to roll back")
    if name == "base" or (name is None and len(stack) == 1):
        _move(ws, "rollback", None)
        return None
    version = get(ws, name or stack[-2])
    if version.name not in {event["version"] for event in history(ws)}:
        raise UsageError(f"{name} was never current, so there is no way back to it; use `treering promote {name}`")
    version.check()
    _move(ws, "rollback", version.name)
    return version


def unlearned(ws: Workspace, version: Version) -> bool:
    """Whether rows that the version or an ancestor learned were deleted on request since."""
    return any(ancestor.deleted_rows for ancestor in lineage(ws, version))


def history(ws: Workspace) -> list[dict[str, Any]]:
    """Every promotion and rollback, oldest first; a line that a crash left unfinished is not one."""
    events = []
    for number, line in whole_lines(ws.history):
        try:
            event = json.loads(line)
            events.append({key: event[key] for key in ("time", "event", "version", "previous", "forced")})
            if event["version"] is not None and not _NAME.fullmatch(event["version"]):
                raise ValueError(event["version"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise VersionError(f"{ws.history}, line {number} is damaged; restore the file from a backup") from None
    return events


def recover(ws: Workspace) -> None:
    """Finish what a crash left half done: a noted promotion whose link was not moved, a commit that was not promoted.

    Damage is passed over, so that it stops only the commands that meet it.
    """
    for scratch in ws.versions.glob(".link-*"):
        scratch.unlink()
    for replaced in ws.versions.glob(f"{REPLACED}*"):
        folder = ws.versions / replaced.name.removeprefix(REPLACED)
        if folder.exists():
            shutil.rmtree(replaced)
        else:
            replaced.rename(folder)
    for unfinished in ws.versions.glob(f"{REPLACING}*"):
        shutil.rmtree(unfinished)
    _note_highest(ws)
    events = history(ws)
    if events and not ws.consumed.exists():
        _note_rows_anew(ws, {event["version"] for event in events})
    with suppress(VersionError):
        if events and events[-1]["version"] != _linked(ws):
            _link(ws, events[-1]["version"])
        made = versions(ws)
        if not made or any(event["version"] == made[-1].name for event in events):
            return
        newest = made[-1]
        # The update that made it still has its folder: promoting was its next step, and nobody else put this there.
        plan = newest.manifest.get("plan")
        making = plan is not None and staging_folder(ws, plan).exists()
        if making and newest.promote and newest.manifest["promote_wanted"] and newest.parent == _linked(ws):
            promote(ws, newest)


def _newest(ws: Workspace) -> int:
    """The number of the newest version that is there; 0 if there is none."""
    return max((version.number for version in versions(ws)), default=0)


def _highest(ws: Workspace) -> int:
    """The highest number that was noted; 0 if none was, or if it cannot be read."""
    try:
        noted = ws.highest.read_bytes().strip()
    except OSError:
        return 0
    return int(noted) if _NUMBER.fullmatch(noted) else 0


def _note_highest(ws: Workspace) -> None:
    """Note the newest version's number, which outlives its folder. On a full disk the next command does."""
    newest = _newest(ws)
    if newest > _highest(ws):
        with suppress(OSError):
            write_file(ws.highest, b"%d\n" % newest)


def _note_rows(ws: Workspace, version: Version) -> None:
    """Note what `version` brings before it becomes current; it counts once `history.jsonl` says that it did."""
    new = _brought(version) - _noted(ws, {event["version"] for event in history(ws)})
    if new:
        append_line(ws.consumed, {"version": version.name, "rows": sorted(new)})


def _brought(version: Version) -> set[str]:
    """Ids of its rows, to train on and held out."""
    return {*version.rows, *measured(version)}


def _note_rows_anew(ws: Workspace, once: set[str]) -> None:
    """Make `consumed.jsonl`, where it was lost, of those of `once` that are still there and can be read."""
    lines, known = b"", set[str]()
    for version in versions(ws):
        if version.name in once:
            with suppress(VersionError):
                lines += json_line({"version": version.name, "rows": sorted(_brought(version) - known)})
                known |= _brought(version)
    with suppress(OSError):  # On a full disk the next command does it.
        write_file(ws.consumed, lines)


def _once_consumed(ws: Workspace) -> set[str]:
    """Ids of the rows, to train on and held out, of every version that was current once.

    Those noted, and those of the folders that are there: a note may be older than they are, or lost.
    """
    once = {event["version"] for event in history(ws)}
    found = _noted(ws, once)
    for version in versions(ws):
        if version.name in once:
            with suppress(VersionError):
                found |= _brought(version)
    return found


def forget_rows(ws: Workspace, is_gone: Callable[[str], bool]) -> None:
    """Take the ids that are gone out of `consumed.jsonl`: no version brings them any more."""
    notes = [_note(json.loads(line)) for _, line in whole_lines(ws.consumed)]
    if any(is_gone(id) for _, rows in notes for id in rows):
        left = [{"version": name, "rows": [id for id in rows if not is_gone(id)]} for name, rows in notes]
        write_file(ws.consumed, b"".join(map(json_line, left)))


def _noted(ws: Workspace, of: Set[str | None] | None = None) -> set[str]:
    """Ids of the rows that `consumed.jsonl` has: of all versions, or of those named."""
    found: set[str] = set()
    anew = "restore the file from a backup, or remove it: it is made anew of the versions that are there"
    try:
        lines = list(whole_lines(ws.consumed))
    except OSError as error:
        raise VersionError(f"{ws.consumed} cannot be read ({error.strerror}); {anew}") from None
    for number, line in lines:
        try:
            name, rows = _note(json.loads(line))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise VersionError(f"{ws.consumed}, line {number} is damaged; {anew}") from None
        if of is None or name in of:
            found.update(rows)
    return found


def _note(line: dict[str, Any]) -> tuple[str, list[str]]:
    name, rows = line["version"], line["rows"]
    if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
        raise TypeError(rows)
    return name, rows


def promoted(ws: Workspace) -> list[str]:
    """The names of promoted versions, as a stack: a rollback takes off all above its target."""
    stack: list[str] = []
    for event in history(ws):
        name = event["version"]
        if name is None:
            stack = []
        elif event["event"] == "rollback" and name in stack:
            stack = stack[: stack.index(name) + 1]
        elif not stack or stack[-1] != name:
            stack.append(name)
    return stack


def _move(ws: Workspace, event: str, name: str | None, forced: bool = False) -> None:
    """Note what is about to happen, then do it; `recover` does it if a crash comes between."""
    note = {
        "time": timestamp(),
        "event": event,
        "version": name,
        "previous": _linked(ws),
        "forced": forced,
    }
    append_line(ws.history, note)
    _link(ws, name)


def _linked(ws: Workspace) -> str | None:
    """The name that `current` points to, whether or not it is there."""
    try:
        return Path(os.readlink(ws.current)).name
    except FileNotFoundError:
        return None
    except OSError:
        raise VersionError(f"{ws.current} is not a symbolic link; remove it and run `treering promote vN`") from None


def _link(ws: Workspace, name: str | None) -> None:
    """Let `current` point to a version, by an atomic rename, or to none."""
    from treering import canary

    if name is None:
        ws.current.unlink(missing_ok=True)
    else:
        canary.promoted(ws.root, name)  # First, so that what a crash leaves of the two is finished by the next command.
        scratch = ws.versions / f".link-{os.getpid()}"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(Path(ws.versions.name) / name)
        scratch.replace(ws.current)
    fsync_folder(ws.root)


def _pickled(name: str) -> bool:
    return name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"))


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def discard(staging: Path) -> None:
    """Remove a staging folder: first its plan, so that what a crash leaves of it is never taken up again."""
    with suppress(OSError):
        (staging / PLAN).unlink()
    shutil.rmtree(staging, ignore_errors=True)
