"""The gate on made-up results: what promotes, what holds, what it says, and how often it errs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from treering.gate import Judgement, Verdict, best_of, held_for, judge, rows_needed
from treering.results import Result
from treering.sections import GateConfig

ENOUGH = 400
"""Held-out rows that suffice for the default margin where up to three rows in ten change sides."""


def results(task: str, scores: Sequence[float], loss: float = 1.0, slice_: str = "") -> list[Result]:
    return [
        Result(f"{task}{slice_}-{number}", task, "exact_match", float(score), loss, "")
        for number, score in enumerate(scores)
    ]


def ids(found: Sequence[Result]) -> set[str]:
    return {result.id for result in found}


def scores(right: int, wrong: int) -> list[int]:
    return [1] * right + [0] * wrong


def old(
    before: Mapping[str, Sequence[float]],
    after: Mapping[str, Sequence[float]],
    config: GateConfig | None = None,
    seed: int = 0,
) -> Verdict:
    """Judged on old tasks alone."""
    was = [result for task, found in before.items() for result in results(task, found)]
    now = [result for task, found in after.items() for result in results(task, found)]
    return judge(was, now, list(before), set(), config or GateConfig(), seed)


def fresh(before: Sequence[float], after: Sequence[float], loss_change: float = 0.0, **config: Any) -> Verdict:
    """Judged on new data alone."""
    was, now = results("new", before), results("new", after, loss=1.0 + loss_change)
    return judge(was, now, ["new"], ids(was), GateConfig(**config), seed=0)


def named(verdict: Verdict, name: str) -> Judgement:
    [found] = [judgement for judgement in verdict.judgements if judgement.name == name]
    return found


def test_a_clear_win_promotes() -> None:
    was = [*results("pens", scores(360, 40)), *results("cups", scores(5, 45))]
    now = [*results("pens", scores(370, 30)), *results("cups", scores(45, 5), loss=0.1)]
    verdict = judge(was, now, ["pens", "cups"], ids(results("cups", [0] * 50)), GateConfig(), seed=0)
    assert verdict.promote
    assert verdict.summary == "promoted: the new data was learned, and no old task is worse"
    assert [j.name for j in verdict.judgements] == ["pens", "new data"]
    pens = named(verdict, "pens")
    assert (pens.before, pens.after, pens.rows) == (0.9, 0.925, 400)
    assert pens.lower <= 0.025 <= pens.upper
    assert pens.reason.startswith("no worse: changed by 2.5 points")
    gain = named(verdict, "new data")
    assert (gain.before, gain.after, gain.rows, gain.rows_needed) == (0.1, 0.9, 50, 0)
    assert json.loads(json.dumps(verdict.as_dict(), allow_nan=False))["judgements"][0]["name"] == "pens"


@pytest.mark.parametrize("rows", [4, 20, 200])
def test_a_collapse_holds_however_few_the_rows(rows: int) -> None:
    before, after = scores(rows, 0), scores(rows // 2, rows // 2)
    verdict = old({"pens": before, "cups": scores(50, 0)}, {"pens": after, "cups": scores(50, 0)})
    assert not verdict.promote
    assert "pens: fell by 50.0 points, more than the floor of 25.0 points" in verdict.summary
    assert "cups" not in verdict.summary


def test_a_real_drop_with_enough_rows_holds() -> None:
    verdict = old({"pens": scores(ENOUGH, 0)}, {"pens": scores(350, 50)})
    assert not verdict.promote
    assert "pens: changed by -12.5 points" in verdict.summary
    assert "the margin is 5.0 points" in verdict.summary


def test_a_drop_within_the_margin_passes() -> None:
    assert old({"pens": scores(ENOUGH, 0)}, {"pens": scores(396, 4)}).promote


def test_a_drop_that_may_be_beyond_the_margin_holds_where_rows_suffice() -> None:
    """Not shown to be worse than the margin, but not shown to be no worse either: 19 of 400 rows lost."""
    verdict = old({"pens": scores(ENOUGH, 0)}, {"pens": scores(381, 19)})
    pens = named(verdict, "pens")
    assert (pens.after or 0) - (pens.before or 0) > -0.05
    assert pens.lower < -0.05
    assert pens.rows >= pens.rows_needed
    assert not verdict.promote


def test_too_few_rows_are_said_and_counted() -> None:
    verdict = old({"pens": scores(18, 2)}, {"pens": scores(18, 2)})
    assert verdict.promote
    assert "no old task is shown to be worse, though 2 comparisons had too few rows" in verdict.summary
    assert "nothing was measured of the new data" in verdict.summary
    pens = named(verdict, "pens")
    assert pens.rows_needed == rows_needed(0.0, GateConfig()) == 174
    assert f"20 held-out rows are {174 - 20} too few to see a drop of 5.0 points" in pens.reason
    assert pens.reason.endswith("judged with the other old tasks")
    pool = named(verdict, "old tasks together")
    assert pool.rows == 20
    assert "154 too few" in pool.reason
    assert "held only if shown to be worse" in pool.reason


def test_small_tasks_are_pooled() -> None:
    """Each alone is too small to tell; together ten tasks of 20 rows are 200."""
    tasks = [f"task{number}" for number in range(10)]
    same = old(dict.fromkeys(tasks, scores(20, 0)), dict.fromkeys(tasks, scores(20, 0)))
    assert same.promote
    assert named(same, "old tasks together").rows == 200
    assert "too few" not in named(same, "old tasks together").reason
    lost = old(dict.fromkeys(tasks, scores(20, 0)), dict.fromkeys(tasks, scores(18, 2)))
    assert not lost.promote
    assert "old tasks together: changed by -10.0 points" in lost.summary
    assert all(judgement.passed for judgement in lost.judgements if judgement.name.startswith("task"))


def test_few_rows_hold_what_lost_twice_the_margin() -> None:
    assert old({"pens": scores(20, 0)}, {"pens": scores(19, 1)}).promote
    verdict = old({"pens": scores(8, 0)}, {"pens": scores(7, 1)})
    assert [judgement.name for judgement in verdict.judgements if not judgement.passed] == ["old tasks together"]
    assert "old tasks together: changed by -12.5 points" in verdict.summary


def test_a_drop_of_one_task_is_not_hidden_by_the_gain_of_another() -> None:
    before = {"pens": scores(ENOUGH, 0), "cups": scores(0, ENOUGH)}
    verdict = old(before, {"pens": scores(350, 50), "cups": scores(ENOUGH, 0)})
    assert not verdict.promote
    assert "pens" in verdict.summary


def test_new_data_that_was_not_learned_holds() -> None:
    verdict = fresh(scores(10, 40), scores(10, 40))
    assert not verdict.promote
    assert "new data: changed by 0.0 points" in verdict.summary
    assert verdict.summary.endswith("a gain of at least 0.0 points or a lower loss is needed")
    assert not fresh(scores(40, 10), scores(20, 30), loss_change=-0.5).promote
    assert not fresh(scores(0, 4), scores(0, 4), loss_change=0.1).promote


def test_a_lower_loss_is_learning_too() -> None:
    assert fresh(scores(0, 4), scores(0, 4), loss_change=-0.1).promote
    # Within the noise of few rows, the loss decides.
    assert fresh(scores(10, 10), scores(9, 11), loss_change=-0.1).promote


def test_a_gain_that_was_asked_for() -> None:
    assert fresh(scores(10, 40), scores(20, 30), min_gain=0.2).promote
    verdict = fresh(scores(10, 40), scores(15, 35), min_gain=0.4, loss_change=-1.0)
    assert not verdict.promote
    assert "a gain of at least 40.0 points" in verdict.summary


@pytest.mark.parametrize("loss_change", [-0.1, 0.0, 0.1])
def test_what_is_perfect_needs_no_gain(loss_change: float) -> None:
    assert fresh(scores(20, 0), scores(20, 0), loss_change=loss_change).promote
    assert fresh(scores(20, 0), scores(20, 0), loss_change=loss_change, min_gain=0.5).promote
    assert fresh(scores(18, 2), scores(20, 0), loss_change=loss_change, min_gain=0.5).promote


def test_what_was_perfect_must_not_get_worse() -> None:
    assert not fresh(scores(200, 0), scores(150, 50), loss_change=0.1).promote


def test_without_held_out_rows_the_gain_is_not_measured() -> None:
    verdict = judge([], [], [], set(), GateConfig(), 0)
    assert verdict.promote
    assert "not measured" in named(verdict, "new data").reason


def test_rows_scored_only_once_do_not_count() -> None:
    was = results("pens", scores(ENOUGH, 0))
    now = [*results("pens", scores(ENOUGH, 0)), *results("pens", scores(0, 300), slice_="later")]
    verdict = judge(was, now, ["pens"], set(), GateConfig(), 0)
    assert verdict.promote
    assert named(verdict, "pens").rows == ENOUGH


def test_a_new_slice_of_an_old_task_is_new_data() -> None:
    was = [*results("pens", scores(ENOUGH, 0)), *results("pens", scores(0, 50), slice_="new")]
    now = [*results("pens", scores(ENOUGH, 0)), *results("pens", scores(40, 10), slice_="new")]
    verdict = judge(was, now, ["pens"], ids(was[ENOUGH:]), GateConfig(), 0)
    assert (named(verdict, "pens").rows, named(verdict, "new data").rows) == (ENOUGH, 50)
    assert verdict.promote


def later(old: Sequence[float], before: Sequence[float], after: Sequence[float], loss_change: float) -> Verdict:
    """Judged on new rows of a task whose old rows keep the scores `old`."""
    known = results("pens", old)
    was, now = (results("pens", found, slice_="new") for found in (before, after))
    now = [Result(r.id, r.task, r.metric, r.score, r.loss + loss_change, "") for r in now]
    return judge([*known, *was], [*known, *now], ["pens"], ids(was), GateConfig(), 0)


def test_new_rows_that_contradict_their_task_hold() -> None:
    """Shuffled labels: however long they are trained, they do not come right, though the loss on them falls."""
    for was, now in (([1, 0, 0] * 6, [0, 0, 1] * 6), ([1, 0, 0] * 6, [1, 0, 0] * 6)):
        verdict = later(scores(20, 1), was, now, loss_change=-2.0)
        assert not verdict.promote
        assert verdict.summary.startswith("held: new data of pens: 61.9 points below the old rows of the task")
        assert "its labels may contradict the task" in verdict.summary
        assert [j.name for j in verdict.judgements if not j.passed] == ["new data of pens"]


def test_new_rows_that_are_hard_but_get_better_are_let_through() -> None:
    assert later(scores(20, 0), scores(0, 18), scores(9, 9), loss_change=-0.5).promote
    # Hard are the old rows of the task, too.
    assert later(scores(10, 10), scores(8, 10), scores(8, 10), loss_change=-0.5).promote
    # One wrong row shows nothing.
    assert later(scores(12, 0), [0], [0], loss_change=-0.5).promote


def test_new_rows_that_are_known_already_need_no_gain() -> None:
    verdict = later(scores(38, 2), scores(9, 1), scores(9, 1), loss_change=0.001)
    assert verdict.promote
    assert "on new data the score went 90.0 to 90.0" in verdict.summary
    # One row of ten is no reason to hold; two are.
    assert later(scores(40, 0), scores(10, 0), scores(9, 1), loss_change=0.04).promote
    assert not later(scores(40, 0), scores(10, 0), scores(8, 2), loss_change=0.04).promote
    assert not later(scores(38, 2), scores(10, 0), scores(7, 3), loss_change=0.001).promote


def test_partial_scores_are_judged_too() -> None:
    rng = np.random.default_rng(1)
    f1 = rng.uniform(0.4, 0.9, ENOUGH)
    for drop, promoted in ((0.01, True), (0.06, False)):
        assert old({"pens": f1.tolist()}, {"pens": (f1 - drop).tolist()}).promote == promoted


def test_the_same_seed_gives_the_same_verdict() -> None:
    rng = np.random.default_rng(2)
    before, after = rng.integers(0, 2, 300).tolist(), rng.integers(0, 2, 300).tolist()
    verdicts = [old({"pens": before}, {"pens": after}, seed=seed) for seed in (5, 5, 6)]
    assert verdicts[0] == verdicts[1] != verdicts[2]
    # The order of the other tasks does not matter to a task's bounds.
    alone = named(old({"pens": before}, {"pens": after}), "pens")
    beside = named(old({"cups": before, "pens": before}, {"cups": after, "pens": after}), "pens")
    assert alone == beside


def test_no_margin_means_no_loss_at_all() -> None:
    config = GateConfig(margin=0.0)
    assert old({"pens": scores(50, 0)}, {"pens": scores(50, 0)}, config).promote
    assert not old({"pens": scores(50, 0)}, {"pens": scores(49, 1)}, config).promote


def test_held_for_a_reason() -> None:
    verdict = held_for("the disk is on fire")
    assert (verdict.promote, verdict.summary, verdict.judgements) == (False, "held: the disk is on fire", ())


@given(st.floats(0, 0.7), st.floats(0.01, 0.2))
def test_rows_needed_grow_with_the_spread_and_shrink_with_the_margin(spread: float, margin: float) -> None:
    config = GateConfig(margin=margin)
    needed = rows_needed(spread, config)
    assert needed >= rows_needed(0.0, config) >= 1
    assert rows_needed(spread + 0.1, config) >= needed >= rows_needed(spread, GateConfig(margin=margin * 2))
    assert rows_needed(spread, GateConfig(margin=margin, confidence=0.99)) > needed


@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40),
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), max_size=40),
)
def test_whatever_the_scores_the_verdict_is_sound(pens: list[tuple[int, int]], new: list[tuple[int, int]]) -> None:
    config = GateConfig(resamples=100)
    was = [*results("pens", [b for b, _ in pens]), *results("new", [b for b, _ in new])]
    now = [*results("pens", [a for _, a in pens]), *results("new", [a for _, a in new])]
    verdict = judge(was, now, ["pens", "new"], ids(results("new", [0] * len(new))), config, 0)
    assert verdict.promote == all(judgement.passed for judgement in verdict.judgements)
    assert verdict.summary.startswith("promoted: " if verdict.promote else "held: ")
    pens_found = named(verdict, "pens")
    change = (pens_found.after or 0) - (pens_found.before or 0)
    assert pens_found.lower - 1e-9 <= change <= pens_found.upper + 1e-9 or len(pens) < 30
    if change < -config.floor:
        assert not verdict.promote
    if verdict.promote:
        assert change >= -config.floor


def drifting(updates: int, lost: float, seed: int, rows: int = ENOUGH) -> int:
    """How many updates in a row are promoted, each of which truly loses `lost` of the score of an old task."""
    config, rng = GateConfig(resamples=400), np.random.default_rng(seed)
    now = np.ones(rows)
    best = was = results("pens", now.tolist())
    for update in range(updates):
        draw = rng.random(rows)
        now = np.where(now > 0, draw >= 0.01 + lost, draw < 0.01 * now.sum() / max(1, rows - now.sum()))
        after = results("pens", now.astype(float).tolist())
        if not judge(was, after, ["pens"], set(), config, update, best=best).promote:
            return update
        was, best = after, best_of(best, after, config, update)
    return updates


def test_small_losses_do_not_add_up() -> None:
    """Each of 2 points is within the margin of 5; all together they end where 10 are lost."""
    ended = [drifting(20, 0.02, seed) for seed in range(20)]
    assert max(ended) <= 6 and sum(ended) > 20
    stayed = [drifting(20, 0.0, seed) for seed in range(20)]
    assert sum(20 - updates for updates in stayed if updates < 20) <= 0.05 * 20 * 20


def test_what_was_best_is_asked_for_until_something_is_shown_to_be_better() -> None:
    best = results("pens", scores(300, 100))
    worse, better = (results("pens", scores(right, 400 - right)) for right in (290, 340))
    lucky = results("pens", [*scores(0, 10), *scores(305, 85)])  # Ten lost and fifteen gained.
    assert best_of(best, worse, GateConfig(), 0) == best == best_of(best, lucky, GateConfig(), 0)
    assert best_of(best, better, GateConfig(), 0) == better
    more = [*worse, *results("pens", [1, 0], slice_="later"), *results("cups", [1])]
    assert best_of(best, more, GateConfig(), 0) == [*best, *more[400:]]
    gone = best_of(best, worse[:50], GateConfig(), 0)
    assert gone == best[:50]


def test_a_task_that_is_as_its_parent_has_it_is_judged_once() -> None:
    was, now = results("pens", scores(400, 0)), results("pens", scores(399, 1))
    assert [j.name for j in judge(was, now, ["pens"], set(), GateConfig(), 0, best=was).judgements][:1] == ["pens"]
    worse, loose = results("pens", scores(350, 50)), GateConfig(margin=0.2)
    verdict = judge(now, worse, ["pens"], set(), GateConfig(margin=0.2, best_margin=0.1), 0, best=was)
    at_best = named(verdict, "pens at its best")
    assert (at_best.before, at_best.after, at_best.passed) == (1.0, 0.875, False)
    assert "the margin is 10.0 points" in verdict.summary
    assert judge(now, worse, ["pens"], set(), loose, 0, best=was).promote
    few = judge(was[:30], was[:30], ["pens"], set(), GateConfig(), 0, best=results("pens", scores(30, 0))[:29])
    assert not [j.name for j in few.judgements if "best" in j.name]


def test_a_task_may_have_limits_of_its_own() -> None:
    was, now = (
        {"pens": scores(ENOUGH, 0), "cups": scores(ENOUGH, 0)},
        {"pens": scores(350, 50), "cups": scores(350, 50)},
    )
    loose = {"cups": {"margin": 0.3}}
    verdict = old(was, now, GateConfig.model_validate({"tasks": loose}))
    assert not verdict.promote and named(verdict, "cups").passed and not named(verdict, "pens").passed
    assert old(was, now, GateConfig.model_validate({"tasks": {**loose, "pens": {"margin": 0.2}}})).promote
    low = GateConfig.model_validate({"margin": 0.2, "tasks": {"pens": {"min_score": 0.9}}})
    assert "pens: 87.5 points are below its min_score, 90.0 points" in old(was, now, low).summary
    assert old(was, now, GateConfig(margin=0.2, min_score=0.8)).promote
    at_best = GateConfig.model_validate({"margin": 0.05, "tasks": {"pens": {"margin": 0.2}}})
    assert (at_best.of("pens").best_margin, at_best.of("cups").best_margin) == (0.4, 0.1)


def test_a_margin_of_its_own_is_all_that_a_small_task_is_asked_for() -> None:
    was, now = {"pens": scores(20, 0), "cups": scores(20, 0)}, {"pens": scores(16, 4), "cups": scores(20, 0)}
    assert not old(was, now).promote
    loose = GateConfig.model_validate({"tasks": {"pens": {"margin": 0.5}}})
    assert old(was, now, loose).promote
    assert named(old(was, now, loose), "old tasks together").rows == 20
    alone = old({"pens": was["pens"]}, {"pens": now["pens"]}, loose)
    assert [judgement.name for judgement in alone.judgements] == ["pens", "new data"]


def test_rows_that_were_right_may_be_limited() -> None:
    was, now = {"pens": scores(200, 200)}, {"pens": [*scores(0, 8), *scores(392, 0)]}
    assert old(was, now).promote
    assert old(was, now, GateConfig(negative_flips=0.02)).promote
    verdict = old(was, now, GateConfig(negative_flips=0.01))
    assert verdict.summary.startswith(
        "held: negative flips: 8 of 400 rows were right and are wrong now, 2.0%; the limit is 1.0%"
    )


TRIALS = 300
"""With which a rate of 5% is seen as more than 9% in one of a thousand."""


def share_promoted(lost: float, flipped: float, rows: int) -> float:
    """How often a candidate passes that truly lost `lost` of its score while `flipped` of the rows change sides."""
    config = GateConfig(resamples=400)
    promoted = 0
    for trial in range(TRIALS):
        rng = np.random.default_rng(trial)
        before = rng.random(rows) < 0.7
        draw = rng.random(rows)
        # Of the rows that were right some go wrong, of those that were wrong some come right; on balance `lost`.
        falls, rises = (flipped / 2 + lost) / 0.7, flipped / 2 / 0.3
        after = np.where(before, draw >= falls, draw < rises)
        verdict = old({"pens": before.astype(float).tolist()}, {"pens": after.astype(float).tolist()}, config, trial)
        promoted += verdict.promote
    return promoted / TRIALS


def test_error_rates() -> None:
    """A candidate that is no worse is seldom held, one that lost twice the margin seldom passes."""
    rows = rows_needed(np.sqrt(0.08), GateConfig())
    assert share_promoted(lost=0.0, flipped=0.08, rows=rows) >= 0.91
    assert share_promoted(lost=0.10, flipped=0.08, rows=rows) <= 0.09
    # Where there are rows enough to see it, losing the margin is too much.
    assert share_promoted(lost=0.05, flipped=0.04, rows=2 * rows) <= 0.09


def guesses(answered: Sequence[str], labels: Sequence[str], **config: Any) -> Verdict:
    """Judged on a new task whose rows have these labels."""
    was = results("new", [0] * len(labels))
    now = [
        Result(row.id, row.task, "exact_match", float(said == label), 0.5, said)
        for row, said, label in zip(was, answered, labels, strict=True)
    ]
    answers = {row.id: label for row, label in zip(was, labels, strict=True)}
    return judge(was, now, [], ids(was), GateConfig(**config), 0, answers)


def dealt(labels: Sequence[str], right: int) -> list[str]:
    """Answers of which the first `right` are right and each other one is the next label."""
    names = sorted(set(labels))
    wrong = {name: names[(at + 1) % len(names)] for at, name in enumerate(names)}
    return [label if at < right else wrong[label] for at, label in enumerate(labels)]


THREE = ["north", "south", "tower"] * 6


def test_a_new_task_of_shuffled_labels_holds() -> None:
    """The loss on it fell and its score is above that of the parent; it is that of a guess all the same."""
    verdict = guesses(dealt(THREE, 7), THREE)
    assert not verdict.promote
    assert verdict.summary.startswith("held: new against chance: 38.9 points, the most frequent label alone would")
    assert verdict.summary.endswith("no better than guessing, as with labels that were shuffled")
    # Always the same answer has to do with no question, however often it is right.
    skewed = ["north"] * 80 + ["south"] * 20
    verdict = guesses(["north"] * 100, skewed)
    assert [judgement.name for judgement in verdict.judgements if not judgement.passed] == ["new against chance"]


def test_a_new_task_that_was_learned_passes() -> None:
    verdict = guesses(dealt(THREE, 12), THREE)
    assert verdict.promote
    assert verdict.summary == "promoted: the new data was learned"
    assert "would have 33.3 points" in named(verdict, "new against chance").reason
    assert guesses(dealt(["a", "b"] * 18, 27), ["a", "b"] * 18).promote
    assert guesses(dealt(list("abcdef") * 6, 20), list("abcdef") * 6).promote


def test_few_rows_are_asked_for_less() -> None:
    """Nine rows of three labels: ahead of the most frequent one is enough; of four rows nothing is asked."""
    assert guesses(dealt(THREE[:9], 4), THREE[:9]).promote
    assert not guesses(dealt(THREE[:9], 3), THREE[:9]).promote
    verdict = guesses(dealt(THREE[:4], 1), THREE[:4])
    assert verdict.promote
    assert "too few, or too much alike, to tell" in named(verdict, "new against chance").reason
    # Nobody can be ahead where all labels are the same.
    assert guesses(["north"] * 30, ["north"] * 30).promote


def test_answers_that_are_no_labels_are_not_compared_with_chance() -> None:
    was = [Result(str(n), "new", "token_f1", 0.0, 1.0, "") for n in range(30)]
    now = [Result(str(n), "new", "token_f1", 0.1, 0.5, "some words") for n in range(30)]
    verdict = judge(was, now, [], ids(was), GateConfig(), 0, {str(n): f"answer {n}" for n in range(30)})
    assert [judgement.name for judgement in verdict.judgements] == ["new data"]
    assert verdict.promote


def test_how_often_chance_and_learning_are_told_apart() -> None:
    """Eighteen held-out rows of three labels, as of ninety rows with `val_size: 0.2`."""
    shuffled = learned = 0
    for trial in range(TRIALS):
        rng = np.random.default_rng(trial)
        labels = rng.permutation([f"label {n % 3}" for n in range(90)])[:18].tolist()
        guessed = [f"label {n}" for n in rng.integers(0, 3, 18)]
        known = [label if rng.random() < 0.8 else other for label, other in zip(labels, guessed, strict=True)]
        shuffled += guesses(guessed, labels, resamples=400).promote
        learned += guesses(known, labels, resamples=400).promote
    assert shuffled / TRIALS <= 0.09
    assert learned / TRIALS >= 0.95
