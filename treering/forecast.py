"""`treering plan`: what the next update will do and need, and whether there is room for it."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering import errors, registry
from treering.errors import RoomError, TreeringError, full_disk_is_clear
from treering.files import write_json
from treering.progress import say
from treering.registry import TRIED
from treering.stop import Stop, stop_on_signals

if TYPE_CHECKING:
    from treering.calibrate import Estimate
    from treering.config import Config
    from treering.data.intake import Ingested
    from treering.plan import Plan
    from treering.workspace import Workspace

ESTIMATE = ".estimate.json"
"""The last estimate, with the digest of the plan it is of: the update of that plan keeps it beside what it took."""

SURELY = 1.25
"""An update is refused when this many times as much room would not do: estimates of memory are good to 20%."""

_WORDS = {"memory_mb": "memory", "gpu_memory_mb": "GPU memory", "disk_mb": "disk"}


@dataclass(frozen=True)
class Forecast:
    """What the next update will be: its plan, what it needs and what there is, both in MB, and what is short."""

    plan: Plan
    ingested: Ingested
    estimate: Estimate | None
    room: dict[str, float]
    problems: list[str]


def forecast(ws: Workspace, overrides: Iterable[str] = (), *, quiet: bool = False) -> Forecast:
    """Plan the next update, the inbox's rows included, and run it in miniature; nothing is changed but `ESTIMATE`.

    `estimate` is None where nothing is new. Raises what the update would, and `TreeringError` if the miniature failed.
    """
    from treering import general, launch
    from treering.data.intake import ingest
    from treering.model import fingerprint, resolve
    from treering.plan import make_plan, taken_up
    from treering.room import room

    config = ws.config(overrides := list(overrides))
    base = resolve(config.model_name_or_path, config.trust_remote_code)
    launch.check(config, ws.root)
    general.file(config, ws.root)
    with (
        ws.lock("plan", "update"),
        full_disk_is_clear(ws.root),
        stop_on_signals("nothing was changed") as stop,
        stop.at_once(),
        _trial(ws) as (trial, folder),
    ):
        taken = ingest(trial, config=config, quiet=quiet)
        plan = taken_up(ws, make_plan(trial, registry.current(ws), config, fingerprint(base)))
        space = room(ws.root)
        if not plan.rows:
            return Forecast(plan, taken, None, space, [])
        refuse(ws, base, config, None)
        write_json(folder / registry.PLAN, asdict(plan))
        if not quiet:
            say("trying a few steps of the update")
        estimate = _measured(ws, overrides, folder, stop, quiet)
        write_json(ws.root / ESTIMATE, {"plan": plan.digest, "machine": plan.machine, "estimate": asdict(estimate)})
        return Forecast(plan, taken, estimate, space, _short(estimate.needs, space, config))


def kept(ws: Workspace, plan: Plan) -> Estimate | None:
    """What `treering plan` said of this very plan on this machine, if it was asked."""
    from treering.calibrate import Estimate

    try:
        found = json.loads((ws.root / ESTIMATE).read_text(encoding="utf-8"))
        return Estimate(**found["estimate"]) if _is_of(found, plan) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def refuse(ws: Workspace, base: Path, config: Config, estimate: Estimate | None) -> None:
    """Raise `RoomError` if an update surely finds no room: by its estimate, or by the bare size of the base model."""
    from treering.room import room

    least, space = _least(base, config), room(ws.root)
    needs = dict(least)
    for name, wanted in (estimate.needs if estimate else {}).items():
        needs[name] = max(needs.get(name, 0.0), wanted / SURELY)
    bare = any(least[name] > space[name] for name in least)
    problems = _short(needs, space, config, bare)
    if problems:
        raise RoomError(
            "the update will not fit, however low its needs are reckoned, and was not begun: " + "; ".join(problems)
        )


@contextmanager
def _trial(ws: Workspace) -> Iterator[tuple[Workspace, Path]]:
    """The workspace with a catalog of its own, to try things on, and a folder that goes away; an update clears it."""
    with tempfile.TemporaryDirectory(dir=ws.versions, prefix=TRIED) as scratch:
        trial = copy.copy(ws)
        trial.catalog = ws.catalog.copy(Path(scratch) / "treering.db")
        yield trial, Path(scratch)


def _measured(ws: Workspace, overrides: list[str], folder: Path, stop: Stop, quiet: bool) -> Estimate:
    from treering.automate import children
    from treering.calibrate import Estimate

    order = {
        "workspace": str(ws.root),
        "step": "calibrate",
        "overrides": overrides,
        "folder": str(folder),
        "quiet": quiet,
    }
    with stop.patient():  # The child is waited for.
        answer = children.run(order, lambda: "asked to stop" if stop.asked else None)
    stop.check()
    if answer.error is not None:
        raise getattr(errors, answer.kind, TreeringError)(f"a few steps of the update were tried: {answer.error}")
    return Estimate(**answer.value)


def _is_of(found: dict[str, Any], plan: Plan) -> bool:
    return (found["plan"], found["machine"]) == (plan.digest, plan.machine)


def _least(base: Path, config: Config) -> dict[str, float]:
    """What no update of this base model can do without, in MB; true values are several times as large.

    Float32 files may be loaded as bfloat16, half their size. All weights learn as float32 with gradients as large, from
    files of float32 or less; their version may be half a file's size, their checkpoint is whole.
    """
    import torch

    files = sum(path.stat().st_size for path in base.glob("*.safetensors")) / 2**20
    of_whole_models = {"freeze": (0.5, 0.5), "norm": (0.5, 0.5), "osf": (0.5, 0.5), "full": (2.0, 1.5)}
    memory, disk = of_whole_models.get(config.finetuning_type, (0.5, 0.0))
    return {"gpu_memory_mb" if torch.cuda.is_available() else "memory_mb": memory * files, "disk_mb": disk * files}


def _short(needs: dict[str, float], space: dict[str, float], config: Config, bare: bool = False) -> list[str]:
    """What there is too little of, each with the way out; `bare`: even for the model alone."""
    return [
        f"{_WORDS[name]}: {needs[name]:,.0f} MB are needed, {space[name]:,.0f} MB are free; "
        + (_less_disk() if name == "disk_mb" else _less_memory(config, bare))
        for name in needs
        if needs[name] > space[name]
    ]


def _less_memory(config: Config, bare: bool) -> str:
    batch, judged = config.per_device_train_batch_size, config.eval.batch_size
    smaller = [f"set per_device_train_batch_size lower than {batch}", f"eval.batch_size lower than {judged}"]
    ways = ["take a smaller model"] if bare else smaller
    ways += ["finetuning_type: lora in a new workspace"] if config.finetuning_type in ("full", "freeze") else []
    return f"{', or '.join(ways)}, or end other programs"


def _less_disk() -> str:
    return "free some, or move the workspace"
