"""Processes started by accelerate and by Ray: the same training as in one, whatever ends any of them."""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.training import Run, same_bits, settings
from treering import Workspace, launch, registry, worker
from treering.answers import Answerer
from treering.data.example import Message
from treering.errors import ConfigError, TreeringError, UpdateInterruptedError
from treering.forecast import forecast
from treering.handover import Handover
from treering.model import with_prompts
from treering.recovery import LossError
from treering.stop import Stop
from treering.testing import toy_rows
from treering.worker import WANTED

MUST = os.environ.get("CI") == "true"
STEPS = 200
"""Enough of them that one is under way when something is done to it."""

TRAINING: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 1e-3, "save_steps": 10, "processes": 2}
DEADLINE = 300.0


FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
mixed_precision: 'no'
num_machines: 1
fsdp_config:
  fsdp_version: 2
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_reshard_after_forward: true
  fsdp_cpu_ram_efficient_loading: false
"""


class Training:
    """One training on the tiny model, by processes."""

    def __init__(self, model: Path, folder: Path, launcher: str, **values: Any) -> None:
        self.folder, self.entries = folder, list[dict[str, Any]]()
        self.stop = Stop()
        run = Run(model, settings(model, launcher=launcher, per_device_train_batch_size=4, **{**TRAINING, **values}))
        self.checkpoints = folder / "checkpoints"
        self.handover = Handover(run.config, model, None, run.rows, run.steps, run.pad_id, 1, self.checkpoints)

    def train(self, stop_at: int = 0) -> list[Any]:
        def track(entry: Any) -> None:
            self.entries.append(entry)
            if int(entry["step"]) == stop_at:
                self.stop.ask()  # As a signal does in an update: the processes are waited for all the same.

        self.stop.asked = False
        with self.stop.at_once():
            return launch.train(
                self.handover, self.folder / "processes", self.folder, stop=self.stop, track=track, quiet=True
            )

    @property
    def weights(self) -> dict[str, Tensor]:
        tensors = load_file(self.checkpoints / f"step-{STEPS}" / "state.safetensors")
        return {name: tensor for name, tensor in tensors.items() if name.startswith("weight.")}


@pytest.fixture(scope="module")
def training(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """Two processes of accelerate's, stopped in the middle and resumed."""
    made = Training(model_folder, tmp_path_factory.mktemp("accelerate"), "accelerate")
    with pytest.raises(UpdateInterruptedError):
        made.train(stop_at=20)
    stopped = max(int(path.name.removeprefix("step-")) for path in made.checkpoints.glob("step-*"))
    assert 20 <= stopped < STEPS
    assert all(trained.peak_memory_mb > 10 for trained in made.train())
    assert [entry["step"] for entry in made.entries[-(STEPS - stopped) :]] == list(range(stopped + 1, STEPS + 1))
    return made


def holding(folder: Path) -> list[psutil.Process]:
    """The processes that look whether they are wanted: those that train, and what started them at Ray's."""
    found = []
    for process in psutil.process_iter():
        try:
            if any(file.path == str(folder / WANTED) for file in process.open_files()):
                found.append(process)
        except (psutil.AccessDenied, psutil.NoSuchProcess):
            pass
    return [process for process in found if process.pid != os.getpid()]


def until(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + DEADLINE
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def test_accelerate_teaches_what_one_process_does(training: Training, model_folder: Path) -> None:
    alone = Run(model_folder, settings(model_folder, **{**TRAINING, "processes": 1}, per_device_train_batch_size=8))
    losses = [entry["loss"] for entry in alone.train()]
    found = {int(entry["step"]): entry["loss"] for entry in training.entries}
    assert sorted(found) == list(range(1, STEPS + 1))
    assert [found[step] for step in range(1, 21)] == pytest.approx(losses[:20], rel=1e-4)
    assert losses[-1] < 0.5 * losses[0]
    for name, weight in alone.weights().items():
        torch.testing.assert_close(training.weights[f"weight.{name}"], weight, rtol=0.02, atol=2e-3)


@pytest.mark.soak
def test_ray_starts_the_workers_again(training: Training, model_folder: Path, tmp_path: Path) -> None:
    """One is killed in the middle; they go on from the checkpoint, to the bits of two that nobody killed."""
    if not MUST:
        pytest.importorskip("ray.train.torch")
    made = Training(model_folder, tmp_path, "ray")
    killed: list[int] = []

    def kill() -> None:
        until(lambda: (made.checkpoints / "step-20").exists())
        (worker, *_) = [p for p in holding(tmp_path) if any(f.path.endswith("/writing") for f in p.open_files())]
        worker.send_signal(signal.SIGKILL)
        killed.append(worker.pid)

    killer = threading.Thread(target=kill)
    killer.start()
    assert len(made.train()) == 2
    killer.join()
    assert len(killed) == 1
    steps = [int(entry["step"]) for entry in made.entries]
    again = [step for before, step in itertools.pairwise(steps) if step <= before]
    assert len(again) <= 1 and steps[0] == 1 and steps[-1] == STEPS  # Not begun anew, and no step left out.
    assert set(steps) == set(range(1, STEPS + 1)) and all(step > 10 for step in again)
    assert same_bits(made.weights, training.weights)
    until(lambda: not holding(tmp_path))


@pytest.fixture
def waiting(workspace: Callable[..., Workspace]) -> Workspace:
    """A workspace with a version, and rows for the next, which replays and distils."""
    ws = workspace(
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        protect=["replay", "distill", "lwf"],
        eval={"max_new_tokens": 4},
        max_steps=4,
        gate={"margin": 1.0, "floor": 1.0},
    )
    ws.ingest(toy_rows("pens", 20), task="pens")
    assert ws.update() is not None
    ws.ingest(toy_rows("cups", 21), task="cups")
    return ws


@pytest.mark.soak
def test_an_update_survives_its_death(waiting: Workspace) -> None:
    """Killed while its processes train, it leaves none of them; the next one resumes, with all that methods add."""
    settings = ["max_steps=60", "save_steps=5"]
    spread = [*settings, "per_device_train_batch_size=4"]
    options = ["--launcher", "accelerate", "--processes", "2", "-w", str(waiting.root)]
    command = [sys.executable, "-c", "from treering.cli import main; main()", "update", *spread, *options]
    process = subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    (staging,) = until(lambda: [path.parent for path in waiting.versions.glob(".staging-*/wanted")])
    until(lambda: (staging / "checkpoints" / "step-5").exists())
    process.kill()
    process.wait()
    until(lambda: not holding(staging))
    assert len(list(waiting.versions.glob("v*"))) == 1

    spread += ["launcher=accelerate", "processes=2"]
    planned = forecast(waiting, spread, quiet=True).estimate
    assert planned is not None and planned.steps == 60
    # In a process of its own, as its own memory counts.
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, 2), done.stderr
    version = registry.versions(waiting)[-1]
    assert {key: version.manifest["machine"][key] for key in ("launcher", "processes")} == {
        "launcher": "accelerate",
        "processes": 2,
    }
    cost = version.manifest["cost"]
    assert cost["steps"] == 60 and cost["rows_trained"] == planned.rows_trained
    assert cost["peak_memory_mb"] == pytest.approx(planned.peak_memory_mb, rel=0.4)  # That of three processes.
    assert version.manifest["estimate"]["steps"] == 60 and version.manifest["config"]["processes"] == 2
    waiting.rollback()
    alone = waiting.update(*settings)
    assert alone is not None and alone.name == "v3"
    logs = [[json.loads(line) for line in (v.folder / "log.jsonl").read_text().splitlines()] for v in (version, alone)]
    for name in ("loss", "distill", "lwf"):
        found, wanted = ([entry.get(name, 0.0) for entry in log[:10]] for log in logs)
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5) and any(wanted)


@pytest.mark.soak
def test_a_signal_keeps_where_the_processes_are(waiting: Workspace) -> None:
    command = [
        sys.executable,
        "-c",
        "from treering.cli import main; main()",
        "update",
        "max_steps=400",
        "save_steps=200",
    ]
    command += ["per_device_train_batch_size=4", "--launcher", "accelerate", "--processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, "-w", str(waiting.root)], env=environment, stderr=subprocess.PIPE, text=True)
    (staging,) = until(lambda: [path.parent for path in waiting.versions.glob(".staging-*/wanted")])
    until(lambda: (staging / "checkpoints" / "step-0").exists() and list(staging.glob("processes/log.jsonl")))
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 1 and "stopped as asked" in said
    until(lambda: not holding(staging))
    (kept,) = {int(path.name.removeprefix("step-")) for path in staging.glob("checkpoints/step-*")} - {0}
    assert 0 < kept < 200


@pytest.mark.soak
def test_what_processes_made_serves_and_goes_on(workspace: Callable[..., Workspace]) -> None:
    """With the protection that is the default, which answers with what is remembered of earlier versions."""
    ws = workspace(launcher="accelerate", processes=2, max_steps=4, gate={"margin": 1.0, "floor": 1.0})
    for name, task in (("v1", "pens"), ("v2", "cups")):
        ws.ingest(toy_rows(task, 40), task=task)
        made = ws.update()
        assert made is not None and made.name == name
        assert made.manifest["config"]["processes"] == 2
    assert "recall" in ws.config().protect
    assert len(Answerer(ws, made).answer([[Message("user", "pens 1")]])) == 1


def test_processes_asked_before_their_first_step(model_folder: Path, tmp_path: Path) -> None:
    """They have nothing to keep: nobody waits until they have started."""
    made = Training(model_folder, tmp_path, "accelerate")

    def ask() -> None:
        until(lambda: (tmp_path / "processes" / "accelerate.yaml").exists())
        made.stop.asked = True  # From a thread it cannot be more.

    watch = threading.Thread(target=ask)
    watch.start()
    with pytest.raises(UpdateInterruptedError):
        made.train()
    watch.join()
    assert not list(made.checkpoints.glob("step-[1-9]*"))
    until(lambda: not holding(tmp_path))


def test_a_training_as_files_is_the_same(model_folder: Path, tmp_path: Path) -> None:
    run = Run(model_folder, settings(model_folder))
    rows = {id: with_prompts(row) if at % 2 else row for at, (id, row) in enumerate(run.rows.items())}
    given = Handover(run.config, model_folder, None, rows, run.steps, run.pad_id, 1, tmp_path / "checkpoints")
    given.save(tmp_path)
    found = Handover.load(tmp_path)
    assert found == given and any(row.prompts for row in found.rows.values())


@pytest.mark.soak
def test_what_the_processes_raise_is_raised(model_folder: Path, tmp_path: Path) -> None:
    """With weights in shards, as a file of accelerate's has it."""
    (tmp_path / "fsdp.yaml").write_text(FSDP)
    values = {"accelerate_config": "fsdp.yaml", "max_steps": 12, "learning_rate": 1e30}
    made = Training(model_folder, tmp_path, "accelerate", **values)
    launch.check(made.handover.config, tmp_path)
    with pytest.raises(LossError, match=r"at step .*max_loss_retries is 3"):
        made.train()
    assert len(json.loads((made.checkpoints / "recovery.json").read_text())["retries"]) == 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"launcher": "rey"}, r"launcher: unknown name, did you mean 'ray'\?; known: local, accelerate, ray"),
        ({"launcher": "ray", "processes": 0}, r"processes: .*greater than or equal to 1 \(got 0\)"),
        ({"processes": 2}, "processes is 2, but launcher is local, which has one: set launcher: accelerate"),
        ({"launcher": "ray", "accelerate_config": "a.yaml"}, "accelerate_config is a.yaml, but launcher is ray"),
    ],
)
def test_wrong_settings(model_folder: Path, values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(model_folder, **values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "accelerate_config is a.yaml, but there is no file .*a.yaml; write it with `accelerate config"),
        ("distributed_type: DEEPSPEED", "has distributed_type DEEPSPEED; treering trains with MULTI_GPU"),
        ("distributed_type: MULTI_GPU\nnum_machines: 2", "has num_machines 2; across machines take launcher: ray"),
        (
            "distributed_type: MULTI_GPU\nmixed_precision: bf16",
            "has mixed_precision bf16; set mixed_precision: 'no' there",
        ),
        (
            "distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}",
            "has fsdp_version 1 in fsdp_config; set fsdp_version: 2",
        ),
        (FSDP, "has FSDP, but optim is muon, which does not go with it: set optim: adamw_torch"),
    ],
)
def test_wrong_files_of_accelerate(workspace: Callable[..., Workspace], text: str | None, words: str) -> None:
    ws = workspace()
    if text:
        (ws.root / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=words):
        ws.update(launcher="accelerate", accelerate_config="a.yaml", optim="muon")


def test_ray_that_is_not_installed(workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray.train.torch", None)
    with pytest.raises(
        ConfigError, match=r"launcher is ray, but ray.train.torch is not .*pip install 'treering\[ray\]'"
    ):
        workspace().update(launcher="ray")


def test_another_number_of_processes_starts_over(workspace: Callable[..., Workspace]) -> None:
    from treering import registry
    from treering.plan import make_plan, stage, taken_up

    ws = workspace()
    ws.ingest(toy_rows("cups", 10), task="cups")

    def plan(*overrides: str) -> Any:
        return make_plan(ws, registry.current(ws), ws.config(overrides), "base")

    two = plan("launcher=accelerate", "processes=2")
    stage(ws, two)
    assert taken_up(ws, two) == two
    for overrides in (["launcher=accelerate", "processes=3"], ["launcher=ray", "processes=2"], []):
        other = plan(*overrides)
        assert taken_up(ws, other) == other != two


def test_a_worker_that_dies_without_a_word(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Training(model_folder, tmp_path, "accelerate")
    monkeypatch.setattr(launch, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(TreeringError, match=r"launcher: accelerate, exit code 3\), number 1, 2 died; .*to resume"):
        made.train()

    def full(path: Path, _: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", path)

    monkeypatch.setattr(launch, "write_file", full)  # A full disk keeps them from saying so.
    with pytest.raises(TreeringError, match=r"cannot write to .*Free some space"):
        launch._outcome(tmp_path, made.handover.config, 1)


def test_a_worker_that_cannot_note_how_it_ended_says_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, _: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", path)

    def begin(_: Path) -> None:
        raise TreeringError("cannot write to it: no space is left")

    monkeypatch.setattr(worker, "write_json", full)
    monkeypatch.setattr(worker, "wanted", begin)
    worker.work(tmp_path)
    said = (
        "treering: process 1 cannot note how it ended (No space left on device): cannot write to it: no space is left"
    )
    assert capsys.readouterr().err.splitlines() == [said]
