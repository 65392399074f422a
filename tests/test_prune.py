"""What is pruned keeps its records and serves no more; what is needed stays whole, whatever a crash leaves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from treering import Workspace, canary, overview, prune, registry, remarks
from treering.errors import VersionError
from treering.results import read_results
from treering.testing import toy_rows


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Workspace:
    """v1 to v5: v3 was held, the others were promoted. Tests only read it."""
    ws = Workspace.create(
        tmp_path_factory.mktemp("five") / "ws",
        model_name_or_path=str(model_folder),
        bf16=False,
        max_steps=1,
        gate={"floor": 1.0, "margin": 1.0},
    )
    for number, task in enumerate(("pens", "cups", "hats", "bags", "caps"), start=1):
        ws.ingest(toy_rows(task, 10), task=task)
        version = ws.update(promote=number != 3)
        assert version is not None
        if version.name not in {event["version"] for event in registry.history(ws)} and number != 3:
            ws.promote(version.name, force=True)
    return ws


@pytest.fixture
def ws(five: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(five.root, tmp_path / "ws", symlinks=True)
    return Workspace(tmp_path / "ws")


def whole(ws: Workspace) -> list[str]:
    return [version.name for version in registry.versions(ws) if not version.pruned]


def test_old_versions_keep_their_records(ws: Workspace) -> None:
    before = {v.name: v.manifest for v in registry.versions(ws)}
    best = prune.best(registry.versions(ws), registry.current(ws))
    assert best is not None and best.name == "v5"  # No other knows all tasks.
    would = prune.prune(ws, 1, dry_run=True)
    assert whole(ws) == list(before)
    assert prune.prune(ws, 1) == would and list(would) == ["v1", "v2", "v3", "v4"]
    assert all(size > 10_000 for size in would.values())
    assert whole(ws) == ["v5"] == [version.name for version in registry.versions(ws) if version.has_weights]
    assert overview.verify(ws)["problems"] == []
    old = registry.get(ws, "v2")
    assert sorted(path.name for path in old.folder.iterdir()) == sorted([*prune.RECORDS, "manifest.json"])
    assert {**old.manifest, "files": 0, "digest": 0} == {
        **before["v2"],
        "files": 0,
        "digest": 0,
        "pruned": old.manifest["pruned"],
    }
    assert read_results(old.folder / "results.parquet")
    assert overview.compare(ws, old, registry.get(ws))["tasks"]["pens"]["rows"] > 0
    assert prune.prune(ws, 1) == {}


def test_what_is_needed_stays_whole(ws: Workspace) -> None:
    remarks.set_alias(ws.root, "champion", "v1")
    assert prune.kept(ws, 2) == {
        "v5": "is current",
        "v4": "is one of the last 2 that were promoted",
        "v1": "has the alias champion",
    }
    canary.start(ws, "v2", shadow=True)
    assert prune.kept(ws, 1) == {"v5": "is current", "v1": "has the alias champion", "v2": "is on trial"}
    (ws.root / canary.FILE).write_text("{")
    ws.rollback("v2")
    best = prune.best(registry.versions(ws), registry.current(ws))
    assert best is not None and best.scores.keys() >= {"pens", "cups"}
    rest = {"v5": "is one of the last 1", "v1": "has the alias champion"}
    assert prune.kept(ws, 1) == {best.name: "has the best average score", **rest, "v2": "is current"}


def test_a_pruned_version_cannot_serve(ws: Workspace) -> None:
    prune.prune(ws, 1)
    for use in (
        lambda: ws.promote("v4", force=True),
        lambda: ws.rollback(),
        lambda: canary.start(ws, "v4", force=True),
    ):
        with pytest.raises(VersionError, match=r"v4 was pruned .*name another version"):
            use()
    here = registry.current(ws)
    assert here is not None and here.name == "v5"


def test_updates_and_deletions_go_on(ws: Workspace) -> None:
    prune.prune(ws, 1)
    rows = registry.get(ws, "v2").rows[:1]
    done = ws.forget(rows)
    assert "v2" in done.versions and registry.get(ws, "v2").pruned
    assert rows[0] not in json.dumps(registry.get(ws, "v2").manifest)
    ws.ingest(toy_rows("ties", 10), task="ties")
    version = ws.update("keep_versions=1")
    assert version is not None and version.parent == "v5"
    here = registry.current(ws)
    assert here is not None and whole(ws) == sorted({"v6", here.name})
    assert overview.verify(ws)["problems"] == []


def test_a_version_that_was_changed_stays_as_it_is(ws: Workspace) -> None:
    (registry.get(ws, "v2").folder / "memory.json").write_text("{}")
    with pytest.raises(VersionError, match=r"v2: memory\.json was changed"):
        prune.prune(ws, 1)
    assert whole(ws) == ["v2", "v3", "v4", "v5"]


@pytest.mark.parametrize("call", range(8))
def test_a_crash_leaves_each_version_whole_or_pruned(ws: Workspace, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    """Whatever was done last when the power went."""
    done = 0

    def failing(name: str) -> None:
        real = getattr(Path, name)

        def act(self: Path, *given: object) -> object:
            nonlocal done
            if self.is_relative_to(ws.versions) and not self.name.startswith(".link"):
                done += 1
                if done > call:
                    raise KeyboardInterrupt
            return real(self, *given)

        monkeypatch.setattr(Path, name, act)

    for name in ("rename", "mkdir"):
        failing(name)
    with pytest.raises(KeyboardInterrupt):
        prune.prune(ws, 1)
    monkeypatch.undo()
    with ws.changing("look"):
        pass
    assert overview.verify(ws) == {"ok": True, "versions": 5, "problems": []}
    assert sorted(path.name for path in ws.versions.iterdir()) == ["v1", "v2", "v3", "v4", "v5"]
    prune.prune(ws, 1)
    assert whole(ws) == ["v5"]
