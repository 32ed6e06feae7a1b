"""Membership of a closed swarm, on streams and in the directory: each end proves to the other that it has the key.

In an open swarm, which has no key, all peers are members.
"""

from __future__ import annotations

import asyncio
from typing import Any

from hivemind.p2p import PeerID
from hivemind.utils.auth import AuthorizerBase

from shoal.net.swarm_key import PROOF_BYTES, SwarmKey
from shoal.net.transport import Stream, StreamBroken, StreamHandler
from shoal.protocol import ProtocolViolation

PROOF_SECONDS = 10.0
"""How long a peer that has opened a stream may take to prove that it is a member."""
STREAM = "stream"
REQUEST = "request"
ANSWER = "answer"


class NotAMember(Exception):
    """A peer has not proved that it has the swarm's key."""


class Membership(AuthorizerBase):  # type: ignore[misc]
    """What the peer `own` proves, and asks others to prove.

    hivemind is given it as the authorizer of its requests, but does not say whom a request goes to or comes from. So
    `LimitedDHTProtocol` calls `sign` and `check`, and the methods that hivemind calls do nothing.
    """

    def __init__(self, own: str, key: SwarmKey | None) -> None:
        self._own = own
        self._key = key

    async def prove(self, stream: Stream) -> None:
        """Send the proof on a stream that this peer has opened. Raises `StreamBroken`."""
        if self._key is not None:
            await stream.send(self._key.proof(STREAM, self._own, stream.peer))

    def required_by(self, handler: StreamHandler) -> StreamHandler:
        """A handler of streams that others have opened: it calls this one for members only."""
        key = self._key
        if key is None:
            return handler

        async def handle(stream: Stream) -> None:
            try:
                async with asyncio.timeout(PROOF_SECONDS):
                    proof, _ = await stream.receive(_check_size)
            except (ProtocolViolation, TimeoutError):
                proof = b""
            if not key.accepts(proof, STREAM, stream.peer, self._own):
                raise StreamBroken(f"{stream.peer} is no member of this closed swarm")
            await handler(stream)

        return handle

    def sign(self, message: Any, purpose: str, receiver: PeerID) -> None:
        """Add the proof to a request or an answer of the DHT."""
        if self._key is not None:
            message.auth.signature = self._key.proof(purpose, self._own, receiver.to_base58())

    def check(self, message: Any, purpose: str, sender: PeerID) -> None:
        """Raises `NotAMember` if a request or an answer of the DHT does not have the proof."""
        if self._key is not None and not self._key.accepts(
            message.auth.signature, purpose, sender.to_base58(), self._own
        ):
            raise NotAMember("this swarm is closed")

    async def sign_request(self, request: Any, service_public_key: Any) -> None: ...

    async def validate_request(self, request: Any) -> bool:
        return True

    async def sign_response(self, response: Any, request: Any) -> None: ...

    async def validate_response(self, response: Any, request: Any) -> bool:
        return True


OPEN = Membership("", None)
"""In an open swarm: nothing is proved or asked for."""


def _check_size(header: bytes, num_bytes: int) -> None:
    if len(header) != PROOF_BYTES or num_bytes:
        raise ProtocolViolation("no proof of membership")
