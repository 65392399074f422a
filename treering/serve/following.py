"""Which version answers to the name `current`: the one promoted last, once the engine has it."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from treering import registry, remarks
from treering.errors import TreeringError
from treering.files import stamp
from treering.serve.engine import BASE, Engine, EngineError
from treering.serve.errors import ApiError

if TYPE_CHECKING:
    from treering.workspace import Workspace

SECONDS_BETWEEN_LOOKS = 0.1
RETRY_SECONDS = 5.0
MOST_RETRY_SECONDS = 600.0
"""What was refused is tried again after a pause, each twice as long as the one before, up to this."""

log = logging.getLogger("treering.serve")


class Following:
    """Looks where `current` points, and switches when the engine has that version loaded.

    A version that cannot be loaded does not serve: the one before goes on, and `problem` says why. It is tried again
    after a while, and at once when its files or `current` change. `serving` is empty as long as nothing can.
    """

    def __init__(self, ws: Workspace, engine: Engine) -> None:
        self._ws = ws
        self._engine = engine
        self._loading: asyncio.Task[None] | None = None
        self._refused: object = None  # What `current` was, link and files, when it was refused.
        self._retry = 0.0
        self._pause = RETRY_SECONDS
        self.serving = ""
        self.problem = ""

    async def run(self) -> None:
        """Follow until cancelled."""
        try:
            while True:
                self._glance()
                await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            if self._loading is not None:
                self._loading.cancel()

    async def look(self) -> None:
        """Switch to what `current` names now; returns when that serves, or was refused."""
        self._glance()
        while self._loading is not None:
            await asyncio.wait({self._loading})
            self._glance()

    def version(self, model: str) -> str:
        """The version that answers to `model`. Raises `ApiError` for a name nobody has."""
        if model == "current":
            if not self.serving:
                raise ApiError(
                    f"nothing answers to `current`: {self.problem or 'it is being loaded'}",
                    status=503,
                    code="version_unavailable",
                )
            return self.serving
        if model == BASE or model in self._versions():
            return model
        names = self.names()
        if model not in names:
            raise ApiError(
                f"there is no model {model!r}; there are: {', '.join(names)}", status=404, code="model_not_found"
            )
        return names[model]

    def names(self) -> dict[str, str]:
        """What `model` may name, aliases last, each with the version that answers to it."""
        known = self._versions()
        aliases = {alias: name for alias, name in remarks.read(self._ws.root).aliases.items() if name in known}
        return {"current": self.serving, BASE: BASE, **dict(zip(known, known, strict=True)), **aliases}

    def _versions(self) -> list[str]:
        return [version.name for version in registry.versions(self._ws) if version.has_weights]

    def _glance(self) -> None:
        """Begin to load what `current` names now, unless that is under way; what it no longer names is given up."""
        if self._loading is not None and self._loading.done():
            self._loading = None
        try:
            wanted = self._wanted()
        except (TreeringError, OSError) as error:
            self._complain("current", str(error))
            return
        given_up = self._loading is not None and self._loading.get_name() != wanted
        if self._loading is not None and given_up:
            self._loading.cancel()
            self._loading = None
        if wanted == BASE or (wanted == self.serving and not given_up):
            self._switch(wanted)
        elif self._loading is None and not self._is_refused():
            # What serves is loaded again after another was given up, for it is to be kept instead.
            self._loading = asyncio.create_task(self._load(wanted), name=wanted)

    def _wanted(self) -> str:
        found = registry.current(self._ws)
        return found.name if found else BASE

    async def _load(self, wanted: str) -> None:
        seen = stamp(self._ws.current)
        try:
            await self._engine.load(wanted, keep=True)
        except EngineError as error:
            if seen != self._refused:
                self._pause = RETRY_SECONDS
            self._refused = seen
            self._retry = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, MOST_RETRY_SECONDS)
            self._complain(wanted, str(error))
            return
        with suppress(TreeringError, OSError):  # The next glance tells.
            if self._wanted() == wanted:  # It may have moved meanwhile.
                self._switch(wanted)

    def _is_refused(self) -> bool:
        return self._refused == stamp(self._ws.current) and time.monotonic() < self._retry

    def _switch(self, version: str) -> None:
        if version != self.serving:
            log.info("serving %s instead of %s", version, self.serving or "nothing")
        self.serving, self.problem = version, ""
        self._refused, self._pause = None, RETRY_SECONDS

    def _complain(self, name: str, reason: str) -> None:
        if self.problem != reason:
            before = f"{self.serving} goes on serving" if self.serving else "nothing serves"
            log.error("%s, for %s cannot: %s", before, name, reason)
        self.problem = reason
