"""All errors that shoal raises, as one tree.

    ShoalError
    ├── UserError                the request cannot be fulfilled; the user has to change it
    │   ├── UnsupportedModel     the model's family is not certified to be cut into blocks
    │   ├── UnsupportedOperation the model or its servers cannot do this, such as rewinding recurrent state
    │   └── CheckpointError      weights are missing, damaged or of another shape
    └── SwarmError               the swarm cannot do it now
        ├── MissingBlocks        no server has some of the blocks
        ├── BootstrapFailed      none of the initial peers answered
        └── PeerError            one peer failed one request; `peer` is its id
            ├── ServerLost       it is gone, silent or violates the protocol: use another server
            ├── ServerLate       it has not done in time what others have done meanwhile: use one of them
            ├── ServerBusy       it has no capacity left: try later, or use another server
            ├── Misrouted        it cannot serve this request: other blocks, other weights, or too small
            ├── RequestRejected  it refuses the request, because the request is wrong
            └── CannotRewind     it cannot rewind its session: send it all inputs again

The client's retry loop handles `ServerLost`, `ServerLate`, `ServerBusy` and `Misrouted`. All other errors reach the
user. Errors of other libraries are translated into these where they arise. Each error may have a `hint` that says what
to do.
"""

from __future__ import annotations

from collections.abc import Iterable


class ShoalError(Exception):
    """The base class of all errors that shoal raises on purpose."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UserError(ShoalError, ValueError):
    """The request cannot be fulfilled, now or later. The user has to change it."""


class UnsupportedModel(UserError):
    """The model's family is not certified to be cut into blocks, or cannot be."""


class UnsupportedOperation(UserError):
    """The model or its servers cannot do this. For example, recurrent state cannot be rewound."""


class CheckpointError(UserError):
    """A tensor or a file of a checkpoint is missing, damaged or of the wrong shape."""


class SwarmError(ShoalError):
    """The swarm cannot fulfill the request at present."""


class MissingBlocks(SwarmError):
    """No reachable server holds `blocks`."""

    def __init__(self, message: str, *, blocks: Iterable[int] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.blocks = tuple(blocks)


class BootstrapFailed(SwarmError):
    """None of the initial peers could be reached."""


class PeerError(SwarmError):
    """One peer failed one request; `peer` is its id."""

    def __init__(self, message: str, *, peer: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.peer = peer


class ServerLost(PeerError):
    """The peer is gone, silent, or violates the protocol."""


class ServerLate(PeerError):
    """The peer has not done in time what others have done meanwhile. It may do it later."""


class ServerBusy(PeerError):
    """The peer is alive but has no capacity left. A client may try again after `retry_after` seconds."""

    def __init__(self, message: str, *, peer: str, retry_after: float, hint: str | None = None) -> None:
        super().__init__(message, peer=peer, hint=hint)
        self.retry_after = retry_after


class Misrouted(PeerError):
    """The peer cannot serve this request, now or later, but another peer may."""


class ServerMoved(Misrouted):
    """The peer has other blocks than its last record says, or is changing them. Its next record says which."""


class RequestRejected(PeerError):
    """The peer refuses the request because it is wrong. No other peer would accept it."""


class Interrupted(PeerError):
    """This client was interrupted while it sent something: the stream is of no more use. The peer is not at fault."""


class CannotRewind(PeerError):
    """The peer cannot rewind its session. The client has to send it all inputs again."""
