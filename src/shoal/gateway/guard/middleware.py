"""What every request goes through: an id for it and its log line, limits of its size, and which host it names."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.gateway.error_objects import Refused
from shoal.gateway.guard.metrics import Metrics

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 << 20
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestIds:
    """Gives each request an id, the client's own if it is a plain one, and counts it and writes a line at its end."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
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


class BodyLimit:
    """Refuses bodies that are larger than `max_bytes`, before they are in memory."""

    def __init__(self, app: ASGIApp, *, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        size = 0
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > self._max_bytes:
            await self._too_large().response()(scope, receive, send)
            return

        async def receive_within() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, receive_within, send)

    def _too_large(self) -> Refused:
        return Refused(413, f"the body is larger than {self._max_bytes >> 20} MiB")


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
