"""Which session the calls inside a `with` block go on with, without being told.

`with model.inference_session() as session:` makes the session the active one of its blocks, as in PETALS. It is so in
the thread and the tasks that entered the block: another thread that uses the same model has its own calls.
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
    """From now on, until it is left or closed, it is the active one of its blocks."""
    _entered.set((*_entered.get(), session))


def leave(session: InferenceSession) -> None:
    """The one that was active before is so again."""
    _entered.set(tuple(other for other in _entered.get() if other is not session))


def active_session(owner: object) -> InferenceSession | None:
    """The innermost open session of these blocks.

    A task that was started inside of a block may outlive it; a session that was closed meanwhile is not active.
    """
    return next((each for each in reversed(_entered.get()) if each.owner is owner and not each.is_closed), None)


@contextlib.contextmanager
def none_active() -> Iterator[None]:
    """Meanwhile no session is: what `generate()` calls deep inside has caches of its own."""
    before = _entered.get()
    _entered.set(())
    try:
        yield
    finally:
        _entered.set(before)
