"""What training logs goes to experiment trackers as well: TensorBoard, MLflow, Weights & Biases, trackio."""

from __future__ import annotations

import importlib
import importlib.util
import os
import queue
import threading
import time
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
"""Seconds, and tries: by default MLflow waits minutes for a server that is gone."""

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
    """The trackers `names` of one run, each with a thread of its own: nobody waits for a server, nor for another."""

    def __init__(self, names: Sequence[str], run: Run) -> None:
        self._senders = [_Sender(name, run) for name in names]
        for sender in self._senders:
            sender.start()

    def log(self, entry: Mapping[str, float]) -> None:
        """Send an entry of the training log: all its values, at its `step`."""
        values = {name: value for name, value in entry.items() if name != "step"}
        for sender in self._senders:
            sender.entries.put((int(entry["step"]), values))

    def scores(self, results: Sequence[Result], step: int) -> None:
        """Send the score of each task (`score/<task>`, 0 to 1), at `step`."""
        self.log({"step": step, **{f"score/{task}": found["score"] for task, found in task_scores(results).items()}})

    def close(self, patience: float) -> None:
        """End the run, as far as it began; what is not sent after so many seconds is lost."""
        deadline = time.monotonic() + patience
        for sender in self._senders:
            sender.entries.put(None)
        for sender in self._senders:
            sender.join(max(0.0, deadline - time.monotonic()))
            if sender.is_alive():
                say(f"report_to: {sender.of} had not taken all after {patience:.0f} s; the update goes on without it")


class _Sender(threading.Thread):
    """Sends `entries` to one tracker, which begins with the first, until there is None.

    A tracker that fails is told of, and gets no more.
    """

    def __init__(self, of: str, run: Run) -> None:
        super().__init__(daemon=True)
        self.of, self._run = of, run
        self.entries = queue.SimpleQueue[tuple[int, Mapping[str, float]] | None]()

    def run(self) -> None:
        """What the thread does."""
        try:
            self._send()
        except Exception as error:
            reason = (str(error).strip().splitlines() or [""])[0]
            say(f"report_to: {self.of} failed ({type(error).__name__}: {reason[:300]}); the update goes on without it")

    def _send(self) -> None:
        tracker: Any = None
        for step, values in iter(self.entries.get, None):
            tracker = tracker or _begin(self.of, self._run, step)
            tracker.log(values, step=step)
        if tracker is not None:
            tracker.finish()


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
    """The tracker of that name, begun at `step` (what an earlier try sent from there on counts no more).

    A resumed training sends its log from the first step on, for nobody knows how much of it was taken before it ended.
    """
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
