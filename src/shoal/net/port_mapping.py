"""A port of this network's router that leads to this machine, by UPnP. Only where the user asks for it.

It opens this machine to the world, so it is no default; and what the router says is parsed by a C library (miniupnpc),
so it is asked only in networks whose owner runs this program.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import ipaddress
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from shoal.concurrency import owned_task
from shoal.errors import UserError

logger = logging.getLogger(__name__)

LEASE_SECONDS = 3600
"""For how long the router is asked to keep the port: if this machine crashes, it is closed after that."""
RENEW_SECONDS = 300.0
"""How often it is asked again. A router that was restarted has forgotten it."""
DISCOVER_SECONDS = 2.0
"""How long routers have to answer when one is looked for."""
REMOVE_SECONDS = 4.0
"""How long the router may take at the end."""
ATTEMPTS = 8
"""The ports that are tried, this machine's own first: another machine may have taken it."""
NAME = "shoal"
"""What the router's list of ports shows."""


class MappingFailed(OSError):
    """The router does not give a port, or there is none that speaks UPnP."""


@dataclass(frozen=True)
class Mapping:
    """The router's `port` at the public IPv4 address `host`."""

    host: str
    port: int

    @property
    def address(self) -> str:
        """Where others reach it, as a multiaddress."""
        return f"/ip4/{self.host}/tcp/{self.port}"


def check_library() -> None:
    """Raise `UserError` if the library is not installed. Imports nothing."""
    if importlib.util.find_spec("miniupnpc") is None:
        raise UserError("--upnp needs the package miniupnpc", hint="install it: pip install miniupnpc")


@contextlib.asynccontextmanager
async def mapped_port(
    port: int, *, interface: str | None = None, renew_seconds: float = RENEW_SECONDS
) -> AsyncIterator[Mapping | None]:
    """Have the router lead one of its ports to `port` of this machine while the context lasts.

    `interface`: the IPv4 address of this machine in the router's network; `None` is that of the default route. Yields
    `None` if there is no router that does it, which is logged. A router that fails later is asked again.
    """
    mapping = None
    try:
        router = await asyncio.to_thread(_Router, interface)
        mapping = await asyncio.to_thread(router.map, port)
    except MappingFailed as failure:
        logger.warning("no port of the router leads to this machine: %s", failure)
    if mapping is None:
        yield None
        return
    try:
        async with owned_task(_renewing(router, port, mapping, renew_seconds)):
            yield mapping
    finally:
        try:
            async with asyncio.timeout(REMOVE_SECONDS):
                await asyncio.to_thread(router.remove, mapping)
        except (MappingFailed, TimeoutError) as failure:
            logger.info("the router keeps port %d open for a while: %s", mapping.port, failure or "it does not answer")


async def _renewing(router: _Router, port: int, mapping: Mapping, seconds: float) -> None:
    """Renew a mapping again and again."""
    last = mapping
    while True:
        await asyncio.sleep(seconds)
        try:
            now = await asyncio.to_thread(router.map, port, mapping.port)
        except MappingFailed as failure:
            logger.warning("the router did not renew port %d: %s", mapping.port, failure)
            continue
        if now != last:
            last = now
            logger.warning("the router has another address now, %s: start again to announce it", now.address)


class _Router:
    """The router of this network. Its methods wait for it, some seconds at most. Raises `MappingFailed`."""

    def __init__(self, interface: str | None) -> None:
        import miniupnpc  # optional, and only for this

        self._igd: Any = miniupnpc.UPnP(multicastif=interface, discoverdelay=int(1000 * DISCOVER_SECONDS))
        self._ask("discover")
        self._ask("selectigd")

    def map(self, port: int, wanted: int | None = None) -> Mapping:
        """Give or renew the router's port `wanted`, or else the first that is free, from `port` on."""
        host = str(self._ask("externalipaddress"))
        if not _is_public(host):
            raise MappingFailed(f"its own address, {host}, is not public: it is behind another router")
        candidates = [wanted] if wanted is not None else range(port, min(port + ATTEMPTS, 1 << 16))
        failure: MappingFailed | None = None
        for each in candidates:
            if wanted is None and self._is_taken(each, port):
                failure = MappingFailed(f"other machines have the ports up to {each}")
                continue
            for lease in (LEASE_SECONDS, 0):  # some routers know only mappings that last
                try:
                    self._ask("addportmapping", each, "TCP", self._igd.lanaddr, port, NAME, "", lease)
                    return Mapping(host, each)
                except MappingFailed as refusal:
                    failure = refusal
        assert failure is not None
        raise failure

    def remove(self, mapping: Mapping) -> None:
        """Close the router's port."""
        self._ask("deleteportmapping", mapping.port, "TCP")

    def _is_taken(self, candidate: int, port: int) -> bool:
        """Whether the router's port leads to something else already."""
        try:
            found = self._ask("getspecificportmapping", candidate, "TCP")
        except MappingFailed:
            return False
        return found is not None and tuple(found[:2]) != (self._igd.lanaddr, port)

    def _ask(self, what: str, *arguments: object) -> Any:
        try:
            return getattr(self._igd, what)(*arguments)
        except Exception as failure:  # the library raises plain exceptions
            raise MappingFailed(str(failure) or what) from None


def _is_public(host: str) -> bool:
    try:
        return ipaddress.IPv4Address(host).is_global
    except ValueError:
        return False
