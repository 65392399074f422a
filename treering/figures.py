"""What came of a version on trial: counted by the server into `canary.jsonl`, summed up and compared here.

A line is what one arm did in a minute or so. Arms: `canary` (answered by the version on trial), `control` (answered
by `current` meanwhile) and `shadow` (asked of the version on trial, not sent).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from treering import canary, feedback
from treering.errors import TreeringError
from treering.files import append_line, whole_lines

if TYPE_CHECKING:
    from treering.workspace import Workspace

FILE = "canary.jsonl"

Arm = Literal["canary", "control", "shadow"]

STEP = 1.1
"""Ratio of the bounds of a bin of seconds: a quantile is known to five percent."""

LATE = timedelta(hours=1)
"""Feedback that came so long after the last answer still counts."""

CERTAIN = 0.05


class Line(BaseModel):
    """What one arm did from `start` to `end`."""

    model_config = ConfigDict(extra="forbid")

    version: str
    """The version on trial."""
    mode: canary.Mode
    arm: Arm
    by: str
    """The version that answered."""
    start: datetime
    end: datetime
    requests: int = 0
    errors: int = 0
    """Requests that failed; in the canary those that current had to answer, as well."""
    dropped: int = 0
    """Requests that were not sent to the shadow, or cut off there, because users needed the engine."""
    seconds: float = 0.0
    bins: dict[int, int] = {}
    """How many requests took between `STEP ** (n - 1)` and `STEP ** n` milliseconds, by n."""
    completion_tokens: int = 0
    compared: int = 0
    agreed: int = 0
    f1: float = 0.0
    """Sum over what was compared."""

    def count(self, seconds: float, tokens: int = 0, failed: bool = False) -> None:
        """One request more."""
        self.requests += 1
        self.errors += failed
        self.completion_tokens += tokens
        self.seconds += seconds
        at = math.ceil(math.log(max(1000 * seconds, 1), STEP))
        self.bins[at] = self.bins.get(at, 0) + 1


class Sum(BaseModel):
    """What an arm did in all. Shares are None where nothing was counted."""

    mode: canary.Mode
    arm: Arm
    versions: list[str]
    """Those that answered."""
    requests: int
    errors: int
    dropped: int
    seconds_mean: float | None
    seconds_p95: float | None
    completion_tokens: int
    compared: int
    agreement: float | None
    f1: float | None
    up: int
    down: int


class Comparison(BaseModel):
    """The version on trial against current: the share of `what` in both, and in words what that shows."""

    mode: canary.Mode
    what: Literal["errors", "thumbs down"]
    candidate: float
    control: float
    p: float
    words: str

    @property
    def worse(self) -> bool:
        """Whether the version on trial is shown to do worse."""
        return self.p < CERTAIN and self.candidate > self.control


class Figures(BaseModel):
    """All that is known of a version on trial."""

    arms: list[Sum] = []
    comparisons: list[Comparison] = []


def append(ws: Workspace, line: Line) -> None:
    """Keep it."""
    with ws.changing("canary figures"):
        append_line(ws.root / FILE, line.model_dump(mode="json", exclude_defaults=True))


def read(ws: Workspace, version: str) -> list[Line]:
    """What was counted while `version` was on trial, oldest first. Raises `TreeringError` for a damaged file."""
    path = ws.root / FILE
    found = []
    for number, text in whole_lines(path):
        try:
            found.append(Line.model_validate_json(text))
        except ValidationError as error:
            first = error.errors()[0]["msg"]
            raise TreeringError(f"{path}, line {number} is damaged ({first}); restore the file from a backup") from None
    return [line for line in found if line.version == version]


def figures(ws: Workspace, version: str) -> Figures:
    """Sum up what is known of `version`, over all its trials, with what users said of the answers meanwhile."""
    lines = read(ws, version)
    groups: dict[tuple[canary.Mode, Arm], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.mode, line.arm), []).append(line)
    said = feedback.read(ws) if lines else []
    arms = [_sum(group, said) for _, group in sorted(groups.items())]
    return Figures(arms=arms, comparisons=_compare(version, arms))


def worse(ws: Workspace, version: str) -> list[str]:
    """What its trials show against `version`, in words."""
    return [comparison.words for comparison in figures(ws, version).comparisons if comparison.worse]


def report(ws: Workspace) -> dict[str, Any]:
    """What is or was last on trial, and its figures; plain values."""
    found = canary.read(ws.root)
    state: dict[str, Any] = {key: None for key in canary.Canary.model_fields if key != "format"}
    known = Figures()
    if found is not None:
        state = found.model_dump(mode="json", exclude={"format"})
        known = figures(ws, found.version)
    return {**state, **known.model_dump(mode="json")}


def _sum(lines: Sequence[Line], said: Sequence[feedback.Entry]) -> Sum:
    bins: Counter[int] = Counter()
    for line in lines:
        bins.update(line.bins)
    requests, compared = sum(line.requests for line in lines), sum(line.compared for line in lines)
    by = sorted({line.by for line in lines})
    # Answers of the shadow were not sent, so nobody can mean them.
    thumbs = _thumbs(said, [] if lines[0].arm == "shadow" else by, lines)
    return Sum(
        mode=lines[0].mode,
        arm=lines[0].arm,
        versions=by,
        requests=requests,
        errors=sum(line.errors for line in lines),
        dropped=sum(line.dropped for line in lines),
        seconds_mean=sum(line.seconds for line in lines) / requests if requests else None,
        seconds_p95=_quantile(bins, 0.95),
        completion_tokens=sum(line.completion_tokens for line in lines),
        compared=compared,
        agreement=sum(line.agreed for line in lines) / compared if compared else None,
        f1=sum(line.f1 for line in lines) / compared if compared else None,
        up=thumbs["up"],
        down=thumbs["down"],
    )


def _thumbs(said: Sequence[feedback.Entry], versions: Sequence[str], lines: Sequence[Line]) -> Counter[str]:
    """Thumbs for `versions` that came while the arm was used, or soon after."""
    start, end = min(line.start for line in lines), max(line.end for line in lines) + LATE
    return Counter(
        entry.feedback.rating
        for entry in said
        if entry.feedback.rating is not None
        and entry.feedback.version in versions
        and start <= datetime.fromisoformat(entry.time) <= end
    )


def _quantile(bins: Counter[int], share: float) -> float | None:
    left = share * bins.total()
    for at, count in sorted(bins.items()):
        left -= count
        if left <= 0:
            return float(STEP ** (at - 0.5)) / 1000  # The middle of the bin.
    return None


def _compare(version: str, arms: Sequence[Sum]) -> list[Comparison]:
    found = []
    for mode in get_args(canary.Mode):
        by_arm = {arm.arm: arm for arm in arms if arm.mode == mode}
        candidate, control = by_arm.get(mode), by_arm.get("control")
        if candidate is None or control is None:
            continue
        failed = [(arm.errors, arm.requests) for arm in (candidate, control)]
        disliked = [(arm.down, arm.up + arm.down) for arm in (candidate, control)]
        found += [_fisher(mode, "errors", version, *failed), _fisher(mode, "thumbs down", version, *disliked)]
    return [comparison for comparison in found if comparison is not None]


def _fisher(
    mode: canary.Mode,
    what: Literal["errors", "thumbs down"],
    version: str,
    candidate: tuple[int, int],
    control: tuple[int, int],
) -> Comparison | None:
    """Fisher's exact test, two-sided, of two (counted, total); None if either total is zero."""
    import numpy as np
    from scipy.stats import fisher_exact

    if not candidate[1] or not control[1]:
        return None
    shares = [count / total for count, total in (candidate, control)]
    table = np.array([[count, total - count] for count, total in (candidate, control)])
    p = float(fisher_exact(table).pvalue)
    shown = "no difference is shown"
    if p < CERTAIN:
        shown = f"{version} is {'worse' if shares[0] > shares[1] else 'better'}"
    words = (
        f"{what}: {version} {100 * shares[0]:.1f}% of {candidate[1]}, current {100 * shares[1]:.1f}% of {control[1]}: "
        f"{shown} (p = {p:.2g})"
    )
    return Comparison(mode=mode, what=what, candidate=shares[0], control=shares[1], p=p, words=words)


def describe(found: dict[str, Any]) -> list[str]:
    """A `report`, in lines to read."""
    version = found["version"]
    if version is None:
        return ["no version was on trial yet; `treering canary vN` begins"]
    how = "in shadow" if found["mode"] == "shadow" else f"with {100 * found['share']:g}% of the traffic"
    lines = [f"{version} {'was' if found['ended'] else 'is'} on trial {how}, since {found['since']}"]
    if found["ended"]:
        lines[0] += f"; ended {found['ended']}: {found['reason']}"
    lines += [_describe_arm(arm) for arm in found["arms"]] or ["nothing was counted yet"]
    return lines + [comparison["words"] for comparison in found["comparisons"]]


def _describe_arm(arm: dict[str, Any]) -> str:
    name = f"{arm['arm']} of the {arm['mode']}" if arm["arm"] == "control" else arm["arm"]
    text = f"  {name} ({', '.join(arm['versions'])}): {arm['requests']} requests, {arm['errors']} failed"
    if arm["seconds_mean"] is not None:
        text += f"; {arm['seconds_mean']:.3f} s in the mean, 95% within {arm['seconds_p95']:.3f} s"
    text += f"; {arm['completion_tokens']} tokens written"
    if arm["arm"] == "shadow":
        text += f"; {arm['dropped']} not asked, for users came first"
    if arm["compared"]:
        text += f"; same answer in {100 * arm['agreement']:.1f}% of {arm['compared']}, token F1 {100 * arm['f1']:.1f}"
    if arm["up"] + arm["down"]:
        text += f"; thumbs: {arm['up']} up, {arm['down']} down"
    return text
