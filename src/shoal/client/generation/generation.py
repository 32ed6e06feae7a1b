"""One text that is being generated, and a token of it."""

# S tokens of the text so far

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList
from transformers.generation.stopping_criteria import MaxLengthCriteria, MaxTimeCriteria

from shoal.client.generation.drafting.wishes import Wish, grant
from shoal.client.generation.speculating import NO_GUESSES, Guesses, Speculation
from shoal.client.inference_session import InferenceSession

LIMITS = MaxLengthCriteria, MaxTimeCriteria
"""The criteria that cut a text. All others end it."""
MAX_GUESSES = 64
"""The most guesses of one step: more are seldom all right, and a server would compute them like a prompt."""


@dataclass(frozen=True)
class Token:
    """One token of a text.

    The last one has a `finish_reason`: "stop" if the text has come to its end, "length" if it was cut. `logprob` is the
    token's log-probability by the model, before anything that the caller asked for changed it, and `top_logprobs` are
    the likeliest tokens with theirs, as many as the caller asked for.
    """

    id: int
    finish_reason: str | None = None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()

    def ending(self, reason: str) -> Token:
        """The same as the last token of a text."""
        return replace(self, finish_reason=reason)


@dataclass(eq=False)
class Generation:
    """A text: its tokens `ids_1S` so far, how the next is chosen, and the session that computes it.

    `finish` is called with all tokens once it has ended by itself. The session ends with it, unless it `keeps_session`,
    which is the caller's then. `num_logprobs` is how many likeliest tokens the caller wants to know; with `None`, none
    at all. Its steps carry guesses if there is `speculation`. Only the engine changes it.
    """

    model: Any
    ids_1S: torch.Tensor
    session: InferenceSession
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    samples: bool
    generator: torch.Generator
    keeps_session: bool
    finish: Callable[[torch.Tensor], object]
    num_logprobs: int | None = None
    speculation: Speculation | None = None

    def append(self, token: int) -> None:
        """One more token."""
        self.ids_1S = torch.cat((self.ids_1S, self.ids_1S.new_tensor([[token]])), dim=1)

    def wish(self, most: int) -> Wish | None:
        """What it wants to be guessed for its next step, at most `most` tokens, if no step is under way."""
        if self.speculation is None or not self._may_guess:
            return None
        most = min(most, MAX_GUESSES, self._room)
        return self.speculation.wish(most=most) if most > 0 else None

    def rounds(self, under_way: Sequence[Guesses], most: int) -> list[Guesses]:
        """The guesses of its next step and of the steps ahead of it: those that are made or `under_way` already, and
        new ones behind them, at most `most` tokens each. None goes beyond where the text or its session would end.

        Raises `ValueError` if a drafter guesses what is no token of the model.
        """
        if self.speculation is None or not self._may_guess:
            return [NO_GUESSES]
        found, most, room = list(under_way), min(most, MAX_GUESSES), self._room
        while (left := room - sum(len(each.tokens) for each in found)) > 0:
            further = self.speculation.further(found, most=min(left, most))
            if not further.tokens:
                break
            found.append(further)
        num_words = len(self.model.get_input_embeddings().weight)  # PEFT's embedding has no `num_embeddings`
        if not all(0 <= token < num_words for each in found for token in each.tokens):
            raise ValueError(f"a drafter guessed a token that is not one of 0 to {num_words - 1}")
        return found

    @property
    def _may_guess(self) -> bool:
        """Whether its session has read all of the text but its last token."""
        return self.num_read == self.ids_1S.shape[1] - 1

    @property
    def _room(self) -> int:
        """How many guesses behind the next token are within the text and its session."""
        ends: list[int] = [each.max_length for each in self.criteria if isinstance(each, MaxLengthCriteria)]
        return min([self.session.max_length, *ends]) - self.ids_1S.shape[1] - 1

    @property
    def num_read(self) -> int:
        """How many tokens of the text the session has read. It may have read wrong guesses behind them."""
        return min(self.session.num_tokens, self.ids_1S.shape[1] - 1)

    def forget_guesses(self) -> None:
        """Let the session go back to what it has read of the text. To be called on the client's event loop."""
        self.session.crop(self.num_read)

    def finish_reason(self) -> str | None:
        """Why the text ends with its last token, or `None`."""
        ended = [each for each in self.criteria if bool(each(self.ids_1S, None).any())]
        if not ended:
            return None
        return "length" if all(isinstance(each, LIMITS) for each in ended) else "stop"


def rounds_of_all(texts: Sequence[tuple[Generation, Sequence[Guesses]]], most: int) -> list[list[Guesses] | Exception]:
    """The `rounds` of these texts, behind those that are under way. First all that have none are guessed for at once.

    A text whose drafter fails has its exception instead.
    """
    found: list[list[Guesses] | Exception] = [list(under_way) for _, under_way in texts]
    wishes: dict[int, Wish] = {}
    for index, (generation, under_way) in enumerate(texts):
        if not under_way:
            try:
                if (wish := generation.wish(most)) is not None:
                    wishes[index] = wish
            except Exception as error:
                found[index] = error
    for (index, wish), made in zip(wishes.items(), grant(list(wishes.values())), strict=True):
        speculation = texts[index][0].speculation
        assert speculation is not None
        found[index] = made if isinstance(made, Exception) else [speculation.granted(wish, made)]
    for index, (generation, _) in enumerate(texts):
        if not isinstance(known := found[index], Exception):
            try:
                found[index] = generation.rounds(known or [NO_GUESSES], most)
            except Exception as error:
                found[index] = error
    return found
