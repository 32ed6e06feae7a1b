"""Helps peers to measure their networks, with as many bytes as `TransferBudget` allows."""

from __future__ import annotations

import asyncio

import torch

from shoal.net.bandwidth import TRANSFER_SECONDS, NotGranted, digest_of, random_bytes, receive_filler
from shoal.net.transport import Stream
from shoal.net.wire import codec
from shoal.policy.network.transfer_budget import WINDOW_SECONDS, TransferBudget
from shoal.protocol import MAX_TRANSFER_BYTES, Filler, Transfer
from shoal.server.refusals import busy, rejected

MAX_CONCURRENT = 3
"""Transfers at a time, of different peers: more would disturb each other, and the sessions."""


class TransferService:
    """Takes and sends bytes that mean nothing. A transfer that would be too much is refused before it begins."""

    def __init__(self) -> None:
        self._budget = TransferBudget()
        self._peers: set[str] = set()  # that transfer now
        self._filler: torch.Tensor | None = None

    async def answer(self, stream: Stream, request: Transfer) -> None:
        """Do what a peer asks for.

        Raises `Refused` if that is too much, `ProtocolViolation` if it sends something else, `StreamBroken`, and
        `TimeoutError` for a link that is too slow to be worth it.
        """
        self._charge(stream.peer, request.sends + request.wants)
        self._peers.add(stream.peer)
        try:
            async with asyncio.timeout(TRANSFER_SECONDS):
                if request.wants:
                    await codec.send(stream, Filler(), {"filler": self._random()[: request.wants]})
                else:
                    await codec.send(stream, Filler())
                    _, filler = await receive_filler(stream, request.sends)
                    assert filler is not None
                    await codec.send(stream, Filler(digest=digest_of(filler)))
        except NotGranted:
            raise rejected("a failure instead of bytes") from None
        finally:
            self._peers.discard(stream.peer)

    def _charge(self, peer: str, num_bytes: int) -> None:
        if peer in self._peers or len(self._peers) >= MAX_CONCURRENT:
            raise busy("others measure their networks")
        budget = self._budget.grant(peer, num_bytes, now=asyncio.get_running_loop().time())
        if budget is None:
            raise busy("no more bytes to measure networks with", retry_after=WINDOW_SECONDS)
        self._budget = budget

    def _random(self) -> torch.Tensor:
        if self._filler is None:
            self._filler = random_bytes(MAX_TRANSFER_BYTES)
        return self._filler
