"""Each rule by rows that break it and rows that just do not; what levels make of that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from treering.config import Config
from treering.data.check import Checked, Checks
from treering.data.example import Example
from treering.data.rules import RULES
from treering.data.shapes import convert
from treering.errors import ConfigError
from treering.model import load_tokenizer

LOOP = "again and again " * 8
OFF = dict.fromkeys((name for name, rule in RULES.items() if "off" in rule.levels), "off")


def example(question: str, answer: str = "an answer") -> Example:
    return Example.of([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Any:
    return load_tokenizer(model_folder)


def checked(tokenizer: Any, row: Example, task: str = "", root: Path | None = None, **settings: Any) -> Checked:
    return Checks(Config.build(settings), tokenizer, root)(row, task)


@pytest.mark.parametrize(
    "row",
    [
        *(example(question, "!!") for question in ("fine", "tab\tand\r\nlines", "?", "x " * 6)),
        example("How much is 3 < 5 & 7 > 2?", "{a: 1} <- so"),
        example("café déjà vu, naïve", "“quoted” – 中文 ❤"),
        example("Say it three times", "again and again and again"),
        example("a list", " ".join(str(at) for at in range(100))),
        example("sorry", "I am sorry to hear that; the lamp will be replaced"),
    ],
)
def test_good_rows_pass(tokenizer: Any, row: Example) -> None:
    assert checked(tokenizer, row) == Checked(row)


@pytest.mark.parametrize(
    ("row", "rule", "reason"),
    [
        (example(" "), "empty-question", "last user turn is empty"),
        (example("Lost card", " lost  CARD. "), "answer-equals-question", "' lost  CARD. ' repeats"),
        (example("bell\x07"), "control-characters", "turn 1 holds U+0007 at character 5"),
        (example("fine", "\x00"), "control-characters", "turn 2 holds U+0000"),
        (example("go on", LOOP), "repetition", "says 'again and again' 8 times"),
        (example("继续", "好的好的" * 10), "repetition", "times; write it once"),
        (example("x" * 100), "too-long", "tokens are more than cutoff_len=60; shorten"),
    ],
)
def test_bad_rows_are_refused(tokenizer: Any, row: Example, rule: str, reason: str) -> None:
    found = checked(tokenizer, row, cutoff_len=60 if rule == "too-long" else 2048)
    assert found.refused is not None and found.refused[0] == rule
    assert reason in found.refused[1]


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        (example("<p>Where is it?</p>"), "html"),
        (example("Tom &amp; Jerry"), "html"),
        (example("Dear {{ name }}"), "template-markers"),
        (example("[INST] hello [/INST]"), "template-markers"),
        (example("hello", "As an AI language model, I cannot say"), "refusal"),
        (example("你好", "作为一个人工智能，我无法回答"), "refusal"),
    ],
)
def test_doubtful_rows_are_taken_with_a_warning_or_as_the_settings_say(tokenizer: Any, row: Example, rule: str) -> None:
    assert checked(tokenizer, row) == Checked(row, warned=(rule,))
    assert checked(tokenizer, row, checks={rule: "off"}) == Checked(row)
    refused = checked(tokenizer, row, checks={rule: "reject"}).refused
    assert refused is not None and refused[0] == rule


@pytest.mark.parametrize(
    ("row", "rule", "mended"),
    [
        (example("the cafÃ© is closed"), "broken-encoding", "the café is closed"),
        (example("stop<|im_end|>\n<|im_start|>system"), "special-tokens", "stop< |im_end|>\n< |im_start|>system"),
        (example("bell\x07 rings"), "control-characters", "bell rings"),
    ],
)
def test_what_can_be_mended_is(tokenizer: Any, row: Example, rule: str, mended: str) -> None:
    found = checked(tokenizer, row, checks={rule: "repair"})
    assert found == Checked(example(mended), mended=(rule,))
    assert checked(tokenizer, found.row) == Checked(found.row)
    assert checked(tokenizer, row, checks={rule: "off"}) == Checked(row)


def test_a_neutralised_mark_is_no_token(tokenizer: Any) -> None:
    found = checked(tokenizer, example("<|im_end|>"))
    assert tokenizer.eos_token_id not in tokenizer(found.row.messages[0].content)["input_ids"]


@pytest.mark.parametrize("question", ["x" * 300, "x"])
def test_what_is_too_long_is_cut_to_fit(tokenizer: Any, question: str) -> None:
    row = example(question, "y" * 10 if len(question) > 1 else "".join(f"{at} " for at in range(90)).strip())
    checks = Checks(Config.build({"cutoff_len": 60, "checks": {"too-long": "repair"}}), tokenizer)
    found = checks(row)
    assert found.mended == ("too-long",)
    assert 59 <= checks.around.lengths.of(found.row) <= 60  # No blank is left at the end.
    assert [new.content == old.content for new, old in zip(found.row.messages, row.messages, strict=True)] == [
        len(question) == 1,
        len(question) > 1,
    ]
    tight = Checks(Config.build({"cutoff_len": 10, "checks": {"too-long": "repair"}}), tokenizer)
    assert tight(row).refused is not None  # The marks alone are more.


def test_lengths_are_bytes_at_most_and_counted_where_in_question(tokenizer: Any) -> None:
    lengths = Checks(Config.build({"cutoff_len": 60}), tokenizer).around.lengths
    for count in range(20, 50):
        row = example("é" * (count // 2), "y")
        assert lengths.fits(row) == (lengths.of(row) <= 60)


def test_what_the_chat_template_refuses_is_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{% if messages|length != 2 %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}x"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    turns = [("user", "a"), ("user", "b"), ("assistant", "c")]
    row = Example.of([{"role": role, "content": text} for role, text in turns])
    found = checked(tokenizer, row)
    assert found.refused is not None
    assert found.refused[0] == "template-refuses"
    assert "template refuses it (Conversation roles must alternate)" in found.refused[1]


def test_the_last_question_counts(tokenizer: Any) -> None:
    turns = [("user", ""), ("assistant", "what?"), ("user", "this"), ("assistant", "what?")]
    row = Example.of([{"role": role, "content": text} for role, text in turns])
    assert checked(tokenizer, row).refused is None


@pytest.mark.parametrize(
    ("rule", "text"), [("control-characters", "a\x07"), ("html", "<p>a"), ("template-markers", "{{ a }}")]
)
def test_all_that_a_row_says_is_looked_at(tokenizer: Any, rule: str, text: str) -> None:
    asked: dict[str, Any] = {"role": "user", "content": "q"}
    pair = Example.of([asked, {"role": "assistant", "content": "b", "rejected": text}])
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": text}}}
    calling: list[dict[str, Any]] = [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    for row in (pair, Example.of([asked, *calling, {"role": "assistant", "content": "b"}])):
        found = checked(tokenizer, row, checks={rule: "reject"}).refused
        assert found is not None and found[0] == rule
    mended = checked(tokenizer, pair, checks={"control-characters": "repair"}).row
    assert "\x07" not in mended.messages[-1].texts[-1]


def test_a_task_may_have_certain_labels_only(tokenizer: Any) -> None:
    labels = {"support": ["refund", "Delivery"]}
    assert checked(tokenizer, example("a", "delivery."), "support", labels=labels).refused is None
    assert checked(tokenizer, example("a", "other"), "sales", labels=labels).refused is None
    found = checked(tokenizer, example("a", "Refunds"), "support", labels=labels).refused
    assert found == ("unknown-label", "the answer 'Refunds' is none of the 2 labels of support; correct it")


def test_rows_in_other_languages(tokenizer: Any) -> None:
    german = example("Wo ist mein Paket, das ich letzte Woche bestellt habe?", "Es ist unterwegs.")
    assert checked(tokenizer, german).refused is None
    assert checked(tokenizer, german, languages=["en", "de"]).refused is None
    assert checked(tokenizer, german, languages=["en"]).refused == (
        "language",
        "it is in de, and languages is [en]; translate it, or add the language",
    )
    assert checked(tokenizer, example("Paket?", "ja"), languages=["en"]).refused is None  # Too short to tell.
    with pytest.raises(ConfigError, match="languages names klingon: write ISO 639-1 codes"):
        checked(tokenizer, german, languages=["klingon"])


def test_personal_data_is_masked_or_refused(tokenizer: Any) -> None:
    row = example("Call +1 212 555 0175 about order 12345", "or write to anna@example.com by 2024-05-01")
    assert checked(tokenizer, row) == Checked(row)
    assert checked(tokenizer, row, checks={"personal-data": "repair"}) == Checked(
        example("Call <PHONE_NUMBER> about order 12345", "or write to <EMAIL_ADDRESS> by 2024-05-01"),
        mended=("personal-data",),
    )
    assert checked(tokenizer, row, checks={"personal-data": "reject"}).refused == (
        "personal-data",
        "it holds EMAIL_ADDRESS, PHONE_NUMBER; take it out",
    )


def test_personal_data_is_masked_in_calls_too(tokenizer: Any) -> None:
    call = {"name": "mail", "arguments": {"to": ["anna@example.com"], "times": 12125550175}}
    row = convert(
        {"messages": [{"role": "user", "content": "do it"}, {"role": "tool_call", "content": json.dumps(call)}]}
    )
    found = checked(tokenizer, row, checks={"personal-data": "repair"})
    assert '{"to": ["<EMAIL_ADDRESS>"], "times": 12125550175}' in found.row.answer


def test_a_rule_of_the_users_own(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "rules.py").write_text(
        "def no_prices(messages):\n"
        "    if '$' in messages[-1]['content']:\n"
        "        return 'it names a price'\n"
        "def broken(messages):\n"
        "    return messages[9]\n"
    )
    checks = {"rules.py:no_prices": "reject"}
    assert checked(tokenizer, example("a", "12 $"), root=tmp_path, checks=checks).refused == (
        "rules.py:no_prices",
        "it names a price",
    )
    assert checked(tokenizer, example("a", "12"), root=tmp_path, checks=checks).refused is None
    found = checked(tokenizer, example("a"), root=tmp_path, checks={"rules.py:broken": "reject"}).refused
    assert found is not None and "the rule failed on it (IndexError" in found[1]
    for name, said in (("no.py:a", "is no file"), ("rules.py:missing", "cannot be loaded")):
        with pytest.raises(ConfigError, match=said):
            checked(tokenizer, example("a"), root=tmp_path, checks={name: "warn"})


def test_all_wrong_levels_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        Config.build({"checks": {"htlm": "off", "html": "repair", "rules.py:f": "repair"}})
    for words in (
        "htlm is no rule, did you mean 'html'?",
        "html is repair; it may be reject, warn, off",
        "rules.py:f is repair",
    ):
        assert words in str(told.value)


def test_the_first_rule_refuses_and_later_ones_see_what_was_mended(tokenizer: Any) -> None:
    row = example("bell\x07", "bell")
    assert checked(tokenizer, row, checks={"control-characters": "repair"}) == Checked(
        example("bell", "bell"), mended=("control-characters",)
    )
    assert checked(tokenizer, example("", "x")).refused is not None
    assert Checks(Config.build({"checks": OFF}), tokenizer)(example("", "<p>")) == Checked(example("", "<p>"))
