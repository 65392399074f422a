"""What training logs goes to experiment trackers as well: TensorBoard, MLflow, Weights & Biases, trackio."""

from __future__ import annotations

import importlib
import importlib.util
import os
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering import registry
from treering.errors import ConfigError
from treering.progress import say
from treering.results import Result, task_scores

if TYPE_CHECKING:
    from treering.config import Config
    from treering.plan import Plan
    from treering.workspace import Workspace

_PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}
"""Seconds, and tries: by default MLflow waits minutes for a server that is gone, and training with it."""

_ENDED, _STOPPED = 30.0, 2.0
"""Seconds that an update waits for its trackers at its end, and where it was stopped."""


@dataclass(frozen=True)
class Run:
    """What trackers call one update: `name` in `project`; `id` is the same when it is resumed. `folder`: for files."""

    project: str
    name: str
    id: str
    folder: Path


class Trackers:
    """The trackers `names` of one run. They begin with its first entry; one that fails is told of and left out.

    A thread talks to them, so that training never waits for a server.
    """

    def __init__(self, names: Sequence[str], run: Run) -> None:
        self._waiting, self._run = list(names), run
        self._begun: dict[str, Any] = {}
        self._entries = queue.SimpleQueue[tuple[int, dict[str, float]] | None]()
        self._thread = threading.Thread(target=self._send_all, daemon=True)
        if names:
            self._thread.start()

    def log(self, entry: Mapping[str, float]) -> None:
        """Send an entry of the training log: all its values, at its `step`."""
        self._entries.put((int(entry["step"]), {name: value for name, value in entry.items() if name != "step"}))

    def scores(self, results: Sequence[Result], step: int) -> None:
        """Send the score of each task (`score/<task>`, 0 to 1), at `step`."""
        self.log({"step": step, **{f"score/{task}": found["score"] for task, found in task_scores(results).items()}})

    def close(self, patience: float) -> None:
        """End the run, as far as it began; what is not sent after so many seconds is lost."""
        self._entries.put(None)
        if self._thread.is_alive():
            self._thread.join(patience)
        if self._thread.is_alive():
            names = ", ".join([*self._waiting, *self._begun])
            say(f"report_to: {names} had not taken all after {patience:.0f} s; the update goes on without")

    def _send_all(self) -> None:
        for step, values in iter(self._entries.get, None):
            while self._waiting:
                with self._left_out_if_it_fails(name := self._waiting[0]):
                    self._begun[name] = _begin(name, self._run, step)
                self._waiting.pop(0)
            for name, tracker in list(self._begun.items()):
                with self._left_out_if_it_fails(name):
                    tracker.log(values, step=step)
        for name, tracker in list(self._begun.items()):
            with self._left_out_if_it_fails(name):
                tracker.finish()

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._begun.pop(name, None)
            reason = (str(error).strip().splitlines() or [""])[0]
            say(f"report_to: {name} failed ({type(error).__name__}: {reason[:300]}); the update goes on without it")


@contextmanager
def of_update(ws: Workspace, plan: Plan, config: Config) -> Iterator[Trackers]:
    """The trackers of the update that follows `plan`, ended at the end whatever happens."""
    run = Run(ws.root.name, registry.next_name(ws), plan.digest[:12], ws.root / "logs")
    trackers = Trackers(config.report_to, run)
    patience = _STOPPED
    try:
        yield trackers
        patience = _ENDED
    finally:
        trackers.close(patience)


def check(names: Sequence[str]) -> None:
    """Raise `ConfigError` if a tracker's package is not installed, or has nowhere to write to."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"report_to is {name}, but the package {name} cannot be imported ({error}): "
                f"install it (`pip install 'treering[trackers]'` has tensorboard and mlflow), or take it out"
            ) from None
    if "mlflow" in names and not os.environ.get("MLFLOW_TRACKING_URI") and importlib.util.find_spec("alembic") is None:
        raise ConfigError(
            "report_to is mlflow, but there is nowhere to write to: mlflow-skinny cannot write to a database itself. "
            "Set MLFLOW_TRACKING_URI to a server's address, or pip install mlflow to write to logs/mlflow.db"
        )


def _begin(name: str, run: Run, step: int) -> Any:
    """The tracker of that name, begun at `step` (what an earlier try sent from there on counts no more)."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    run.folder.mkdir(exist_ok=True)
    tracker = LOGGER_TYPE_TO_CLASS[name](**_ARGUMENTS[name](run, step))
    tracker.start()
    return tracker


def _tensorboard(run: Run, step: int) -> dict[str, Any]:
    return {"run_name": run.name, "logging_dir": run.folder, "purge_step": step}


def _mlflow(run: Run, _: int) -> dict[str, Any]:
    for variable, value in _PATIENCE.items():
        os.environ.setdefault(variable, value)
    import mlflow

    if not os.environ.get("MLFLOW_TRACKING_URI"):
        mlflow.set_tracking_uri(f"sqlite:///{run.folder / 'mlflow.db'}")
    earlier = mlflow.search_runs(
        experiment_names=[os.environ.get("MLFLOW_EXPERIMENT_NAME", run.project)],
        filter_string=f"tags.`treering.plan` = '{run.id}'",
        output_format="list",
    )
    return {
        "experiment_name": run.project,
        "run_id": earlier[0].info.run_id if earlier else None,
        "run_name": run.name,
        "tags": {"treering.plan": run.id},
    }


def _wandb(run: Run, _: int) -> dict[str, Any]:
    return {"run_name": run.project, "name": run.name, "id": run.id, "resume": "allow", "dir": str(run.folder)}


def _trackio(run: Run, _: int) -> dict[str, Any]:
    return {"run_name": run.project, "name": run.name, "resume": "allow"}


_ARGUMENTS = {"tensorboard": _tensorboard, "mlflow": _mlflow, "wandb": _wandb, "trackio": _trackio}
