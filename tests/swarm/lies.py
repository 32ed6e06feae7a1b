"""Servers that change what they answer and push."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

import torch

from shoal.net.memory import Frame, MemoryNetwork
from shoal.net.signing.receipt_signatures import signed_receipt
from shoal.net.signing.token_digests import DIGEST_BYTES, joint_digest, token_digests
from shoal.net.wire import codec
from shoal.protocol import Open, Opened, PassInputs, PassResult, Receipt, Step, StepResult, parse
from shoal.tensors import TensorName

Lie = Callable[[torch.Tensor], torch.Tensor]
Signs = Literal["nothing", "what it computed", "what it sent"]


def noise(strength: float) -> Lie:
    """Adds noise, relative to the size of each hidden state."""
    generator = torch.Generator().manual_seed(0)

    def add(hidden_BTD: torch.Tensor) -> torch.Tensor:
        size_BT1 = hidden_BTD.square().mean(dim=-1, keepdim=True).sqrt()
        return hidden_BTD + strength * size_BT1 * torch.randn(hidden_BTD.shape, generator=generator)

    return add


def shifted(hidden_BTD: torch.Tensor) -> torch.Tensor:
    """The outputs of other channels."""
    return hidden_BTD.roll(1, dims=-1)


@dataclass(frozen=True)
class Signer:
    """What can sign as a peer of a network in memory."""

    network: MemoryNetwork
    peer: str

    def sign(self, data: bytes) -> bytes:
        return self.network.sign(self.peer, data)


@dataclass
class _Liar:
    lie: Lie
    answers: bool
    pushes: bool
    tensor: TensorName
    signs: Signs
    num_honest: int  # frames
    sent: dict[tuple[type, int], bytes] = field(default_factory=dict)
    """The digest of what it has really answered and pushed, by the kind of message and the position of the token."""


class Liars:
    """Lets servers change what they answer and push. At most one session of a liar signs `what it sent`."""

    def __init__(self, network: MemoryNetwork) -> None:
        self._network = network
        self._liars: dict[str, _Liar] = {}
        self._session: dict[str, str] = {}  # the name for receipts of the first session on a server
        network.on_frame = self._changed

    def add(
        self,
        name: str,
        lie: Lie,
        *,
        answers: bool = True,
        pushes: bool = True,
        after: int = 0,
        tensor: TensorName = "hidden",
        signs: Signs = "nothing",
    ) -> None:
        """A server lies from its answer or push number `after` on, in one tensor of these."""
        self._liars[name] = _Liar(lie, answers, pushes, tensor, signs, after)

    def sign_nothing(self, *names: str) -> None:
        """Honest servers that give no receipts."""
        for name in names:
            self.add(name, lambda hidden_BTD: hidden_BTD, answers=False, pushes=False)

    def _changed(self, frame: Frame) -> Frame | None:
        if b'"kind":"open"' in frame.header and isinstance(message := parse(frame.header), Open):
            self._session.setdefault(frame.receiver, message.receipts or "")
        liar = self._liars.get(frame.sender)
        if liar is None:
            return frame
        if not frame.payload:
            return self._receipt(frame, liar) if b'"kind":"receipt"' in frame.header else frame
        message, tensors = codec.decode(frame.header, bytearray(frame.payload))
        is_answer = isinstance(message, StepResult | Opened | PassResult)
        is_push = isinstance(message, Step | PassInputs)
        if liar.tensor not in tensors:
            return frame
        if (is_answer and liar.answers) or (is_push and liar.pushes):
            liar.num_honest -= 1
            if liar.num_honest < 0:
                tensors = {**tensors, liar.tensor: liar.lie(tensors[liar.tensor])}
                header, buffers = codec.encode(message, tensors)
                payload = b"".join(bytes(memoryview(each).cast("B")) for each in buffers)
                frame = replace(frame, header=header, payload=payload)
        if isinstance(message, Step | StepResult) and "hidden" in tensors:
            digests = token_digests(tensors["hidden"], "raw")
            for index in range(len(digests) // DIGEST_BYTES):
                digest = digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES]
                liar.sent[type(message), message.position + index] = digest
        return frame

    def _receipt(self, frame: Frame, liar: _Liar) -> Frame | None:
        """What a liar sends in place of a receipt."""
        if liar.signs == "nothing":
            return None
        if liar.signs == "what it computed":
            return frame
        receipt = parse(frame.header)
        assert isinstance(receipt, Receipt)
        signed = signed_receipt(
            cast(Any, Signer(self._network, frame.sender)),
            session=self._session[frame.sender],
            client=frame.receiver,
            **receipt.model_dump(include={"epoch", "first", "end", "inputs"}),
            answered=receipt.answered and self._digest(liar, StepResult, receipt),
            pushed=receipt.pushed and self._digest(liar, Step, receipt),
        )
        return replace(frame, header=codec.encode(signed, {})[0])

    def _digest(self, liar: _Liar, kind: type, receipt: Receipt) -> str:
        return joint_digest(b"".join(liar.sent[kind, position] for position in range(receipt.first, receipt.end)))
