"""Everything that can go wrong, as one tree.

    ShoalError
    ├── UserError                what somebody asked for cannot be done; ask differently
    │   ├── UnsupportedModel     no certified way to cut this family
    │   ├── UnsupportedOperation the model, or whoever serves it, cannot do this, such as rewinding a recurrent state
    │   └── CheckpointError      weights that are missing, damaged or of another shape
    └── SwarmError               the swarm cannot do it now
        ├── MissingBlocks        nobody serves some blocks
        ├── BootstrapFailed      none of the initial peers answered
        └── PeerError            one peer, one request; `peer` says who
            ├── ServerLost       it vanished, fell silent or spoke nonsense: go elsewhere
            ├── ServerBusy       it is alive but full: come back later, or go elsewhere
            ├── Misrouted        it cannot do this one: other blocks, other weights, or too small
            ├── RequestRejected  it understood and refuses: the request itself is wrong
            └── CannotRewind     its session cannot go back: everything is to be sent again

The first three of these are handled by the client's one retry loop; everything else reaches the user. Foreign
errors become one of these at the border where they arise. Each may carry a `hint`: what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterable


class ShoalError(Exception):
    """The root: catch it to catch whatever shoal raises on purpose."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UserError(ShoalError, ValueError):
    """What was asked for cannot be done, now or later."""


class UnsupportedModel(UserError):
    """The model's family has not been certified to be cut into blocks."""


class UnsupportedOperation(UserError):
    """The model, or whoever serves it, cannot do this: its recurrent state does not rewind, for example."""


class CheckpointError(UserError):
    """A tensor or a file of the checkpoint is missing, damaged or of the wrong shape."""


class SwarmError(ShoalError):
    """The swarm, as it is now, cannot do what was asked."""


class MissingBlocks(SwarmError):
    """No reachable server holds these blocks."""

    def __init__(self, message: str, *, blocks: Iterable[int] = (), hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.blocks = tuple(blocks)


class BootstrapFailed(SwarmError):
    """None of the initial peers could be reached."""


class PeerError(SwarmError):
    """One peer failed one request."""

    def __init__(self, message: str, *, peer: str, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.peer = peer


class ServerLost(PeerError):
    """The peer is gone, silent, or answers what nobody asked."""


class ServerBusy(PeerError):
    """The peer is alive and has no room.

    `retry_after` is in seconds.
    """

    def __init__(self, message: str, *, peer: str, retry_after: float, hint: str | None = None) -> None:
        super().__init__(message, peer=peer, hint=hint)
        self.retry_after = retry_after


class Misrouted(PeerError):
    """The peer cannot do this request, now or later; another may."""


class RequestRejected(PeerError):
    """The peer understood the request and refuses it; no other peer would accept it either."""


class CannotRewind(PeerError):
    """The peer cannot take its session back; the client has to send everything again."""
