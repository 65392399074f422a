"""After a hold: which files it was made of, what is tried before one is blamed, and how it goes to quarantine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from treering import registry
from treering.data.read import CORRECTED

if TYPE_CHECKING:
    from treering.registry import Version
    from treering.workspace import Workspace


def to_blame(version: Version) -> bool:
    """Whether the gate held it for what it learned; not, say, because its parent was no longer current."""
    return not version.promote and any(not j["passed"] for j in version.manifest["verdict"]["judgements"])


def only_forgot(version: Version) -> bool:
    """Whether it was held for what it forgot alone, and new rows were measured that it gets right as often as before.

    That nothing was measured of them, or that they got worse without proof of it, speaks for nobody.
    """
    judgements = version.manifest["verdict"]["judgements"]
    new = [j for j in judgements if j["about"] == "new" and j["rows"]]
    right = bool(new) and all(j["after"] > 0 and j["after"] >= j["before"] for j in new)
    return right and {j["about"] for j in judgements if not j["passed"]} == {"old"}


def careful(ws: Workspace, file: str) -> list[str]:
    """Settings that protect more than when `file` was held: half the rate, and half as many new rows among old ones."""
    config = ws.config()
    held = next((v for v in reversed(registry.readable(ws)) if not v.promote and files(ws, v) == [file]), None)
    rate = held.manifest["choices"]["learning_rate"]["value"] if held else config.learning_rate
    share = (1 + config.memory.replay_share) / 2
    slower = [f"learning_rate={rate / 2!r}"] if rate != "auto" else []
    return [*slower, f"memory.replay_share={share!r}"]


def files(ws: Workspace, version: Version) -> list[str]:
    """The files that the rows of its update came from and that still wait, in the order they came."""
    waiting = ws.catalog.waiting(registry.known(ws, registry.current(ws)) | registry.given_back(ws)).values()
    tried = set(version.rows)
    rows = [id for ids in waiting for id in ids if id in tried]
    return list(dict.fromkeys(origin.file for origin in ws.catalog.origins(rows).values()))


def quarantine(ws: Workspace, file: str, version: Version) -> int:
    """Move what came from `file` and waits, but for what a rollback gave back, to quarantine; returns how many rows.

    Its held-out rows go with it: they would go on judging the files that come after.
    """
    here = registry.current(ws)
    others = registry.given_back(ws)
    kept = registry.measured(here) | others
    waiting = ws.catalog.waiting(registry.known(ws, here) | others, file)
    rows = [id for ids in waiting.values() for id in ids]
    rows += [id for ids in ws.catalog.held_out(file).values() for id in ids if id not in kept]
    reason = f"{version.name}, which learned this file, was {version.summary}"
    if Path(file).is_absolute() and not file.endswith(CORRECTED):  # Rows from Python, or corrected, are in no file.
        reason += (
            f"; to take it back: treering ingest {shlex.quote(file)} --task {shlex.quote(next(iter(waiting), ''))}"
        )
    else:
        reason += "; to take it back: treering quarantine release, with its number"
    with ws.catalog.writing() as writer:
        return writer.set_aside(rows, reason)
