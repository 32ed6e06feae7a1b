"""Which of the client's adapters each server has been sent: each version is sent once."""

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
"""How long a server usually takes to store the adapters of some blocks, once they have arrived."""
MAX_ADAPTER_UPLOADS = 3
"""How often a server is sent an adapter that it misses: after that, it has no room for the adapter."""

Versions = dict[tuple[int, int], str]
"""By block and origin, the name of the version that was sent last."""


class AdapterSync:
    """Which adapters each server has been sent, as far as the client knows: a server may have dropped them.

    Passes use one version after another. A session keeps the version of the moment when it was made, and may be opened
    again with that version long after passes have left it. So what a server was sent is remembered for passes and for
    sessions separately, and a server is told to drop only versions that passes have left.
    """

    def __init__(self) -> None:
        self._for_passes: dict[str, Versions] = defaultdict(dict)
        self._for_sessions: dict[str, Versions] = defaultdict(dict)
        self._not_hosted: dict[str, set[str]] = defaultdict(set)  # by peer, what it says to host and misses
        self._uploading: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def ensure_loaded(
        self, connection: Connection, server: ServerInfo, adapters: Iterable[AdapterFactors], *, session: bool = False
    ) -> None:
        """Send the adapters that the server does not have, for passes or for a session, and wait until it has them.

        Adapters that the server says to host are not sent until it misses them. Raises `PeerError`s.
        """
        async with self._uploading[server.peer]:
            known = (self._for_sessions if session else self._for_passes)[server.peer]
            missing = self._not_hosted[server.peer]
            new = [
                each
                for each in adapters
                if known.get((each.block, each.origin)) != each.name
                and (each.hosted not in server.adapters or each.name in missing)
            ]
            if not new:
                return
            requests: list[tuple[AnyMessage, Tensors]] = []
            for each in new:
                replaces = None if session else self._replaced(server.peer, each)
                message = Adapter(block=each.block, layers=each.layers, replaces=replaces, shared=each.hosted)
                requests.append((message, {"factors": each.values}))
            await connection.ask_all(requests, expect=AdapterStored, usual_seconds=USUAL_UPLOAD_SECONDS)
            known.update({(each.block, each.origin): each.name for each in new})

    def _replaced(self, peer: str, new: AdapterFactors) -> str | None:
        """The version that passes have used until now, which the server may drop. It is forgotten here."""
        key = new.block, new.origin
        name, known = self._for_passes[peer].pop(key, None), self._for_sessions[peer]
        if name is not None and known.get(key) == name:
            del known[key]
        return name

    def forget(self, peer: str, requested: Iterable[AdapterFactors], names: Collection[str]) -> None:
        """A server that was requested to compute with adapters says that it misses those of these names."""
        missing = [each for each in requested if each.name in names]
        self._not_hosted[peer].update(each.name for each in missing if each.hosted is not None)
        for known in (self._for_passes[peer], self._for_sessions[peer]):
            for each in missing:
                if known.get((each.block, each.origin)) == each.name:
                    del known[each.block, each.origin]
