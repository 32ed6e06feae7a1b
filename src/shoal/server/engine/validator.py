"""Which requests a server computes: each is validated completely before it is queued.

So every request that reaches the compute thread can be computed, and a wrong one leaves its session as it was.
"""

# B sequences, T new tokens, N pages, D hidden size

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.prefix import DIGEST_BYTES, PAGE_TOKENS
from shoal.protocol import (
    MAX_BATCH,
    MAX_FACTORS,
    MAX_LOGITS_BYTES,
    MAX_PASS_TOKENS,
    MAX_PUSHED_BYTES,
    MAX_STEP_TOKENS,
    AnyMessage,
    Backward,
    Forward,
    Norms,
    Open,
    PassInputs,
    Step,
)
from shoal.server.refusals import misrouted, moved, rejected
from shoal.server.step_inputs import StepInputs, Tensors, WantedLogits
from shoal.spans import Span
from shoal.tensors import TensorSpec

NO_GRADIENT = "a backward pass needs a gradient of its output's shape"
MAX_STRAY_BYTES = 1 << 20
"""A step of this many bytes that is pushed is received and dropped, also where none of this model is as large."""


@dataclass(frozen=True)
class RequestValidator:
    """What a server may be asked for. All methods raise `Refused`."""

    model: str
    fingerprint: str
    span: Span
    hidden_size: int
    max_length: int
    training: bool = True  # whether single passes are offered
    vocabulary: int | None = None  # of the output head, if the server holds it: then the span ends at the last block

    def span_of(self, request: Open | Forward | Backward | Norms) -> Span:
        """The blocks that a request names, which have to be this server's."""
        if request.model != self.model:
            raise misrouted(f"this server holds blocks of {self.model}")
        if request.fingerprint != self.fingerprint:
            raise misrouted(f"this server's weights are others: {self.fingerprint[:12]}")
        span = Span(request.start, request.end)
        if span not in self.span:
            raise moved(f"this server holds blocks {self.span}, not {span}")
        return span

    def check_declared(self, message: AnyMessage) -> None:
        """The tensors that a request declares may not be larger than any that is computed here.

        So a frame that could only be refused is not received. Everything else is checked when the tensors are here. Of
        what a server pushes only the bytes are: a refusal would end the stream for all sessions and passes.
        """
        if isinstance(message, PassInputs) or (isinstance(message, Step) and message.link is not None):
            least = MAX_PUSHED_BYTES if isinstance(message, PassInputs) else MAX_STRAY_BYTES
            most = max(least, MAX_STEP_TOKENS * (self.hidden_size + 4) * torch.float32.itemsize)
            if message.payload_bytes > most:
                raise rejected(f"a push of {message.payload_bytes} bytes; {most} are allowed")
            return
        for spec in message.tensors:
            match message, spec.name:
                case Backward(), "grad" if len(spec.shape) != 3 or spec.shape[2] != self.hidden_size:
                    raise rejected(NO_GRADIENT)
                case Step() | Forward() | Backward(), "hidden" | "grad":
                    batch_size, num_tokens = self._declared_shape(spec)
                    if isinstance(message, Step):
                        _check_step_size(batch_size, num_tokens)
                    else:
                        self._check_pass_size(batch_size, num_tokens)
                case Step() | Forward() | Backward(), "positions" | "mask":
                    if math.prod(spec.shape) > MAX_PASS_TOKENS:
                        raise rejected(f"{math.prod(spec.shape)} {spec.name}; {MAX_PASS_TOKENS} are allowed")
                case Open(), "digests":
                    self.check_length(message)
                    _check_digests(message, spec.shape, is_uint8=spec.dtype == "uint8")

    def _declared_shape(self, spec: TensorSpec) -> tuple[int, int]:
        if len(spec.shape) != 3:
            raise rejected("hidden states must be floating-point numbers of shape [batch, tokens, hidden size]")
        batch_size, num_tokens, size = spec.shape
        if size != self.hidden_size:
            raise rejected(f"hidden size {size}; this model's is {self.hidden_size}")
        return batch_size, num_tokens

    def step_inputs(self, tensors: Tensors) -> StepInputs:
        """The inputs of a step: of this model, and not more than one step may have."""
        inputs = self._inputs_of(tensors)
        _check_step_size(inputs.batch_size, inputs.num_tokens)
        return inputs

    def pass_inputs(self, tensors: Tensors) -> StepInputs:
        """The inputs of a single pass: of this model, and not more than one pass may have."""
        inputs = self._inputs_of(tensors)
        self._check_pass_size(inputs.batch_size, inputs.num_tokens)
        return inputs

    def backward_inputs(self, request: Backward, tensors: Tensors) -> tuple[torch.Tensor, StepInputs | None]:
        """The gradient [B, T, D] of a pass's outputs, and its inputs; None if the server should have saved them."""
        is_saved = request.kept is not None and "hidden" not in tensors
        inputs = None if is_saved else self.pass_inputs(tensors)
        grad = tensors.get("grad")
        if grad is None or grad.dim() != 3 or not grad.is_floating_point():
            raise rejected(NO_GRADIENT)
        return grad, inputs

    def _inputs_of(self, tensors: Tensors) -> StepInputs:
        hidden = tensors.get("hidden")
        if hidden is None or hidden.dim() != 3 or not hidden.is_floating_point():
            raise rejected("hidden states must be floating-point numbers of shape [batch, tokens, hidden size]")
        if hidden.shape[2] != self.hidden_size:
            raise rejected(f"hidden size {hidden.shape[2]}; this model's is {self.hidden_size}")
        positions, mask = tensors.get("positions"), tensors.get("mask")
        if positions is not None:
            if positions.shape != hidden.shape[:2] or positions.dtype != torch.int64:
                raise rejected("positions must be int64 of shape [batch, tokens]")
            if positions.min() < 0 or positions.max() >= self.max_length:
                raise rejected(f"positions must be in 0:{self.max_length}")
        if mask is not None and (mask.shape != hidden.shape[:2] or mask.dtype != torch.uint8 or mask.max() > 1):
            raise rejected("the padding mask must be uint8 zeros and ones of shape [batch, tokens]")
        return StepInputs(hidden, positions, None if mask is None else mask.long())

    def check_training(self) -> None:
        """The server has to offer single passes."""
        if not self.training:
            raise misrouted("this server offers no forward and backward passes")

    def _check_pass_size(self, batch_size: int, num_tokens: int) -> None:
        self.check_training()
        if num_tokens > self.max_length:
            raise rejected(f"{num_tokens} tokens; the model allows {self.max_length}")
        size = batch_size * num_tokens
        if batch_size > 1 and size > MAX_STEP_TOKENS:
            raise rejected(f"{size} tokens in one batch; {MAX_STEP_TOKENS} are allowed")
        if size > MAX_PASS_TOKENS:
            raise rejected(f"{size} tokens in one pass; {MAX_PASS_TOKENS} are allowed")

    def check_length(self, request: Open) -> None:
        """The model has to allow a session as long as the client expects."""
        if request.expected_length > self.max_length:
            raise rejected(f"a session of {request.expected_length} tokens; the model allows {self.max_length}")

    def page_names_of(self, request: Open, tensors: Tensors) -> list[list[bytes]]:
        """The names of the pages with which each sequence begins, as the client says; none if it says nothing."""
        digests = tensors.get("digests")
        if digests is None:
            return [[] for _ in range(request.batch_size)]
        _check_digests(request, tuple(digests.shape), is_uint8=digests.dtype == torch.uint8)
        return [[bytes(name) for name in row.numpy()] for row in digests]

    def check_factors(self, num_tensors: int) -> None:
        """The adapters of a pass may have as many tensors as its answer can name (`PassResult.unused`)."""
        if num_tensors > MAX_FACTORS:
            raise rejected(f"{num_tensors} tensors of factors in one span; {MAX_FACTORS} are allowed")

    def check_step(
        self,
        request: Step,
        inputs: StepInputs,
        *,
        rows: Sequence[int] | None,
        num_tokens: int,
        batch_size: int,
    ) -> None:
        """A step has to continue these rows of its session, which holds `num_tokens` of `batch_size` sequences."""
        if request.position > num_tokens:
            raise rejected(f"position {request.position} of a session with {num_tokens} tokens")
        if request.position == 0:  # nothing is continued: the batch may be another
            if rows is not None:
                raise rejected("rows of a session that begins anew")
        else:
            rows = range(batch_size) if rows is None else rows
            if max(rows) >= batch_size or len(rows) != inputs.batch_size:
                raise rejected(f"{inputs.batch_size} sequences that do not continue those of the session")
        end = request.position + inputs.num_tokens
        if end > self.max_length:
            raise rejected(f"{end} tokens in a session; the model allows {self.max_length}")

    def logits_of(self, request: Step, inputs: StepInputs, span: Span) -> WantedLogits | None:
        """The logits that a step asks for, which this server has to be able to compute and to answer in one message."""
        if request.logits is None:
            return None
        if self.vocabulary is None or span.end != self.span.end:
            raise misrouted("this server holds no output head, or the session does not end where it would follow")
        if request.logits > inputs.num_tokens:
            raise rejected(f"logits of {request.logits} tokens in a step of {inputs.num_tokens}")
        if request.top_k is not None and request.top_k > self.vocabulary:
            raise rejected(f"the {request.top_k} likeliest of {self.vocabulary} tokens")
        width = self.vocabulary if request.top_k is None else request.top_k
        each = inputs.hidden_BTD.itemsize + (0 if request.top_k is None else torch.int64.itemsize)
        if inputs.batch_size * request.logits * width * each > MAX_LOGITS_BYTES:
            raise rejected(f"more than {MAX_LOGITS_BYTES >> 20} MiB of logits")
        return WantedLogits(request.logits, request.top_k)


def _check_step_size(batch_size: int, num_tokens: int) -> None:
    if batch_size > MAX_BATCH:
        raise rejected(f"{batch_size} sequences; {MAX_BATCH} are allowed")
    size = batch_size * num_tokens
    if size > max(MAX_STEP_TOKENS, batch_size):
        raise rejected(f"{size} tokens in one step; {MAX_STEP_TOKENS} are allowed")


def _check_digests(request: Open, shape: Sequence[int], *, is_uint8: bool) -> None:
    if not is_uint8 or len(shape) != 3 or (shape[0], shape[2]) != (request.batch_size, DIGEST_BYTES):
        raise rejected(f"digests must be uint8 of shape [batch, pages, {DIGEST_BYTES}]")
    if shape[1] * PAGE_TOKENS > request.expected_length:
        raise rejected(f"digests of {shape[1]} pages for a session of {request.expected_length} tokens")
