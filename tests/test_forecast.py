"""`treering plan`: what it says is what the update then does and takes; what cannot fit is refused before it begins."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from tests.test_pipeline import snapshot
from treering import Workspace, forecast, pipeline, registry
from treering.automate import children
from treering.automate.child import perform
from treering.automate.children import Answer
from treering.calibrate import Estimate, _all_steps, typical_steps
from treering.errors import ConfigError, RoomError, TreeringError
from treering.testing import toy_rows

MakeWorkspace = Callable[..., Workspace]
NEEDS = Estimate(2, 16, 1.0, 3.0, 900.0, None, 50.0)
PLENTY = {"memory_mb": 1e9, "disk_mb": 1e9}


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What there is, as the test sets it."""
    found = dict(PLENTY)
    monkeypatch.setattr("treering.room.room", lambda _: dict(found))
    return found


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], None]:
    """Has the process that calibrates answer so, without running it."""
    return lambda answer: monkeypatch.setattr(children, "run", lambda *_: answer)


def of_an_update(ws: Workspace) -> dict[str, Any]:
    """The manifest of an update that a process of its own ran, so that its peak of memory is its own."""
    order = {"workspace": str(ws.root), "step": "update", "file": None, "careful": False, "ordered": None}
    answer = children.run(order, lambda: None)
    assert answer.error is None
    return registry.get(ws, answer.value["version"]).manifest


KINDS: dict[str, dict[str, Any]] = {
    "lora": {"finetuning_type": "lora", "protect": ["replay", "distill", "lwf"], "early_stopping_steps": 50},
    "full": {"finetuning_type": "full", "gradient_accumulation_steps": 2},
}


def takes_what_was_planned(ws: Workspace) -> tuple[dict[str, Any], dict[str, Any]]:
    """The estimate and the cost of an update, which agree in all but their peaks of memory."""
    ws.ingest(toy_rows("pens", 40), task="pens")
    ws.update(max_steps=2)
    ws.promote("v1", force=True)
    ws.ingest(toy_rows("cups", 80), task="cups")
    planned = forecast.forecast(ws, quiet=True)
    manifest = of_an_update(ws)
    cost, estimate = manifest["cost"], manifest["estimate"]
    assert planned.estimate is not None and asdict(planned.estimate) == estimate
    assert planned.plan.digest == manifest["plan"] and planned.problems == []
    assert set(estimate) - {"disk_mb"} <= set(cost)
    assert (estimate["steps"], estimate["rows_trained"]) == (cost["steps"], cost["rows_trained"])
    assert manifest["range_test"] is not None  # It takes no step of the update's.
    assert 0 < estimate["seconds"] < estimate["total_seconds"] and cost["seconds"] < cost["total_seconds"]
    page = (ws.versions / manifest["name"] / "report.html").read_text(encoding="utf-8")
    assert f"planned: {estimate['peak_memory_mb']:,.0f} MB" in page
    # A version is on the disk beside its last checkpoint.
    assert estimate["disk_mb"] > sum(p.stat().st_size for p in (ws.versions / manifest["name"]).iterdir()) / 2**20
    return estimate, cost


@pytest.fixture
def kind(workspace: MakeWorkspace, request: pytest.FixtureRequest) -> Workspace:
    settings = KINDS[request.param]
    return workspace(per_device_train_batch_size=8, eval={"max_new_tokens": 4}, gate={"floor": 1.0}, **settings)


@pytest.mark.parametrize("kind", ["lora", pytest.param("full", marks=pytest.mark.soak)], indirect=True)
def test_an_update_takes_what_was_planned(kind: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a process of its own, whose memory is nobody else's."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # As this process has it, or the estimate would be of another machine.
    estimate, cost = takes_what_was_planned(kind)
    assert estimate["peak_memory_mb"] == pytest.approx(cost["peak_memory_mb"], rel=0.2)


@pytest.mark.usefixtures("no_children")
@pytest.mark.parametrize("kind", ["full"], indirect=True)
def test_an_update_of_all_weights_takes_what_was_planned(kind: Workspace) -> None:
    takes_what_was_planned(kind)


def test_the_inbox_counts_and_nothing_changes(workspace: MakeWorkspace, said: Callable[[Answer], None]) -> None:
    said(Answer(asdict(NEEDS)))
    ws = workspace(max_steps=1, gate={"floor": 1.0})
    (ws.inbox / "pens").mkdir()
    rows = [*toy_rows("pens", 20), {"odd": 1}]
    (ws.inbox / "pens" / "june.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert ws.catalog.counts()["train"] == 0
    before = snapshot(ws.root)
    found = forecast.forecast(ws, ["lora_rank=4"], quiet=True)
    assert (found.ingested.accepted, found.ingested.quarantined) == (20, 1)
    assert found.plan.as_dict()["rows"] == {"pens": 18} and found.plan.config["lora_rank"] == 4
    after = snapshot(ws.root)
    assert json.loads(after.pop(forecast.ESTIMATE))["plan"] == found.plan.digest
    assert after == before and ws.catalog.counts()["train"] == 0

    first = pipeline.update(ws, promote=False, quiet=True).version  # Other settings: the estimate is not its own.
    assert first is not None and first.manifest["estimate"] is None
    second = pipeline.update(ws, ["lora_rank=4"], quiet=True).version
    assert second is not None and second.manifest["plan"] == found.plan.digest
    assert second.manifest["estimate"] == asdict(NEEDS)
    nothing = forecast.forecast(ws, quiet=True)
    assert nothing.estimate is None and nothing.plan.rows == {}


def test_an_interrupted_update_is_what_is_planned(workspace: MakeWorkspace, said: Callable[[Answer], None]) -> None:
    from treering.plan import stage

    said(Answer(asdict(NEEDS)))
    ws = workspace()
    ws.ingest(toy_rows("pens", 20), task="pens")
    stage(ws, forecast.forecast(ws, quiet=True).plan)
    ws.ingest(toy_rows("cups", 20), task="cups")
    assert list(forecast.forecast(ws, quiet=True).plan.rows) == ["pens"]


def test_what_will_not_fit_is_told_with_a_way_out(
    workspace: MakeWorkspace, room: dict[str, float], said: Callable[[Answer], None]
) -> None:
    ws = workspace(per_device_train_batch_size=4)
    ws.ingest(toy_rows("pens", 20), task="pens")
    said(Answer(asdict(replace(NEEDS, peak_gpu_memory_mb=70.0))))
    room.update(memory_mb=899.0, disk_mb=49.0, gpu_memory_mb=69.0)
    memory, disk, gpu = forecast.forecast(ws, quiet=True).problems
    assert memory.startswith("memory: 900 MB are needed, 899 MB are free; set per_device_train_batch_size lower than 4")
    assert disk.startswith("disk: 50 MB are needed, 49 MB are free")
    assert gpu.startswith("GPU memory: 70 MB")
    room.update(memory_mb=901.0, disk_mb=51.0, gpu_memory_mb=71.0)
    assert forecast.forecast(ws, quiet=True).problems == []


def test_an_update_is_refused_only_where_it_surely_cannot_fit(
    workspace: MakeWorkspace, room: dict[str, float], said: Callable[[Answer], None]
) -> None:
    ws = workspace(max_steps=1, gate={"floor": 1.0})
    ws.ingest(toy_rows("pens", 20), task="pens")
    said(Answer(asdict(NEEDS)))
    forecast.forecast(ws, quiet=True)
    before = snapshot(ws.root)
    room["memory_mb"] = 900 / forecast.SURELY - 1
    with pytest.raises(RoomError, match="memory: 720 MB are needed, 719 MB are free"):
        ws.update()
    assert snapshot(ws.root) == before and not list(ws.versions.iterdir())
    room["memory_mb"] = 900 / forecast.SURELY + 1  # It may need less than was reckoned.
    assert ws.update() is not None


@pytest.mark.parametrize(
    ("kind", "memory", "disk"),
    [("lora", 0.5, 0), ("adapter", 0.5, 0), ("norm", 0.5, 0.5), ("freeze", 0.5, 0.5), ("full", 2, 1.5)],
)
def test_without_a_plan_the_size_of_the_model_decides(
    workspace: MakeWorkspace, model_folder: Path, room: dict[str, float], kind: str, memory: float, disk: float
) -> None:
    ws = workspace(max_steps=1, finetuning_type=kind, freeze_trainable_layers=1, gate={"floor": 1.0})
    ws.ingest(toy_rows("pens", 20), task="pens")
    files = (model_folder / "model.safetensors").stat().st_size / 2**20
    for name, needed in (("memory_mb", memory * files), ("disk_mb", disk * files)):
        room.update(PLENTY)
        room[name] = 0.99 * needed
        if needed:
            with pytest.raises(RoomError, match=r"however low.* are needed, .* are free"):
                ws.update()
            with pytest.raises(RoomError):  # Not even tried in miniature.
                forecast.forecast(ws, quiet=True)
    room.update(memory_mb=1.01 * memory * files, disk_mb=1.01 * disk * files)
    assert ws.update() is not None


def test_a_damaged_estimate_is_none(workspace: MakeWorkspace, said: Callable[[Answer], None]) -> None:
    said(Answer(asdict(NEEDS)))
    ws = workspace()
    ws.ingest(toy_rows("pens", 20), task="pens")
    plan = forecast.forecast(ws, quiet=True).plan
    assert forecast.kept(ws, plan) == NEEDS
    assert forecast.kept(ws, replace(plan, machine={**plan.machine, "threads": 99})) is None
    (ws.root / forecast.ESTIMATE).write_text('{"plan": ')
    assert forecast.kept(ws, plan) is None


def test_what_stops_the_miniature_is_told(workspace: MakeWorkspace, said: Callable[[Answer], None]) -> None:
    ws = workspace()
    ws.ingest(toy_rows("pens", 20), task="pens")
    said(Answer(error="it was killed (SIGKILL)", kind="killed"))
    with pytest.raises(TreeringError, match=r"a few steps of the update were tried: it was killed"):
        forecast.forecast(ws, quiet=True)
    assert list(ws.versions.iterdir()) == [] and not (ws.root / forecast.ESTIMATE).exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "cannot write to .*Free some space"),
        (RuntimeError("could not create a primitive"), "out of memory"),
    ],
)
def test_a_miniature_that_finds_no_room_says_so(
    workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def full(*_: object) -> None:
        raise error

    ws = workspace()
    monkeypatch.setattr("treering.data.catalog.Catalog", full)
    with pytest.raises(TreeringError, match=said):
        perform(ws, {"step": "calibrate", "folder": str(ws.root), "overrides": [], "quiet": True})


@pytest.mark.usefixtures("no_children")
def test_a_setting_that_does_not_go_with_the_model_is_told_as_such(workspace: MakeWorkspace) -> None:
    ws = workspace(finetuning_type="freeze", freeze_trainable_layers=9)
    ws.ingest(toy_rows("pens", 20), task="pens")
    with pytest.raises(ConfigError, match="freeze_trainable_layers is 9, but the model has 2 layers"):
        forecast.forecast(ws, quiet=True)


def test_the_steps_that_are_tried_span_all_others() -> None:
    tokens = {"a": 11, "b": 21, "c": 31, "d": 61}
    steps = [[["b", "b"]], [["a"]], [["d"]], [["c"], ["a", "a"]]]
    a, b, c, d = [["a"]], [["b", "b"]], [["c"], ["a", "a"]], [["d"]]
    assert typical_steps(steps, tokens) == [d, a, c, d]
    assert typical_steps(steps * 4, tokens) == [d, a, a, c, c, b, d, d]
    assert typical_steps([a], tokens) == [a] * 4
    # 10, 40 and 60 tokens took 1, 4 and 8 seconds; 50 lie between.
    tried = [d, a, b, d]
    assert _all_steps(steps, tried, [99.0, 1.0, 4.0, 8.0], tokens) == pytest.approx(4 + 1 + 8 + 6)


def test_a_report_without_a_plan_says_nothing_of_one(made: Path) -> None:
    assert "planned:" not in (made / "versions" / "v1" / "report.html").read_text(encoding="utf-8")
