"""Routes for those who keep the server: promote and roll back, health, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from treering import canary, figures, overview, registry
from treering.serve.body import plain
from treering.serve.guard import guarded, may, opened
from treering.serve.state import ERRORS, Here, Server

admin = APIRouter(prefix="/admin", route_class=guarded(may("admin"), opened, plain), responses=ERRORS)
health = APIRouter(responses=ERRORS)


class Promotion(BaseModel):
    """`POST /admin/promote`."""

    model_config = ConfigDict(extra="forbid")
    version: str
    force: bool = False


class Rollback(BaseModel):
    """`POST /admin/rollback`."""

    model_config = ConfigDict(extra="forbid")
    version: str | None = None


class Canary(BaseModel):
    """`POST /admin/canary`: `version`, with a `share` of the traffic or in `shadow`; or `off`."""

    model_config = ConfigDict(extra="forbid")
    version: str | None = None
    share: float | None = Field(None, gt=0, le=1)
    shadow: bool = False
    force: bool = False
    off: bool = False

    @model_validator(mode="after")
    def _says_what(self) -> Canary:
        if (self.version is None) != self.off:
            raise ValueError("give a version or off, one of the two")
        return self


@admin.get("/status")
async def status(server: Here) -> dict[str, Any]:
    """What `treering status` says, and what serves."""
    found = await asyncio.to_thread(overview.status, server.ws)
    return {**found, "serving": server.following.serving, "problem": server.problem}


@admin.post("/promote")
async def promote(body: Promotion, server: Here) -> dict[str, Any]:
    """Make a version current."""
    await asyncio.to_thread(server.ws.promote, body.version, force=body.force)
    return await _moved(server)


@admin.post("/rollback")
async def rollback(body: Rollback, server: Here) -> dict[str, Any]:
    """Go back to the version promoted before, or to the one named."""
    await asyncio.to_thread(server.ws.rollback, body.version)
    return await _moved(server)


@admin.post("/canary")
async def set_canary(body: Canary, server: Here) -> dict[str, Any]:
    """Put a version on trial, or end that."""
    if body.version is None:
        await asyncio.to_thread(canary.stop, server.ws)
    else:
        how = {"shadow": body.shadow, "force": body.force}
        await asyncio.to_thread(canary.start, server.ws, body.version, body.share, **how)
    await server.trial.look()
    return await get_canary(server)


@admin.get("/canary")
async def get_canary(server: Here) -> dict[str, Any]:
    """What is or was last on trial, and what was counted up to now."""
    await server.trial.write()
    return await asyncio.to_thread(figures.report, server.ws)


async def _moved(server: Server) -> dict[str, Any]:
    await server.following.look()
    here = registry.current(server.ws)
    return {"current": here.name if here else None, "serving": server.following.serving}


@health.get("/healthz")
async def healthz() -> dict[str, str]:
    """200 while the process lives."""
    return {"status": "ok"}


@health.get("/readyz", response_model=None)
async def readyz(server: Here) -> Any:
    """200 while requests are answered; also which version serves, and why not a newer one."""
    ready = server.opened.is_set() and server.engine.alive and bool(server.following.serving)
    body = {"ready": ready, "serving": server.following.serving, "problem": server.problem}
    return JSONResponse(body, 200 if ready else 503)


@health.get("/metrics", dependencies=[Depends(may("api"))], response_class=PlainTextResponse)
async def metrics(server: Here) -> Response:
    """Prometheus metrics."""
    page = server.telemetry.page(server.limits.inside, server.engine.alive, server.following.serving)
    return PlainTextResponse(page, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})
