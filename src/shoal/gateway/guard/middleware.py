"""What every request goes through: an id and its log line, error objects, its key, and which host it names."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import Collection

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.gateway.error_objects import Refused, refused
from shoal.gateway.guard.admission import Admission
from shoal.gateway.guard.metrics import Metrics

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 << 20
BODY_SECONDS = 30.0
"""Seconds within which the next part of a body must arrive."""
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestIds:
    """Gives each request an id, the client's own if it is a plain one, and counts it and writes a line at its end.

    The id is in the request's state, and in every line about it.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = request_id
        status: int | None = None
        began = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            seconds = time.monotonic() - began
            route = scope.get("route")
            endpoint = "unknown" if route is None else str(route.path)  # not what anybody may ask for
            self._metrics.requests.labels(endpoint, status).inc()
            self._metrics.duration.labels(endpoint).observe(seconds)
            log.info("%s %s %s: %s in %.3f s", request_id, scope["method"], scope["path"], status, seconds)


class ErrorObjects:
    """Answers with an error object where a request fails, and the connection stays usable.

    An error that reached the HTTP server would end the connection, without a word to the client that uses it next.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answered = False

        async def send_noting(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        except Exception as error:
            if answered or scope["type"] != "http":
                raise
            found = refused(error)
            if found.status == 500:
                log.exception("%s %s %s failed", scope["state"]["request_id"], scope["method"], scope["path"])
            await found.response(path=scope["path"])(scope, receive, send)


class Keys:
    """Finds out whose request it is, before its body is read, and gives the body a limited time to arrive.

    The account is in the request's state. Everything under `/v1` and `/api` has one.
    """

    def __init__(self, app: ASGIApp, *, admission: Admission) -> None:
        self._app = app
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith(("/v1/", "/api/")):
            given = {name: value.decode("latin-1") for name, value in scope["headers"]}
            account = self._admission.account(given.get(b"authorization"), given.get(b"x-api-key"))
            scope.setdefault("state", {})["account"] = account
        has_all = False

        async def receive_in_time() -> Message:
            nonlocal has_all
            if has_all:  # what comes next is the end of the connection, which may take as long as the answer
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_SECONDS)
            except TimeoutError:
                detail = f"nothing more of the body came within {BODY_SECONDS:.0f} seconds"
                raise HTTPException(408, detail, headers={"Connection": "close"}) from None
            has_all = not message.get("more_body", False)
            return message

        await self._app(scope, receive_in_time, send)


class KnownHosts:
    """Refuses requests that name another host than those in `hosts`.

    A page on the internet whose name is made to lead to this machine (DNS rebinding) would otherwise reach a gateway
    that listens on loopback, in the browser of a user who looks at that page.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            named = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            if host_of(named) not in self._hosts:
                await Refused(421, f"this gateway is not {named[:200]}").response()(scope, receive, send)
                return
        await self._app(scope, receive, send)


def host_of(named: str) -> str:
    """The host in a `Host` header, without its port."""
    if named.startswith("["):
        return named[1 : named.find("]")].lower()
    return named.partition(":")[0].lower()
