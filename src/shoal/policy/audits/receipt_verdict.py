"""What follows from a receipt: whether a server has signed what it did, and who is blamed if not."""

from __future__ import annotations

from enum import Enum

UNSIGNED_STEPS = 64
"""A server that has answered more steps than this since its last receipt counts as one that signs nothing."""


class ReceiptVerdict(Enum):
    """What a receipt of a server has shown."""

    AGREES = "it says what the client sent and got"
    OPEN = "it agrees as far as it can be compared yet"
    FORGED = "its signature is not that of the server for this session"
    CONTRADICTS = "the server signs other inputs than the client sent it, or other outputs than the client got"
    PUSHED_OTHERS = "the server signs that it pushed other outputs than the client got from it"
    MISLED = "the server signs other inputs than the server before it, which pushes to it, gave the client"

    @property
    def is_fault(self) -> bool:
        """Whether the server is replaced, though not shut out: it answers wrongly."""
        return self in (ReceiptVerdict.FORGED, ReceiptVerdict.CONTRADICTS)


def receipt_verdict(
    *, is_signed: bool, inputs: bool | None, are_pushed: bool, answered: bool | None, pushed: bool | None
) -> ReceiptVerdict:
    """The verdict on a receipt of a server whose signature is right if it `is_signed`.

    The others say whether digests are equal: that of the `inputs` to that of what the client sent, or of what the
    server before it answered if its inputs `are_pushed`; that of the outputs that were `answered`, and of those that
    were `pushed`, to that of what the client got. None is for what the client does not know, or what was not sent.

    Who pushes something else than it answers is to blame by its own signature. If it signs that it pushed what it
    answered, and the next server signs other inputs, one of both lies, and nothing says which.
    """
    if not is_signed:
        return ReceiptVerdict.FORGED
    if pushed is False:
        return ReceiptVerdict.PUSHED_OTHERS
    if answered is False or (inputs is False and not are_pushed):
        return ReceiptVerdict.CONTRADICTS
    if inputs is None:
        return ReceiptVerdict.OPEN
    return ReceiptVerdict.AGREES if inputs else ReceiptVerdict.MISLED
