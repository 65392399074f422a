"""Values as people write them."""

from __future__ import annotations

import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from treering.config import Config
from treering.errors import ConfigError
from treering.settings import as_yaml, parse, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, word) for word in ("off", "on", "no", "Yes", "n", "12:30", "2026-11-23", "0b1", "1_000", "=")),
        ("true", True),
        ("FALSE", False),
        ("~", None),
        ("", None),
        ("null", None),
        ("08", 8),
        ("-12", -12),
        ("0xff", 255),
        ("0o17", 15),
        ("1e-3", 1e-3),
        ("-.5", -0.5),
        ("3.", 3.0),
        ("-.inf", -math.inf),
        ("9" * 5000, math.inf),
        ("{a: [no, 1]}", {"a": ["no", 1]}),
        (r'"\ud83d\ude00"', "😀"),
        (r'["a", "\ud83d"]', r'["a", "\ud83d"]'),
        ("to: everybody", "to: everybody"),
        ("[a", "[a"),
        ("[" * 4000, "[" * 4000),
        ("an answer # please", "an answer # please"),
        ("# c", "# c"),
        ("---", "---"),
        ("'off' # c", "off"),
        ("!!float x", "!!float x"),
        ("!!timestamp 2026-11-23", "!!timestamp 2026-11-23"),
    ],
)
def test_a_value(text: str, value: Any) -> None:
    found = parse(text)
    assert (found, type(found)) == (value, type(value))


def test_a_merge_and_what_is_written_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: &a {x: 1}\nb: {<<: *a, y: off}\n")
    assert read_yaml(tmp_path / "a.yaml")["b"] == {"x": 1, "y": "off"}
    values = {"a": "off", "b": 1e-05, "c": None, "d": [True, "yes", "1", ""]}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(values))
    assert read_yaml(tmp_path / "a.yaml") == values


TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp")))


@given(st.recursive(TEXTS | st.integers() | st.booleans() | st.none(), st.lists))
@example(["08", "1e3", "off", "12:30", "~", "=", "<<", "0x1f", "1_0", ".inf", "2026-11-23", "a\nb", "\ud7ff"])
def test_what_is_written_is_read_again(value: Any) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder, "a.yaml")
        path.write_text(as_yaml({"a": value}), encoding="utf-8", newline="")
        assert read_yaml(path) == {"a": value}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "'seed' stands twice"),
        ("a: " + "[" * 4000, "cannot be read as YAML"),
        (r'a: "\ude00"', "half of a character"),
        (r'"\ud83d": 1', "half of a character"),
    ],
)
def test_what_is_no_settings(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        read_yaml(tmp_path / "a.yaml")


def test_a_number_where_a_text_is_wanted(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"labels: must be a text: put it in quotes \(got 9\)"):
        Config.build({"labels": {"sizes": [9]}})


def test_nothing_but_plain_values_is_made(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        read_yaml(tmp_path / "a.yaml")


def test_words_of_settings(tmp_path: Path) -> None:
    text = "checks: {html: off}\nlabels: {t: [yes, no]}\nlanguages: [no, en]\nbf16: no\nprotect: []\n"
    (tmp_path / "treering.yaml").write_text(text)
    found = Config.load(tmp_path / "treering.yaml")
    assert found.checks == {"html": "off"} and found.labels == {"t": ("yes", "no")}
    assert found.languages == ("no", "en") and found.bf16 is False
