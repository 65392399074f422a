"""Rows past the rules: taken as they are, mended, or refused by the first rule that says so."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treering.data.alike import Said
from treering.data.example import Example
from treering.data.lengths import Lengths
from treering.data.read import Bad, Row
from treering.data.rules import ALL, RULES, Around, Finding, Rule
from treering.data.values import RAW_LENGTH
from treering.own import function, is_own

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from treering.config import Config


PART, PART_CHARACTERS = 4096, 1 << 24
"""Rows that are taken on at a time; fewer where they have more characters than that."""


@dataclass(frozen=True)
class Fit:
    """A row that no rule refuses, as the rules have mended it, and what it says."""

    row: Row
    said: Said
    mended: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checked:
    """A row as it is to be taken; `refused`: the rule that refuses it, and why.

    `mended` and `warned` name the rules that changed it, and those that only warn.
    """

    row: Example
    refused: tuple[str, str] | None = None
    mended: tuple[str, ...] = ()
    warned: tuple[str, ...] = ()


class Checks:
    """The rules at their levels in `config`; those of the user's own lie in the workspace `root`.

    Raises `ConfigError` for a rule of the user's own that is not there.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, root: Path | None = None) -> None:
        lengths = Lengths(tokenizer, config.cutoff_len)
        self.levels = levels = {name: known.level for name, known in ALL.items()} | config.checks
        cuts = levels["too-long"] == "repair"
        self.around = Around(tokenizer, lengths, config.languages, config.labels, cuts=cuts)
        rules: dict[str, Rule] = {name: known.check for name, known in RULES.items()}
        for name in filter(is_own, config.checks):
            rules[name] = partial(_asked, name, function(name, root or Path.cwd(), "checks"))
        self.rules = {name: (rule, levels[name]) for name, rule in rules.items() if levels[name] != "off"}

    def __call__(self, row: Example, task: str = "") -> Checked:
        """What becomes of `row`."""
        around = self.around if task == self.around.task else self._of(task)
        mended, warned = list[str](), list[str]()
        if not around.cuts and (reason := around.lengths.far_too_long(row)):
            return Checked(row, ("too-long", reason))
        for name, (rule, level) in self.rules.items():
            found = rule(row, around)
            if found is None:
                continue
            if level == "warn":
                warned.append(name)
            elif level == "repair" and found.mended is not None and found.mended.answer:
                row = found.mended
                mended.append(name)
            else:
                return Checked(row, (name, found.reason))
        return Checked(row, None, tuple(mended), tuple(warned))

    def mending(self, config: Config, root: Path, personal: bool) -> Checks:
        """The rules that can mend a row, whatever their level, but that none is cut; what they refuse stays as it is.

        So all forms that a row may come in, as settings change, are one. `personal`: masks of personal data as well,
        where presidio is installed; it takes 1 to 10 ms a row.
        """
        there = {name for name, known in RULES.items() if "repair" in known.levels} - {"too-long"}
        if not personal or importlib.util.find_spec("presidio_analyzer") is None:
            there.remove("personal-data")
        levels = {name: "repair" if name in there else "off" for name, known in ALL.items() if "off" in known.levels}
        endless = config.model_copy(update={"checks": levels, "cutoff_len": sys.maxsize})
        return Checks(endless, self.around.tokenizer, root)

    def _of(self, task: str) -> Around:
        self.around = replace(self.around, task=task)
        return self.around


def opened(config: Config, root: Path) -> Checks:
    """The checks of the workspace `root`, with its own model's tokenizer."""
    from treering.model import load_tokenizer, resolve

    folder = resolve(config.model_name_or_path, config.trust_remote_code)
    return Checks(config, load_tokenizer(folder, config.trust_remote_code), root)


def fit(rows: Iterable[Row | Bad], checks: Checks, task: str) -> Generator[list[Fit | Bad]]:
    """What becomes of the rows of a task, part by part: fit to be compared and stored, or for quarantine."""
    part, size = list[Fit | Bad](), 0
    for one in rows:
        part.append(one if isinstance(one, Bad) else _fit(one, checks(one.example, task)))
        size += sum(len(turn.content) + len(turn.extra) for turn in one.example.messages) if one.example else 0
        if len(part) == PART or size >= PART_CHARACTERS:
            yield part
            part, size = [], 0
    if part:
        yield part


def refused(row: Row, rule: str, reason: str) -> Bad:
    """The row as it goes to quarantine."""
    raw = " | ".join(turn.text for turn in row.example.messages)[:RAW_LENGTH]
    return Bad(row.file, row.line, rule, reason, raw, row.example)


def _fit(row: Row, checked: Checked) -> Fit | Bad:
    if checked.refused:
        return refused(row, *checked.refused)
    row = replace(row, example=checked.row) if checked.mended else row
    return Fit(row, Said.of(row.example), checked.mended, checked.warned)


def _asked(name: str, rule: Callable[[Any], str | None], row: Example, _: Around) -> Finding | None:
    """What the user's rule `name` says: it gets the messages as dictionaries, and returns a reason or None."""
    try:
        reason = rule(row.as_dicts())
    except (Exception, SystemExit) as error:
        return Finding(f"the rule failed on it ({error!r}); correct {name}")
    return Finding(str(reason)) if reason else None
