"""Which version answers to the name `current`: the one promoted last, once the engine has it."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from treering import registry
from treering.errors import TreeringError
from treering.serve.engine import BASE, Engine, EngineError

if TYPE_CHECKING:
    from treering.workspace import Workspace

SECONDS_BETWEEN_LOOKS = 0.1

log = logging.getLogger("treering.serve")


class Following:
    """Looks where `current` points, and switches when the engine has that version loaded.

    A version that cannot be loaded does not serve: the one before goes on, and `problem` says why.
    """

    def __init__(self, ws: Workspace, engine: Engine) -> None:
        self._ws = ws
        self._engine = engine
        self._refused: str | None = None
        self.serving = BASE
        self.problem = ""

    async def run(self) -> None:
        """Follow until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)

    async def look(self) -> None:
        """Switch to what `current` names now."""
        try:
            found = registry.current(self._ws)
            wanted = found.name if found else BASE
        except (TreeringError, OSError) as error:
            self._complain("current", str(error))
            return
        if wanted == self.serving:
            self._refused, self.problem = None, ""
            return
        if wanted == self._refused:
            return
        try:
            if wanted != BASE:
                await self._engine.load(wanted)
        except EngineError as error:
            self._refused = wanted
            self._complain(wanted, str(error))
            return
        log.info("serving %s instead of %s", wanted, self.serving)
        self.serving, self._refused, self.problem = wanted, None, ""

    def version(self, model: str) -> str:
        """The version that answers to `model`. Raises `EngineError` for a name nobody has."""
        if model == "current":
            return self.serving
        if model == BASE:
            return BASE
        known = [version.name for version in registry.versions(self._ws)]
        if model in known:
            return model
        raise EngineError(
            f"there is no model {model!r}; there are: {', '.join(['current', BASE, *known])}",
            status=404,
            code="model_not_found",
        )

    def _complain(self, name: str, reason: str) -> None:
        if self.problem != reason:
            log.error("%s goes on serving, for %s cannot: %s", self.serving, name, reason)
        self.problem = reason
