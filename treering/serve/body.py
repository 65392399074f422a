"""What holds for every body, whatever its route makes of it: it is JSON, and can be kept and handed on."""

from __future__ import annotations

from json import JSONDecodeError

from fastapi import Request
from starlette.requests import ClientDisconnect

from treering.files import json_line
from treering.serve.errors import ApiError
from treering.serve.respond import CLIENT_LEFT


async def plain(request: Request) -> None:
    """Refuse what is no JSON, and what could not be logged, handed on and sent back: half characters, NaN, nesting."""
    try:
        if not await request.body():
            return
    except ClientDisconnect:
        raise ApiError("the client left", status=CLIENT_LEFT, code="client_left") from None
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        said = f"the body came as content-type {given}" if given else "the body came without a content-type"
        raise ApiError(f"{said}; send it as application/json", status=400, code="invalid_content_type")
    try:
        json_line(await request.json())
    except JSONDecodeError as error:
        raise _unusable(f"it is not JSON ({error})") from None
    except UnicodeDecodeError as error:
        raise _unusable(f"it is not UTF-8 ({error})") from None
    except RecursionError:
        raise _unusable("it is nested too deeply; make it flatter") from None
    except ValueError as error:
        raise _unusable(str(error)) from None


def _unusable(why: str) -> ApiError:
    return ApiError(f"the body cannot be used: {why}", status=400, code="invalid_body")
