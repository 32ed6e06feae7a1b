"""What the passes of one client's stream are pushed by the servers before, and push to the servers after."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict

import torch

from shoal.net.wire import codec
from shoal.protocol import Downstream, PassInputs, PassMessage
from shoal.server.rpc.pushing.push_connection import Pushed, PushHandle
from shoal.server.rpc.pushing.push_service import PushService
from shoal.tensors import Encoding

MAX_DOWNSTREAM = 8
"""The servers after this one to which a client's stream keeps a way open: the replicas that share its passes."""
PUSH_FIRST_SECONDS = 1.0
"""How long the answer to the client waits until the push has left: it would take half of the line. A push that takes
longer than this is not waited for: the client may have to learn from the answer that the push does not arrive."""


class PassPushes:
    """The pushes from and to other servers for one client's stream, until `close`."""

    def __init__(self, push_service: PushService) -> None:
        self.is_waiting = False
        """Whether the pass that the client has asked for last waits for its inputs."""
        self._push_service = push_service
        self._handles: OrderedDict[tuple[str, tuple[str, ...]], PushHandle] = OrderedDict()
        self._has_left = asyncio.Event()  # whether the last push has left, or was given up
        self._has_left.set()

    async def receive(self, request: PassMessage) -> torch.Tensor:
        """The inputs [B, T, D] of a pass from its upstream server: the first push over its link that has such a tensor.

        Nothing of it is checked: who it is from says little of what it is.
        """
        assert request.upstream is not None
        arrived: asyncio.Future[torch.Tensor] = asyncio.get_running_loop().create_future()

        def inbox(message: Pushed, tensors: codec.Tensors) -> None:
            if isinstance(message, PassInputs) and request.pushed in tensors and not arrived.done():
                arrived.set_result(tensors[request.pushed])

        self.is_waiting = True
        self._push_service.expect(request.upstream, inbox)
        try:
            return await arrived
        finally:
            self._push_service.forget(request.upstream, inbox)
            self.is_waiting = False

    def prepare(self, downstream: Downstream) -> PushHandle | None:
        """The way to a downstream server, which is opened now if there is none yet; None if there is no room for it."""
        place = downstream.peer, downstream.addresses
        if place not in self._handles:
            handle = self._push_service.handle_to(downstream, for_passes=True)
            if handle is None:
                return None
            self._handles[place] = handle
            if len(self._handles) > MAX_DOWNSTREAM:
                _, oldest = self._handles.popitem(last=False)
                if oldest.num_waiting:
                    self._has_left.set()
                oldest.close()
        self._handles.move_to_end(place)
        return self._handles[place]

    async def push(self, downstream: Downstream, tensors: codec.Tensors, encoding: Encoding) -> None:
        """Push outputs to a downstream server. Returns when they have left, or after `PUSH_FIRST_SECONDS`.

        It waits for the push before, so that no more than one of this stream takes memory, however slow the other
        server is. If outputs do not get there, the client notices it: the server there goes on waiting.
        """
        await self._has_left.wait()
        handle = self.prepare(downstream)
        if handle is not None:
            self._has_left.clear()
            handle.push(PassInputs(link=downstream.link), tensors, encoding, done=lambda sent: self._has_left.set())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PUSH_FIRST_SECONDS):
                    await self._has_left.wait()

    def close(self) -> None:
        """The stream has ended. What has not left is forgotten."""
        while self._handles:
            self._handles.popitem()[1].close()
