"""Who is blamed when two servers differ: at most one server, after a third one has computed the same."""

from __future__ import annotations

from enum import Enum


class Verdict(Enum):
    """What an audit has found of the outputs of a server."""

    CLEAN = "a witness has computed the same"
    LIED = "two witnesses have computed the same, and something else than the server"
    WITNESS_LIED = "a second witness has computed the same as the server"
    MISLED = "it computes the same of what the client sends; a server that pushes to it may have misled it"
    UNSETTLED = "the servers differ, and no third one decides"

    @property
    def clears(self) -> bool:
        """Whether the outputs are right after all."""
        return self in (Verdict.CLEAN, Verdict.WITNESS_LIED)


def verdict(*, like_witness: bool, like_second: bool | None = None, witnesses_alike: bool | None = None) -> Verdict:
    """The verdict on a server whose outputs are or are not `like_witness`, and like those of a second witness.

    `None` if there is no second witness. One that lied may still turn out to have been misled (`with_own_answer`).
    """
    if like_witness:
        return Verdict.CLEAN
    if like_second:
        return Verdict.CLEAN if witnesses_alike else Verdict.WITNESS_LIED
    return Verdict.LIED if witnesses_alike else Verdict.UNSETTLED


def with_own_answer(found: Verdict, *, like_witness: bool) -> Verdict:
    """The verdict on a server that was pushed its inputs, after the client has sent it the same inputs itself.

    Another server may have pushed it something else than it answered to the client. If its own answer is right now, it
    takes a further audit, without pushes, to tell which of both lied.
    """
    return Verdict.MISLED if found is Verdict.LIED and like_witness else found
