"""What servers have been sent of the client's adapters: each version once."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Collection, Iterable

from shoal.client.swarm.connection import Connection
from shoal.model.peft.factors import AdapterFactors
from shoal.net.wire.codec import Tensors
from shoal.peers import ServerInfo
from shoal.protocol import Adapter, AdapterStored, AnyMessage

USUAL_UPLOAD_SECONDS = 1.0


Versions = dict[tuple[int, int], str]
"""By block and origin, the version that was sent last."""


class AdapterSync:
    """Which adapters each server has been sent, as far as we know: it may have forgotten them.

    Passes use one version after another. A session has the version of the moment at which it was made, and may be
    opened anew, with that one, long after passes have left it. So it is remembered by itself what a server was sent for
    either, and only a version that passes have left is said to be needed no more.
    """

    def __init__(self) -> None:
        self._for_passes: dict[str, Versions] = defaultdict(dict)
        self._for_sessions: dict[str, Versions] = defaultdict(dict)
        self._not_hosted: dict[str, set[str]] = defaultdict(set)  # of what it says that it hosts
        self._uploading: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ensure_loaded(
        self, connection: Connection, server: ServerInfo, adapters: Iterable[AdapterFactors], *, session: bool = False
    ) -> None:
        """Send what the server does not have, for passes or a session. Once this returns, it has it.

        What it hosts it is believed to have, until it says otherwise. Raises `PeerError`s.
        """
        async with self._uploading[server.peer]:
            known = (self._for_sessions if session else self._for_passes)[server.peer]
            lacking = self._not_hosted[server.peer]
            new = [
                each
                for each in adapters
                if known.get((each.block, each.origin)) != each.name
                and (each.hosted not in server.adapters or each.name in lacking)
            ]
            if not new:
                return
            questions: list[tuple[AnyMessage, Tensors]] = []
            for each in new:
                replaces = None if session else self._left(server.peer, each)
                message = Adapter(block=each.block, layers=each.layers, replaces=replaces, shared=each.hosted)
                questions.append((message, {"factors": each.values}))
            await connection.ask_all(questions, expect=AdapterStored, usual_seconds=USUAL_UPLOAD_SECONDS)
            known.update({(each.block, each.origin): each.name for each in new})

    def _left(self, peer: str, new: AdapterFactors) -> str | None:
        """The version that passes have used until now, and that the server need not keep."""
        key = new.block, new.origin
        name, known = self._for_passes[peer].pop(key, None), self._for_sessions[peer]
        if name is not None and known.get(key) == name:
            del known[key]
        return name

    def forget(self, peer: str, asked: Iterable[AdapterFactors], names: Collection[str]) -> None:
        """A server that was asked to compute with adapters says that it does not have those of these names."""
        missing = [each for each in asked if each.name in names]
        self._not_hosted[peer].update(each.name for each in missing if each.hosted is not None)
        for known in (self._for_passes[peer], self._for_sessions[peer]):
            for each in missing:
                if known.get((each.block, each.origin)) == each.name:
                    del known[each.block, each.origin]
