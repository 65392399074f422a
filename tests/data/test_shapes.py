"""Every shape a row may have, and every way in which one may be wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from treering.data.pairs import is_pair
from treering.data.shapes import NAMED, convert, known_columns
from treering.data.values import RowError

ASK = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
PLAIN = [("user", "q"), ("assistant", "a")]


def turns(record: Mapping[str, object], system: str | None = None, need_answer: bool = True) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in convert(record, system, need_answer).messages]


PLAIN_RECORDS: list[dict[str, object]] = [
    {"messages": [ASK, ANSWER]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}], "name": None}, ANSWER]},
    {"messages": [{"role": "System", "content": " "}, ASK, ANSWER]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}], "system": ""},
    {"conversations": [{"from": "user", "value": "q", "role": None, "content": None}, ANSWER]},
    {"instruction": "q", "output": "a"},
    {"instruction": "q", "input": "", "output": "a", "system": None, "history": []},
    {"prompt": "q", "completion": "a"},
    {"prompt": "q", "response": "a", "completion": None},
    {"prompt": [ASK], "completion": [ANSWER]},
    {"prompt": [ASK], "completion": "a"},
    {"question": "q", "answer": "a"},
    {"text": "q", "label": "a"},
    {"sentence": "q", "category": "a"},
    {"utterance": "q", "intent": "a"},
    {"message": "q", "label": "a", "intent": " "},
    {"query": "q", "label": "a"},
    {" TEXT ": " q\n", "Label\t": "\ta "},
    {"text": "q", "label": "a", "system": "Linux", "ID": 1, "id": 2},
    {"prompt": "q", "text": None, "label": None, "completion": "a"},
    {"prompt": "unanswered", "text": "q", "label": "a"},
]


@pytest.mark.parametrize("record", PLAIN_RECORDS, ids=str)
def test_every_shape_gives_the_same_example(record: dict[str, object]) -> None:
    assert turns(record) == PLAIN


def test_text_parts_are_joined_by_newlines() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two", "image_url": None}]
    assert turns({"messages": [{"role": "user", "content": parts}, ANSWER]})[0] == ("user", "one\ntwo")


def test_roles_are_translated() -> None:
    said = [
        ("developer", "be brief"),
        ("human", "q"),
        ("gpt", "look"),
        ("observation", "42"),
        ("tool", "43"),
        ("gpt", "a"),
    ]
    roles = [role for role, _ in turns({"conversations": [{"from": role, "value": text} for role, text in said]})]
    assert roles == ["system", "user", "assistant", "tool", "tool", "assistant"]


def test_alpaca_in_full() -> None:
    record = {"instruction": "q", "input": "in", "output": "a", "system": "s", "history": [["q1", "a1"], ("q2", "a2")]}
    history = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]
    assert turns(record) == [("system", "s"), *history, ("user", "q\nin"), ("assistant", "a")]


def test_labels_lose_underscores_and_stay_digits() -> None:
    assert turns({"text": "q", "label": "_card_lost"})[1] == ("assistant", "card lost")
    assert turns({"text": "q", "label": 7})[1] == ("assistant", "7")
    assert turns({"question": "q", "answer": "snake_case"})[1] == ("assistant", "snake_case")


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [ASK, ANSWER], "system": "own"},
        {"messages": [{"role": "system", "content": "own"}, ASK, ANSWER]},
        {"messages": [{"role": "system", "content": "own"}, ASK, ANSWER], "system": "own "},
        {"prompt": "q", "completion": "a", "system": "own"},
    ],
)
def test_a_rows_own_system_turn_wins(record: dict[str, object]) -> None:
    assert turns(record, system="given") == [("system", "own"), *PLAIN]


def test_system_is_added_where_there_is_none() -> None:
    assert turns({"text": "q", "label": "a"}, system=" given ") == [("system", "given"), *PLAIN]
    assert turns({"text": "q", "label": "a"}, system=" ") == PLAIN


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASK]},
        {"messages": [ASK, {"role": "assistant", "content": ""}]},
        {"instruction": "q"},
        {"prompt": "q", "completion": " "},
        {"question": "q", "answer": None},
        {"text": "q"},
    ],
)
def test_prediction_rows_may_lack_the_answer(record: dict[str, object]) -> None:
    assert turns(record, need_answer=False) == PLAIN[:1]


def test_prediction_rows_keep_the_answer_they_have() -> None:
    assert turns({"text": "q", "label": "a"}, need_answer=False) == PLAIN


def test_what_a_question_is_about_stands_with_it() -> None:
    assert turns({"question": "q", "context": "c", "answer": "a"}) == [("user", "c\nq"), ("assistant", "a")]
    dolly = {"instruction": "q", "context": "c", "response": "a", "category": "open"}
    assert turns(dolly) == [("user", "q\nc"), ("assistant", "a")]


def test_what_openai_had_before_is_known() -> None:
    call = {"name": "f", "arguments": "{}"}
    result = {"role": "function", "name": "f", "content": "1"}
    row = {"messages": [ASK, {"role": "assistant", "content": None, "function_call": call}, result, ANSWER]}
    assert json.loads(convert(row).messages[1].extra)["tool_calls"][0]["function"]["name"] == "f"


def test_a_turn_of_weight_0_says_so() -> None:
    row = {"messages": [ASK, {**ANSWER, "content": "bad", "weight": 0}, ASK, {**ANSWER, "weight": 1}]}
    assert [turn.is_learned for turn in convert(row).messages] == [True, False, True, True]
    assert convert(row).as_dicts() == [ASK, {**ANSWER, "content": "bad", "weight": 0}, ASK, ANSWER]
    assert convert({"messages": convert(row).as_dicts()}).id == convert(row).id


def test_an_empty_question_is_left_to_the_checks() -> None:
    assert turns({"prompt": " ", "completion": "a"})[0] == ("user", "")


WRONG: list[tuple[str, str, dict[str, object]]] = [
    ("unknown-format", "'colour', 'size'", {"colour": 1, "size": 2}),
    ("unknown-format", "instruction\\+output", {}),
    ("unknown-format", "named 'text'", {"text": "q", "Text ": "q", "label": "a"}),
    ("unknown-format", "label and intent", {"text": "q", "label": "a", "intent": "b"}),
    ("unknown-format", "text and query", {"text": "q", "query": "q", "label": "b"}),
    ("no-answer", "output", {"instruction": "q"}),
    ("no-answer", "completion or response", {"prompt": "q", "completion": " \n"}),
    ("no-answer", "label or category", {"text": "q", "label": None}),
    ("no-answer", "last turn of messages", {"messages": [ASK, {"role": "assistant", "content": " "}]}),
    ("no-user-turn", "user", {"messages": []}),
    ("no-user-turn", "user", {"conversations": [{"from": "gpt", "value": "a"}]}),
    ("no-user-turn", "user", {"question": [ANSWER], "context": "c", "answer": "a"}),
    ("bad-turns", "messages is text", {"messages": "q"}),
    ("bad-turns", "messages is null", {"messages": None}),
    ("bad-turns", "turn 1 is text", {"messages": ["q", "a"]}),
    ("bad-turns", "'wizard'", {"messages": [{"role": "wizard", "content": "q"}, ANSWER]}),
    ("bad-turns", "role of messages turn 1 is null", {"messages": [{"content": "q"}, ANSWER]}),
    ("bad-turns", "role of messages turn 1 is a list", {"messages": [{"role": [[]], "content": "q"}, ANSWER]}),
    ("bad-turns", "turn 2 is a number", {"messages": [ASK, {"role": "assistant", "content": 5}]}),
    ("bad-turns", "turn 2 is null", {"messages": [ASK, {"role": "assistant", "content": None}]}),
    ("bad-turns", "beside it is only 'refusal'", {"messages": [ASK, {"role": "assistant", "refusal": "no"}]}),
    ("bad-turns", "weight of messages turn 2 is 0.5", {"messages": [ASK, {**ANSWER, "weight": 0.5}]}),
    ("undesired-answer", "label is false", {"prompt": "q", "completion": "a", "label": False}),
    ("undesired-answer", "label is false", {"prompt": "q", "completion": "a", "label": "False"}),
    ("undesired-answer", "label is false", {"messages": [ASK, ANSWER], "label": False}),
    ("undesired-answer", "label is false", {"instruction": "q", "output": "a", "label": False}),
    ("undesired-answer", "the last turn has weight 0", {"messages": [ASK, {**ANSWER, "weight": 0}]}),
    ("unknown-format", "input and context", {"instruction": "q", "input": "a", "context": "b", "output": "c"}),
    ("bad-turns", "not 'text'", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}),
    ("bad-turns", "not 'text'", {"messages": [{"role": "user", "content": ["q"]}, ANSWER]}),
    ("bad-turns", "call 1 needs a name", {"messages": [ASK, {**ANSWER, "tool_calls": [{"id": "1"}]}]}),
    ("bad-turns", "tools are no list", {"messages": [ASK, ANSWER], "tools": {"name": "f"}}),
    ("bad-turns", "tools cannot be read as JSON", {"messages": [ASK, ANSWER], "tools": "f"}),
    ("bad-turns", "tool 1 has no name", {"messages": [ASK, ANSWER], "tools": [{"type": "function"}]}),
    ("bad-turns", "last turn is the user's", {"messages": [ASK, ANSWER, ASK]}),
    ("bad-turns", "turn 2 is a system turn", {"messages": [ASK, {"role": "system", "content": "s"}, ANSWER]}),
    ("bad-turns", "turn 2 is a system", {"messages": [{"role": "system", "content": "s"}, ASK, ANSWER], "system": "t"}),
    ("bad-turns", "turn 2, an assistant's", {"messages": [ASK, {"role": "assistant", "content": ""}, ASK, ANSWER]}),
    ("bad-turns", "history is text", {"instruction": "q", "output": "a", "history": "before"}),
    ("bad-turns", "history entry 1", {"instruction": "q", "output": "a", "history": [["q"]]}),
    ("bad-turns", "label is a number", {"text": "q", "label": 1.0}),
    ("bad-turns", "label is a truth value", {"text": "q", "label": True}),
    ("bad-turns", "answer is an object", {"question": "q", "answer": {"text": "a"}}),
    ("bad-turns", "type bytes", {"question": "q", "answer": b"a"}),
    ("encoding", "U\\+D800", {"text": "q\ud800", "label": "a"}),
    ("encoding", "U\\+DFFF", {"messages": [ASK, {"role": "assistant", "content": "\udfff"}]}),
]


@pytest.mark.parametrize(
    ("rule", "reason", "record"), WRONG, ids=lambda value: str(value)[:60].encode("utf-8", "replace")
)
def test_wrong_rows_are_named(rule: str, reason: str, record: dict[str, object]) -> None:
    with pytest.raises(RowError, match=reason) as caught:
        convert(record)
    assert caught.value.rule == rule


def test_a_prediction_row_ends_with_the_users_turn() -> None:
    with pytest.raises(RowError, match="last turn is the tool's"):
        convert({"messages": [ASK, {"role": "tool", "content": "42"}]}, need_answer=False)


# Names of elsewhere


SHARED: list[dict[str, object]] = [
    {"指令": "q", "输出": "a"},
    {"指令": "q", "输入": "", "输出": "a", "系统": "", "历史": []},
    {"问题": "q", "答案": "a"},
    {"問題": "q", "回答": "a"},
    {"提示": "q", "回复": "a"},
    {"文本": "q", "标签": "a"},
    {"内容": "q", "类别": "a"},
    {"句子": "q", "意图": "a"},
    {"对话": [{"角色": "用户", "内容": "q"}, {"角色": "助手", "内容": "a"}]},
    {"对话": [{"角色": "客户", "内容": "q"}, {"角色": "客服", "内容": "a"}]},
    {"消息": [{"role": "user", "内容": "q"}, {"角色": "assistant", "content": "a"}]},
    {"conversation": [{"human": "q", "assistant": "a"}], "category": "chat", "conversation_id": 1},
    {"conversations": [{"assistant": "a", "user": "q"}]},
    {"conversations": [{"user": "q"}, {"role": "bot", "text": "a"}]},
    {"dialogue": [{"speaker": "prompter", "text": "q"}, {"speaker": "assistant", "text": "a"}]},
    {"conversations": [{"from": "Human", "value": "q"}, {"from": "ChatGPT", "value": "a"}]},
    {"conversations": [{"from": "user", "value": "q"}, {"from": "model", "value": "a"}]},
    {"conversations": [{"role": "human", "value": "q"}, {"from": "bing", "content": "a"}]},
    {"text": "q", "label": "a", "dialog": "a text that is no list of turns"},
]


@pytest.mark.parametrize("record", SHARED, ids=str)
def test_names_of_elsewhere_are_known(record: dict[str, object]) -> None:
    assert turns(record) == PLAIN
    assert set(known_columns(list(record))) <= set(record)


def test_a_chinese_row_in_full() -> None:
    record = {"系统": "s", "历史": [["q1", "a1"]], "指令": "q", "输入": "in", "输出": "a"}
    assert turns(record) == [
        ("system", "s"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q\nin"),
        ("assistant", "a"),
    ]


def test_a_key_and_its_other_name_are_not_both_taken() -> None:
    with pytest.raises(RowError, match="two columns or keys are named 'question'"):
        convert({"问题": "q", "question": "r", "答案": "a"})


# Preference pairs

NO = {"role": "assistant", "content": "no"}

PAIRS: list[dict[str, object]] = [
    {"prompt": "q", "chosen": "a", "rejected": "no"},
    {"prompt": [ASK], "chosen": [ANSWER], "rejected": [NO]},
    {"prompt": "q", "chosen": [ASK, ANSWER], "rejected": [ASK, NO]},
    {"chosen": [ASK, ANSWER], "rejected": [ASK, NO]},
    {"prompt": "q", "messages": [ASK, ANSWER], "chosen": [ASK, ANSWER], "rejected": [ASK, NO]},
    {"instruction": "q", "input": "", "chosen": "a", "rejected": "no"},
    {"question": "q", "chosen": "a", "rejected": "no", "system": ""},
    {"问题": "q", "优选": "a", "劣选": "no"},
    {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "no"},
    },
    {"messages": [ASK], "chosen": "a", "rejected": None},
]


@pytest.mark.parametrize("record", PAIRS, ids=str)
def test_of_a_pair_the_chosen_answer_is_learned(record: dict[str, object]) -> None:
    assert is_pair(record)
    assert turns(record) == PLAIN


def test_what_looks_like_a_pair() -> None:
    assert turns({"question": "q", "answer": "a", "chosen": True}) == PLAIN
    assert turns({"question": "q", "answer": "a", "chosen": None, "rejected": None}) == PLAIN
    assert not is_pair({"question": "q", "answer": "a", "chosen": True})
    with pytest.raises(RowError, match="answer and chosen are both filled"):
        convert({"question": "q", "answer": "b", "chosen": "a", "rejected": "no"})
    with pytest.raises(RowError, match="the chosen answer has no question"):
        convert({"chosen": "a", "rejected": "no"})
    with pytest.raises(RowError, match="chosen is a number"):
        convert({"prompt": "q", "chosen": 0.5, "rejected": 0.1})


def test_a_shape_that_is_told() -> None:
    both = {"text": "q", "label": "a", "prompt": "other", "completion": "b"}
    assert turns(both) == [("user", "other"), ("assistant", "b")]
    assert [turn.content for turn in convert(both, shape="label").messages] == ["q", "a"]
    with pytest.raises(RowError, match="rename them to one of: messages"):
        convert(both, shape="openai")
    assert set(NAMED) == {"openai", "sharegpt", "alpaca", "prompt", "question", "label", "text"}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        {"question": "q", "answer": [{"role": "assistant", "content": "a"}]},
        {"dialogue": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"对话": [{"角色": "user", "内容": "q"}, {"角色": "assistant", "内容": "a"}]},
        {"instruction": "q", "output": "a", "history": []},
        {"prompt": [{"role": "user", "content": "q"}], "chosen": [{"role": "assistant", "content": "a"}]},
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    ],
)
def test_turns_that_stand_as_json_text_are_turns(row: dict[str, Any]) -> None:
    """As tables have them; the rejected answer of a pair too."""
    if "chosen" in row:
        row = row | {"rejected": [{"role": "assistant", "content": "no"}]}
    told = {key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()}
    assert convert(told, pairs=True) == convert(row, pairs=True)
    assert turns(told) == [("user", "q"), ("assistant", "a")]


ROLES_OF_A_SITE = '[{"role": "user", "permissions": "read"}]'
SAID = '[{"speaker": "AI", "text": "hello"}]'


@pytest.mark.parametrize("text", ["[1, 2]", "[]", '[{"name": "lamp"}]', ROLES_OF_A_SITE, SAID, "[" * 9999])
def test_other_json_text_is_text(text: str) -> None:
    assert turns({"prompt": "q", "completion": text}) == [("user", "q"), ("assistant", text)]
    if text != SAID:
        with pytest.raises(RowError):
            turns({"dialogue": text})
