"""Metrics of answers: by hand, beside the libraries that define them, and a user's own, in a whole update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import sentence_chrf
from sklearn.metrics import f1_score

from treering import Workspace, answers, registry
from treering.config import Config
from treering.data.example import Example
from treering.errors import ConfigError
from treering.results import Result
from treering.scoring import (
    METRICS,
    chrf,
    conditions,
    exact_match,
    further,
    is_label_set,
    macro_f1,
    rouge_l,
    scorers,
    token_f1,
    wanted,
)
from treering.testing import toy_rows

MakeWorkspace = Callable[..., Workspace]


def row(question: str, answer: str) -> Example:
    return Example.of([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("Lost card", "lost  CARD.", 1.0),
        (" 'yes' ", "Yes!", 1.0),
        ("ﬁne", "fine", 1.0),  # NFKC: the ligature.
        ("STRASSE", "straße", 1.0),
        ("lost card now", "lost card", 0.0),
        ("", "x", 0.0),
        ("", "", 1.0),
        ("?", "!", 1.0),  # Nothing but punctuation is nothing.
        ("a.b", "ab", 0.0),
    ],
)
def test_exact_match_by_hand(prediction: str, answer: str, score: float) -> None:
    assert exact_match(prediction, answer) == score


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("the cat sat", "the cat sat", 1.0),
        ("the cat", "the cat sat", 2 * (2 / 2) * (2 / 3) / (2 / 2 + 2 / 3)),
        ("cat the", "The cat!", 1.0),
        ("the the the", "the", 2 * (1 / 3) * 1 / (1 / 3 + 1)),
        ("the", "the the the", 0.5),
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("cat", "", 0.0),
        ("", "...", 1.0),
        ("日本 語", "日本", 2 / 3),
    ],
)
def test_token_f1_by_hand(prediction: str, answer: str, score: float) -> None:
    assert token_f1(prediction, answer) == pytest.approx(score)


words = st.lists(st.sampled_from(["a", "b", "c"]), max_size=6).map(" ".join)


@given(words, words)
def test_token_f1_is_symmetric(one: str, other: str) -> None:
    assert token_f1(one, other) == token_f1(other, one)
    assert 0 <= token_f1(one, other) <= 1
    assert token_f1(one, one) == 1
    assert token_f1(one, other) >= exact_match(one, other)


@pytest.mark.parametrize(
    ("answers", "labels"),
    [
        (["yes", "no", "yes", "no"], True),
        (["yes", "no"], False),
        (["yes", "yes"], True),
        (["yes"], False),
        (["a b c d e f g h"] * 2, True),
        (["a b c d e f g h i"] * 2, False),
        (["yes"] * 99 + ["an answer that is far too long to be a label"], False),
        ([str(number // 2) for number in range(100)], True),
        ([str(number // 2) for number in range(99)], False),
    ],
)
def test_is_label_set_by_hand(answers: list[str], labels: bool) -> None:
    assert is_label_set(answers) == labels


@given(words, words)
def test_rouge_l_is_that_of_the_library(one: str, other: str) -> None:
    if one and other:
        found = RougeScorer(["rougeL"]).score(target=other, prediction=one)["rougeL"].fmeasure
        assert rouge_l(one, other) == pytest.approx(found)
    assert rouge_l(one, other) <= token_f1(one, other)


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("the cat sat", "The cat sat.", 1.0),
        ("sat the cat", "the cat sat", 2 / 3),
        ("police ended the gunman", "police killed the gunman", 3 / 4),  # Lin 2004
        ("", "cat", 0.0),
        ("", "", 1.0),
    ],
)
def test_rouge_l_by_hand(prediction: str, answer: str, score: float) -> None:
    assert rouge_l(prediction, answer) == pytest.approx(score)


@given(words, words)
def test_chrf_lies_between_0_and_1(one: str, other: str) -> None:
    assert 0 <= chrf(one, other) <= 1
    assert chrf(one, one) == pytest.approx(1)


def test_chrf_is_that_of_sacrebleu() -> None:
    for one, other in (("the cat sat", "a cat sat down"), ("Äpfel", "Apfel"), ("x", "y")):
        assert chrf(one, other) == pytest.approx(sentence_chrf(one, [other]).score / 100)
    assert (chrf("", "cat"), chrf("cat", " "), chrf("", "")) == (0, 0, 1)


labels = st.sampled_from(["a", "b", "c", "none of them"])


@given(st.lists(st.tuples(labels, st.sampled_from(["a", "b", "c"])), min_size=1))
def test_macro_f1_is_that_of_scikit_learn(pairs: Sequence[tuple[str, str]]) -> None:
    said, right = zip(*pairs, strict=True)
    library = f1_score(right, said, labels=sorted(set(right)), average="macro", zero_division=0)
    assert macro_f1(said, right) == pytest.approx(library)


def test_rare_labels_count_as_much_in_macro_f1() -> None:
    assert macro_f1(["Yes"] * 10, ["yes."] * 9 + ["no"]) == pytest.approx((2 * 9 / 19 + 0) / 2)


def test_further_measures() -> None:
    rows = {e.id: e for e in (row("a", "yes"), row("b", "no"), row("c", "the cat sat"), row("d", "gone"))}
    yes, no, cat, gone = rows
    of = {yes: ("labels", "exact_match", "yes"), no: ("labels", "exact_match", "yes")}
    of |= {cat: ("open", "token_f1", "cat"), gone: ("pairs", "preference", "")}
    results = [Result(id, task, metric, 0.0, 1.0, said) for id, (task, metric, said) in of.items()]
    found = further(results, {id: rows[id] for id in (yes, no, cat)})
    assert found["labels"] == {"macro_f1": pytest.approx(1 / 3)}
    assert found["open"] == {name: metric("cat", "the cat sat") for name, metric in METRICS.items()}
    assert "pairs" not in found
    assert further(results, {}) == {}


def test_the_metric_that_is_wanted() -> None:
    chosen = {"a": "exact_match", "b": "token_f1", "c": "token_f1"}
    assert wanted(Config.build({}), chosen) == chosen
    config = Config.build({"eval": {"metrics": {"b": "chrf"}}})
    assert wanted(config, chosen) == {**chosen, "b": "chrf"}
    config = Config.build({"eval": {"metrics": {"b": "chrf", "*": "rouge_l", "gone": "chrf"}}})
    assert wanted(config, chosen) == {"a": "rouge_l", "b": "chrf", "c": "rouge_l"}
    with pytest.raises(ConfigError, match="rougel is no metric, did you mean 'rouge_l'"):
        Config.build({"eval": {"metrics": {"b": "rougel"}}})


OWN = """
def same_length(messages, answer):
    assert messages[-1]["role"] == "assistant" and messages[0]["role"] == "user"
    return len(answer) == len(messages[-1]["content"])
def two(messages, answer):
    return 2
def broken(messages, answer):
    return messages["nothing"]
"""


def test_a_metric_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "metrics.py").write_text(OWN)
    names = [f"metrics.py:{name}" for name in ("same_length", "two", "broken")]
    config = Config.build({"eval": {"metrics": dict(zip("abc", names, strict=True))}})
    found = scorers(config, tmp_path)
    assert [found[names[0]](row("q", "yes"), said) for said in ("abc", "abcd")] == [1.0, 0.0]
    for name, said in ((names[1], "gave 2.0; a score lies between 0 and 1"), (names[2], r"failed \(TypeError")):
        with pytest.raises(ConfigError, match=said):
            found[name](row("q", "yes"), "no")
    for name, said in (("no.py:a", "eval.metrics names no.py:a, but .* is no file"), ("metrics.py:x", "be loaded")):
        with pytest.raises(ConfigError, match=said):
            scorers(Config.build({"eval": {"metrics": {"a": name}}}), tmp_path)


def test_scores_of_another_metric_are_not_compared(tmp_path: Path) -> None:
    (tmp_path / "metrics.py").write_text(OWN)
    own = Config.build({"eval": {"metrics": {"a": "metrics.py:two"}}})
    plain, before = conditions(Config.build({}), tmp_path), conditions(own, tmp_path)
    assert plain != before == conditions(own, tmp_path)
    (tmp_path / "metrics.py").write_text(OWN.replace("2", "1"))
    assert conditions(own, tmp_path) != before


def test_an_update_scored_by_metrics_that_the_user_names(workspace: MakeWorkspace) -> None:
    """The next one as well; without them the parent is scored again, by its tasks' own."""
    named = {"pens": "metrics.py:same_length", "*": "rouge_l"}
    ws = workspace(max_steps=2, eval={"metrics": named})
    for number, task in enumerate(("pens", "cups")):
        ws.ingest(toy_rows(task), task=task)
        if not number:
            with pytest.raises(ConfigError, match="is no file"):
                ws.update()
            (ws.root / "metrics.py").write_text(OWN)
        ws.update()
        ws.promote(f"v{number + 1}", force=True)
    first, second = registry.versions(ws)
    assert second.manifest["scores"]["pens"]["metric"] == "metrics.py:same_length"
    assert second.manifest["parent_scores"]["cups"]["metric"] == "rouge_l"
    assert second.manifest["choices"]["metric of cups"] == {"value": "rouge_l", "reason": "eval.metrics names it"}
    assert second.manifest["parent_scores"]["pens"] == {
        key: value for key, value in first.manifest["scores"]["pens"].items() if key != "measures"
    }
    assert set(second.manifest["scores"]["cups"]["measures"]) == set(METRICS)
    scored: dict[str, Any] = answers.score(ws, second, quiet=True)["tasks"]
    assert scored == second.manifest["scores"]
    file = ws.root / "treering.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | {"eval": {}}))
    scored = answers.score(ws, second, quiet=True)["tasks"]
    assert {task: found["metric"] for task, found in scored.items()} == dict.fromkeys(scored, "exact_match")
    assert list(scored["cups"]["measures"]) == ["macro_f1"]
