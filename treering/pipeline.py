"""READ FIRST: one update, from the inbox to `current`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from treering import registry, report
from treering.errors import ModelError, UsageError, VersionError, full_disk_is_clear, short_memory_is_clear
from treering.manifest import base_name, of_update
from treering.progress import say
from treering.registry import Version
from treering.stop import stop_on_signals

if TYPE_CHECKING:
    from treering.calibrate import Estimate
    from treering.candidate import Candidate
    from treering.config import Config
    from treering.data.intake import Ingested
    from treering.gate import Verdict
    from treering.plan import Plan
    from treering.results import Result
    from treering.workspace import Workspace


@dataclass(frozen=True)
class Outcome:
    """How an update ended: `status` is `promoted`, `held` or `nothing new`."""

    status: str
    reason: str
    version: Version | None = None
    ingested: Ingested | None = None


def update(
    ws: Workspace,
    overrides: Iterable[str] = (),
    *,
    promote: bool = True,
    inbox: bool = True,
    file: str | None = None,
    rolled_back: bool = True,
    ordered: str | None = None,
    quiet: bool = False,
) -> Outcome:
    """Train a candidate on everything new, judge it, keep it as a version, make it current if it is no worse.

    With `promote=False` the candidate keeps its verdict and `current` stays. With `inbox=False` only rows that were
    ingested before are new, with `file` only those that came from that file, and with `rolled_back=False` none that a
    rollback gave back. `ordered`: when the loop that updates by itself ordered it, which the version says then. Raises
    `RoomError` where memory or disk will surely not do.
    """
    config = ws.config(overrides)
    with (
        ws.lock("update", "update"),
        full_disk_is_clear(ws.root),
        short_memory_is_clear(),
        stop_on_signals() as stop,
        stop.at_once(),
    ):
        from treering import forecast, gate, trackers
        from treering.candidate import Candidate
        from treering.data.intake import ingest
        from treering.model import fingerprint, resolve
        from treering.plan import clear, give_up, make_plan, stage, taken_up

        _check_surroundings(ws, config)
        base = resolve(config.model_name_or_path, config.trust_remote_code)
        taken = ingest(ws, config=config, quiet=quiet) if inbox else None
        with stop.patient(), ws.changing("update"):
            parent = registry.current(ws)
        without = frozenset() if rolled_back else registry.given_back(ws)
        plan = make_plan(ws, parent, config, fingerprint(base), file, without)
        with stop.patient():
            done = _nothing_to_train(ws, plan, promote)
        if done is not None:
            return replace(done, ingested=taken)
        newest, plan = plan, taken_up(ws, plan)
        estimate = forecast.kept(ws, plan)
        forecast.refuse(ws, base, config, estimate)
        staging = stage(ws, plan)
        later = len(newest.row_ids) - len(plan.row_ids)
        stop.check()

        try:
            candidate = Candidate(ws, plan, parent, base, config, staging, stop=stop, quiet=quiet)
            before = candidate.measure_parent()
            candidate.prepare()
        except (UsageError, ModelError, VersionError):
            give_up(staging)
            raise
        candidate.choose_rate()
        with trackers.of_update(ws, plan, config) as tracked:
            log = candidate.learn(tracked.log)
            candidate.merge_alike()
            clear(ws, keep=staging)
            after = candidate.measure()
            tracked.scores(after, len(candidate.taken))
        candidate.remember()
        answers = {id: candidate.examples[id].answer for id in plan.fresh_ids}
        best = candidate.best()
        verdict = gate.judge(before, after, candidate.metrics, plan.fresh_ids, config.gate, config.seed, answers, best)

        best = gate.best_of(best, after, config.gate, config.seed)
        candidate.write(base_name(config), after, best, log)
        with stop.patient():
            version, verdict = _commit(ws, candidate, before, after, verdict, log, promote, ordered, estimate)
            _prune(ws, config)
            status = "promoted" if verdict.promote and promote else "held"
            resumed = f"; it was resumed, and {later} newer rows wait for the next update" if later else ""
            return Outcome(status, verdict.summary + resumed, version, ingested=taken)


def _commit(
    ws: Workspace,
    candidate: Candidate,
    before: Sequence[Result],
    after: Sequence[Result],
    verdict: Verdict,
    log: Sequence[dict[str, float]],
    promote: bool,
    ordered: str | None,
    estimate: Estimate | None,
) -> tuple[Version, Verdict]:
    """Make the candidate a version, and current if it is to be; the verdict is that on what is there by now."""
    with ws.changing("update"):
        verdict = _still_valid(ws, candidate.plan) or verdict
        manifest = of_update(candidate, before, after, verdict, promote=promote, ordered=ordered, estimate=estimate)
        report.write(candidate.folder, registry.next_name(ws), manifest, log)
        version = registry.commit(ws, candidate.folder, manifest)
        if verdict.promote and promote:
            registry.promote(ws, version)
        registry.discard(candidate.staging)
    return version, verdict


def _prune(ws: Workspace, config: Config) -> None:
    """Leave only the records of versions that the settings do not keep; the update is done, whatever comes of it."""
    from treering.prune import prune

    if config.keep_versions is not None:
        try:
            prune(ws, config.keep_versions)
        except VersionError as error:
            say(f"{error}; so not all older versions were pruned")


def _check_surroundings(ws: Workspace, config: Config) -> None:
    """Raise `ConfigError` where something outside of the settings that they name is not there, before a row is read."""
    from treering import general, launch, trackers

    trackers.check(config.report_to)
    launch.check(config, ws.root)
    general.file(config, ws.root)


def _nothing_to_train(ws: Workspace, plan: Plan, promote: bool) -> Outcome | None:
    """How the update ends if it need not train: nothing new, or done before. None: train."""
    from treering.plan import clear

    if not plan.rows:
        clear(ws)
        return Outcome("nothing new", "every training row has been learned; put new files into the inbox")
    tried = next((v for v in registry.readable(ws) if v.manifest["plan"] == plan.digest and not v.overtaken), None)
    if tried is None:
        return None
    clear(ws)
    was_current = any(event["version"] == tried.name for event in registry.history(ws))
    if promote and tried.promote and not was_current:  # Kept by an earlier update that was not to promote.
        if tried.pruned:
            return None
        with ws.changing("update"):
            registry.promote(ws, tried)
        return Outcome("promoted", tried.summary, tried)
    made = f"{tried.name} was already made of these rows, this parent and these settings"
    if was_current:
        return Outcome(
            "held", f"{made}, and rolled back: `treering promote {tried.name}` makes it current again", tried
        )
    return Outcome("held", f"{made}; {tried.summary}", tried)


def _still_valid(ws: Workspace, plan: Plan) -> Verdict | None:
    """A hold for what happened while the update ran, or None."""
    from treering import gate

    here = registry.current(ws)
    if (here.name if here else None) != plan.parent:
        return gate.held_for(gate.overtaken(plan.parent))
    moved = len(set(plan.row_ids) & {id for ids in ws.catalog.held_out().values() for id in ids})
    return gate.held_for(f"{moved} of its rows were held out while it ran") if moved else None
