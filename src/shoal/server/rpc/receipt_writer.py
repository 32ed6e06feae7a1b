"""Signs what a session's steps were computed from and what was sent of them. No step waits for that."""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shoal.net.signing.receipt_signatures import signed_receipt
from shoal.net.signing.token_digests import ASIDE_BYTES, joint_digest, token_digests
from shoal.net.transport import Transport
from shoal.net.wire.encodings import as_received
from shoal.policy.audits.receipt_range import RECEIPT_TOKENS, ReceiptRange, with_step
from shoal.protocol import Receipt, Step
from shoal.server.executor import alone

HELD_BYTES = 64 * 1024
"""Small steps are digested together, once a receipt is due or their tensors are larger than this."""


@dataclass(frozen=True)
class _ComputedStep:
    step: Step
    inputs_BTD: torch.Tensor
    outputs_BTD: torch.Tensor | None

    @property
    def num_bytes(self) -> int:
        return self.inputs_BTD.nbytes + (0 if self.outputs_BTD is None else self.outputs_BTD.nbytes)

    def digests(self) -> tuple[bytes, bytes]:
        """Those of the inputs, and of the outputs if any are sent."""
        encoding = self.step.encoding_of("hidden")
        inputs, outputs = token_digests(self.inputs_BTD, encoding), b""
        if self.outputs_BTD is not None and (self.step.hops_left or self.step.skip < self.outputs_BTD.shape[1]):
            outputs = token_digests(as_received(self.outputs_BTD, encoding), encoding)
        return inputs, outputs


class ReceiptWriter:
    """Gives `send` the receipts for a `session` of this name, in order, while `run` runs; none without a name.

    Most steps are only held here. `changed` is called when fewer of those that are to be digested wait than before.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        client: str,
        session: str | None,
        send: Callable[[Receipt], None],
        changed: Callable[[], None],
    ) -> None:
        self._transport = transport
        self._client = client
        self._session = session
        self._send = send
        self._changed = changed
        self._held: list[_ComputedStep] = []
        self._num_held_bytes = 0
        self._num_tokens = 0  # since a receipt was due
        self._due: asyncio.Queue[list[_ComputedStep]] = asyncio.Queue()
        self._unsigned = ReceiptRange(0, 0)

    @property
    def num_waiting(self) -> int:
        """How many steps, or groups of small ones, wait to be digested: their tensors stay in memory."""
        return self._due.qsize()

    def computed(self, step: Step, inputs_BTD: torch.Tensor, outputs_BTD: torch.Tensor | None) -> None:
        """A step was computed, and its answer is queued. `outputs_BTD` is None if that has no hidden states."""
        if self._session is None:
            return
        computed = _ComputedStep(step, inputs_BTD, outputs_BTD)
        self._held.append(computed)
        self._num_held_bytes += computed.num_bytes
        self._num_tokens += inputs_BTD.shape[1]
        if self._num_tokens >= RECEIPT_TOKENS or self._num_held_bytes >= HELD_BYTES:
            self._due.put_nowait(self._held)
            self._held, self._num_held_bytes = [], 0
            self._num_tokens = 0 if self._num_tokens >= RECEIPT_TOKENS else self._num_tokens

    async def run(self) -> None:
        """Sign what is computed, until this is cancelled."""
        while True:
            due = await self._due.get()
            if sum(each.num_bytes for each in due) > ASIDE_BYTES:
                digests = await asyncio.to_thread(alone, lambda due=due: [each.digests() for each in due])
            else:
                digests = [each.digests() for each in due]
            for computed, (inputs, outputs) in zip(due, digests, strict=True):
                self._append(computed.step, inputs, outputs)
            self._changed()

    def _append(self, step: Step, inputs: bytes, outputs: bytes) -> None:
        due, self._unsigned = with_step(
            self._unsigned, inputs, outputs, at=(step.epoch, step.position), skip=step.skip, pushed=step.hops_left > 0
        )
        for each in due:
            self._send(self._signed(each))

    def _signed(self, tokens: ReceiptRange) -> Receipt:
        assert self._session is not None
        outputs = joint_digest(tokens.outputs)
        return signed_receipt(
            self._transport,
            session=self._session,
            client=self._client,
            epoch=tokens.epoch,
            first=tokens.first,
            end=tokens.end,
            inputs=joint_digest(tokens.inputs),
            answered=outputs if tokens.answered else None,
            pushed=outputs if tokens.pushed else None,
        )
