"""The border between the event loop and the compute thread: what the loop has chosen is computed there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shoal.events import PassComputed
from shoal.server.device_memory import or_busy, unless_out_of_memory
from shoal.server.engine.cpu_turns import CpuTurns, turn_of
from shoal.server.engine.requests import PassRequest
from shoal.server.executor import Executor
from shoal.server.kv.batch import Chunk, Pass
from shoal.server.kv.output_head import Answer, ServerHead, answers_of
from shoal.server.refusals import Refused, busy
from shoal.spans import Span


@dataclass(frozen=True)
class PassOutcome:
    """What is answered to each chunk of one pass: hidden states, logits, or the error that it met.

    `tokens_without_memory` is how many tokens the pass had, if the device had no memory for all of them together.
    """

    answers: Sequence[Answer | Exception]
    tokens_without_memory: int | None


class ModelRunner:
    """Computes passes of the model, one at a time. Servers that share a processor take turns (`CpuTurns`)."""

    def __init__(
        self,
        compute: Pass,
        executor: Executor,
        *,
        head: ServerHead | None = None,
        cpu_turns: CpuTurns | None = None,
    ) -> None:
        self._compute = compute
        self._executor = executor
        self._head = head
        self._cpu_turns = cpu_turns

    def turn(self) -> contextlib.AbstractAsyncContextManager[None]:
        """The processor's turn of this server. To be entered around every pass."""
        return turn_of(self._cpu_turns)

    @property
    def is_contended(self) -> bool:
        """Whether another server of this machine had the turn when this one asked for it, now or lately."""
        return self._cpu_turns is not None and self._cpu_turns.contended

    async def run(self, chunks: Sequence[Chunk]) -> PassOutcome:
        """Compute one pass. If the device has no memory for it, each chunk is computed alone."""
        return await self._executor.run(lambda: self._outcome(chunks))

    async def advance(self, request: PassRequest[Any]) -> Any:
        """Compute the next piece of a single pass. Returns its outcome when that was the last one, else None.

        Raises `Refused`, as busy, if the device has no memory for it.
        """
        return await self._executor.run(lambda: or_busy(request.advance))

    def _outcome(self, chunks: Sequence[Chunk]) -> PassOutcome:
        outputs = computed = unless_out_of_memory(lambda: self._outputs(chunks))
        if outputs is None:
            outputs = [self._alone(chunk) for chunk in chunks] if len(chunks) > 1 else [_no_memory()]
        # What is computed must not be computed again: recurrent states have gone on.
        answers = unless_out_of_memory(lambda: answers_of(self._head, outputs, chunks))
        if computed is not None and answers is not None:
            return PassOutcome(answers, None)
        num_tokens = sum(chunk.hidden_BTD.shape[:2].numel() for chunk in chunks)
        return PassOutcome([_no_memory()] * len(chunks) if answers is None else answers, num_tokens)

    def _alone(self, chunk: Chunk) -> torch.Tensor | Exception:
        outputs = unless_out_of_memory(lambda: self._outputs([chunk]))
        return _no_memory() if outputs is None else outputs[0]

    def _outputs(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | Exception]:
        try:
            return self._compute(chunks)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return [error] * len(chunks)


def _no_memory() -> Refused:
    return busy("the device has no memory for this step now")


def pass_computed(chunks: Sequence[Chunk], seconds: float) -> PassComputed:
    """What observers are told of a pass."""
    span = Span(min(chunk.span.start for chunk in chunks), max(chunk.span.end for chunk in chunks))
    num_tokens = sum(chunk.hidden_BTD.shape[0] * chunk.hidden_BTD.shape[1] for chunk in chunks)
    return PassComputed(span, len(chunks), num_tokens, seconds)
