"""`memory.general`: a file of general text that every epoch has a share of, so that general ability is replayed too.

Its rows are no task's: they are in no catalog, no memory and no ledger. A plan names the file's hash, so another text
is another update, and one that is resumed has the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from treering.data.records import records
from treering.data.shapes import PLAIN, convert, is_plain_text
from treering.data.values import RowError
from treering.errors import ConfigError
from treering.files import sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from treering.config import Config
    from treering.model import Tokens


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
    from treering.model import encode, with_prompts

    if is_plain_text(record):
        row = encode(tokenizer, convert(record, shape=PLAIN))
        return replace(row, id=f"general:{row.id}")
    row = encode(tokenizer, convert(record, system=config.default_system))
    row = with_prompts(row) if config.train_on_prompt else row
    return replace(row, id=f"general:{row.id}")


def _cut(row: Tokens, length: int) -> Tokens:
    answers, prompts = ([place for place in places if place < length] for places in (row.answers, row.prompts))
    return replace(row, ids=row.ids[:length], answers=answers, prompts=prompts)
