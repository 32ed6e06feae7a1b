"""Why a request is not computed, as its sender is told."""

from __future__ import annotations

from shoal.protocol import Failure

RETRY_SECONDS = 2.0


class Refused(Exception):
    """A request that is not computed; `failure` is what its sender is told."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.reason)
        self.failure = failure


def rejected(reason: str) -> Refused:
    """The request is wrong, here and everywhere."""
    return Refused(Failure(code="rejected", reason=reason))


def misrouted(reason: str) -> Refused:
    """Another server may well do it."""
    return Refused(Failure(code="misrouted", reason=reason))


def busy(reason: str, *, retry_after: float = RETRY_SECONDS) -> Refused:
    """Not now."""
    return Refused(Failure(code="busy", reason=reason, retry_after=retry_after))
