"""The receipts of one server for a session, and what they should say."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from shoal.client.decoding.pending_step import PendingStep
from shoal.client.decoding.receipts.token_log import LazyDigests, Passage, TokenLog, digests_of
from shoal.net.signing.token_digests import joint_digest
from shoal.policy.audits.receipt_verdict import UNSIGNED_STEPS, ReceiptVerdict, receipt_verdict
from shoal.protocol import Receipt
from shoal.tensors import Encoding

log = logging.getLogger(__name__)

MAX_WAITING = 40
"""Receipts that cannot be compared yet, as those of all pieces of a prompt that are under way. Of more, the oldest are
dropped, as if they had not come."""
MAX_NOTED = 64
"""Steps that are noted. Of more, all but the last few are digested, so that their tensors do not stay in memory."""


@dataclass(frozen=True)
class ReceiptFinding:
    """What a receipt has shown. `pushers` are the servers that pushed the inputs that it is about.

    `got` is the digest of the outputs that the client got, as far as it knows.
    """

    verdict: ReceiptVerdict
    receipt: Receipt
    pushers: tuple[str, ...] = ()
    got: str | None = None


class StageReceipts:
    """What a client keeps of its talk with a server until that has signed it. `session` is the name for signatures.

    Nothing is kept without a name, nor of a server that turns out to sign nothing: it `signs` no more then. While a
    token is on its way, what happens is only noted. It is put in order, and digested, when a receipt has come.
    """

    def __init__(self, session: str | None = None) -> None:
        self.session = session
        self.signs = session is not None
        self._sent = TokenLog()  # with what the servers before it answered of what they pushed to it
        self._got = TokenLog()
        self._noted: list[tuple[TokenLog, Passage]] = []  # not in the logs yet
        self._num_sent = self._num_got = 0  # how far the logs go, with what is noted
        self._fresh: list[Passage] = []  # answers that the next server may have been pushed
        self.signed_to = 0
        """The position up to which its signatures have been compared."""
        self._num_unsigned = 0  # steps since the last receipt
        self._waiting: deque[Receipt] = deque(maxlen=MAX_WAITING)

    @property
    def num_waiting(self) -> int:
        """How many receipts cannot be compared yet."""
        return len(self._waiting)

    # -- what the stage does ------------------------------------------------------------------------------------------

    def sent(self, step: PendingStep, hidden_BTD: torch.Tensor, encoding: Encoding) -> None:
        """The client has sent a step with these inputs itself."""
        if self.signs:
            digests = LazyDigests(step.position, hidden_BTD, encoding, is_decoded=False)
            self._note_sent(Passage(step.epoch, step.position, step.end, digests))

    def answered(self, step: PendingStep, hidden_BTD: torch.Tensor | None, encoding: Encoding) -> None:
        """The server has answered a step, with these outputs unless they are logits, or all are skipped."""
        if self.session is None:
            return
        first = step.end if hidden_BTD is None else step.position + step.skip
        if step.position < first:
            self._note_got(Passage(step.epoch, step.position, first))
        if hidden_BTD is not None:
            found = Passage(step.epoch, first, step.end, LazyDigests(first, hidden_BTD, encoding, is_decoded=True))
            self._fresh.append(found)
            self._note_got(found)
        self._num_unsigned += 1
        if self._num_unsigned > UNSIGNED_STEPS:
            self._give_up()

    def _note_sent(self, passage: Passage) -> None:
        self._note(self._sent, passage)
        self._num_sent = passage.end

    def _note_got(self, passage: Passage) -> None:
        self._note(self._got, passage)
        self._num_got = passage.end

    def _note(self, log: TokenLog, passage: Passage) -> None:
        if self.signs:
            self._noted.append((log, passage))
            if len(self._noted) >= MAX_NOTED:
                self._put_noted()

    def _put_noted(self) -> None:
        noted, self._noted = self._noted, []
        for log, passage in noted:
            log.put(passage)

    def _give_up(self) -> None:
        """Expect no receipts any more."""
        self.signs = False
        self._sent, self._got = TokenLog(), TokenLog()
        self._noted.clear()
        self._waiting.clear()

    def rewound(self, *, num_computed: int, num_requested: int) -> None:
        """The server has computed, and was asked for, no more tokens than this."""
        if num_computed < self._num_got or num_requested < self._num_sent:
            self._put_noted()
            self._got.crop(num_computed)
            self._sent.crop(num_requested)
            self._num_got, self._num_sent = min(self._num_got, num_computed), min(self._num_sent, num_requested)
            self.signed_to = min(self.signed_to, num_computed)

    def add(self, receipt: Receipt) -> bool:
        """A receipt has come. Returns whether it was asked for."""
        if self.session is None:
            return False
        if self.signs:
            self._waiting.append(receipt)
        return True

    # -- what the pipeline does ---------------------------------------------------------------------------------------

    def take_answers(self) -> list[Passage]:
        """The outputs that the server has answered since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def pushed(self, answers: Sequence[Passage], *, by: str) -> None:
        """The server before has answered these outputs: if it has pushed them, this server has got the same."""
        for each in answers if self.signs else ():
            self._note_sent(replace(each, pusher=by))

    def findings(self, is_signed: Callable[[Receipt], bool]) -> Iterator[ReceiptFinding]:
        """What the receipts show that can be compared by now. Others wait. `is_signed` checks a signature."""
        self._put_noted()
        waiting, self._waiting = list(self._waiting), deque(maxlen=MAX_WAITING)
        for receipt in waiting:
            got = self._got.between(receipt.first, receipt.end)
            if got is None and receipt.first >= self.signed_to:
                self._waiting.append(receipt)
            elif got is None or any(each.epoch > receipt.epoch for each in got):
                log.debug("a receipt is about tokens that the session has taken back")
            elif any((each.digests is None) != (receipt.answered is None) for each in got):
                log.debug("a receipt is about other outputs than the client has got")
            else:
                finding = self._finding(receipt, got, is_signed)
                if finding.verdict is ReceiptVerdict.OPEN:
                    self._waiting.append(receipt)
                else:
                    self._settle(finding)
                    yield finding

    def _settle(self, finding: ReceiptFinding) -> None:
        receipt = finding.receipt
        if finding.verdict not in (ReceiptVerdict.AGREES, ReceiptVerdict.MISLED):
            self._give_up()  # one is enough
        self._num_unsigned = 0
        self.signed_to = receipt.end
        self._got.forget_before(receipt.end)
        self._sent.forget_before(receipt.end)

    def _finding(
        self, receipt: Receipt, got: Sequence[Passage], is_signed: Callable[[Receipt], bool]
    ) -> ReceiptFinding:
        inputs = self._inputs_of(got)
        digests, outputs = None if inputs is None else digests_of(inputs), digests_of(got)
        answer = None if outputs is None else joint_digest(outputs)
        pushers = () if inputs is None else tuple(dict.fromkeys(each.pusher for each in inputs if each.pusher))
        verdict_if = partial(
            receipt_verdict,
            inputs=None if digests is None else joint_digest(digests) == receipt.inputs,
            are_pushed=bool(pushers),
            answered=_are_equal(receipt.answered, answer),
            pushed=_are_equal(receipt.pushed, answer),
        )
        verdict = verdict_if(is_signed=True)
        if verdict is not ReceiptVerdict.OPEN:  # a signature is checked once
            verdict = verdict_if(is_signed=is_signed(receipt))
        return ReceiptFinding(verdict, receipt, pushers, answer)

    def _inputs_of(self, got: Sequence[Passage]) -> list[Passage] | None:
        """What the server should have received for these answers; None if the client does not know.

        A step that was pushed had the inputs that the server before answered to the same step, of the same epoch. If
        that answer was lost, the client has got others meanwhile.
        """
        found: list[Passage] = []
        for each in got:
            inputs = self._sent.between(each.start, each.end)
            if inputs is None or any(part.epoch != each.epoch for part in inputs):
                return None
            found += inputs
        return found


def _are_equal(signed: str | None, known: str | None) -> bool | None:
    return None if signed is None or known is None else signed == known
