"""A machine on a local network, in a process of its own: it announces a swarm, listens, or asks with a packet.

announce HOST      announces swarms by this machine's interfaces, and prints a line for each; a line of stdin ends it
listen             prints the swarms that it hears, checked, one on each line
ask FROM TO ...    asks from one address at another by unicast, and prints the names that come for the last question
"""

from __future__ import annotations

import asyncio
import socket
import sys

from zeroconf import DNSIncoming, DNSOutgoing, DNSQuestion

from shoal.cli.nearby.choose_swarm import described
from shoal.joining.heard_swarms import listen
from shoal.joining.invite_code import InviteCode, Way
from shoal.joining.lan import Announcement
from shoal.joining.multicast import SERVICE, MulticastLan
from shoal.net.own_addresses import lan_interfaces
from shoal.spans import Span

SECONDS = 60.0
PTR, IN = 12, 1


async def announce(host: str) -> None:
    code = InviteCode("0123456789abcdef", (Way(host, 4001),))
    async with MulticastLan().announcing(lan_interfaces()) as publish:
        for end in (6, 12):
            await publish(Announcement(code, f"stories-{end}", "float32", "none", Span(0, end), 12))
            print(end, flush=True)
            await asyncio.to_thread(sys.stdin.readline)


async def hear(*, checks: bool) -> None:
    interfaces = lan_interfaces()
    swarms = await listen(MulticastLan(), interfaces, report=lambda hearing: None)
    if checks:
        from shoal.joining.checked_swarms import Libp2pDialler, checked

        swarms = await checked(swarms, interfaces, Libp2pDialler(), seconds=SECONDS)
    for swarm in swarms:
        print(described(swarm), flush=True)


def ask(*ways: str) -> None:
    """Each pair is the address to ask from, and the address to ask. Only the last is waited for."""
    query = DNSOutgoing(0, multicast=False)
    query.add_question(DNSQuestion(SERVICE, PTR, IN))
    sockets = []
    for own, other in zip(ways[::2], ways[1::2], strict=True):
        sockets.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sockets[-1].bind((own, 0))
        sockets[-1].sendto(query.packets()[0], (other, 5353))
    sockets[-1].settimeout(SECONDS)
    print(len(DNSIncoming(sockets[-1].recv(9000)).answers()))
    for each in sockets[:-1]:
        each.setblocking(False)
        try:
            print(len(DNSIncoming(each.recv(9000)).answers()))
        except BlockingIOError:
            print("nothing")


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "ask":
        ask(*rest)
    else:
        asyncio.run(announce(*rest) if what == "announce" else hear(checks=what == "check"))
