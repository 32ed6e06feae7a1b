"""Why a server does not do what was asked: every `Failure` that it sends is made here."""

from __future__ import annotations

from shoal.protocol import Failure, ProtocolViolation

RETRY_SECONDS = 2.0
"""When a client that finds no room should come back: about as long as a few sessions need to end or to move."""


class Refused(Exception):
    """A request that is not computed; `failure` is what its client is told."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure

    @property
    def is_request_at_fault(self) -> bool:
        """Whether the same request would be refused again, as long as the server is the same."""
        return self.failure.code in ("rejected", "misrouted", "moved")


def rejected(reason: str) -> Refused:
    """The request is wrong, here and on every other server."""
    return Refused(Failure(code="rejected", reason=reason))


def misrouted(reason: str) -> Refused:
    """This server cannot do it; another one may."""
    return Refused(Failure(code="misrouted", reason=reason))


def busy(reason: str, *, retry_after: float = RETRY_SECONDS) -> Refused:
    """The server cannot do it now. The client may come back after `retry_after` seconds."""
    return Refused(Failure(code="busy", reason=reason, retry_after=retry_after))


def too_many(what: str, payer: str) -> Refused:
    """As many requests wait as one network may have. Its users may not know of each other."""
    return busy(f"{what} of {payer or 'this client'} wait here already; all clients of one network count as one")


def preempted() -> Refused:
    """The session had to give its pages up to other sessions."""
    return busy("others needed this session's pages")


def cannot_rewind(reason: str) -> Refused:
    """The session cannot go back to where a step begins."""
    return Refused(Failure(code="rewind", reason=reason))


def leaving() -> Refused:
    """The server is going away."""
    return Refused(Failure(code="leaving", reason="this server is going away"))


def moved(reason: str) -> Refused:
    """This server has other blocks. The directory says which, or soon will."""
    return Refused(Failure(code="moved", reason=reason))


def moving() -> Refused:
    """The server goes to other blocks, or has just none."""
    return moved("this server is changing its blocks")


def failure_of(error: Exception) -> Failure:
    """What the client is told about an exception: of an unexpected one only its type."""
    match error:
        case Refused():
            return error.failure
        case ProtocolViolation():
            return Failure(code="rejected", reason=str(error))
        case _:
            return Failure(code="broken", reason=f"{type(error).__name__} while computing")
