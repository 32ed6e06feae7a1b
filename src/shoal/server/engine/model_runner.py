"""The border between the event loop and the compute thread: what the loop has chosen is computed there."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from shoal.server.engine.cpu_turns import CpuTurns, turn_of
from shoal.server.engine.requests import PassRequest
from shoal.server.executor import Executor
from shoal.server.kv.batch import Chunk, Pass
from shoal.server.kv.output_head import Answer, ServerHead, answers_of


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

    async def run(self, chunks: Sequence[Chunk]) -> list[Answer | Exception]:
        """What is answered to each chunk of one pass: hidden states, logits, or the error that it met."""
        return await self._executor.run(lambda: self._answers(chunks))

    async def advance(self, request: PassRequest[Any]) -> Any:
        """Compute the next piece of a single pass. Returns its outcome when that was the last one, else None."""
        return await self._executor.run(request.advance)

    def _answers(self, chunks: Sequence[Chunk]) -> list[Answer | Exception]:
        try:
            return answers_of(self._head, self._compute(chunks), chunks)
        except Exception as error:
            return [error] * len(chunks)
