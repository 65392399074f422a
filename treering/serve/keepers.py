"""Routes for those who keep the server: promote and roll back, health, metrics."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict

from treering import overview, registry
from treering.serve.state import ERRORS, Here, Server, may

admin = APIRouter(prefix="/admin", dependencies=[Depends(may("admin"))], responses=ERRORS)
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


@admin.get("/status")
async def status(server: Here) -> dict[str, Any]:
    """What `treering status` says, and what serves."""
    found = await asyncio.to_thread(overview.status, server.ws)
    return {**found, "serving": server.following.serving, "problem": server.following.problem}


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
    ready = server.engine.alive
    body = {"ready": ready, "serving": server.following.serving, "problem": server.following.problem}
    return JSONResponse(body, 200 if ready else 503)


@health.get("/metrics", dependencies=[Depends(may("api"))], response_class=PlainTextResponse)
async def metrics(server: Here) -> Response:
    """Prometheus metrics."""
    page = server.telemetry.page(server.limits.inside, server.engine.alive, server.following.serving)
    return PlainTextResponse(page, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})
