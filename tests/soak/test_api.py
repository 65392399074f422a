"""The API against its own page, with hundreds of requests a route."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.drawn import met
from tests.serving import Served
from treering import Workspace
from treering.serve import keys

EXAMPLES = 300


@pytest.mark.soak
def test_the_api_does_what_its_page_says(trained: Workspace, tmp_path: Path, record_property: Any) -> None:
    ws = Workspace(shutil.copytree(trained.root, tmp_path / "ws", symlinks=True))
    _, key = keys.create(ws, "drawn", "admin")
    running = Served(ws, tmp_path / "serve.log")
    try:
        found = met(running.url, key, EXAMPLES)
    finally:
        assert running.stop() == 0
    statuses = sum(found.values(), Counter[int]())
    record_property("requests", ", ".join(f"{count} with {status}" for status, count in sorted(statuses.items())))
    assert [route for route, met in found.items() if not any(200 <= status < 300 for status in met)] == []
    assert "Traceback" not in running.log.read_text()
