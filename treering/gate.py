"""The gate: paired results of candidate and current -> promote or hold, with reasons in words and numbers.

An old task is judged by a paired bootstrap over its held-out rows: the mean difference of score, candidate minus
current, and its one-sided bounds. Where the rows are enough to see the margin, the candidate must be shown to be no
worse (lower bound above minus the margin). Where they are too few, the verdict says so and how many are missing; then
the old tasks are pooled, and each task alone holds the candidate only if it is shown to be worse, or collapses.

The same is asked of the best results that each old task ever had, within a wider margin: else losses too small for the
gate could add up, update by update. Results are better only where that is shown, by the same bounds, since of many
versions one has always been lucky.

New rows of an old task are also compared with its old rows: labels that contradict the task (shuffled ones, say) cost
the old rows little where they are replayed, and any training lowers the loss on them, but no training makes them right.

A new task has nothing to be compared with but chance: whoever has learned something of its labels is right more often
than the most frequent label alone, and than the same answers dealt out to other rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from treering.data.example import normalise
from treering.metrics import negative_flips
from treering.results import Result
from treering.sections import GateConfig

_LEARNED = 0.6
"""Of the rows on which chance is wrong, the share on which a candidate that has learned its task is right."""

_LUCK = 0.02
"""How often labels that were shuffled may pass. Whoever has learned its task is far from it, and a task that begins
with wrong labels refuses the right ones for ever."""


@dataclass(frozen=True)
class Judgement:
    """One comparison. Scores are means over the rows both were scored on; `lower` and `upper` bound the difference.

    `about` says whether it judges what was forgotten (`old`) or what was learned (`new`).
    """

    name: str
    about: Literal["old", "new"]
    before: float | None
    after: float | None
    lower: float
    upper: float
    rows: int
    rows_needed: int
    passed: bool
    reason: str


@dataclass(frozen=True)
class Verdict:
    """What the gate says of a candidate."""

    promote: bool
    summary: str
    judgements: tuple[Judgement, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for the manifest."""
        return asdict(self)


def judge(
    before: Sequence[Result],
    after: Sequence[Result],
    old: Iterable[str],
    fresh: set[str],
    config: GateConfig,
    seed: int,
    answers: Mapping[str, str] | None = None,
    best: Sequence[Result] = (),
) -> Verdict:
    """Compare candidate (`after`) with current (`before`) on the rows both were scored on.

    `old` names the tasks that current knew; `fresh` holds the ids of the new data's own held-out rows. The two sets
    of rows are judged apart: old rows must not get worse, new rows must get better. `answers` has the right answers of
    fresh rows by id; where they are labels, the candidate's are compared with chance. `best` are those of old rows
    that `best_of` kept.
    """
    pairs = _pairs(before, after)
    old_pairs = {task: [p for p in pairs if p[1].task == task and p[1].id not in fresh] for task in old}
    judgements = _old_tasks(old_pairs, "", lambda own: own, config, seed)
    changed = {now.task for was, now in _pairs(best, before) if was.score != now.score and now.id not in fresh}
    at_best = _pairs(best, after)
    best_pairs = {task: [p for p in at_best if p[1].task == task] for task in old_pairs if task in changed}
    judgements += _old_tasks(best_pairs, " at its best", _at_best, config, seed)
    judgements += _flips([p for found in old_pairs.values() for p in found], config)
    new_pairs = [p for p in pairs if p[1].id in fresh]
    fits = []
    for task, found in old_pairs.items():
        new = [p for p in new_pairs if p[1].task == task]
        if found and new:
            fits.append(_fit(task, new, found, config, seed))
    judgements += [fit.judgement for fit in fits]
    known = all(fit.as_right for fit in fits) and {p[1].task for p in new_pairs} <= {fit.task for fit in fits}
    judged_old = bool(judgements)
    for task in dict.fromkeys(after.task for _, after in new_pairs):
        mine = [after for _, after in new_pairs if after.task == task and after.metric == "exact_match"]
        labels = [(answers or {}).get(result.id) for result in mine]
        if mine and None not in labels:
            judgements.append(_chance(task, mine, [str(label) for label in labels], config, seed))
    judgements.append(_gain(new_pairs, known, config, seed))
    return Verdict(all(j.passed for j in judgements), _summary(judgements, judged_old), tuple(judgements))


def best_of(best: Sequence[Result], after: Sequence[Result], config: GateConfig, seed: int) -> list[Result]:
    """The results that later candidates are held against, row by row as in `after`, those of the candidate.

    They are a task's `best` so far, unless the candidate's are shown to be better; and its own on rows that have none.
    """
    past = {r.id: r for r in best}
    found = []
    for task in dict.fromkeys(r.task for r in after):
        rows = [r for r in after if r.task == task]
        pairs = [(past[r.id], r) for r in rows if r.id in past]
        is_better = bool(pairs) and paired(task, pairs, config, seed)["lower"] > 0
        found += rows if is_better else [past.get(r.id, r) for r in rows]
    return found


def _pairs(before: Sequence[Result], after: Sequence[Result]) -> list[tuple[Result, Result]]:
    past = {r.id: r for r in before}
    return [(past[r.id], r) for r in after if r.id in past]


def _summary(judgements: Sequence[Judgement], judged_old: bool) -> str:
    """The verdict in a sentence that claims no more than was measured."""
    failed = [j for j in judgements if not j.passed]
    if failed:
        return "held: " + "; ".join(f"{j.name}: {j.reason}" for j in failed)
    gain = judgements[-1]
    learned = "nothing was measured of the new data"
    if gain.before is not None and gain.after is not None:
        learned = "the new data was learned"
        if gain.after <= gain.before:
            learned = f"on new data the score went {100 * gain.before:.1f} to {100 * gain.after:.1f}"
    few = [j for j in judgements if j.rows < j.rows_needed]
    if not few:
        return f"promoted: {learned}" + (", and no old task is worse" if judged_old else "")
    text = f"promoted: {learned}, and no old task is shown to be worse, though {len(few)} comparisons had too few rows"
    fell = [j for j in few if j.before is not None and j.after is not None and j.after < j.before]
    changes = [f"{j.name} {100 * ((j.after or 0) - (j.before or 0)):+.1f} on {j.rows} rows" for j in fell[:4]]
    return text + (f" ({', '.join(changes)})" if changes else "")


def overtaken(parent: str | None) -> str:
    """Why a candidate is held whose `parent` serves no more."""
    return f"its parent {parent or 'the base model'} is no longer current"


def held_for(reason: str) -> Verdict:
    """A hold that no statistics brought about."""
    return Verdict(False, f"held: {reason}", ())


def _old_tasks(
    pairs: Mapping[str, Sequence[tuple[Result, Result]]],
    how: str,
    limits: Callable[[GateConfig], GateConfig],
    config: GateConfig,
    seed: int,
) -> list[Judgement]:
    """Each old task that has `pairs`, and all together where one has too few; `how` ends their names.

    `limits` makes those that it is judged by of what the settings say of a task.
    """
    judgements = [
        _old_task(f"{task}{how}", found, limits(config.of(task)), seed) for task, found in pairs.items() if found
    ]
    if any(j.rows < j.rows_needed for j in judgements):
        # A task with a margin of its own is judged by that alone.
        every = [pair for task, found in pairs.items() if not config.sets_margin(task) for pair in found]
        if every:
            judgements.append(_pool(f"old tasks together{how}", every, limits(config.of("")), seed))
    return judgements


def _at_best(config: GateConfig) -> GateConfig:
    return config.model_copy(update={"margin": config.best_margin, "min_score": None})


def _flips(pairs: Sequence[tuple[Result, Result]], config: GateConfig) -> list[Judgement]:
    """Where a limit is set and there are old rows."""
    if config.negative_flips is None or not pairs:
        return []
    share = negative_flips(*({row.id: row.score for row in side} for side in zip(*pairs, strict=True)))
    reason = f"{share * len(pairs):.0f} of {len(pairs)} rows were right and are wrong now, {100 * share:.1f}%"
    passed = share <= config.negative_flips
    if not passed:
        reason += f"; the limit is {100 * config.negative_flips:.1f}%"
    found = {"before": None, "after": None, "lower": 0.0, "upper": 0.0, "rows": len(pairs), "rows_needed": 0}
    return [_judgement("negative flips", "old", found, passed, reason)]


def _old_task(task: str, pairs: Sequence[tuple[Result, Result]], config: GateConfig, seed: int) -> Judgement:
    found = paired(task, pairs, config, seed)
    worse = found["upper"] < 0 and -found["change"] > config.margin
    collapsed = -found["change"] > config.floor
    enough = found["rows"] >= found["rows_needed"]
    low = config.min_score is not None and found["after"] < config.min_score
    passed = not (worse or collapsed or low) and (found["lower"] >= -config.margin or not enough)
    if low:
        reason = f"{_points(found['after'])} are below its min_score, {_points(config.min_score or 0)}"
    elif collapsed:
        reason = f"fell by {_points(-found['change'])}, more than the floor of {_points(config.floor)}"
    elif worse or not passed:
        reason = (
            f"changed by {_points(found['change'])} (bounds {_range(found)}); the margin is {_points(config.margin)}"
        )
    elif enough:
        reason = f"no worse: changed by {_points(found['change'])} (bounds {_range(found)})"
    else:
        reason = _too_few(found, config) + "; judged with the other old tasks"
    return _judgement(task, "old", found, passed, reason)


def _pool(name: str, pairs: Sequence[tuple[Result, Result]], config: GateConfig, seed: int) -> Judgement:
    found = paired(name, pairs, config, seed)
    enough = found["rows"] >= found["rows_needed"]
    worse = found["upper"] < 0 and -found["change"] > config.margin
    passed = found["lower"] >= -config.margin if enough else not worse and -found["change"] <= 2 * config.margin
    reason = f"changed by {_points(found['change'])} (bounds {_range(found)}); the margin is {_points(config.margin)}"
    if not enough:
        reason += f"; {_too_few(found, config)}: held only if shown to be worse, or by a drop of twice the margin"
    return _judgement(name, "old", found, passed, reason)


@dataclass(frozen=True)
class _Fit:
    """How the new rows of an old task go with its old ones; `as_right`: they are not shown to be less often right."""

    task: str
    judgement: Judgement
    as_right: bool


def _fit(
    task: str,
    new: Sequence[tuple[Result, Result]],
    old: Sequence[tuple[Result, Result]],
    config: GateConfig,
    seed: int,
) -> _Fit:
    name = f"new data of {task}"
    found = paired(name, new, config, seed)
    right, known = (np.asarray([after.score for _, after in pairs]) for pairs in (new, old))
    missing = float(known.mean() - right.mean())
    # Rows with equal scores are interchangeable, so a permutation is a draw of counts without replacement.
    values, counts = np.unique(np.concatenate([right, known]), return_counts=True)
    rng = np.random.default_rng([seed, *name.encode()])
    drawn = rng.multivariate_hypergeometric(counts, len(right), config.resamples, method="marginals") @ values
    as_right = bool(np.mean(drawn <= right.sum() + 1e-9) >= 1 - config.confidence)
    passed = as_right or missing <= config.floor or found["lower"] > 0
    reason = f"{_points(missing)} below the old rows of the task, changed by {_points(found['change'])}"
    if not passed:
        reason += f" (bounds {_range(found)}): it was trained on and is still wrong; its labels may contradict the task"
    return _Fit(task, _judgement(name, "new", {**found, "rows_needed": 0}, passed, reason), as_right)


def _chance(task: str, results: Sequence[Result], labels: Sequence[str], config: GateConfig, seed: int) -> Judgement:
    """Whether the answers have to do with the questions, as no answers learned from shuffled labels have.

    Asked in full where the rows are enough to see a candidate that gets `_LEARNED` of what chance leaves right. With
    fewer rows more luck is let pass, down to half as many, where being ahead of the most frequent label is enough;
    fewer still tell nothing.
    """
    name = f"{task} against chance"
    texts = [normalise(text) for text in (*(result.prediction for result in results), *labels)]
    given, right = np.split(np.unique(texts, return_inverse=True)[1].reshape(-1), 2)
    counts = np.bincount(right)
    pairs = [(replace(r, score=float(at == counts.argmax())), r) for r, at in zip(results, right, strict=True)]
    found = {**paired(name, pairs, config, seed), "rows_needed": 0}
    agree = float(np.sum((counts / len(right)) ** 2))
    needed = 0 if agree == 1 else _rows(float(np.sqrt(agree * (1 - agree))), _LEARNED * (1 - agree), config)
    reason = f"{_points(found['after'])}, the most frequent label alone would have {_points(found['before'])}"
    passed = True
    if agree == 1 or 2 * len(right) < needed:
        reason += f"; {len(right)} held-out rows are too few, or too much alike, to tell"
    elif found["change"] <= 0:
        passed = False
    else:
        rng = np.random.default_rng([seed, *name.encode()])
        dealt = np.asarray([np.sum(given == rng.permutation(right)) for _ in range(config.resamples)])
        share = float(np.mean(dealt >= np.sum(given == right)))
        passed = share <= _LUCK ** min(1.0, 2 * len(right) / needed - 1)
        reason += f"; its own answers, dealt out at random, have as much in {100 * share:.1f}% of the draws"
    if not passed:
        reason += ": no better than guessing, as with labels that were shuffled"
    return _judgement(name, "new", found, passed, reason)


def _gain(pairs: Sequence[tuple[Result, Result]], known: bool, config: GateConfig, seed: int) -> Judgement:
    """`known`: the new rows are as right as the old ones of their tasks, so there may be nothing left to gain."""
    if not pairs:
        nothing = {"before": None, "after": None, "lower": 0.0, "upper": 0.0, "rows": 0, "rows_needed": 0}
        return _judgement(
            "new data", "new", nothing, True, "no held-out rows of the new data, so its gain is not measured"
        )
    found = paired("new data", pairs, config, seed)
    wanted = min(config.min_gain, 1 - found["before"])
    loss = float(np.mean([after.loss - before.loss for before, after in pairs]))
    # What is perfect cannot gain more.
    gained = found["after"] == 1 or (found["change"] > 0 and found["change"] >= wanted)
    # A score that did not move says little (few rows, or right already); then the loss tells if anything was learned.
    # Of few rows that were right before, one that is wrong now says as little.
    lost = -found["change"] * found["rows"]
    little = lost <= max(config.margin * found["rows"], 1 if known else 0) + 1e-9
    passed = gained or (found["upper"] >= wanted and little and (known or loss < 0))
    reason = f"changed by {_points(found['change'])} (bounds {_range(found)}), held-out loss by {loss:+.3f}"
    if not passed:
        reason += f"; a gain of at least {_points(wanted)} or a lower loss is needed"
        if elsewhere := sum(after.of_base for _, after in pairs):
            reason += (
                f"; {elsewhere} of {len(pairs)} prompts are unlike what was learned, so the base model answered them"
            )
    return _judgement("new data", "new", {**found, "rows_needed": 0}, passed, reason)


def paired(name: str, pairs: Sequence[tuple[Result, Result]], config: GateConfig, seed: int) -> dict[str, Any]:
    """Means of both, their difference (`change`), its one-sided bootstrap bounds, and the rows there are and needed."""
    before = np.asarray([b.score for b, _ in pairs])
    after = np.asarray([a.score for _, a in pairs])
    difference = after - before
    # Rows with equal differences are interchangeable, so a resample is a multinomial draw over the distinct ones.
    values, counts = np.unique(difference, return_counts=True)
    rng = np.random.default_rng([seed, *name.encode()])
    means = rng.multinomial(len(pairs), counts / len(pairs), config.resamples) @ values / len(pairs)
    lower, upper = np.quantile(means, [1 - config.confidence, config.confidence])
    return {
        "before": float(before.mean()),
        "after": float(after.mean()),
        "change": float(difference.mean()),
        "lower": float(lower),
        "upper": float(upper),
        "rows": len(pairs),
        "rows_needed": rows_needed(float(difference.std()), config),
    }


def rows_needed(spread: float, config: GateConfig) -> int:
    """Held-out rows with which an equally good candidate passes at the set confidence.

    `n = ((z_confidence + z_confidence) * spread / margin)^2`, the sample size of a paired non-inferiority test with
    both error rates at `1 - confidence`; `spread` is the standard deviation of the rows' differences, at least 0.2
    (four rows in a hundred flipped), since a small sample may show no flip at all.
    """
    return _rows(spread, config.margin, config) if config.margin else 0


def _rows(spread: float, effect: float, config: GateConfig) -> int:
    return int(np.ceil((2 * NormalDist().inv_cdf(config.confidence) * max(spread, 0.2) / effect) ** 2))


def _judgement(
    name: str, about: Literal["old", "new"], found: Mapping[str, Any], passed: bool, reason: str
) -> Judgement:
    fields = ("before", "after", "lower", "upper", "rows", "rows_needed")
    return Judgement(name, about, **{field: found[field] for field in fields}, passed=passed, reason=reason)


def _too_few(found: Mapping[str, Any], config: GateConfig) -> str:
    missing = found["rows_needed"] - found["rows"]
    return f"{found['rows']} held-out rows are {missing} too few to see a drop of {_points(config.margin)}"


def _points(value: float) -> str:
    return f"{100 * value:.1f} points"


def _range(found: Mapping[str, Any]) -> str:
    return f"{100 * found['lower']:+.1f} to {100 * found['upper']:+.1f}"
