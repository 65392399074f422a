"""What goes wrong with a request, and how its client is told: in OpenAI's shape, which is made here only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from treering.errors import LockError, TreeringError, UsageError
from treering.serve.engine import EngineError

if TYPE_CHECKING:
    from fastapi import FastAPI, Request


class Error(BaseModel):
    """What went wrong, in OpenAI's shape."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is an error."""

    error: Error


class ApiError(TreeringError):
    """A request is refused, whatever the engine could do with it: `code` is the short name of why.

    `retry_after` says in how many seconds to come back.
    """

    def __init__(self, message: str, *, status: int, code: str, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after = retry_after


def error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    return ErrorBody(error=Error(message=message, type=kind, param=param, code=code)).model_dump()


def kind_of(status: int) -> str:
    """OpenAI's name for the kind of error that an HTTP status tells."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")


def refusal(
    status: int, message: str, code: str | None = None, param: str | None = None, headers: Any = None
) -> JSONResponse:
    """The response that says what went wrong."""
    return JSONResponse(error(message, kind_of(status), code, param), status, headers)


def told_as_openai_does(app: FastAPI) -> None:
    """Have all that routes raise become such responses."""
    app.add_exception_handler(ApiError, cast(Any, _api_error))
    app.add_exception_handler(EngineError, cast(Any, _engine_error))
    app.add_exception_handler(TreeringError, cast(Any, _treering_error))
    app.add_exception_handler(RequestValidationError, cast(Any, _validation_error))
    app.add_exception_handler(HTTPException, cast(Any, _http_error))
    app.add_exception_handler(Exception, _bug)


async def _api_error(_: Request, failure: ApiError) -> JSONResponse:
    headers = {"retry-after": str(failure.retry_after)} if failure.retry_after is not None else None
    return refusal(failure.status, str(failure), failure.code, headers=headers)


async def _engine_error(_: Request, failure: EngineError) -> JSONResponse:
    headers = {"retry-after": "1"} if failure.status == 429 else None
    return refusal(failure.status, str(failure), failure.code, headers=headers)


async def _treering_error(_: Request, failure: TreeringError) -> JSONResponse:
    status, code = 500, "internal_error"
    if isinstance(failure, UsageError):
        status, code = 400, "invalid_request"
    elif isinstance(failure, LockError):
        status, code = 409, "workspace_in_use"
    return refusal(status, str(failure), code)


async def _validation_error(_: Request, failure: RequestValidationError) -> JSONResponse:
    first = failure.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")
    message = "; ".join(f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in failure.errors()[:5])
    return refusal(400, message, "invalid_request", where or None)


async def _http_error(_: Request, failure: HTTPException) -> JSONResponse:
    return refusal(failure.status_code, str(failure.detail), headers=failure.headers)


async def _bug(_: Request, __: Exception) -> JSONResponse:
    return refusal(500, "an error in the server; its log says more", "internal_error")
