"""What the gate says of a version today: by the policy as it is now, from the results that versions keep; no model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from treering import gate, registry
from treering.data.example import Example
from treering.errors import UsageError
from treering.gate import Verdict
from treering.registry import Version
from treering.results import PARENT_RESULTS, RESULTS, Result, read_best, read_results

if TYPE_CHECKING:
    from treering.config import Config
    from treering.workspace import Workspace


def rival(ws: Workspace, version: Version) -> Version | None:
    """What it is held against: the current version, or its parent where it is current itself; None: the base model."""
    here = registry.current(ws)
    if here is None or here.name != version.name:
        return here
    return registry.get(ws, version.parent) if version.parent else None


def judged(ws: Workspace, version: Version, config: Config) -> Verdict:
    """The verdict on `version` beside its `rival`, on the rows both were scored on.

    It is a hold where its parent is no longer current: it lacks what was learned since.
    Raises `UsageError` where it has no scores, or the two were scored in different ways.
    """
    other = rival(ws, version)
    if version.manifest["evaluation"] is None:
        raise UsageError(f"{version.name} has no scores: it is {version.summary}")
    version.check_files()
    before = _of(version, PARENT_RESULTS) if (other.name if other else None) == version.parent else []
    best = list[Result]()
    if other is not None and other.manifest["evaluation"] == version.manifest["evaluation"]:
        other.check_files()
        before = [*_of(other, RESULTS), *before]
        best = read_best(other.folder)
    against = other.name if other else "the base model"
    if not before and other is None:
        raise UsageError(
            f"{version.name} was measured beside its parent {version.parent}, and the base model is current: promote "
            f"{version.parent} first"
        )
    if not before:
        raise UsageError(
            f"{version.name} and {against} were not scored in the same way (settings of eval, or their metrics, "
            "differ), so nothing can be said of them without scoring again"
        )
    unknown = [task for task in (other.scores if other else ()) if task not in version.scores]
    if unknown:
        return gate.held_for(f"it was never measured on {', '.join(unknown)}, which {against} knows")
    known = registry.measured(other)
    fresh = {id for id in registry.measured(version) if id not in known}
    answers = {row["id"]: Example.of(row["messages"]).answer for row in ws.catalog.rows(sorted(fresh))}
    after = _of(version, RESULTS)
    verdict = gate.judge(before, after, version.manifest["metrics"], fresh, config.gate, config.seed, answers, best)
    here = registry.current(ws)
    if verdict.promote and here != version and (here.name if here else None) != version.parent:
        return replace(verdict, promote=False, summary=gate.held_for(gate.overtaken(version.parent)).summary)
    return verdict


def _of(version: Version, name: str) -> list[Result]:
    return read_results(version.folder / name)
