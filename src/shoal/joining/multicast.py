"""Local networks over multicast DNS, with service discovery (RFC 6762 and 6763), through the library zeroconf.

A member is a service `NAME._shoal._tcp.local.`, with a random name: a laptop should not be known again in the next
network. What it announces is in the TXT record.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import secrets
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from zeroconf import Error, IPVersion, ServiceInfo, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from shoal.errors import SwarmError
from shoal.joining.lan import Announcement, Hear, Publish

if TYPE_CHECKING:
    from shoal.net.own_addresses import Interface

log = logging.getLogger(__name__)

SERVICE = "_shoal._tcp.local."
ANSWER_MILLISECONDS = 3000.0
"""How long a member that was named may take to send its record; usually both come in one packet."""
MAX_ASKED = 256
"""Members that are asked for their records: names cost a stranger nothing."""
GOODBYE_SECONDS = 1.0
"""How long taking an announcement back may take: it is sent three times within half a second."""


class _OnLink(Zeroconf):
    """Answers only machines that are in one of these networks, as RFC 6762 asks (section 11).

    The port is open on all interfaces, because multicast needs it, and a machine elsewhere could ask by unicast.
    """

    def __init__(self, interfaces: Sequence[Interface]) -> None:
        self._networks = tuple(each.network for each in interfaces)
        versions = {each.version for each in interfaces}
        version = IPVersion.All if len(versions) == 2 else IPVersion.V6Only if 6 in versions else IPVersion.V4Only
        super().__init__(interfaces=[str(each.ip) for each in interfaces], ip_version=version)

    def async_send(self, out: Any, addr: str | None = None, *args: Any, **options: Any) -> None:
        if addr is None or self._is_near(addr):
            super().async_send(out, addr, *args, **options)

    def _is_near(self, host: str) -> bool:
        address = ipaddress.ip_address(host.partition("%")[0])
        if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        return address.is_link_local or any(address in network for network in self._networks)


class MulticastLan:
    """Multicast DNS on this machine's interfaces. It goes along with other programs that use it, such as Avahi."""

    @contextlib.asynccontextmanager
    async def announcing(self, interfaces: Sequence[Interface]) -> AsyncIterator[Publish]:
        """See `shoal.joining.lan.Lan`."""
        name = secrets.token_hex(8)
        is_there = False

        async def publish(announcement: Announcement) -> None:
            nonlocal is_there
            info = ServiceInfo(
                SERVICE,
                f"{name}.{SERVICE}",
                port=announcement.code.ways[0].port,
                properties=announcement.record,
                server=f"{name}.local.",
                parsed_addresses=[str(each.ip) for each in interfaces],
            )
            with _translated():
                await (
                    await (responder.async_update_service(info) if is_there else responder.async_register_service(info))
                )
            is_there = True

        async with _open(interfaces) as responder:
            yield publish

    @contextlib.asynccontextmanager
    async def listening(self, interfaces: Sequence[Interface], hear: Hear) -> AsyncIterator[None]:
        """See `shoal.joining.lan.Lan`."""
        asked: dict[str, asyncio.Task[None]] = {}

        async def ask(name: str) -> None:
            with contextlib.suppress(Error):  # a stranger may choose a name that is none
                service = AsyncServiceInfo(SERVICE, name)
                if await service.async_request(responder.zeroconf, ANSWER_MILLISECONDS):
                    hear(name, service.properties)

        def on_change(*, name: str, state_change: ServiceStateChange, **_: Any) -> None:
            if (former := asked.pop(name, None)) is not None:
                former.cancel()
            if state_change is ServiceStateChange.Removed:
                hear(name, None)
            elif len(asked) < MAX_ASKED:
                asked[name] = asyncio.create_task(ask(name))

        async with _open(interfaces) as responder:
            browser = AsyncServiceBrowser(responder.zeroconf, SERVICE, handlers=[on_change])
            try:
                yield
            finally:
                await browser.async_cancel()
                for task in asked.values():
                    task.cancel()
                await asyncio.gather(*asked.values(), return_exceptions=True)


@contextlib.asynccontextmanager
async def _open(interfaces: Sequence[Interface]) -> AsyncIterator[AsyncZeroconf]:
    """A responder on these interfaces. What it has announced is taken back at the end. Raises `SwarmError`."""
    with _translated():
        responder = AsyncZeroconf(zc=_OnLink(interfaces))
    try:
        yield responder
    finally:
        with contextlib.suppress(SwarmError, TimeoutError), _translated():
            async with asyncio.timeout(GOODBYE_SECONDS):
                await responder.async_close()


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Raise the library's errors, and those of sockets, as `SwarmError`."""
    try:
        yield
    except (Error, OSError, RuntimeError) as failure:  # RuntimeError: an interface has just gone
        raise SwarmError(
            f"multicast DNS (UDP port 5353) does not work here: {failure or type(failure).__name__}",
            hint="a firewall or a program that holds the port may be in its way; an invite code works without it",
        ) from None
