"""For which tokens a server signs, and when: the tokens that it has computed since its last receipt."""

from __future__ import annotations

from dataclasses import dataclass, replace

RECEIPT_TOKENS = 16
"""A receipt is due when it covers this many tokens of a sequence."""


@dataclass(frozen=True)
class ReceiptRange:
    """Tokens of a session from `first` on, as a server had them in an `epoch`; of one or several steps.

    `inputs` and `outputs` are digests of `size` bytes for each token. All tokens of a range had the same fate: their
    outputs were `answered` to the client or not, and `pushed` to the next server or not. Without either, there are no
    digests of `outputs`.
    """

    epoch: int
    first: int
    inputs: bytes = b""
    outputs: bytes = b""
    answered: bool = False
    pushed: bool = False
    size: int = 32

    @property
    def end(self) -> int:
        """The position after its last token."""
        return self.first + len(self.inputs) // self.size

    @property
    def num_tokens(self) -> int:
        """How many tokens of each sequence it has."""
        return self.end - self.first

    @property
    def is_due(self) -> bool:
        """Whether it is long enough to be signed."""
        return self.num_tokens >= RECEIPT_TOKENS

    def going_on_at(self, position: int, epoch: int) -> ReceiptRange:
        """What is left of it when the next step is at this position: the session may have gone back."""
        if not self.first <= position <= self.end:
            return ReceiptRange(epoch, position, size=self.size)
        length = (position - self.first) * self.size
        return replace(self, epoch=epoch, inputs=self.inputs[:length], outputs=self.outputs[:length])

    def then(self, part: ReceiptRange) -> tuple[ReceiptRange | None, ReceiptRange]:
        """Two ranges in a row: what is to be signed now, because the second had another fate, and what goes on."""
        assert part.first == self.end
        if not self.inputs:
            return None, part
        if (self.answered, self.pushed) != (part.answered, part.pushed):
            return self, part
        return None, replace(
            self, epoch=part.epoch, inputs=self.inputs + part.inputs, outputs=self.outputs + part.outputs
        )


def with_step(
    unsigned: ReceiptRange, inputs: bytes, outputs: bytes, *, at: tuple[int, int], skip: int, pushed: bool
) -> tuple[list[ReceiptRange], ReceiptRange]:
    """What is to be signed after a step, and what stays unsigned.

    The step is `at` this epoch and position. Of its tokens, the outputs of the first `skip` were not answered.
    `outputs` is empty if none were answered or pushed as hidden states.
    """
    epoch, position = at
    size, due = unsigned.size, []
    unsigned = unsigned.going_on_at(position, epoch)
    num_tokens = len(inputs) // size
    cut = skip if outputs else num_tokens
    for start, end, answered in ((0, cut, False), (cut, num_tokens, True)):
        if start < end:
            sent = outputs[start * size : end * size] if answered or pushed else b""
            part = ReceiptRange(
                epoch, position + start, inputs[start * size : end * size], sent, answered, pushed, size
            )
            broken, unsigned = unsigned.then(part)
            due += [] if broken is None else [broken]
    if unsigned.is_due:
        due.append(unsigned)
        unsigned = ReceiptRange(epoch, unsigned.end, size=size)
    return due, unsigned
