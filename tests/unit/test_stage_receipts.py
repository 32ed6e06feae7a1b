"""What a client finds out from receipts, whatever happens to a session: no honest server is blamed, no lie is missed.

A ring of two servers in miniature: A gets tokens from the client and pushes its outputs to B. Both sign as real servers
do. The session goes back, begins epochs, loses answers, and replaces A.
"""

# T tokens, D hidden size

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import count

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.client.decoding.pending_step import PendingStep
from shoal.client.decoding.receipts.stage_receipts import MAX_WAITING, StageReceipts
from shoal.net.signing.token_digests import joint_digest, token_digests
from shoal.policy.audits.receipt_range import ReceiptRange, with_step
from shoal.policy.audits.receipt_verdict import UNSIGNED_STEPS, ReceiptVerdict
from shoal.protocol import Receipt

SIZE = 2
SESSION = "0" * 32
V = ReceiptVerdict


@dataclass
class Server:
    """Signs as a real one. Its outputs are never the same twice; `numbers` makes them."""

    numbers: count[int]
    unsigned: ReceiptRange = field(default_factory=lambda: ReceiptRange(0, 0))

    def compute(
        self, inputs_1TD: torch.Tensor, *, epoch: int, position: int, skip: int = 0, pushed: bool = False
    ) -> tuple[torch.Tensor, list[Receipt]]:
        outputs_1TD = torch.stack([torch.full((1, SIZE), float(next(self.numbers))) for _ in inputs_1TD[0]], dim=1)
        inputs, outputs = token_digests(inputs_1TD, "raw"), token_digests(outputs_1TD, "raw")
        due, self.unsigned = with_step(self.unsigned, inputs, outputs, at=(epoch, position), skip=skip, pushed=pushed)
        return outputs_1TD, [signed(each) for each in due]


def signed(tokens: ReceiptRange) -> Receipt:
    outputs = joint_digest(tokens.outputs)
    return Receipt(
        epoch=tokens.epoch,
        first=tokens.first,
        end=tokens.end,
        inputs=joint_digest(tokens.inputs),
        answered=outputs if tokens.answered else None,
        pushed=outputs if tokens.pushed else None,
        signature="0" * 128,
    )


def step(position: int, num_tokens: int, *, epoch: int = 0, skip: int = 0, pushed: bool = False) -> PendingStep:
    shape = torch.Size((1, num_tokens, SIZE))
    return PendingStep(epoch, position, shape, torch.float32, None, 0, 0.1, skip=skip, pushed=pushed)


def verdicts(receipts: StageReceipts, *, is_signed: bool = True) -> list[ReceiptVerdict]:
    return [each.verdict for each in receipts.findings(lambda receipt: is_signed)]


class Ring:
    """A session on A and B, as far as receipts are concerned."""

    def __init__(self) -> None:
        self.numbers = count(1)
        self.epoch = 0
        self.history_A: list[torch.Tensor] = []  # of a tensor [1, 1, D] for each token
        self.history_B: list[torch.Tensor] = []
        self.found: list[ReceiptVerdict] = []
        self.b = Server(self.numbers)
        self.of_b = StageReceipts(SESSION)
        self.num_b = 0  # the tokens that B has answered
        self.replace_a()

    def replace_a(self) -> None:
        """Another server takes the place of A. It computes all again; of what the client knows, it answers nothing."""
        self.a, self.of_a = Server(self.numbers), StageReceipts(SESSION)
        self.num_a = 0

    def _token(self) -> torch.Tensor:
        return torch.full((1, 1, SIZE), float(next(self.numbers)))

    def ask_a(self, num_tokens: int, *, pushes: bool, loses_answer: bool) -> None:
        """Let A compute new tokens, after what it lacks, and push the outputs to B if that is up to date."""
        if self.num_a < len(self.history_A):
            self._let_a_compute(self.num_a, len(self.history_A), pushes=False, loses_answer=False)
        position = len(self.history_A)
        self.history_A += [self._token() for _ in range(num_tokens)]
        pushes = pushes and self.num_b == len(self.history_B) == position
        self._let_a_compute(position, position + num_tokens, pushes=pushes, loses_answer=loses_answer)
        if loses_answer:
            self.epoch += 1
            self.replace_a()
            self._let_a_compute(0, position + num_tokens, pushes=False, loses_answer=False)

    def _let_a_compute(self, position: int, end: int, *, pushes: bool, loses_answer: bool) -> None:
        inputs_1TD = torch.cat(self.history_A[position:end], dim=1)
        known = len(self.history_B)
        skip = max(0, min(known, end) - position)
        asked = step(position, end - position, epoch=self.epoch, skip=skip)
        self.of_a.sent(asked, inputs_1TD, "raw")
        outputs_1TD, receipts = self.a.compute(
            inputs_1TD, epoch=self.epoch, position=position, skip=skip, pushed=pushes
        )
        if pushes:
            self._let_b_compute(outputs_1TD, position, pushed=True)
        if loses_answer:
            return
        self.num_a = end
        wanted = outputs_1TD[:, skip:]
        self.of_a.answered(asked, wanted if wanted.shape[1] else None, "raw")
        self.history_B += list(wanted.split(1, dim=1)) if wanted.shape[1] else []
        self._receive(self.of_a, receipts)

    def ask_b(self, num_tokens: int) -> None:
        """Let the client send B tokens that it lacks."""
        end = min(len(self.history_B), self.num_b + num_tokens)
        if end > self.num_b:
            inputs_1TD = torch.cat(self.history_B[self.num_b : end], dim=1)
            self.of_b.sent(step(self.num_b, end - self.num_b, epoch=self.epoch), inputs_1TD, "raw")
            self._let_b_compute(inputs_1TD, self.num_b, pushed=False)

    def _let_b_compute(self, inputs_1TD: torch.Tensor, position: int, *, pushed: bool) -> None:
        asked = step(position, inputs_1TD.shape[1], epoch=self.epoch, pushed=pushed)
        outputs_1TD, receipts = self.b.compute(inputs_1TD, epoch=self.epoch, position=position)
        self.of_b.answered(asked, outputs_1TD, "raw")
        self.num_b = asked.end
        self._receive(self.of_b, receipts)

    def go_back(self, num_tokens: int) -> None:
        """Forget all tokens after the first `num_tokens`."""
        del self.history_A[num_tokens:], self.history_B[num_tokens:]
        self.num_a, self.num_b = min(self.num_a, num_tokens), min(self.num_b, num_tokens)
        self.of_a.rewound(num_computed=self.num_a, num_requested=self.num_a)
        self.of_b.rewound(num_computed=self.num_b, num_requested=self.num_b)
        self.epoch += 1

    def _receive(self, of_stage: StageReceipts, receipts: list[Receipt]) -> None:
        for receipt in receipts:
            assert of_stage.add(receipt)

    def settle(self) -> None:
        self.of_b.pushed(self.of_a.take_answers(), by="A")
        self.of_b.take_answers()
        self.found += verdicts(self.of_a) + verdicts(self.of_b)


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_no_honest_server_is_blamed_whatever_happens_to_the_session(data: st.DataObject):
    ring = Ring()
    for _ in range(data.draw(st.integers(1, 25))):
        match data.draw(st.sampled_from(["ask a", "ask a", "ask a", "ask b", "go back", "replace a", "settle"])):
            case "ask a":
                ring.ask_a(
                    data.draw(st.integers(1, 20)),
                    pushes=data.draw(st.booleans()),
                    loses_answer=data.draw(st.sampled_from([False, False, False, True])),
                )
            case "ask b":
                ring.ask_b(data.draw(st.integers(1, 30)))
            case "go back":
                ring.go_back(data.draw(st.integers(0, len(ring.history_A))))
            case "replace a":
                ring.replace_a()
                ring.epoch += 1
            case _:
                ring.settle()
    ring.settle()
    assert set(ring.found) <= {V.AGREES}


@given(st.lists(st.integers(1, 20), min_size=4, max_size=12))
def test_all_that_two_servers_sign_is_compared(lengths: list[int]):
    ring = Ring()
    for length in lengths:
        ring.ask_a(length, pushes=True, loses_answer=False)
        ring.settle()
    assert ring.of_a.signed_to == ring.a.unsigned.first
    assert ring.of_b.signed_to == ring.b.unsigned.first
    assert ring.found == [V.AGREES] * len(ring.found)
    assert len(ring.found) >= 2 * (sum(lengths) // 36)


class Pair:
    """Two servers, of which the first pushes 16 tokens to the second; what one of them says may be changed."""

    def __init__(self) -> None:
        numbers = count(1)
        self.of_a, self.of_b = StageReceipts(SESSION), StageReceipts(SESSION)
        inputs_1TD = torch.ones(1, 16, SIZE)
        self.answer_1TD, (self.receipt_a,) = Server(numbers).compute(inputs_1TD, epoch=0, position=0, pushed=True)
        self.outputs_1TD, (self.receipt_b,) = Server(numbers).compute(self.answer_1TD, epoch=0, position=0)
        self.of_a.sent(step(0, 16), inputs_1TD, "raw")

    def settle(self) -> tuple[list[ReceiptVerdict], list[ReceiptVerdict]]:
        self.of_a.answered(step(0, 16), self.answer_1TD, "raw")
        self.of_b.answered(step(0, 16, pushed=True), self.outputs_1TD, "raw")
        self.of_a.add(self.receipt_a)
        self.of_b.add(self.receipt_b)
        self.of_b.pushed(self.of_a.take_answers(), by="A")
        return verdicts(self.of_a), verdicts(self.of_b)


@given(st.integers(0, 15), st.integers(0, SIZE * 4 - 1), st.integers(0, 7))
def test_any_changed_byte_of_what_was_pushed_is_found(position: int, byte: int, bit: int):
    pair = Pair()
    pair.answer_1TD = pair.answer_1TD.clone()
    pair.answer_1TD[0, position].view(torch.uint8)[byte] ^= 1 << bit  # A answers something else than it has pushed
    assert pair.settle() == ([V.PUSHED_OTHERS], [V.MISLED])


def test_if_it_signs_that_it_pushed_what_it_answered_neither_is_to_blame():
    pair = Pair()
    pair.answer_1TD = pair.answer_1TD + 1
    other = joint_digest(token_digests(pair.answer_1TD, "raw"))
    pair.receipt_a = pair.receipt_a.model_copy(update={"answered": other, "pushed": other})
    assert pair.settle() == ([V.AGREES], [V.MISLED])


def test_a_receipt_waits_for_what_it_is_to_be_compared_with():
    pair = Pair()
    pair.of_b.add(pair.receipt_b)
    assert not verdicts(pair.of_b)  # nothing is answered
    pair.of_b.answered(step(0, 16, pushed=True), pair.outputs_1TD, "raw")
    assert not verdicts(pair.of_b)  # what A has answered is not known
    pair.of_a.answered(step(0, 16), pair.answer_1TD, "raw")
    pair.of_b.pushed(pair.of_a.take_answers(), by="A")
    assert verdicts(pair.of_b) == [V.AGREES]


def test_a_receipt_counts_once():
    pair = Pair()
    assert pair.settle() == ([V.AGREES], [V.AGREES])
    pair.of_a.add(pair.receipt_a)
    assert not verdicts(pair.of_a)


def test_receipts_that_can_not_be_compared_are_not_kept_and_their_signatures_are_not_checked():
    of_stage = StageReceipts(SESSION)
    pair = Pair()
    for number in range(1000):
        first = 16 * (number + 1)
        of_stage.add(pair.receipt_a.model_copy(update={"first": first, "end": first + 16}))

    def never(receipt: Receipt) -> bool:
        raise AssertionError(receipt)

    assert not list(of_stage.findings(never))
    assert of_stage.num_waiting == MAX_WAITING


def test_a_server_without_a_receipt_for_many_steps_counts_as_one_that_signs_nothing():
    of_stage = StageReceipts(SESSION)
    for position in range(UNSIGNED_STEPS):
        of_stage.sent(step(position, 1), torch.ones(1, 1, SIZE), "raw")
        of_stage.answered(step(position, 1), torch.ones(1, 1, SIZE), "raw")
        assert of_stage.signs
    of_stage.answered(step(UNSIGNED_STEPS, 1), torch.ones(1, 1, SIZE), "raw")
    assert not of_stage.signs
    assert of_stage.add(Pair().receipt_a)  # no fault either
    assert not verdicts(of_stage)


def test_who_leaves_out_digests_has_not_signed():
    pair = Pair()
    pair.receipt_a = pair.receipt_a.model_copy(update={"answered": None})
    assert pair.settle() == ([], [V.AGREES])
    assert pair.of_a.signed_to == 0


def test_a_wrong_signature_is_found_and_an_unasked_receipt_refused():
    pair = Pair()
    pair.of_a.answered(step(0, 16), pair.answer_1TD, "raw")
    pair.of_a.add(pair.receipt_a)
    assert verdicts(pair.of_a, is_signed=False) == [V.FORGED]
    assert not StageReceipts(None).add(pair.receipt_a)
