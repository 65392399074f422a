"""Experience replay: remembered rows mixed into every epoch (Rolnick et al. 2019, arXiv:1811.11682)."""

from __future__ import annotations

from collections.abc import Sequence

from treering.config import Config
from treering.memory import Memory


class Replay:
    """Mixes in as many remembered rows as give `memory.replay_share` of the epoch."""

    def __init__(self, config: Config) -> None:
        self.share = config.memory.replay_share

    def replay(self, new: Sequence[str], memory: Memory, epoch: int) -> list[str]:
        """Ids of remembered rows, each as often as the others (give or take one)."""
        return memory.draw(round(len(new) * self.share / (1 - self.share)), epoch)
