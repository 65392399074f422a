"""Personal data in texts: what presidio's patterns find, on a blank pipeline with no model."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from treering.errors import ConfigError

SURE = 0.4
"""Score from which on what a pattern matches counts; those that any number matches lie below."""

NOBODYS = {"DATE_TIME", "URL"}
"""Kinds that belong to no person."""


MASK = re.compile(r"<[A-Z]+(_[A-Z]+)*>")
"""What stands for a find."""


def masked(text: str) -> tuple[str, set[str]]:
    """`text` with each find as `<KIND>`, and the kinds. Raises `ConfigError` where presidio is not installed."""
    found = [
        one for one in _analyzer().analyze(text, language="en", score_threshold=SURE) if one.entity_type not in NOBODYS
    ]
    kinds, end = set[str](), len(text) + 1
    for one in sorted(found, key=lambda one: (-one.end, one.start, -one.score)):
        if one.end <= end:  # Of those that overlap the one that ends last, and of these the longest.
            text = f"{text[: one.start]}<{one.entity_type}>{text[one.end :]}"
            kinds.add(one.entity_type)
            end = one.start
    return text, kinds


@cache
def _analyzer() -> Any:
    try:
        import spacy
        import tldextract
        from presidio_analyzer import AnalyzerEngine, RecognizerRegistry
        from presidio_analyzer.nlp_engine import SpacyNlpEngine
    except ImportError:
        raise ConfigError(
            "checks has personal-data, but presidio is not installed: pip install 'treering[personal]', or set it off"
        ) from None
    # The list of domains that came with the package; a newer one would be fetched from the network.
    tldextract.tldextract.TLD_EXTRACTOR = tldextract.TLDExtract(suffix_list_urls=())
    engine: Any = SpacyNlpEngine()
    engine.nlp = {"en": spacy.blank("en")}
    registry = RecognizerRegistry()
    registry.load_predefined_recognizers(languages=["en"], nlp_engine=engine)
    return AnalyzerEngine(registry=registry, nlp_engine=engine, supported_languages=["en"])
