"""Which language a text is in (lingua), where that can be told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import cache
from typing import Any

from treering.errors import ConfigError

SURE = 0.9
"""Confidence from which on a text counts as one of another language."""

SHORTEST = 20
"""Characters from which on a text says its language."""

UNCLEAR = "unclear"
"""Stands for the language of texts that are too short, or could be of several."""

_READ = 1000
"""Characters of a text that are read where many are counted."""


def language_of(text: str, wanted: tuple[str, ...]) -> str | None:
    """The ISO 639-1 code of its language where it is surely none of those `wanted`, else None.

    Raises `ConfigError` where lingua is not installed, or knows none of the codes.
    """
    detector, codes = _detector(wanted)
    code = _surely(detector, text)
    return code if code not in codes else None


def languages(texts: Iterable[str]) -> dict[str, int] | None:
    """How many of the texts are in which language (ISO 639-1, or `UNCLEAR`), most first; None without lingua."""
    try:
        detector, _ = _detector(())
    except ConfigError:
        return None
    return dict(Counter(_surely(detector, text[:_READ]) or UNCLEAR for text in texts).most_common())


def _surely(detector: Any, text: str) -> str | None:
    if len(text.strip()) < SHORTEST:
        return None
    found = detector.compute_language_confidence_values(text)[0]
    return found.language.iso_code_639_1.name.lower() if found.value >= SURE else None


@cache
def _detector(wanted: tuple[str, ...]) -> tuple[Any, frozenset[str]]:
    try:
        from lingua import IsoCode639_1, LanguageDetectorBuilder
    except ImportError:
        raise ConfigError(
            f"languages is [{', '.join(wanted)}], but lingua is not installed: pip install 'treering[language]'"
        ) from None
    codes = frozenset(code.strip().lower() for code in wanted)
    unknown = [code for code in codes if not hasattr(IsoCode639_1, code.upper())]
    if unknown:
        raise ConfigError(f"languages names {', '.join(sorted(unknown))}: write ISO 639-1 codes such as en, de, zh")
    return LanguageDetectorBuilder.from_all_languages().with_low_accuracy_mode().build(), codes
