"""What many tests share: the tiny model, made once, and workspaces on it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from treering import Workspace, registry
from treering.errors import TreeringError
from treering.testing import tiny_model, toy_rows

hypothesis.settings.register_profile("treering", deadline=None)  # No test fails by the clock.
hypothesis.settings.load_profile("treering")

QUICK: dict[str, Any] = {
    "bf16": False,
    "learning_rate": 1e-2,
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "eval": {"max_new_tokens": 4},
}
"""Settings of updates that only have to happen."""


def pytest_configure(config: pytest.Config) -> None:
    """Tests are of the processor wherever they run, but for those of `make gpu`."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Where everything was installed (`CI=true`), nothing may be missing: a test that is skipped fails."""
    report = yield
    if report.skipped and os.environ.get("CI") == "true":
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model and its tokenizer. Torch gets one thread: on so small a model a second one only costs time."""
    import torch

    torch.set_num_threads(1)
    return tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the threads that torch uses, until the test is over."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def workspace(tmp_path: Path, model_folder: Path) -> Callable[..., Workspace]:
    """Makes a workspace on the tiny model: `workspace("name", lora_rank=4)`."""

    def make(name: str = "ws", **settings: Any) -> Workspace:
        return Workspace.create(tmp_path / name, **{"model_name_or_path": str(model_folder), "bf16": False, **settings})

    return make


@pytest.fixture
def no_children(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process of its own would perform is performed in this one: another start of Python costs seconds.

    `test_forecast.py` and `test_automate.py` have the real ones.
    """
    from treering.automate import children
    from treering.automate.child import perform

    def run(order: dict[str, Any], why_stop: Callable[[], str | None]) -> children.Answer:
        try:
            return children.Answer(perform(Workspace(order["workspace"]), order))
        except TreeringError as error:
            return children.Answer(error=str(error), kind=type(error).__name__)

    monkeypatch.setattr(children, "run", run)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A workspace with v1 (pens) and v2 (cups), both promoted, and ten hats waiting. Only to be read or copied."""
    settings = {**QUICK, "model_name_or_path": str(model_folder)}
    ws = Workspace.create(tmp_path_factory.mktemp("made") / "ws", **settings)
    for task in ("pens", "cups"):
        ws.ingest(toy_rows(task, 20), task=task)
        version = ws.update()
        assert version is not None and version.promote
    ws.ingest(toy_rows("hats", 10), task="hats")
    root = ws.root
    del ws, version
    gc.collect()  # Closes the database, so that none of its files goes away while they are copied.
    return root


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose v1 and v2 were promoted, v2 last; who changes that puts it back, or takes a copy."""
    import torch

    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("served")
    ws = Workspace.create(
        folder / "ws",
        protect=["replay", "distill"],  # Plain adapters, which any server can load.
        model_name_or_path=str(tiny_model(folder / "model")),
        bf16=False,
        learning_rate=0.01,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        gate={"margin": 1.0, "floor": 1.0},
        serve={"max_batch_size": 4, "max_queue": 4, "max_body_bytes": 20_000, "max_loaded_versions": 2},
    )
    for task in ("a", "b"):
        ws.ingest(toy_rows(task), task=task)
        ws.update()
        ws.promote(registry.versions(ws)[-1].name, force=True)
    return ws
