"""What servers inside a ring may have cached of a text that this client has sent before.

The names of the pages of a server follow from its inputs, which the server before has computed. So a client would have
to ask one server after the other. Instead, it remembers which names followed from the same text the last time, and asks
all servers at once. What a server then says that it has is believed only if the inputs that the servers before it have
answered lead to the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from shoal.adapters import adapter_cache_salt
from shoal.client.decoding.opening.page_names import page_names
from shoal.client.decoding.session_inputs import SessionInputs
from shoal.client.decoding.stage import Stage
from shoal.client.history.remembered_pages import RememberedPages
from shoal.concurrency import on_thread
from shoal.model.peft.factors import ActiveAdapters
from shoal.prefix import PAGE_TOKENS, root_hash
from shoal.spans import Span

Names = list[list[bytes]]
"""The names of the pages of each sequence."""

MOST_TOKENS = 8192
"""Pages of longer texts are remembered up to here: their inputs have to be hashed when a session ends."""
ASIDE_BYTES = 1 << 20
"""More bytes than these are hashed on a thread."""
TEXT = Span(0, 1)
"""In place of the blocks, for the pages of a text itself: their names are never sent."""


class PageGuesses:
    """The guesses of one session, with these inputs and adapters."""

    def __init__(self, memory: RememberedPages, inputs: SessionInputs, tuning: ActiveAdapters) -> None:
        self._memory = memory
        self._inputs = inputs
        self._tuning = tuning

    def guess(self, stages: Sequence[Stage], most_tokens: Callable[[Stage], int]) -> dict[Stage, Names]:
        """The names that the inputs of these stages are expected to have, where nothing is known of them yet.

        Those of at most `most_tokens` tokens each. Empty if there is no guess for one of them.
        """
        unknown = [stage for stage in stages if not stage.num_tokens]
        if not unknown or self._inputs.are_new:
            return {}
        text, guesses = self._text(self._inputs.num_tokens), dict[Stage, Names]()
        for stage in unknown:
            num_pages, place = most_tokens(stage) // PAGE_TOKENS, self._place(stage.hop.span)
            guesses[stage] = [self._memory.names(place, row[:num_pages]) for row in text]
            if not all(guesses[stage]):
                return {}
        return guesses

    def is_right(self, stage: Stage, guess: Names, num_tokens: int) -> bool:
        """Whether the first `num_tokens` inputs of a stage are known by now, and have the names that were guessed."""
        if num_tokens > stage.num_tokens:
            return False
        names = self._names(stage, num_tokens) if num_tokens else []
        return all(row == guessed[: len(row)] for row, guessed in zip(names, guess, strict=bool(names)))

    def forget(self, stage: Stage) -> None:
        """The guess for this stage was wrong."""
        place = self._place(stage.hop.span)
        for row in self._text(self._inputs.num_tokens):
            self._memory.forget(place, row)

    async def remember(self, stages: Sequence[Stage]) -> None:
        """Note what the inputs of these stages were, for later sessions. Those of the first are the text itself.

        If it is cancelled, nothing is noted: a thread that finds the names goes on, and they are dropped.
        """
        later = [stage for stage in stages[1:] if stage.num_tokens >= PAGE_TOKENS]
        if not later or self._inputs.are_padded:
            return
        num_tokens = sum(min(stage.num_tokens, MOST_TOKENS) for stage in later)
        is_small = num_tokens * self._inputs.like.nbytes <= ASIDE_BYTES
        text, names = self._named(later) if is_small else await on_thread(partial(self._named, later))
        for stage, rows in zip(later, names, strict=True):
            place = self._place(stage.hop.span)
            for pages, followed in zip(text, rows, strict=True):
                self._memory.note(place, pages, followed)

    def _named(self, stages: Sequence[Stage]) -> tuple[Names, list[Names]]:
        """The names of the text's pages, and those of the inputs of each stage."""
        text = self._text(min(self._inputs.num_tokens, MOST_TOKENS))
        return text, [self._names(stage, min(stage.num_tokens, MOST_TOKENS)) for stage in stages]

    def _names(self, stage: Stage, num_tokens: int) -> Names:
        """The names of the first inputs of a stage."""
        span = stage.hop.span
        return page_names(stage.history.between(0, num_tokens), span, self._inputs, self._tuning.names(span))

    def _text(self, num_tokens: int) -> Names:
        """The names of the full pages of the first tokens of each sequence, whatever adapters they are for."""
        return page_names(self._inputs.hidden.between(0, num_tokens), TEXT, self._inputs)

    def _place(self, span: Span) -> bytes:
        """What inputs of a span follow from beside the text: the blocks before it, the adapters, and the salt."""
        adapters = self._tuning.names(Span(0, span.end))
        return root_hash(span, adapter_cache_salt(self._inputs.salt, adapters))
