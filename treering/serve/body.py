"""What holds for every body, whatever its route makes of it."""

from __future__ import annotations

from contextlib import suppress
from json import JSONDecodeError

from fastapi import Request

from treering.files import json_line
from treering.serve.errors import ApiError


async def plain(request: Request) -> None:
    """Refuse what could be neither logged nor handed on nor sent back: halves of characters, NaN, endless nesting."""
    if not await request.body():
        return
    with suppress(JSONDecodeError, UnicodeDecodeError):  # The route itself says what is wrong with these.
        given = await request.json()
        try:
            json_line(given)
        except ValueError as error:
            raise ApiError(f"the body cannot be used: {error}", status=400, code="invalid_body") from None
