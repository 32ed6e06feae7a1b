"""What servers have been sent of the client's adapters: each version once."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterable

from shoal.client.connection import Connection
from shoal.model.factors import Factors
from shoal.net.codec import Tensors
from shoal.protocol import Adapter, Learned, Message
from shoal.spans import ServerInfo

TEACHING_SECONDS = 1.0


class Taught:
    """Which adapters each server has been sent, as far as we know: it may have forgotten them."""

    def __init__(self) -> None:
        self._names: dict[str, dict[tuple[int, int], str]] = defaultdict(dict)
        self._lacking: dict[str, set[str]] = defaultdict(set)
        self._teaching: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def teach(self, connection: Connection, server: ServerInfo, adapters: Iterable[Factors]) -> None:
        """Send what the server does not have. Once this returns, it has it. Raises `PeerError`s.

        What it hosts it is believed to have, until it says otherwise.
        """
        async with self._teaching[server.peer]:
            known, lacking = self._names[server.peer], self._lacking[server.peer]
            new = [
                each
                for each in adapters
                if known.get((each.block, each.origin)) != each.name
                and (each.hosted not in server.adapters or each.name in lacking)
            ]
            if not new:
                return
            questions: list[tuple[Message, Tensors]] = []
            for each in new:
                replaces = known.pop((each.block, each.origin), None)
                message = Adapter(block=each.block, layers=each.layers, replaces=replaces, shared=each.hosted)
                questions.append((message, {"factors": each.values}))
            await connection.ask_all(questions, expect=Learned, usual_seconds=TEACHING_SECONDS)
            known.update({(each.block, each.origin): each.name for each in new})

    def forget(self, peer: str, names: Collection[str]) -> None:
        """A server says that it does not have these."""
        known = self._names[peer]
        self._lacking[peer].update(names)
        for key in [key for key, name in known.items() if name in names]:
            del known[key]
