"""READ FIRST: one update, from the inbox to `current`."""

from __future__ import annotations

import json
import math
import platform
import resource
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version as library_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering import registry
from treering.errors import UsageError, full_disk_is_clear
from treering.files import write_file
from treering.metrics import Matrix, negative_flips
from treering.registry import Version

if TYPE_CHECKING:
    from treering.candidate import Candidate
    from treering.config import Config
    from treering.gate import Verdict
    from treering.plan import Plan
    from treering.results import Result
    from treering.workspace import Workspace

LIBRARIES = ("accelerate", "peft", "safetensors", "tokenizers", "torch", "transformers", "treering")


@dataclass(frozen=True)
class Outcome:
    """How an update ended: `status` is `promoted`, `held`, `nothing new` or `planned` (a dry run)."""

    status: str
    reason: str
    version: Version | None = None
    plan: dict[str, Any] = field(default_factory=dict)


def update(
    ws: Workspace, overrides: Iterable[str] = (), *, promote: bool = True, dry_run: bool = False, quiet: bool = False
) -> Outcome:
    """Train a candidate on everything new, judge it, keep it as a version, make it current if it is no worse.

    With `promote=False` the candidate keeps its verdict and `current` stays. With `dry_run` nothing is written.
    """
    config = ws.config(overrides)
    with ws.lock("update", "update"), full_disk_is_clear(ws.root):
        from treering import gate
        from treering.candidate import Candidate
        from treering.data.intake import ingest
        from treering.model import fingerprint, resolve
        from treering.plan import clear, make_plan, stage
        from treering.train import stop_on_signals

        base = resolve(config.model_name_or_path, config.trust_remote_code)
        if not dry_run:
            ingest(ws, config=config, quiet=quiet)
        with ws.changing("update"):
            parent = registry.current(ws)
        plan = make_plan(ws, parent, config, fingerprint(base))
        tried = next((v for v in registry.versions(ws) if v.manifest["plan"] == plan.digest), None)
        if not dry_run and (tried is not None or not plan.rows):
            clear(ws)
        if not plan.rows:
            return Outcome("nothing new", "every training row has been learned; put new files into the inbox")
        if tried is not None:
            reason = f"{tried.name} was already made of these rows, this parent and these settings; {tried.summary}"
            return Outcome("held", reason, tried)
        if dry_run:
            return Outcome("planned", "nothing was written", plan=_plain(plan))
        plan, staging = stage(ws, plan)

        with stop_on_signals() as stop:
            try:
                candidate = Candidate(ws, plan, parent, base, config, staging, stop=stop, quiet=quiet)
                before = candidate.measure_parent()
                log = candidate.learn()
            except UsageError:
                registry.discard(staging)
                raise
            clear(ws, keep=staging)
            after = candidate.measure()
            candidate.remember()
            verdict = gate.judge(before, after, candidate.metrics, plan.fresh_ids, config.gate, config.seed)

            candidate.write(_base_name(config), after)
            with ws.changing("update"):
                here = registry.current(ws)
                if (here.name if here else None) != plan.parent:
                    verdict = gate.held_for(f"its parent {plan.parent or 'the base model'} is no longer current")
                moved = len(set(plan.row_ids) & {id for ids in ws.catalog.held_out().values() for id in ids})
                if moved:
                    verdict = gate.held_for(f"{moved} of its rows were held out while it ran")
                version = _commit(ws, candidate, before, after, verdict, log, promote)
                registry.discard(staging)
                if verdict.promote and promote:
                    registry.promote(ws, version)
    return Outcome("promoted" if verdict.promote and promote else "held", verdict.summary, version)


def adopt(ws: Workspace, adapter: Path, config: Config) -> Version:
    """Make an existing PEFT folder v1 and current; nothing is known of what it was taught, so it has no scores."""
    from treering import gate
    from treering.model import fingerprint, load_base, resolve

    base = resolve(config.model_name_or_path, config.trust_remote_code)
    staging = ws.versions / ".staging-adopted"
    registry.discard(staging)
    staging.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(adapter / name, staging / name)
    _loads(load_base(base, config), staging)
    manifest = {
        "created": _now(),
        "parent": None,
        "base": {"name": _base_name(config), "sha256": fingerprint(base)},
        "plan": None,
        "source": str(adapter),
        "config": config.model_dump(mode="json"),
        "rows": {},
        "held_out": {},
        "metrics": {},
        "evaluation": None,
        "scores": {},
        "matrix": asdict(Matrix([], [], [[]])),
        "summary": {},
        "verdict": gate.Verdict(True, f"adopted from {adapter}", ()).as_dict(),
        "promote_wanted": True,
    }
    version = registry.commit(ws, staging, manifest)
    registry.promote(ws, version)
    return version


def _commit(
    ws: Workspace,
    candidate: Candidate,
    before: Sequence[Result],
    after: Sequence[Result],
    verdict: Verdict,
    log: Sequence[dict[str, float]],
    promote: bool,
) -> Version:
    """Add report and manifest to what the candidate wrote, and make the version appear under its name."""
    from treering import report
    from treering.results import task_scores

    plan, parent, config = candidate.plan, candidate.parent, candidate.config
    scores, parent_scores = task_scores(after), task_scores(before)
    matrix = Matrix(**parent.manifest["matrix"]) if parent else Matrix([], [], [])
    matrix = matrix.extended(
        {task: found["score"] for task, found in parent_scores.items()},
        {task: found["score"] for task, found in scores.items()},
        plan.rows,
    )
    flips = negative_flips(
        {r.id: r.score for r in before if r.id not in plan.fresh_ids}, {r.id: r.score for r in after}
    )
    manifest = {
        "created": _now(),
        "parent": plan.parent,
        "base": {"name": _base_name(config), "sha256": plan.base},
        "plan": plan.digest,
        "config": plan.config,
        "choices": candidate.choices,
        "machine": {**plan.machine, "platform": platform.platform()},
        "libraries": {name: library_version(name) for name in LIBRARIES},
        "rows": plan.rows,
        "held_out": candidate.held_out,
        "metrics": candidate.metrics,
        "evaluation": candidate.evaluation,
        "scores": scores,
        "parent_scores": parent_scores,
        "matrix": asdict(matrix),
        "summary": {**matrix.summary(), "negative_flips": None if math.isnan(flips) else flips},
        "verdict": verdict.as_dict(),
        "promote_wanted": promote,
        "memory": candidate.memory.by_task(),
        "cost": {
            "seconds": candidate.train_seconds,
            "steps": len(candidate.steps),
            "rows_trained": sum(len(ids) for step in candidate.steps for ids in step),
            "trainable_parameters": candidate.trainable_parameters,
            "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        },
    }
    report.write(candidate.folder, registry.next_name(ws), manifest, log)
    return registry.commit(ws, candidate.folder, manifest)


def _loads(model: Any, adapter: Path) -> None:
    """Raise `VersionError` if `adapter` does not fit `model`."""
    from peft import PeftModel

    from treering.errors import VersionError

    try:
        PeftModel.from_pretrained(model, str(adapter))
    except Exception as error:
        registry.discard(adapter)
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise VersionError(f"the adapter does not fit the base model: {first}") from None


def _plain(plan: Plan) -> dict[str, Any]:
    return {
        "parent": plan.parent,
        "rows": {task: len(ids) for task, ids in plan.rows.items()},
        "held_out": {task: len(ids) for task, ids in plan.fresh.items()},
        "machine": plan.machine,
        "config": plan.config,
    }


def _base_name(config: Config) -> str:
    from treering.model import DEFAULT_MODEL

    return config.model_name_or_path or DEFAULT_MODEL


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
