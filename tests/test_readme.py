"""The README is true: its Python runs, and its file map lists every file."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from treering import model
from treering.testing import tiny_model

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_model(tmp_path / "tiny")
    monkeypatch.setattr(model, "_default_model", lambda: tiny)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, object] = {}
    for block in blocks:
        exec(block, names)
    assert (tmp_path / "support" / "versions" / "v1" / "manifest.json").exists()
    assert not (tmp_path / "support" / "current").exists()


def test_file_map_lists_every_module() -> None:
    listed = set(re.findall(r"^\| `(treering/[^`]+)` \|", README, re.MULTILINE))
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "treering").rglob("*.py")}
    empty = {"treering/data/__init__.py"}
    assert listed == files - empty


def test_relative_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        links = re.findall(r"\]\(([^)#:]+)[)#]", page.read_text(encoding="utf-8"))
        assert [link for link in links if not (page.parent / link).exists()] == [], page
