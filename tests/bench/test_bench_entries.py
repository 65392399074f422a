"""What `--methods` says, and what each method's settings are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from treering.bench.entries import METHODS, Entry, parse
from treering.errors import ConfigError, UsageError

COMMON: dict[str, Any] = {"memory": {"size": 7}, "num_train_epochs": 1}


def named(name: str) -> Entry:
    (entry,) = parse(name)
    return entry


def test_the_published_table_has_what_it_must_have() -> None:
    kinds = {name: named(name).settings(COMMON) for name in METHODS}
    assert {"untouched", "naive", "naive-tuned", "full", "full-tuned", "replay", "oracle", "joint"} < set(kinds)
    assert kinds["replay"]["memory"] == {"size": 7, "policy": "reservoir"} and kinds["treering"]["memory"]["size"] == 7
    assert [name for name in METHODS if named(name).tuned] == ["naive-tuned", "full-tuned"]
    assert kinds["full"]["finetuning_type"] == "full" and kinds["full"]["protect"] == []
    assert (kinds["naive"]["learning_rate"], kinds["full"]["learning_rate"]) == (1.5e-3, 5e-5)


def test_settings_of_all_methods_leave_each_what_it_is() -> None:
    given = ("distill.weight=1", "protect=[replay, lwf]", "learning_rate=0.01")
    ours, naive, replay = (named(name).settings(COMMON, given) for name in ("treering", "naive", "replay"))
    assert ours["distill"] == naive["distill"] == {"weight": 1.0}
    assert (ours["protect"], naive["protect"], replay["protect"]) == (["replay", "lwf"], [], ["replay"])
    assert ours["learning_rate"] == naive["learning_rate"] == 0.01
    assert named("naive-tuned").settings(COMMON, given)["learning_rate"] == 1.5e-3
    assert named("naive-tuned").at(5e-05).settings(COMMON, given)["learning_rate"] == 5e-05
    with pytest.raises(ConfigError, match=r"method naive: .*\n.*distill\.weigth"):
        named("naive").settings(COMMON, ("distill.weigth=1",))


def test_a_method_may_have_settings_and_a_file_may_name_more(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "gentle: {protect: [replay, lwf], lwf: {weight: 0.5}}\n"
        "slow: {method: naive, learning_rate: 1e-5}\n"
        "best: {method: replay, learning_rate: tuned}\n"
    )
    found = parse(f"naive, treering:lwf.weight=0.1,protect=[replay,lwf],joint,{file}")
    assert [entry.name for entry in found] == [
        "naive",
        "treering:lwf.weight=0.1,protect=[replay,lwf]",
        "joint",
        "gentle",
        "slow",
        "best",
    ]
    settings = [entry.settings(COMMON) for entry in found]
    assert settings[1]["protect"] == settings[3]["protect"] == ["replay", "lwf"]
    assert (settings[1]["lwf"], settings[3]["lwf"]) == ({"weight": 0.1}, {"weight": 0.5})
    assert (settings[4]["learning_rate"], settings[4]["protect"]) == (1e-5, [])
    assert found[5].tuned and found[5].kind == "replay"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("best", "unknown methods: best; known: untouched"),
        ("naive,naive", "naive twice"),
        (" , ", "names no method"),
        ("lora_rank=4,naive", "name the method before it"),
    ],
)
def test_what_cannot_be_meant_is_told(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        parse(text)
