"""What is not computed, and why: a request is checked completely before it is queued.

So whatever reaches the compute thread can be computed, and a wrong request leaves its session as it was.
"""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shoal.protocol import (
    MAX_BATCH,
    MAX_FACTORS,
    MAX_LOGITS_BYTES,
    MAX_PASS_TOKENS,
    MAX_STEP_TOKENS,
    Backward,
    Forward,
    Norms,
    Open,
    Step,
)
from shoal.server.refusals import misrouted, rejected
from shoal.server.step_inputs import StepInputs, Tensors, WantedLogits
from shoal.spans import Span


@dataclass(frozen=True)
class RequestValidator:
    """What a server may be asked for."""

    model: str
    fingerprint: str
    span: Span
    hidden_size: int
    max_length: int
    training: bool = True  # whether single passes are computed
    vocabulary: int | None = None  # that of the output head, if it is held here: then the span ends at the last block

    def span_of(self, request: Open | Forward | Backward | Norms) -> Span:
        """The blocks that a request is about. Raises `Refused` if they are not this server's."""
        if request.model != self.model:
            raise misrouted(f"this server holds blocks of {self.model}")
        if request.fingerprint != self.fingerprint:
            raise misrouted(f"this server's weights are others: {self.fingerprint[:12]}")
        span = Span(request.start, request.end)
        if span not in self.span:
            raise misrouted(f"this server holds blocks {self.span}, not {span}")
        return span

    def inputs_of(self, tensors: Tensors) -> StepInputs:
        """Raises `Refused` for tensors that are no inputs of this model."""
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
        """Raises `Refused` where nothing is computed for those who train."""
        if not self.training:
            raise misrouted("this server offers no forward and backward passes")

    def check_pass(self, inputs: StepInputs) -> None:
        """Raises `Refused` for more than is computed in a single pass, and where none are computed."""
        self.check_training()
        if inputs.num_tokens > self.max_length:
            raise rejected(f"{inputs.num_tokens} tokens; the model allows {self.max_length}")
        size = inputs.batch_size * inputs.num_tokens
        if inputs.batch_size > 1 and size > MAX_STEP_TOKENS:
            raise rejected(f"{size} tokens in one batch; {MAX_STEP_TOKENS} are allowed")
        if size > MAX_PASS_TOKENS:
            raise rejected(f"{size} tokens in one pass; {MAX_PASS_TOKENS} are allowed")

    def check_factors(self, num_tensors: int) -> None:
        """Raises `Refused` for adapters of more tensors than an answer can speak of."""
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
        """Raises `Refused` for a step that does not continue these rows of a session as it is."""
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
        self.check_size(inputs)

    def check_size(self, inputs: StepInputs) -> None:
        """Raises `Refused` for more than is computed in one step."""
        if inputs.batch_size > MAX_BATCH:
            raise rejected(f"{inputs.batch_size} sequences; {MAX_BATCH} are allowed")
        size = inputs.batch_size * inputs.num_tokens
        if size > max(MAX_STEP_TOKENS, inputs.batch_size):
            raise rejected(f"{size} tokens in one step; {MAX_STEP_TOKENS} are allowed")

    def logits_of(self, request: Step, inputs: StepInputs, span: Span) -> WantedLogits | None:
        """The logits that a step asks for. Raises `Refused` if they cannot be had here, or are too many."""
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
