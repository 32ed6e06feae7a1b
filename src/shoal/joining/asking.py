"""Asks several members the same thing at once, until one gives it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from shoal.errors import SwarmError
from shoal.joining.invitation import Invitation
from shoal.joining.requests import Member, NoAnswer, member
from shoal.net.transport import Node
from shoal.peers import ServerInfo

T = TypeVar("T")
Place = tuple[str, Sequence[str]]
"""A peer id, and addresses of it."""

AT_ONCE = 4
"""Members that are asked at the same time: silent ones must not hold up all."""
RETRY_SECONDS = 2.0


def place(server: ServerInfo) -> Place:
    """Where a server is."""
    return server.peer, server.addresses


async def invitation_from(host: Member, digest: str) -> Invitation:
    """The invitation with this digest, from one member. Raises `NoAnswer` if it gives none or another, `SwarmError`."""
    found = await host.invitation(digest)
    if found.digest != digest:
        raise NoAnswer("another invitation than was asked for")
    return found


async def first_answer(
    node: Node, places: Sequence[Place], ask: Callable[[Member], Awaitable[T]], *, patience: float = 0.0
) -> tuple[T | None, str]:
    """The first answer of any of these members, and else why one of them does not give it.

    `ask` may raise `NoAnswer` and `SwarmError`. Members that are busy are asked again for `patience` seconds.
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + patience
    waiting = deque(places)
    reason = "it has no servers"
    found: list[T] = []

    async def ask_one_after_another() -> None:
        nonlocal reason
        while waiting and not found:
            peer, addresses = waiting.popleft()
            try:
                async with member(node.transport, peer, addresses) as host:
                    found.append(await ask(host))
            except (NoAnswer, SwarmError) as failure:
                reason = str(failure)
                if isinstance(failure, NoAnswer) and failure.retry_after is not None and loop.time() < until:
                    waiting.append((peer, addresses))
                    await asyncio.sleep(min(failure.retry_after, RETRY_SECONDS))

    tasks = {asyncio.create_task(ask_one_after_another()) for _ in range(min(AT_ONCE, len(places)))}
    try:
        while tasks and not found:
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return (found[0] if found else None), reason
