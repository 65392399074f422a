"""What a version says of itself: where it comes from, what it learned, how it scored, what was decided."""

from __future__ import annotations

import math
import platform
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version as library_version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering.files import timestamp
from treering.gate import Verdict
from treering.metrics import Matrix, negative_flips
from treering.optimizers import EXTRAS, OPTIMIZERS
from treering.results import Result, task_scores
from treering.scoring import WHY, conditions, wanted

if TYPE_CHECKING:
    from treering.calibrate import Estimate
    from treering.candidate import Candidate
    from treering.config import Config
    from treering.methods.recall import Recall

LIBRARIES = ("accelerate", "peft", "safetensors", "tokenizers", "torch", "transformers", "treering")


def of_update(
    candidate: Candidate,
    before: Sequence[Result],
    after: Sequence[Result],
    verdict: Verdict,
    *,
    promote: bool,
    ordered: str | None,
    estimate: Estimate | None,
) -> dict[str, Any]:
    """The manifest of a finished update, all but what `registry.commit` adds.

    `promote`: whether that was wanted. `ordered`: when the loop ordered it. `estimate`: what `treering plan` had said
    of this very update.
    """
    plan, parent = candidate.plan, candidate.parent
    scores, parent_scores = task_scores(after, candidate.examples), task_scores(before)
    matrix = Matrix(**parent.manifest["matrix"]) if parent else Matrix([], [], [])
    matrix = matrix.extended(
        {task: found["score"] for task, found in parent_scores.items()},
        {task: found["score"] for task, found in scores.items()},
        plan.rows,
    )
    flips = negative_flips(
        {r.id: r.score for r in before if r.id not in plan.fresh_ids}, {r.id: r.score for r in after}
    )
    memory, gpu_memory = candidate.peaks
    return {
        "created": timestamp(),
        "parent": plan.parent,
        "base": {"name": base_name(candidate.config), "sha256": plan.base},
        "plan": plan.digest,
        "config": plan.config,
        "choices": _choices(candidate, after),
        "range_test": asdict(candidate.main.rate) if candidate.main.rate.before else None,
        "machine": {**plan.machine, "platform": platform.platform()},
        "libraries": {name: library_version(name) for name in libraries(candidate.config)},
        "rows": plan.rows,
        "aside": candidate.aside,
        "held_out": candidate.held_out,
        "metrics": candidate.metrics,
        "evaluation": conditions(candidate.config, candidate.root),
        "scores": scores,
        "parent_scores": parent_scores,
        "matrix": asdict(matrix),
        "summary": {**matrix.summary(), "negative_flips": None if math.isnan(flips) else flips},
        "verdict": verdict.as_dict(),
        "promote_wanted": promote,
        "ordered": ordered,
        "memory": candidate.memory.by_task(),
        "general": {"sha256": plan.general, "rows": len(candidate.general)} if plan.general else None,
        "written": _written(candidate),
        "cost": {
            "seconds": candidate.train_seconds,
            "total_seconds": time.perf_counter() - candidate.started,
            "steps": len(candidate.taken),
            "rows_trained": sum(len(ids) for step in candidate.taken for ids in step),
            "rows_written": sum(len(lesson.written.rows) for lesson in candidate.lessons),
            "trainable_parameters": candidate.trainable_parameters,
            "peak_memory_mb": memory,
            "peak_gpu_memory_mb": gpu_memory,
        },
        "estimate": asdict(estimate) if estimate else None,
    }


def of_adoption(adapter: Path, config: Config, base: str) -> dict[str, Any]:
    """The manifest of an adapter made elsewhere: nothing is known of what it was taught, so it has no scores."""
    return {
        "created": timestamp(),
        "parent": None,
        "base": {"name": base_name(config), "sha256": base},
        "plan": None,
        "source": str(adapter),
        "config": config.of_versions(),
        "rows": {},
        "held_out": {},
        "metrics": {},
        "evaluation": None,
        "scores": {},
        "matrix": asdict(Matrix([], [], [[]])),
        "summary": {},
        "verdict": Verdict(True, f"adopted from {adapter}", ()).as_dict(),
        "promote_wanted": True,
    }


def _of_fallback(past: Recall, after: Sequence[Result]) -> str:
    from treering.router import FAR

    if past.router is None or not past.falls_back:
        adopted = past.router is not None and not past.router.whole
        return "nobody knows what the adapter that was adopted has learned" if adopted else "set"
    far = f"farther than {FAR:g} standard deviations from all that was learned"
    like = "more like prompts about anything than like what was learned, or "
    if past.router.mistaken:
        like, far = "", f"{far}; some of what was learned is like prompts about anything"
    rows = Counter(result.task for result in after)
    lost = Counter(result.task for result in after if result.of_base)
    told = ", ".join(f"{count} of {rows[task]} of {task}" for task, count in sorted(lost.items())) or "none"
    return f"the base model answers what is {like}{far}; of the held-out rows it answered {told}"


def _choices(candidate: Candidate, after: Sequence[Result]) -> dict[str, dict[str, Any]]:
    """What was chosen automatically, and why; of lessons but the main one under the name of their expert."""
    from treering.model import precision, precision_name

    found, memory = candidate.main.choices, candidate.memory
    for lesson in candidate.lessons[1:]:
        found |= {f"{name}{lesson.of}": choice for name, choice in lesson.choices.items()}
    found |= {
        "precision": {"value": precision_name(candidate.config), "reason": precision(candidate.config)[1]},
        "memory": {
            "value": len(memory),
            "reason": f"size {memory.size}, {memory.policy}",
        },
    }
    if candidate.past is not None and candidate.past.router is not None:
        known = candidate.past.router.known
        found["recall"] = {
            "value": len(candidate.past.router.answers),
            "reason": f"labels; sharpness {known.sharpness:.2g} was best for labelled rows not yet learned",
        }
        found["fallback"] = {"value": candidate.past.falls_back, "reason": _of_fallback(candidate.past, after)}
    if candidate.taught:
        reasons = [f"{choice.expert}: {choice.reason}" for choice in candidate.taught]
        found["expert"] = {
            "value": ", ".join(choice.expert for choice in candidate.taught),
            "reason": "; ".join(reasons) if len(reasons) > 1 else candidate.taught[0].reason,
        }
    if candidate.merged.found:
        gone = [f"{kept} for {expert}" for expert, kept in candidate.merged.kept.items()]
        found["alike experts"] = {"value": ", ".join(gone) or "none", "reason": "; ".join(candidate.merged.found)}
    for task, metric in wanted(candidate.config, candidate.metrics).items():
        if task in candidate.plan.rows:
            reason = WHY[metric] if metric == candidate.metrics[task] else "eval.metrics names it"
            found[f"metric of {task}"] = {"value": metric, "reason": reason}
    return found


def _written(candidate: Candidate) -> dict[str, Any] | None:
    """What was replayed of the parent's hand: how many rows, which (by their hash), and how many answers."""
    from treering.written import digest

    rows = [id for lesson in candidate.lessons for id in lesson.written.rows]
    answers = sum(len(lesson.written.answers) for lesson in candidate.lessons)
    return {"rows": len(rows), "sha256": digest(rows), "answers": answers} if rows or answers else None


def libraries(config: Config) -> list[str]:
    """Those whose versions the weights may depend on."""
    chosen = {OPTIMIZERS[config.optim].partition(":")[0].partition(".")[0]} & EXTRAS.keys()
    return [*LIBRARIES, *sorted(chosen | ({"bitsandbytes"} if config.quantization_bit else set()))]


def base_name(config: Config) -> str:
    """The base model's name as settings say it, with the default filled in."""
    from treering.model import DEFAULT_MODEL

    return config.model_name_or_path or DEFAULT_MODEL
