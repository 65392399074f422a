"""Work beside the requests that nobody waits for, so that nobody would see it end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

SECONDS = 5.0
"""How long a loop that failed rests: what made it fail may last, and would fill the log."""

log = logging.getLogger("treering.serve")


async def go_on(name: str, run: Callable[[], Awaitable[None]], seconds: float = SECONDS) -> None:
    """Run a loop, and again whenever it fails."""
    while True:
        try:
            return await run()
        except Exception:
            log.exception("%s failed, and goes on in %g s", name, seconds)
        await asyncio.sleep(seconds)
