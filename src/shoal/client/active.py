"""The active session: the one that calls inside its `with` block use without naming it.

`with model.inference_session() as session:` makes the session the active one of its blocks, as in PETALS. That holds in
the thread and the tasks that entered the block; calls of another thread are not affected.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shoal.client.inference_session import InferenceSession

_entered: ContextVar[tuple[InferenceSession, ...]] = ContextVar("_entered", default=())


def enter(session: InferenceSession) -> None:
    """Make a session the active one of its blocks, until it is left or closed."""
    _entered.set((*_entered.get(), session))


def leave(session: InferenceSession) -> None:
    """Make the session that was active before active again."""
    _entered.set(tuple(other for other in _entered.get() if other is not session))


def active_session(owner: object) -> InferenceSession | None:
    """The innermost open session of the blocks with this owner, or `None`.

    A task that was started inside a `with` block may outlive it, so a closed session is never active.
    """
    return next((each for each in reversed(_entered.get()) if each.owner is owner and not each.is_closed), None)


@contextlib.contextmanager
def none_active() -> Iterator[None]:
    """Let no session be active in the context: the calls that `generate()` makes inside bring their own caches."""
    before = _entered.get()
    _entered.set(())
    try:
        yield
    finally:
        _entered.set(before)
