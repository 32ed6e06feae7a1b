"""Signs what a session's steps were computed from and what was sent of them. No step waits for that."""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shoal.net.signing.receipt_signatures import signed_receipt
from shoal.net.signing.token_digests import joint_digest, token_digests
from shoal.net.transport import Transport
from shoal.net.wire.encodings import as_received
from shoal.policy.audits.receipt_range import ReceiptRange, with_step
from shoal.protocol import Receipt, Step
from shoal.server.executor import alone

DIGEST_ASIDE_BYTES = 64 * 1024
"""Steps with more inputs than this are digested on another thread: the event loop should not wait for that."""


@dataclass(frozen=True)
class _ComputedStep:
    step: Step
    inputs_BTD: torch.Tensor
    outputs_BTD: torch.Tensor | None

    def digests(self) -> tuple[bytes, bytes]:
        """Those of the inputs, and of the outputs if any are sent."""
        encoding = self.step.encoding_of("hidden")
        inputs, outputs = token_digests(self.inputs_BTD, encoding), b""
        if self.outputs_BTD is not None and (self.step.hops_left or self.step.skip < self.outputs_BTD.shape[1]):
            outputs = token_digests(as_received(self.outputs_BTD, encoding), encoding)
        return inputs, outputs


class ReceiptWriter:
    """Gives `send` the receipts for a `session` of this name, in order, while `run` runs; none without a name.

    `changed` is called when fewer steps wait than before.
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
        self._steps: asyncio.Queue[_ComputedStep] = asyncio.Queue()
        self._unsigned = ReceiptRange(0, 0)

    @property
    def num_waiting(self) -> int:
        """How many steps are not digested yet: their tensors stay in memory."""
        return self._steps.qsize()

    def computed(self, step: Step, inputs_BTD: torch.Tensor, outputs_BTD: torch.Tensor | None) -> None:
        """A step was computed, and its answer is queued. `outputs_BTD` is None if that has no hidden states."""
        if self._session is not None:
            self._steps.put_nowait(_ComputedStep(step, inputs_BTD, outputs_BTD))

    async def run(self) -> None:
        """Sign what is computed, until this is cancelled."""
        while True:
            computed = await self._steps.get()
            if computed.inputs_BTD.nbytes > DIGEST_ASIDE_BYTES:
                inputs, outputs = await asyncio.to_thread(alone, computed.digests)
            else:
                inputs, outputs = computed.digests()
            step = computed.step
            due, self._unsigned = with_step(
                self._unsigned,
                inputs,
                outputs,
                at=(step.epoch, step.position),
                skip=step.skip,
                pushed=step.hops_left > 0,
            )
            for each in due:
                self._send(self._signed(each))
            self._changed()

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
