"""For which tokens a server signs: all that it computes, once, in ranges whose tokens had the same fate."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from shoal.policy.audits.receipt_range import RECEIPT_TOKENS, ReceiptRange, with_step


@dataclass(frozen=True)
class Done:
    """A step: how far it goes back, and its tokens."""

    back: int
    num_tokens: int
    skip: int
    is_logits: bool
    pushed: bool


@st.composite
def steps(draw: st.DrawFn, *, may_go_back: bool = True) -> Done:
    num_tokens = draw(st.integers(1, 40))
    is_logits = draw(st.booleans())
    return Done(
        draw(st.integers(0, 30)) if may_go_back else 0,
        num_tokens,
        draw(st.integers(0, num_tokens)),
        is_logits,
        draw(st.booleans()) and not is_logits,
    )


class Server:
    """Each token has a byte of its own as its digest, so that all that is signed can be checked."""

    def __init__(self) -> None:
        self.unsigned = ReceiptRange(0, 0, size=1)
        self.tokens: list[tuple[int, int | None, bool, bool]] = []  # input, output, answered, pushed
        self.signed: list[ReceiptRange] = []
        self._count = 0

    def compute(self, step: Done, *, epoch: int = 0) -> None:
        del self.tokens[max(0, len(self.tokens) - step.back) :]
        position = len(self.tokens)
        for index in range(step.num_tokens):
            self._count = (self._count + 1) % 256
            answered = not step.is_logits and index >= step.skip
            sent = answered or step.pushed
            self.tokens.append((self._count, (self._count * 7) % 256 if sent else None, answered, step.pushed))
        new = self.tokens[position:]
        any_sent = any(output is not None for _, output, _, _ in new)
        inputs = bytes(each[0] for each in new)
        outputs = bytes((each[0] * 7) % 256 for each in new) if any_sent else b""
        due, self.unsigned = with_step(
            self.unsigned, inputs, outputs, at=(epoch, position), skip=step.skip, pushed=step.pushed
        )
        for each in due:  # at the time of signing, it has these tokens
            self.check(each)
        self.signed += due

    def check(self, signed: ReceiptRange) -> None:
        said = self.tokens[signed.first : signed.end]
        assert signed.inputs == bytes(each[0] for each in said)
        assert {(answered, pushed) for _, _, answered, pushed in said} == {(signed.answered, signed.pushed)}
        assert signed.outputs == bytes(each[1] for each in said if each[1] is not None)


@given(st.lists(steps(), max_size=12))
def test_what_is_signed_is_what_the_server_has_at_that_time(done: list[Done]):
    server = Server()
    for epoch, step in enumerate(done):
        server.compute(step, epoch=epoch)
        assert server.unsigned.end == len(server.tokens)
        assert server.unsigned.end - server.unsigned.first < RECEIPT_TOKENS


@given(st.lists(steps(may_go_back=False), max_size=12))
def test_each_token_is_signed_once_and_without_a_gap(done: list[Done]):
    server = Server()
    for step in done:
        server.compute(step)
    ends = [each.end for each in server.signed]
    assert [each.first for each in server.signed] == [0, *ends][: len(ends)]
    assert server.unsigned.first == (ends[-1] if ends else 0)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=60))
def test_single_steps_are_signed_in_ranges_of_sixteen_tokens(lengths: list[int]):
    server = Server()
    for length in lengths:
        server.compute(Done(0, length, 0, is_logits=False, pushed=True))
    assert all(RECEIPT_TOKENS <= each.end - each.first < RECEIPT_TOKENS + 5 for each in server.signed)


def test_a_prompt_is_signed_at_the_end_of_each_piece():
    server = Server()
    for _ in range(3):
        server.compute(Done(0, 256, 0, is_logits=False, pushed=True))
    assert [(each.first, each.end) for each in server.signed] == [(0, 256), (256, 512), (512, 768)]


def test_after_going_back_a_little_what_stays_is_signed_together_with_what_is_new():
    server = Server()
    server.compute(Done(0, 10, 0, is_logits=False, pushed=False))
    server.compute(Done(4, 10, 0, is_logits=False, pushed=False), epoch=1)
    assert [(each.first, each.end, each.epoch) for each in server.signed] == [(0, 16, 1)]
