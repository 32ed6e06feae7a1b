"""OpenAI's error objects and Anthropic's, and which error of shoal's becomes which."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi.responses import JSONResponse

from shoal.errors import MissingBlocks, ServerBusy, ShoalError, SwarmError, UnsupportedOperation, UserError

RETRY_SECONDS = 5
"""Seconds after which a client that was refused for a while may ask again."""

ANTHROPIC_KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


_FIELD = re.compile(r"(?!(str|int|float|bool|none)$)[a-z0-9_]+")
"""What a part of a field's name looks like. The forms of a field have names such as `str` and `list[TextPart]`."""


@dataclass
class Refused(Exception):
    """A request that gets an error instead of an answer: the HTTP status, and what OpenAI's error object says."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        error = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def anthropic_body(self) -> dict[str, Any]:
        """Anthropic's error object."""
        kind = ANTHROPIC_KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def response(self, *, path: str = "") -> JSONResponse:
        """The error as an answer to a request to this path."""
        body = self.anthropic_body() if path.startswith("/v1/messages") else self.body()
        return JSONResponse(body, self.status, headers=self.headers)


def bad_field(param: str, message: str) -> Refused:
    """A field that is wrong, or that this server does not support."""
    return Refused(400, message, param=param)


def wrong_body(errors: Sequence[Mapping[str, Any]], *, content_type: str) -> Refused:
    """What pydantic finds wrong with the body of a request. Of several forms of a field, the one that came furthest."""
    found = max(errors, key=lambda each: (len(_fields(each)), not str(each["type"]).endswith("_type")))
    fields, message = _fields(found), str(found["msg"])
    if found["type"] == "json_invalid":
        return Refused(400, f"the body is not JSON: {found['ctx']['error']}, at character {found['loc'][-1]}")
    if not fields and "json" not in content_type:
        return Refused(400, f"the body has to be JSON, with Content-Type: application/json; it came as {content_type}")
    name = ".".join(fields)
    return Refused(400, f"{name}: {message}" if name else message, param=name or None)


def _fields(error: Mapping[str, Any]) -> list[str]:
    """The fields that lead to an error, without the names that pydantic has for the forms that one may take."""
    *outer, last = error["loc"][1:] or ("",)
    is_last_named = error["type"] == "extra_forbidden"
    found = [str(part) for part in (*outer, *([] if is_last_named else [last])) if _FIELD.fullmatch(str(part))]
    return [*found, str(last)] if is_last_named else found


def later(message: str, *, status: int, kind: str, code: str | None = None, seconds: int = RETRY_SECONDS) -> Refused:
    """Something that may work in a while."""
    return Refused(status, message, kind, code=code, headers={"Retry-After": str(seconds)})


def refused(error: Exception) -> Refused:
    """What a client is told about an error of the swarm or of the options that it passed."""
    match error:
        case Refused():
            return error
        case MissingBlocks() | ServerBusy():
            return later(str(error), status=503, kind="server_error", code="swarm_incomplete")
        case UserError() | UnsupportedOperation():
            return Refused(400, _with_hint(error))
        case SwarmError():
            return later(str(error), status=503, kind="server_error", code="swarm_error")
        case ValueError():
            return Refused(400, str(error).splitlines()[0] if str(error) else "a value is wrong")
    return Refused(500, "the gateway has failed; its log says how", "server_error", code="internal_error")


def _with_hint(error: ShoalError) -> str:
    return f"{error} ({error.hint})" if error.hint else str(error)
