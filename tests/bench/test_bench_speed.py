"""What a race says of a contestant that ends before its time."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from treering.bench.speed import Contestant
from treering.errors import TreeringError


def test_a_contestant_that_ends_is_told(tmp_path: Path) -> None:
    peer = Contestant("generate", "nowhere", tmp_path, tmp_path / "log")
    with pytest.raises(TreeringError, match=r"generate ended \(.*No module named treering.bench.nowhere\)"):
        peer.turn(1)


def test_one_that_was_killed_may_have_met_a_full_memory(tmp_path: Path) -> None:
    peer = Contestant("generate", "scorer", tmp_path, tmp_path / "log")
    peer.end()
    with pytest.raises(TreeringError, match="it was killed, as when the machine's memory is full; name fewer --peers"):
        peer.turn(1)
    assert peer._process.returncode == -signal.SIGKILL
