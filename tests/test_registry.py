"""Versions and `current`: whole or not at all, finished after a crash, refused once they were changed."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treering import Workspace, registry
from treering.errors import UsageError, VersionError
from treering.files import append_line
from treering.registry import Version


@pytest.fixture
def ws(tmp_path: Path) -> Workspace:
    return Workspace.create(tmp_path / "ws")


PLAN = "0123456789abcdef"


def crashed_before_promoting(ws: Workspace, parent: str | None = None, **made: Any) -> None:
    """The update's version is there, and so is its folder, which goes last."""
    commit(ws, parent, **made)
    registry.staging_folder(ws, PLAN).mkdir()


def commit(
    ws: Workspace, parent: str | None = None, *, promote: bool = True, wanted: bool = True, rows: tuple[str, ...] = ()
) -> Version:
    staging = ws.versions / ".staging-test"
    (staging / "more").mkdir(parents=True)
    (staging / "weights").write_bytes(b"12345")
    (staging / "more" / "notes").write_text("päper")
    manifest = {
        "parent": parent,
        "plan": PLAN,
        "rows": {"pens": list(rows)},
        "held_out": {"pens": ["held-out row"]},
        "scores": {"pens": {"score": 0.5}},
        "verdict": {"promote": promote, "summary": "promoted: fine" if promote else "held: no"},
        "promote_wanted": wanted,
    }
    return registry.commit(ws, staging, manifest)


def chain(ws: Workspace, length: int) -> list[Version]:
    """`length` versions, each the parent of the next, all promoted."""
    made: list[Version] = []
    for _ in range(length):
        made.append(commit(ws, made[-1].name if made else None, rows=(f"row of v{len(made) + 1}",)))
        registry.promote(ws, made[-1])
    return made


def current(ws: Workspace) -> str | None:
    here = registry.current(ws)
    return here.name if here else None


def rolled_back(ws: Workspace, name: str | None = None) -> str | None:
    version = ws.rollback(name)
    assert version == registry.current(ws)
    return version.name if version else None


def test_a_commit_is_whole(ws: Workspace) -> None:
    version = commit(ws, rows=("a", "b"))
    assert (version.name, version.number, version.folder) == ("v1", 1, ws.versions / "v1")
    assert (version.parent, version.promote, version.summary) == (None, True, "promoted: fine")
    assert (version.rows, version.scores) == (["a", "b"], {"pens": 0.5})
    manifest = json.loads((version.folder / "manifest.json").read_text())
    assert manifest["files"].keys() == {"weights", "more/notes"}
    assert manifest["name"] == "v1"
    assert version.check() == version
    assert version.problems() == []
    assert not (ws.versions / ".staging-test").exists()
    assert current(ws) is None


def test_names_count_on(ws: Workspace) -> None:
    assert [commit(ws).name for _ in range(11)] == [f"v{n}" for n in range(1, 12)]
    (ws.versions / "v12.bak").mkdir()
    (ws.versions / "notes").mkdir()
    assert [v.name for v in registry.versions(ws)] == [f"v{n}" for n in range(1, 12)]
    for gone in ("v3", "v11"):
        shutil.rmtree(ws.versions / gone)
    assert registry.next_name(ws) == "v12"


def test_a_name_counts_though_a_crash_kept_it_from_being_noted(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_note_highest", crash)
        with pytest.raises(RuntimeError):
            commit(ws)
    assert not ws.highest.exists()
    shutil.rmtree(registry.get(Workspace(ws.root), "v1").folder)
    assert commit(Workspace(ws.root)).name == "v2"
    ws.highest.write_bytes(b"rubbish")  # What is there still counts.
    assert registry.next_name(ws) == "v3"


def test_a_version_is_found_by_name(ws: Workspace) -> None:
    with pytest.raises(UsageError, match="no current version yet"):
        registry.get(ws)
    chain(ws, 2)
    assert (registry.get(ws).name, registry.get(ws, "current").name, registry.get(ws, "v1").name) == ("v2", "v2", "v1")
    for name in ("v3", "", "../v1", "V1", "v01", ".staging-test"):
        with pytest.raises(UsageError, match="there are: v1, v2"):
            registry.get(ws, name)


def test_lineage_and_what_it_consumed(ws: Workspace) -> None:
    _, second, third = chain(ws, 3)
    held = commit(ws, "v2", promote=False, rows=("row of the held one",))
    assert [v.name for v in registry.lineage(ws, third)] == ["v3", "v2", "v1"]
    assert registry.consumed(ws, second) == {"row of v1", "row of v2"}
    assert registry.consumed(ws, held) == {"row of v1", "row of v2", "row of the held one"}
    assert registry.consumed(ws, None) == set()


def test_rollback_is_a_stack(ws: Workspace) -> None:
    chain(ws, 4)
    assert rolled_back(ws) == "v3"
    assert rolled_back(ws) == "v2"
    fifth = commit(ws, "v2")
    registry.promote(ws, fifth)
    assert rolled_back(ws) == "v2"
    assert rolled_back(ws) == "v1"
    ws.promote("v4")
    assert rolled_back(ws) == "v1"
    # Before the first version there is the base model.
    assert rolled_back(ws) is None
    with pytest.raises(UsageError, match="nothing to roll back"):
        ws.rollback()
    ws.promote("v3")
    assert rolled_back(ws) is None


def test_rollback_to_a_named_version(ws: Workspace) -> None:
    chain(ws, 4)
    assert rolled_back(ws, "v2") == "v2"
    assert rolled_back(ws) == "v1"
    # Back to where it was before: v4 lies on top, and what was under it stays there.
    assert rolled_back(ws, "v4") == "v4"
    assert rolled_back(ws) == "v1"
    # The gate is not walked past.
    commit(ws, "v1", promote=False)
    with pytest.raises(UsageError, match=r"v5 was never current.*treering promote v5"):
        ws.rollback("v5")
    assert current(ws) == "v1"
    with pytest.raises(UsageError, match="no version 'v9'"):
        ws.rollback("v9")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(st.none(), st.integers(1, 3), st.integers(-3, -1)), max_size=8))
def test_rollback_undoes_promotions(tmp_path_factory: pytest.TempPathFactory, moves: list[int | None]) -> None:
    """Promote vN (N > 0), roll back to vN (N < 0) or by one (None), against a plain stack."""
    ws = Workspace.create(tmp_path_factory.mktemp("ws"))
    for _ in range(3):
        commit(ws, wanted=False)
    stack: list[str] = []
    once: set[str] = set()
    for move in moves:
        if move is not None and move > 0:
            ws.promote(f"v{move}")
            stack += [f"v{move}"] if stack[-1:] != [f"v{move}"] else []
        elif not stack or (move is not None and f"v{-move}" not in once):
            with pytest.raises(UsageError):
                ws.rollback(f"v{-move}" if move else None)
        elif move is None:
            stack.pop()
            ws.rollback()
        else:
            name = f"v{-move}"
            stack = stack[: stack.index(name) + 1] if name in stack else [*stack, name]
            ws.rollback(name)
        once |= set(stack)
        assert current(ws) == (stack[-1] if stack else None)
        assert current(Workspace(ws.root)) == current(ws)


def test_every_move_is_noted(ws: Workspace) -> None:
    chain(ws, 2)
    ws.rollback()
    held = commit(ws, "v1", promote=False)
    ws.promote(held.name, force=True)
    told = [(e["event"], e["version"], e["previous"], e["forced"]) for e in registry.history(ws)]
    assert told == [
        ("promote", "v1", None, False),
        ("promote", "v2", "v1", False),
        ("rollback", "v1", "v2", False),
        ("promote", "v3", "v1", True),
    ]


def crash(*_: Any) -> None:
    raise RuntimeError("power cut")


def test_a_promotion_noted_but_not_linked_is_finished(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    chain(ws, 1)
    commit(ws, "v1")
    for move, expected in ((lambda: ws.promote("v2"), "v2"), (ws.rollback, "v1"), (ws.rollback, None)):
        before = current(ws)
        with monkeypatch.context() as patch:
            patch.setattr(registry, "_link", crash)
            with pytest.raises(RuntimeError):
                move()
        assert current(ws) == before
        assert current(Workspace(ws.root)) == expected


def test_a_commit_that_was_not_promoted_is_finished(ws: Workspace) -> None:
    chain(ws, 1)
    crashed_before_promoting(ws, "v1")
    assert current(Workspace(ws.root)) == "v2"
    assert registry.history(ws)[-1]["version"] == "v2"
    Workspace(ws.root).rollback()
    assert current(Workspace(ws.root)) == "v1"


@pytest.mark.parametrize(
    "made", [{"promote": False}, {"wanted": False}, {"parent": None}, {"parent": "v1"}], ids=lambda made: str(made)
)
def test_a_commit_that_is_not_to_be_promoted_stays(ws: Workspace, made: dict[str, Any]) -> None:
    chain(ws, 2)
    crashed_before_promoting(ws, **{"parent": "v2", **made})
    assert current(Workspace(ws.root)) == "v2"


def test_a_version_that_no_update_made_is_not_promoted(ws: Workspace) -> None:
    chain(ws, 1)
    commit(ws, "v1")  # As if somebody had copied a folder in.
    assert current(Workspace(ws.root)) == "v1"


def test_the_first_commit_is_finished_too(ws: Workspace) -> None:
    crashed_before_promoting(ws)
    assert current(Workspace(ws.root)) == "v1"


@pytest.mark.parametrize("parent", ["v1", "v2", "../v0", "v01", 5])
def test_a_parent_that_is_no_earlier_version_is_refused(ws: Workspace, parent: Any) -> None:
    version = commit(ws, parent)
    with pytest.raises(VersionError, match="no earlier version"):
        assert Version(version.name, version.folder).manifest


def test_what_versions_brought_outlives_their_folders(ws: Workspace) -> None:
    chain(ws, 3)
    ws.rollback("v1")
    both = {"row of v2", "row of v3"}
    assert registry.given_back(ws) == both
    for name in ("v2", "v3"):
        shutil.rmtree(ws.versions / name)
        assert registry.given_back(Workspace(ws.root)) == both
    fourth = commit(ws, "v1", rows=("row of v2",))
    registry.promote(ws, fourth)
    assert registry.given_back(ws) == {"row of v3"}
    ws.rollback()
    assert registry.given_back(ws) == both


def test_what_a_version_brings_is_noted_before_it_serves(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a promotion is cut off: it was not begun, and its rows are new, or it is finished."""
    chain(ws, 1)
    held = commit(ws, "v1", promote=False, rows=("row",))
    for step in ("append_line", "_move"):
        with monkeypatch.context() as patch:
            patch.setattr(registry, step, crash)
            with pytest.raises(RuntimeError):
                ws.promote(held.name, force=True)
        again = Workspace(ws.root)
        assert (current(again), registry.given_back(again)) == ("v1", set())
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_link", crash)
        with pytest.raises(RuntimeError):
            ws.promote(held.name, force=True)
    again = Workspace(ws.root)
    assert current(again) == "v2"
    again.rollback()
    shutil.rmtree(held.folder)
    assert registry.given_back(again) == {"row"}


def test_rows_noted_for_a_promotion_that_was_cut_off_count_for_the_next(
    ws: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain(ws, 1)
    first, second = (commit(ws, "v1", promote=False, rows=("row",)) for _ in range(2))
    noted: list[Path] = []

    def dies(path: Path, content: Any) -> None:
        if noted:
            raise RuntimeError("crash")
        noted.append(path)
        append_line(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(registry, "append_line", dies)
        with pytest.raises(RuntimeError):
            ws.promote(first.name, force=True)
    assert noted == [ws.consumed]
    again = Workspace(ws.root)
    again.promote(second.name, force=True)
    again.rollback()
    shutil.rmtree(second.folder)
    assert registry.given_back(Workspace(ws.root)) == {"row"}


def test_what_versions_brought_is_found_again_as_far_as_they_are_there(ws: Workspace) -> None:
    chain(ws, 4)
    ws.rollback("v1")
    ws.consumed.write_text("rubbish\n")
    with pytest.raises(VersionError, match=r"consumed\.jsonl, line 1 is damaged; .* or remove it"):
        registry.given_back(ws)
    (ws.versions / "v2" / "manifest.json").write_text("{")
    shutil.rmtree(ws.versions / "v3")
    ws.consumed.unlink()
    assert registry.given_back(Workspace(ws.root)) == {"row of v4"}


@pytest.mark.parametrize("left", ["", '{"version": "v2", "rows": ["row of v2"]}\n'])
def test_what_was_not_noted_is_told_by_the_folders(ws: Workspace, left: str) -> None:
    chain(ws, 3)
    ws.rollback("v1")
    manifest = ws.versions / "v3" / "manifest.json"
    whole = manifest.read_bytes()
    manifest.write_text("{")
    ws.consumed.write_text(left)
    assert registry.given_back(Workspace(ws.root)) == {"row of v2"}
    manifest.write_bytes(whole)
    assert registry.given_back(Workspace(ws.root)) == {"row of v2", "row of v3"}


@pytest.mark.parametrize("line", ['{"version": "v1", "rows": "abc"}', '{"version": "v1", "rows": [1]}', "[]"])
def test_notes_of_another_shape_are_refused(ws: Workspace, line: str) -> None:
    chain(ws, 1)
    ws.consumed.write_text(line + "\n")
    with pytest.raises(VersionError, match=r"consumed\.jsonl, line 1 is damaged"):
        registry.given_back(ws)
    ws.consumed.unlink()
    ws.consumed.mkdir()
    with pytest.raises(VersionError, match=r"consumed\.jsonl cannot be read .* or remove it"):
        registry.given_back(ws)


def test_a_highest_number_that_is_none_counts_for_nothing(ws: Workspace) -> None:
    chain(ws, 1)
    for noted in ("9" * 300, "-5", "x", ""):
        ws.highest.write_text(noted)
        assert registry.next_name(ws) == "v2"


@pytest.mark.parametrize("line", ["{}", "[]", "5", '{"time": 1, "event": "promote", "version": "../x"}'])
def test_a_history_of_another_shape_is_refused(ws: Workspace, line: str) -> None:
    ws.history.write_text(line + "\n")
    with pytest.raises(VersionError, match=r"history\.jsonl, line 1 is damaged"):
        registry.history(ws)


def test_a_pickle_is_never_loaded(ws: Workspace) -> None:
    staging = ws.versions / ".staging-pickle"
    staging.mkdir()
    (staging / "adapter_model.bin").write_bytes(b"weights")
    version = registry.commit(ws, staging, {"parent": None})
    assert version.problems() == ["v1: adapter_model.bin may be a pickle, which is never loaded"]


def test_a_crash_while_committing_leaves_no_version(ws: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in ("fsync_tree", "write_json", "sha256"):
        with monkeypatch.context() as patch:
            patch.setattr(registry, step, crash)
            with pytest.raises(RuntimeError):
                commit(ws)
        assert registry.versions(Workspace(ws.root)) == []
        registry.discard(ws.versions / ".staging-test")
    assert commit(ws).name == "v1"


@pytest.mark.parametrize("torn", ["{", '{"event": "promote", "version": "v1"', '{"event": "promote"}\x00\x00'])
def test_a_torn_last_line_is_no_event(ws: Workspace, torn: str) -> None:
    chain(ws, 2)
    whole = ws.history.read_text()
    ws.history.write_text(whole + torn)
    assert current(Workspace(ws.root)) == "v2"
    assert len(registry.history(ws)) == 2
    ws.rollback()
    assert ws.history.read_text().startswith(whole)
    assert [event["version"] for event in registry.history(ws)] == ["v1", "v2", "v1"]


def test_a_broken_line_before_the_last_is_told(ws: Workspace) -> None:
    chain(ws, 1)
    ws.history.write_bytes(b"rubbish\n" + ws.history.read_bytes())
    with pytest.raises(VersionError, match=r"history\.jsonl, line 1"):
        Workspace(ws.root)


def edit_file(folder: Path) -> None:
    (folder / "weights").write_bytes(b"12346")


def edit_manifest(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"score": 0.5', '"score": 0.6'))


def add_file(folder: Path) -> None:
    (folder / "more" / "extra.py").write_text("print()")


def remove_file(folder: Path) -> None:
    (folder / "more" / "notes").unlink()


def newer_format(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": registry.FORMAT + 1}))


def link_file(folder: Path) -> None:
    (folder / "weights").rename(folder.parent / "elsewhere")
    (folder / "weights").symlink_to(folder.parent / "elsewhere")


def link_folder(folder: Path) -> None:
    (folder / "more").rename(folder.parent / "elsewhere")
    (folder / "more").symlink_to(folder.parent / "elsewhere")


def extra_link(folder: Path) -> None:
    (folder / "extra").symlink_to("/etc/hostname")


def fifo(folder: Path) -> None:
    (folder / "weights").unlink()
    os.mkfifo(folder / "weights")


def cut_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_bytes((folder / "manifest.json").read_bytes()[:50])


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def list_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("[]")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (edit_file, "v1: weights was changed since the version was made"),
        (edit_manifest, r"v1: .*/manifest\.json was edited"),
        (add_file, r"v1: more/extra\.py does not belong to it"),
        (remove_file, "v1: more/notes is missing"),
        (newer_format, "v1 has format 2, newer than 1: update treering"),
        (link_file, "v1: weights is not a plain file"),
        (link_folder, "v1: more/notes is missing"),
        (extra_link, "v1: extra does not belong to it"),
        (fifo, "v1: weights is not a plain file"),
        (cut_manifest, r"v1: .*/manifest\.json cannot be read"),
        (no_manifest, r"v1: .*/manifest\.json cannot be read"),
        (list_manifest, r"v1: .*/manifest\.json cannot be read"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_changed_version_is_refused(ws: Workspace, change: Callable[[Path], None], told: str) -> None:
    chain(ws, 2)
    change(ws.versions / "v1")
    with pytest.raises(VersionError, match=told):
        registry.get(ws, "v1").check()
    for move in (lambda: ws.promote("v1"), ws.rollback):
        with pytest.raises(VersionError, match=told):
            move()
    assert current(Workspace(ws.root)) == "v2"
    assert len(registry.history(ws)) == 2


@pytest.mark.parametrize("change", [edit_file, cut_manifest, no_manifest, newer_format])
def test_a_damaged_last_version_does_not_lock_the_workspace(ws: Workspace, change: Callable[[Path], None]) -> None:
    chain(ws, 1)
    change(commit(ws, "v1").folder)
    again = Workspace(ws.root)
    assert current(again) == "v1"
    assert registry.get(again, "v2").problems()


def test_all_changes_are_named_at_once(ws: Workspace) -> None:
    [version] = chain(ws, 1)
    edit_file(version.folder)
    add_file(version.folder)
    remove_file(version.folder)
    assert len(Version(version.name, version.folder).problems()) == 3


def test_a_version_under_another_name_is_refused(ws: Workspace) -> None:
    chain(ws, 1)
    shutil.copytree(ws.versions / "v1", ws.versions / "v2")
    with pytest.raises(VersionError, match=r"v2: .*manifest\.json is that of v1"):
        registry.get(ws, "v2").check()


def test_a_missing_current_is_told_and_can_be_left(ws: Workspace) -> None:
    chain(ws, 2)
    shutil.rmtree(ws.versions / "v2")
    again = Workspace(ws.root)
    with pytest.raises(VersionError, match=r"current points to v2, which is missing; .* `treering promote`"):
        registry.current(again)
    again.promote("v1")
    assert current(again) == "v1"


def test_current_that_is_no_link_is_told(ws: Workspace) -> None:
    chain(ws, 1)
    ws.current.unlink()
    shutil.copytree(ws.versions / "v1", ws.current)
    again = Workspace(ws.root)
    with pytest.raises(VersionError, match=r"is not a symbolic link; remove it"):
        registry.current(again)
    shutil.rmtree(ws.current)
    assert current(Workspace(ws.root)) == "v1"


def test_current_is_relative_so_that_a_workspace_can_move(ws: Workspace, tmp_path: Path) -> None:
    chain(ws, 1)
    ws.root.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "current").resolve() == tmp_path / "moved" / "versions" / "v1"
    assert current(Workspace(tmp_path / "moved")) == "v1"
