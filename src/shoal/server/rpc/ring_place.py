"""A session's place in its ring: which server pushes steps to it, and to which server it pushes them on."""

from __future__ import annotations

from collections.abc import Callable

from shoal.net.wire import codec
from shoal.protocol import Downstream, Step, Upstream
from shoal.server.rpc.pushing.push_connection import PushHandle
from shoal.server.rpc.pushing.push_service import Inbox, PushService
from shoal.tensors import Encoding


class RingPlace:
    """The neighbors of one session, at first none. `inbox` is given what the upstream server pushes."""

    def __init__(self, push_service: PushService, inbox: Inbox) -> None:
        self.upstream: Upstream | None = None
        self._downstream: Downstream | None = None
        self._handle: PushHandle | None = None  # to the downstream server
        self._push_service = push_service
        self._inbox = inbox

    @property
    def num_waiting(self) -> int:
        """How many steps are not sent to the downstream server yet."""
        return 0 if self._handle is None else self._handle.num_waiting

    def change(self, upstream: Upstream | None, downstream: Downstream | None) -> None:
        """From now on these are the neighbors; None is the client."""
        if upstream != self.upstream:
            self.ignore_upstream()
            if upstream is not None:
                self._push_service.expect(upstream, self._inbox)
        if downstream != self._downstream:
            if self._handle is not None:
                self._handle.close()
            self._handle = None if downstream is None else self._push_service.handle_to(downstream)
        self.upstream, self._downstream = upstream, downstream

    def ignore_upstream(self) -> None:
        """Take no more steps from the upstream server. May be called twice."""
        if self.upstream is not None:
            self._push_service.forget(self.upstream, self._inbox)

    def push(
        self, step: Step, tensors: Callable[[], codec.Tensors], encoding: Encoding, *, done: Callable[[bool], None]
    ) -> None:
        """Push a step to the downstream server. `done` is called with whether it was sent."""
        if self._handle is None or self._downstream is None:
            done(False)
        else:
            step = step.model_copy(update={"link": self._downstream.link})
            self._handle.push(step, tensors(), encoding, done=done)
