"""`memory.general`: a file of general text that every epoch has a share of, so that general ability is replayed too.

Its rows are no task's: they are in no catalog, no memory and no ledger. A plan names the file's hash, so another text
is another update, and one that is resumed has the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from treering.data.records import records
from treering.data.shapes import SHAPES, RowError, convert, plain
from treering.errors import ConfigError
from treering.files import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from treering.config import Config
    from treering.model import Tokens

LABELS = {key for shape in SHAPES if "text" in shape.question for key in shape.answer}
"""Keys that make a record with `text` a question and its answer."""


def file(config: Config, root: Path) -> Path | None:
    """The file, None where none is set; `root` is the workspace's folder. Raises `ConfigError` if it is not there."""
    if config.memory.general is None:
        return None
    path = root / config.memory.general
    if not path.is_file():
        raise ConfigError(f"memory.general is {config.memory.general}, but {path} is no file: name one, or drop it")
    return path


def fingerprint(config: Config, root: Path) -> str | None:
    """SHA-256 of the file, None where none is set."""
    path = file(config, root)
    return sha256(path) if path else None


def read(config: Config, root: Path, tokenizer: PreTrainedTokenizerBase, wanted: str | None) -> dict[str, Tokens]:
    """Its rows by id, `cutoff_len` tokens of each at most; of plain text all tokens but the first are learned.

    Ids begin with `general:`, which no row of a task has. Raises `ConfigError` for content that is neither text nor
    chat, and where the file is not the one with the hash `wanted`.
    """
    path = file(config, root)
    if path is None:
        return {}
    rows: dict[str, Tokens] = {}
    said = f"memory.general is {config.memory.general}, but"
    try:
        for found in records(path):
            if found.error is not None:
                raise ConfigError(f"{said} line {found.line}: {found.error.reason}")
            row = _cut(_tokens(found.value, tokenizer, config), config.cutoff_len)
            if row.answers:
                rows[row.id] = row
    except (RowError, OSError, UnicodeError) as error:
        raise ConfigError(f"{said} {error}") from None
    if sha256(path) != wanted:
        raise ConfigError(f"{said} {path} was changed while the update began: start it again")
    if not rows:
        raise ConfigError(f"{said} {path} holds no text: add some, or drop the setting")
    return rows


def _tokens(record: object, tokenizer: PreTrainedTokenizerBase, config: Config) -> Tokens:
    from treering.model import Tokens, encode, with_prompts

    text = _plain_text(record)
    if text is None:
        row = encode(tokenizer, convert(record, system=config.default_system))
        row = with_prompts(row) if config.train_on_prompt else row
        return replace(row, id=f"general:{row.id}")
    ids = cast("list[int]", tokenizer(text)["input_ids"])
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return Tokens(f"general:{digest}", ids, list(range(1, len(ids))))


def _plain_text(record: object) -> str | None:
    """The `text` of a record that has no label beside it."""
    if not isinstance(record, Mapping):
        return None
    fields = {plain(key): value for key, value in record.items() if value is not None}
    text = fields.get("text")
    return text.strip() if isinstance(text, str) and not LABELS & fields.keys() else None


def _cut(row: Tokens, length: int) -> Tokens:
    answers, prompts = ([place for place in places if place < length] for places in (row.answers, row.prompts))
    return replace(row, ids=row.ids[:length], answers=answers, prompts=prompts)
