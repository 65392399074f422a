"""Whatever is killed, whenever: the next command finds a consistent workspace, and the end is the same."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.crashing import Process, Server
from treering import Workspace, registry
from treering.errors import LockError, UsageError, VersionError
from treering.testing import toy_rows

SETTINGS: dict[str, Any] = {
    "bf16": False,
    "learning_rate": 1e-2,
    "num_train_epochs": 2.0,
    "per_device_train_batch_size": 4,
    "save_steps": 2,
}
ROWS = 16
TRAINING = "checkpoints/step-4"
"""A change to pause at: the fourth step is done and about to be kept."""


@dataclass(frozen=True)
class Whole:
    """A workspace before the first update, before the second and after both, none of them interrupted."""

    server: Server
    folder: Path
    changes: dict[str, list[str]]
    seconds: float

    def restore(self, name: str) -> Server:
        """Put the workspace back to where it was `first`, `second` or `done`."""
        shutil.rmtree(self.server.root, ignore_errors=True)
        shutil.copytree(self.folder / name, self.server.root, symlinks=True)
        return self.server


def put(root: Path, task: str) -> None:
    """A file for the inbox."""
    (root / "inbox" / task).mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in toy_rows(task, ROWS))
    (root / "inbox" / task / "train.jsonl").write_text(lines)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Iterator[Whole]:
    folder = tmp_path_factory.mktemp("crash")
    root = folder / "ws"
    (folder / "processes").mkdir()
    server = Server(root, folder / "processes", model_folder)
    Workspace.create(root, model_name_or_path=str(model_folder), **SETTINGS)
    changes = {}
    started = time.monotonic()
    for name, task in (("first", "pens"), ("second", "cups")):
        put(root, task)
        shutil.copytree(root, folder / name, symlinks=True)
        started = time.monotonic()
        changes[name] = server.run("update").changes
    seconds = time.monotonic() - started
    shutil.copytree(root, folder / "done", symlinks=True)
    yield Whole(server, folder, changes, seconds)
    server.close()


def outcome(root: Path) -> dict[str, Any]:
    """Everything of the versions that must not depend on interruptions."""
    found: dict[str, Any] = {"current": os.readlink(root / "current")}
    kept = ("rows", "held_out", "scores", "parent_scores", "matrix", "summary", "verdict", "memory", "plan", "parent")
    for folder in sorted((root / "versions").iterdir()):
        manifest = json.loads((folder / "manifest.json").read_text())
        files = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in {".safetensors", ".parquet"}}
        files["memory.json"] = (folder / "memory.json").read_bytes()
        cost = {key: manifest["cost"][key] for key in ("steps", "rows_trained")}
        found[folder.name] = files, {key: manifest[key] for key in kept}, cost
    return found


def look(server: Server) -> tuple[int, str | None]:
    """How many versions there are and which is current, once all has been checked."""
    status, verified = server.json("status"), server.json("verify")
    assert verified == {"ok": True, "versions": status["versions"], "problems": []}
    names = {path.name for path in (server.root / "versions").iterdir()}
    made = [f"v{number + 1}" for number in range(status["versions"])]
    assert {name for name in names if not name.startswith(".staging-")} == set(made)
    assert status["current"] == (made[-1] if made else None)
    return len(made), status["current"]


def finish(whole: Whole) -> None:
    """Run what is left of the two updates; it must all be as if nothing had happened."""
    server = whole.server
    for task in ("pens", "cups"):
        if not (server.root / "inbox" / task).exists():
            put(server.root, task)
        server.run("update")
    assert look(server) == (2, "v2")
    assert outcome(server.root) == outcome(whole.folder / "done")


def kill_points(whole: Whole, name: str, rng: random.Random, count: int) -> list[int]:
    """Some changes of that update, counted from 1: a third of the commit's, of a checkpoint's, of all others."""
    changes = list(enumerate(whole.changes[name], start=1))
    last = max(n for n, change in changes if "manifest.json.partial" in change)
    commit = [n for n, _ in changes if n >= last]
    training = [n for n, change in changes if "/step-" in change or "/.step-" in change]
    others = [n for n, _ in changes if n not in {*commit, *training}]
    return [n for group in (commit, training, others) for n in rng.sample(group, min(count // 3, len(group)))]


def kill_twice(whole: Whole, name: str, number: int, rng: random.Random) -> None:
    """Kill an update at its `number`-th change, and the next one somewhere; then go on to the end."""
    server = whole.restore(name)
    before = {"first": (0, None), "second": (1, "v1")}[name]
    after = (before[0] + 1, f"v{before[0] + 1}")
    assert server.start("update", kill_at=number).wait() == -signal.SIGKILL
    assert look(server) in (before, after), whole.changes[name][number - 1]
    assert server.start("update", kill_at=rng.randint(1, len(whole.changes[name]))).wait() in (-signal.SIGKILL, 0)
    assert look(server) in (before, after)
    finish(whole)


def renames(whole: Whole, name: str) -> list[int]:
    """Right before and right after what makes a version, counted from 1: manifest, folder and link get their names."""
    changes = whole.changes[name]
    moves = [n for n, c in enumerate(changes, start=1) if re.match(r"os\.rename .*(/manifest.json|/v\d|/current)$", c)]
    assert len(moves) == 3
    return [n for move in moves for n in (move, move + 1)]


@pytest.mark.parametrize("name", ["first", "second"])
def test_killed_at_any_change_to_the_disk(whole: Whole, name: str) -> None:
    rng = random.Random(name)
    points = kill_points(whole, name, rng, 3)
    for number in points if name == "first" else [*renames(whole, name), *points]:
        kill_twice(whole, name, number, rng)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["first", "second"])
def test_killed_at_many_changes_to_the_disk(whole: Whole, name: str) -> None:
    rng = random.Random(f"soak {name}")
    for number in kill_points(whole, name, rng, 150):
        kill_twice(whole, name, number, rng)


def kill_by_the_clock(whole: Whole, rounds: int) -> None:
    """Kill update after update, until both are done; then once more from the start, until all rounds are used."""
    rng = random.Random(rounds)
    server = whole.restore("first")
    for _ in range(rounds):
        process = server.start("update")
        time.sleep(rng.uniform(0, whole.seconds))
        process.kill()
        assert process.wait() in (-signal.SIGKILL, 0)
        if look(server)[0] == 2:
            finish(whole)
            server = whole.restore("first")
        elif look(server)[0] == 1 and not (server.root / "inbox" / "cups").exists():
            put(server.root, "cups")
    finish(whole)


def test_killed_at_random_times(whole: Whole) -> None:
    kill_by_the_clock(whole, 4)


@pytest.mark.soak
def test_killed_a_hundred_times(whole: Whole) -> None:
    kill_by_the_clock(whole, 100)


def test_an_ingest_is_whole_or_nothing(whole: Whole) -> None:
    server = whole.restore("second")
    before = server.json("status")
    changes = server.run("ingest").changes
    after = server.json("status")
    assert after["rows"]["train"] + after["rows"]["held_out"] == 2 * ROWS
    assert (before["inbox"], after["inbox"]) == (["cups/train.jsonl"], [])
    for number in range(changes.index("sql BEGIN"), len(changes) + 1):
        whole.restore("second")
        assert server.start("ingest", kill_at=number).wait() == -signal.SIGKILL
        assert server.json("status") == before, changes[number - 1]
        server.run("ingest")
        assert server.json("status") == after


def readers_of(process: Process) -> list[int]:
    """The processes it has started."""
    return list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))


@pytest.mark.parametrize("when", ["while it is started", "while rows come"])
def test_a_killed_ingest_of_a_large_file_leaves_nothing(whole: Whole, when: str) -> None:
    """Nothing of the file, and nobody who reads on: a line without end keeps the reader busy for long."""
    server = whole.restore("second")
    shutil.rmtree(server.root / "inbox" / "cups")
    file = server.root / "inbox" / "crowd" / "train.jsonl"
    file.parent.mkdir()
    rows = 5000 if when == "while rows come" else 0  # More than one part.
    with file.open("w") as out:
        out.writelines(json.dumps({"text": f"{n:x} {n * n:x} {n**3:x}", "label": str(n)}) + "\n" for n in range(rows))
        out.writelines("x" * 2**20 for _ in range(400))
    before = server.json("status")
    process = server.start("ingest", pause_at="sql INSERT" if rows else "")
    if rows:
        process.until_paused()
    wait_until(lambda: readers_of(process) != [])
    (reader,) = readers_of(process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    wait_until(lambda: not Path(f"/proc/{reader}").exists())
    assert "Traceback" not in process.err
    assert server.json("status") == before
    file.write_text(json.dumps(toy_rows("crowd", 1)[0]))
    assert server.json("ingest")["accepted"] == 1


def test_a_signal_while_another_process_reads_ends_both(whole: Whole) -> None:
    """Rows of a large file are waited for; the reader is busy with a line without end."""
    server = whole.restore("second")
    file = server.root / "inbox" / "cups" / "train.jsonl"
    with file.open("a") as out:
        out.writelines("x" * 2**20 for _ in range(400))
    before = server.json("status")
    process = server.start("update")
    wait_until(lambda: readers_of(process) != [])
    (reader,) = readers_of(process)
    time.sleep(1)
    process.kill(signal.SIGTERM)
    assert process.wait() == 1
    assert "stopped as asked" in process.err and "Traceback" not in process.err
    wait_until(lambda: not Path(f"/proc/{reader}").exists())
    assert server.json("status") == before


def wait_until(is_so: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


WAYS: dict[str, tuple[int, list[str]]] = {
    "plain": (1, []),
    "threads": (2, ["per_device_train_batch_size=8"]),
    "accumulation": (1, ["per_device_train_batch_size=2", "gradient_accumulation_steps=2", "lora_dropout=0.2"]),
    "threads and accumulation": (2, ["per_device_train_batch_size=8", "gradient_accumulation_steps=2"]),
}
"""Threads that torch has, and settings: from eight rows on each of two threads computes its share of a batch."""


def kill_in_steps(whole: Whole, way: str, rounds: int) -> None:
    """SIGKILL update after update in the middle of a step, until one comes to its end; that is one round."""
    threads, settings = WAYS[way]
    rng = random.Random(way)
    server = whole.restore("second")
    passes = server.run("update", *settings, threads=threads).passes
    wanted = outcome(server.root)
    for _ in range(rounds):
        server = whole.restore("second")
        code, killed = -signal.SIGKILL, 0
        while code == -signal.SIGKILL:
            code = server.start("update", *settings, threads=threads, kill_in_pass=rng.randint(2, passes)).wait()
            killed += code == -signal.SIGKILL
        assert (code, look(server)) == (0, (2, "v2"))
        assert killed > 0
        assert outcome(server.root) == wanted


@pytest.mark.parametrize("way", ["plain", "threads and accumulation"])
def test_killed_in_steps(whole: Whole, way: str) -> None:
    kill_in_steps(whole, way, 1)


@pytest.mark.soak
@pytest.mark.parametrize("way", WAYS)
def test_killed_in_many_steps(whole: Whole, way: str) -> None:
    kill_in_steps(whole, way, 25)


def test_a_signal_within_a_step_keeps_where_it_began(whole: Whole) -> None:
    """Between two batches of the third step, which is not finished."""
    settings = WAYS["accumulation"][1]
    server = whole.restore("second")
    process = server.start("update", *settings, pause_in_pass=6)
    process.until_paused()
    process.kill(signal.SIGTERM)
    process.release()
    assert process.wait() == 1
    assert process.passes == 6
    assert {p.name for p in server.root.glob("versions/.staging-*/checkpoints/*")} == {"step-0", "step-2"}
    assert server.run("update", *settings).passes > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_keeps_the_checkpoint(whole: Whole, number: signal.Signals) -> None:
    server = whole.restore("second")
    process = server.start("update", pause_at=TRAINING)
    process.until_paused()
    process.kill(number)
    process.release()
    assert process.wait() == 1
    assert "run `treering update` again: it goes on from the last checkpoint" in process.err
    assert "Traceback" not in process.err
    assert {p.name for p in server.root.glob("versions/.staging-*/checkpoints/*")} == {"step-0", "step-2", "step-4"}
    assert server.json("status")["interrupted"]
    resumed = server.run("update")
    assert not any("step-2" in change.split("/") for change in resumed.changes)
    finish(whole)


def test_a_signal_while_rows_are_taken_in_takes_in_none(whole: Whole) -> None:
    server = whole.restore("second")
    before = server.json("status")
    process = server.start("update", pause_at="sql BEGIN")
    process.until_paused()
    process.kill(signal.SIGTERM)
    process.release()
    assert process.wait() == 1
    assert "stopped as asked" in process.err
    assert server.json("status") == before
    finish(whole)


def test_a_signal_while_an_update_is_planned_leaves_nothing(whole: Whole) -> None:
    server = whole.restore("second")
    before = server.json("status")
    process = server.start("plan", pause_at="sql BEGIN")
    process.until_paused()
    assert list(server.root.glob("versions/.staging-plan-*"))
    process.kill(signal.SIGTERM)
    process.release()
    assert process.wait() == 1
    assert "stopped as asked; nothing was changed" in process.err
    assert not list(server.root.glob("versions/.staging-*"))
    assert server.json("status") == before


def test_a_signal_within_a_rule_is_no_fault_of_the_row(whole: Whole) -> None:
    """What a user's rule raises sends its row to quarantine, but not a signal that comes while it runs."""
    server = whole.restore("second")
    (server.root / "rules.py").write_text(
        "import os, signal\n\ndef ends(messages):\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    before = server.json("status")
    process = server.start("update", "checks={rules.py:ends: reject}")
    assert process.wait() == 1
    assert "stopped as asked" in process.err
    assert server.json("status") == before


def test_a_signal_while_methods_take_what_they_keep(whole: Whole) -> None:
    """The weights are written by then; each row that the method asks for is a look."""
    server = whole.restore("second")
    process = server.start(
        "update",
        "protect=[replay,ewc]",
        "gate.floor=1.0",
        "gate.margin=1.0",
        pause_at="version/adapter_model.safetensors",
    )
    process.until_paused()
    process.kill(signal.SIGTERM)
    process.release()
    assert process.wait() == 1
    assert look(server) == (1, "v1")
    assert (
        server.run("update", "protect=[replay,ewc]", "gate.floor=1.0", "gate.margin=1.0").passes == 0
    )  # All steps were kept.
    assert look(server) == (2, "v2")


def test_two_updates_at_once(whole: Whole) -> None:
    server = whole.restore("second")
    first = server.start("update", pause_at=TRAINING)
    first.until_paused()
    second = server.run("update", code=1)
    assert f"`treering update` (process {first.pid} on " in second.err
    first.kill()
    first.wait()
    server.run("update")
    finish(whole)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_reading_while_an_update_runs_disturbs_nothing(whole: Whole) -> None:
    server = whole.restore("second")
    update = server.start("update", pause_at=TRAINING)
    update.until_paused()
    before = contents(server.root / "versions")
    for command in (["status"], ["versions"], ["verify"], ["show", "v1"], ["compare", "v1", "v1"]):
        server.json(*command)
    server.json("ingest")
    assert contents(server.root / "versions") == before
    update.release()
    assert update.wait() == 0
    finish(whole)


@pytest.mark.parametrize("at", [TRAINING, "version/memory.json.partial"])
def test_a_rollback_does_not_wait_for_an_update(whole: Whole, at: str) -> None:
    server = whole.restore("second")
    update = server.start("update", "--json", pause_at=at)
    update.until_paused()
    server.run("rollback")
    update.release()
    assert update.wait() == 2
    assert "its parent v1 is no longer current" in json.loads(update.out)["reason"]
    status = server.json("status")
    assert (status["current"], status["versions"], status["interrupted"]) == (None, 2, False)
    assert status["waiting"] == {task: ROWS - round(0.1 * ROWS) for task in ("pens", "cups")}


def test_rows_held_out_while_an_update_trains_on_them(whole: Whole, tmp_path: Path) -> None:
    server = whole.restore("second")
    update = server.start("update", "--json", pause_at=TRAINING)
    update.until_paused()
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in toy_rows("cups", 3)))
    moved = server.json("ingest", str(tmp_path / "test.jsonl"), "--task", "cups")
    assert moved["held_out"] > 0
    update.release()
    assert update.wait() == 2
    assert f"{moved['held_out']} of its rows were held out while it ran" in json.loads(update.out)["reason"]
    server.run("update")
    ws = Workspace(server.root)
    held_out = {id for ids in ws.catalog.held_out().values() for id in ids}
    assert not held_out & registry.consumed(ws, registry.current(ws))


def test_what_was_half_removed_is_not_taken_up(whole: Whole) -> None:
    server = whole.restore("second")
    for settings, where in (([], "/step-8"), (["seed=7"], "os.rmdir step-")):
        process = server.start("update", *settings, pause_at=where)
        process.until_paused()
        process.kill()
        process.wait()
    assert len(list(server.root.glob("versions/.staging-*"))) == 2
    server.run("update")
    finish(whole)


def test_the_plan_is_removed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan.json").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda *arguments, **options: None)
    registry.discard(tmp_path)
    assert not (tmp_path / "plan.json").exists()


def test_wrong_settings_cost_no_checkpoint(whole: Whole) -> None:
    server = whole.restore("second")
    process = server.start("update", pause_at="/step-8")
    process.until_paused()
    process.kill()
    process.wait()
    before = contents(server.root / "versions")
    server.run("update", "lora_rank=2", code=3)
    assert contents(server.root / "versions") == before
    resumed = server.run("update")
    assert not any("step-2" in change.split("/") for change in resumed.changes)
    finish(whole)


def test_many_first_commands_at_once(whole: Whole) -> None:
    server = whole.restore("first")
    for path in server.root.glob("treering.db*"):
        path.unlink()
    processes = [server.start("status", "--json") for _ in range(8)]
    assert [process.wait() for process in processes] == [0] * 8, [process.err for process in processes]


@pytest.fixture
def done(whole: Whole, tmp_path: Path) -> Path:
    """A copy of the workspace after both updates."""
    shutil.copytree(whole.folder / "done", tmp_path / "ws", symlinks=True)
    return tmp_path / "ws"


def link(root: Path, name: str) -> None:
    (root / "current").unlink()
    (root / "current").symlink_to(f"versions/{name}")


def events(root: Path) -> list[tuple[str, str | None]]:
    lines = (root / "history.jsonl").read_text().splitlines()
    return [(event["event"], event["version"]) for event in map(json.loads, lines)]


def noted_not_moved(root: Path) -> None:
    link(root, "v1")


def noted_first_not_moved(root: Path) -> None:
    (root / "current").unlink()


def still_working(root: Path) -> None:
    """The folder of the update that made v2, which goes only after the promotion."""
    plan = json.loads((root / "versions" / "v2" / "manifest.json").read_text())["plan"]
    (root / "versions" / f".staging-{plan[:12]}").mkdir()


def committed_not_noted(root: Path) -> None:
    still_working(root)
    lines = (root / "history.jsonl").read_text().splitlines(keepends=True)
    (root / "history.jsonl").write_text(lines[0])
    link(root, "v1")


def noted_half(root: Path) -> None:
    still_working(root)
    text = (root / "history.jsonl").read_text()
    (root / "history.jsonl").write_text(text[:-20])
    link(root, "v1")


def half_link(root: Path) -> None:
    (root / "versions" / ".link-123").symlink_to("versions/v1")


def link_to_nothing(root: Path) -> None:
    (root / "versions" / ".link-1").symlink_to("versions/v9")


def empty_staging(root: Path) -> None:
    (root / "versions" / ".staging-0").mkdir()


def staging_with_half_a_plan(root: Path) -> None:
    (root / "versions" / ".staging-1").mkdir()
    (root / "versions" / ".staging-1" / "plan.json").write_text('{"parent": "v')


def staging_with_half_a_version(root: Path) -> None:
    shutil.copytree(root / "versions" / "v2", root / "versions" / ".staging-2" / "version")
    (root / "versions" / ".staging-2" / "version" / "manifest.json").unlink()


def partial_files(root: Path) -> None:
    for path in (root / "treering.yaml", root / "versions" / ".staging-3" / "plan.json"):
        path.parent.mkdir(exist_ok=True)
        path.with_name(path.name + ".partial").write_text("half")


Damage = Callable[[Path], None]
MOVES = (noted_not_moved, noted_first_not_moved, committed_not_noted, noted_half)
LEFT = (half_link, link_to_nothing, empty_staging, staging_with_half_a_plan, staging_with_half_a_version, partial_files)


@pytest.mark.parametrize("move", MOVES)
def test_the_next_command_finishes_what_was_begun(done: Path, whole: Whole, move: Damage) -> None:
    """Whatever else lies around: every combination of the remains."""
    good = contents(done / "versions" / "v2")
    for chosen in product((False, True), repeat=len(LEFT)):
        move(done)
        for leave, wanted in zip(LEFT, chosen, strict=True):
            if wanted:
                leave(done)
        ws = Workspace(done)
        here = registry.current(ws)
        assert here is not None and here.name == "v2"
        assert events(done) == [("promote", "v1"), ("promote", "v2")]
        assert not list(ws.versions.glob(".link-*"))
        assert [version.name for version in registry.versions(ws)] == ["v1", "v2"]
        for folder in ws.versions.glob(".staging-*"):
            shutil.rmtree(folder)
    assert contents(done / "versions" / "v2") == good


def test_a_noted_rollback_is_finished(done: Path) -> None:
    for name in ("v1", None):
        before = os.readlink(done / "current")
        Workspace(done).rollback()
        if (done / "current").is_symlink():
            (done / "current").unlink()
        (done / "current").symlink_to(before)
        here = registry.current(Workspace(done))
        assert (here.name if here else None) == name


def test_remains_go_with_the_next_update(whole: Whole) -> None:
    server = whole.restore("done")
    for leave in LEFT:
        leave(server.root)
    server.run("update")
    assert sorted(p.name for p in (server.root / "versions").iterdir()) == ["v1", "v2"]
    assert not server.json("status")["interrupted"]


def test_a_workspace_that_stays_open_recovers_too(done: Path) -> None:
    ws = Workspace(done)
    committed_not_noted(done)
    assert ws.update() is None
    assert events(done)[-1] == ("promote", "v2")
    committed_not_noted(done)
    ws.rollback("v1")
    assert events(done)[1:] == [("promote", "v2"), ("rollback", "v1")]


def test_damage_stops_only_what_meets_it(done: Path) -> None:
    committed_not_noted(done)
    manifest = done / "versions" / "v2" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"parent": "v1"', '"parent": null'))
    ws = Workspace(done)
    here = registry.current(ws)
    assert here is not None and here.name == "v1"
    shutil.rmtree(ws.versions / "v2")
    link(done, "v2")
    ws = Workspace(done)
    assert registry.current(ws) == here
    shutil.rmtree(done / "versions" / "v1")
    with pytest.raises(VersionError, match="v1, which is missing"):
        registry.current(Workspace(done))


def test_an_interrupted_init_is_not_built_upon(done: Path) -> None:
    (done / "treering.yaml").unlink()
    with pytest.raises(UsageError, match=r"no treering\.yaml, as an `init` that was cut off leaves it"):
        Workspace.create(done)
    assert not (done / "treering.yaml").exists()


def test_a_workspace_that_cannot_be_written(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.open

    def read_only(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return plain(path, flags, *more, **options)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(LockError, match=r"cannot be locked .*Read-only file system"):
        Workspace(done)


def test_a_full_disk_does_not_keep_from_looking(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    assert registry.current(Workspace(done)) is not None


def test_a_deletion_that_was_begun_is_finished(whole: Whole, tmp_path: Path) -> None:
    """Killed before its tombstones are set it leaves all as it was; after that the next command finishes it."""
    server = whole.restore("done")
    memory = json.loads((server.root / "versions" / "v2" / "memory.json").read_text())
    gone = next(id for id, task, _ in memory["rows"] if task == "pens")
    (tmp_path / "ids").write_text(gone)
    command = ("forget", "--ids", str(tmp_path / "ids"), "--yes")
    before, changes = server.json("status"), server.run(*command).changes
    after = server.json("status")
    assert after["rows"] == {**before["rows"], "train": before["rows"]["train"] - 1}
    decided = next(n for n, change in enumerate(changes, start=1) if re.match(r"fsync .*/deleted\.jsonl$", change))
    moves = [n for n, change in enumerate(changes, start=1) if re.match(r"os\.rename .*/v\d$", change)]
    rng = random.Random("forget")
    others = [n for n in range(1, len(changes) + 1) if n not in moves]
    for number in [*(m for n in moves[:2] for m in (n, n + 1)), *rng.sample(others, 6), *rng.sample(others[-40:], 3)]:
        whole.restore("done")
        assert server.start(*command, kill_at=number).wait() == -signal.SIGKILL
        found = server.json("status")
        assert found == (before if number <= decided else after) or (number <= decided and found == after), changes[
            number - 1
        ]
        assert look(server) == (2, "v2")
        left = {path.name for path in server.root.rglob("*") if path.is_file() and gone.encode() in path.read_bytes()}
        assert bool(left) == (found == before), (changes[number - 1], left)
        assert not (server.root / ".deleting").exists()
