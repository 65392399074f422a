"""Trackers: what they are sent, over an interruption too; one that is gone costs its curves and nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from treering import Workspace
from treering.checkpoints import Checkpoints, Log
from treering.config import Config
from treering.errors import ConfigError, UpdateInterruptedError
from treering.registry import Version
from treering.testing import toy_rows
from treering.trackers import Run, Trackers

MakeWorkspace = Callable[..., Workspace]
SETTINGS: dict[str, Any] = {"max_steps": 4, "save_steps": 2, "eval": {"max_new_tokens": 2}, "gate": {"floor": 1.0}}
TERMS = ("loss", "grad_norm", "lr", "tokens_per_second")


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Version]:
    """Runs an update that is killed in its fourth step, after a checkpoint at the second, and runs it again.

    `between` is called in between.
    """

    def run(ws: Workspace, between: Callable[[], object] = lambda: None) -> Version:
        save, kill = Checkpoints.save, UpdateInterruptedError("killed")

        def killed(checkpoints: Checkpoints, log: Log) -> None:
            if len(log) == 4:
                raise kill
            save(checkpoints, log)

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", killed)
            with pytest.raises(UpdateInterruptedError):
                ws.update()
        between()
        version = ws.update()
        assert version is not None
        return version

    return run


def logged(version: Version) -> list[dict[str, float]]:
    return [json.loads(line) for line in (version.folder / "log.jsonl").read_text().splitlines()]


def in_tensorboard(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows of a run: the value at each step, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_tensorboard_has_every_step_once_and_the_scores(
    workspace: MakeWorkspace, interrupted: Callable[..., Version]
) -> None:
    ws = workspace(report_to="tensorboard", **SETTINGS)
    ws.ingest(toy_rows("pens", 40), task="pens")
    v1 = interrupted(ws)
    ws.promote("v1", force=True)
    ws.ingest(toy_rows("cups", 40), task="cups")
    v2 = ws.update()
    assert v2 is not None
    assert {path.name for path in (ws.root / "logs").iterdir()} == {"v1", "v2"}
    for version, extra in ((v1, ()), (v2, ("distill",))):
        found = in_tensorboard(ws.root / "logs" / version.name)
        assert set(found) == {*TERMS, *extra, *(f"score/{task}" for task in version.scores)}
        for term in (*TERMS, *extra):
            entries = {int(e["step"]): e[term] for e in logged(version) if term in e}
            assert found[term] == pytest.approx(entries, rel=1e-5)
        assert list(found["loss"]) == [1, 2, 3, 4]
        for task, score in version.scores.items():
            assert found[f"score/{task}"] == {4: pytest.approx(score)}


def test_a_resumed_training_sends_what_was_lost(workspace: MakeWorkspace, interrupted: Callable[..., Version]) -> None:
    ws = workspace(report_to="tensorboard", **SETTINGS)
    ws.ingest(toy_rows("pens", 40), task="pens")
    interrupted(ws, lambda: shutil.rmtree(ws.root / "logs"))
    assert list(in_tensorboard(ws.root / "logs" / "v1")["loss"]) == [1, 2, 3, 4]


def test_trackers_change_neither_bits_nor_plan(workspace: MakeWorkspace) -> None:
    versions = []
    for names in ([], ["tensorboard"]):
        ws = workspace(f"with-{len(names)}", report_to=names, **SETTINGS)
        ws.ingest(toy_rows("pens", 40), task="pens")
        versions.append(ws.update())
    one, other = versions
    assert one is not None and other is not None
    assert one.manifest["plan"] == other.manifest["plan"]
    weights = "adapter_model.safetensors"
    assert one.manifest["files"][weights] == other.manifest["files"][weights]


@pytest.mark.parametrize(
    ("value", "names"),
    [("none", ()), ([], ()), ("mlflow", ("mlflow",)), (["tensorboard", "wandb"], ("tensorboard", "wandb"))],
)
def test_report_to(value: object, names: tuple[str, ...]) -> None:
    assert Config.build({"report_to": value}).report_to == names


@pytest.mark.parametrize("value", ["tensorbord", ["none", "mlflow"], 3])
def test_a_wrong_report_to(value: object) -> None:
    with pytest.raises(ConfigError, match="report_to"):
        Config.build({"report_to": value})


def test_a_tracker_that_is_not_installed_is_told_before_anything_begins(workspace: MakeWorkspace) -> None:
    ws = workspace(report_to=["wandb"], **SETTINGS)
    ws.ingest(toy_rows("pens", 20), task="pens")
    with pytest.raises(ConfigError, match="report_to is wandb, but the package wandb cannot be imported"):
        ws.update()
    assert list(ws.versions.iterdir()) == []


def test_mlflow_with_nowhere_to_write_is_told_before_anything_begins(
    workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert importlib.util.find_spec("alembic") is None  # The extra has mlflow-skinny.
    ws = workspace(report_to=["mlflow"], **SETTINGS)
    ws.ingest(toy_rows("pens", 20), task="pens")
    with pytest.raises(ConfigError, match=r"nowhere to write to: .* Set MLFLOW_TRACKING_URI"):
        ws.update()
    assert list(ws.versions.iterdir()) == []


def test_a_server_that_is_gone_costs_no_update(
    workspace: MakeWorkspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:  # Bound and not listening: whoever connects is refused.
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        ws = workspace(report_to=["mlflow", "tensorboard"], **SETTINGS)
        ws.ingest(toy_rows("pens", 20), task="pens")
        version = ws.update()
    assert version is not None
    told = [line for line in capsys.readouterr().err.splitlines() if "report_to: mlflow failed" in line]
    assert len(told) == 1 and told[0].endswith("the update goes on without it")
    assert list(in_tensorboard(ws.root / "logs" / "v1")["loss"]) == [1, 2, 3, 4]


def test_nobody_waits_for_a_tracker_that_hangs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, hangs, steps = threading.Event(), threading.Event(), list[int]()

    class Takes:
        def log(self, _: Mapping[str, float], step: int) -> None:
            steps.append(step)

        def finish(self) -> None:
            steps.append(0)

    def begin(name: str, *_: Any) -> Takes:
        if name == "mlflow":
            begun.set()
            hangs.wait()
        return Takes()

    monkeypatch.setattr("treering.trackers._begin", begin)
    trackers = Trackers(["tensorboard", "mlflow"], Run("shop", "v1", "abc", tmp_path))
    for step in (1, 2):
        trackers.log({"step": float(step), "loss": 1.0})
    assert begun.wait(30)
    trackers.close(2)
    assert steps == [1, 2, 0]
    said = capsys.readouterr().err
    assert "report_to: mlflow had not taken all after 2 s; the update goes on without it" in said
    assert "tensorboard" not in said
    hangs.set()


def test_a_tracker_that_fails_on_the_way_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Fails:
        calls = 0

        def log(self, values: Mapping[str, float], step: int) -> None:
            self.calls += 1
            if step == 2:
                raise OSError("the disk is full")

    fails = Fails()
    monkeypatch.setattr("treering.trackers._begin", lambda *_: fails)
    trackers = Trackers(["tensorboard"], Run("shop", "v1", "abc", tmp_path))
    for step in (1, 2, 3):
        trackers.log({"step": float(step), "loss": 1.0})
    trackers.close(30)
    assert fails.calls == 2
    assert capsys.readouterr().err.count("report_to: tensorboard failed (OSError: the disk is full)") == 1


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real MLflow server on a free port, where `MLFLOW_TRACKING_URI` leads."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    store = ["--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}", "--artifacts-destination", str(tmp_path)]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(
            [os.environ["MLFLOW_PYTHON"], "-m", "mlflow", "server", "--port", str(port), "--workers", "1", *store],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            try:
                urllib.request.urlopen(f"{url}/health")
                break
            except urllib.error.URLError:
                time.sleep(0.5)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        yield url
    finally:
        os.killpg(process.pid, 15)
        process.wait()


@pytest.mark.mlflow
def test_a_real_mlflow_server_has_one_run_an_update(
    server: str, workspace: MakeWorkspace, interrupted: Callable[..., Version]
) -> None:
    from mlflow import MlflowClient

    ws = workspace(report_to="mlflow", **SETTINGS)
    ws.ingest(toy_rows("pens", 40), task="pens")
    version = interrupted(ws)
    client = MlflowClient(server)
    (experiment,) = client.search_experiments(filter_string=f"name = '{ws.root.name}'")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("v1", "FINISHED")
    assert set(run.data.metrics) == {*TERMS, "score/pens"}
    assert run.data.metrics["score/pens"] == pytest.approx(version.scores["pens"])
    found = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert found == pytest.approx({int(e["step"]): e["loss"] for e in logged(version)})
