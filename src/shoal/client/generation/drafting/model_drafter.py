"""Guesses of a small model on this machine. All texts share its weights, and each has a cache of its own.

    text      a b c d e f         the cache has read  a b c d x y
                                  the text begins so  a b c d            x y are taken back
    guesses               g h i   it reads e f, and says g; it reads g, and says h; it reads h, and says i

Each guess is the token that the model finds likeliest. It costs one step of the model, and the first one reads what is
new, which is seldom more than a few tokens. A prompt is read in pieces before that, while the servers compute. Texts
that guess at the same time share the steps (`joint_passes`).
"""

# B texts, S tokens that the model has not read, L tokens of the longest text, V tokens of the vocabulary

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from shoal.client.generation.drafting.drafter import Made, Source
from shoal.client.generation.drafting.guess_time import GuessTime
from shoal.client.generation.drafting.joint_check import size_if_alike
from shoal.client.generation.drafting.joint_passes import Asked, guess_together
from shoal.policy.speculation.shared_passes import Reading, share_passes

log = logging.getLogger(__name__)

PRIOR = 0.5
"""The part of its guesses that is expected to be right before any was judged."""
PIECE = 32
"""How many tokens are read at once: outputs of servers wait for that at the most, and so does a guess."""


class DraftModel:
    """A causal language model of Transformers that guesses, and how long a guess takes it.

    `num_words` is the size of the other model's vocabulary. It guesses no token that only one of both has. It guesses
    for several texts in the same passes if that was seen to give what each gets alone.
    """

    def __init__(self, model: Any, *, num_words: int, clock: Callable[[], float] = time.perf_counter) -> None:
        config = model.config.get_text_config(decoder=True)
        self.num_words = min(num_words, config.vocab_size)
        """Tokens from this one on are in one of both vocabularies only."""
        self.max_length: int | None = getattr(config, "max_position_embeddings", None)
        """The longest text that it can read, in tokens; None if there is no limit."""
        self.model = model
        takes = inspect.signature(model.forward).parameters
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._takes_positions = "position_ids" in takes
        self._clock = clock
        self.time = GuessTime(lambda: self.next_token([0], DynamicCache()), clock)
        self._size = size_if_alike(
            model,
            alone=lambda ids_BS, cache, **_: self._logits(ids_BS, cache),
            together=self._one_pass,
            num_words=self.num_words,
            max_length=self.max_length,
        )

    @property
    def guesses_together(self) -> bool:
        """Whether it guesses for several texts in the same passes."""
        return self._size is not None

    @torch.no_grad()
    def next_token(self, tokens: Sequence[int], cache: DynamicCache) -> int:
        """The likeliest token behind these, and behind those that the cache has read."""
        return int(self._logits(torch.tensor([tokens], device=self.model.device), cache)[0].argmax())

    def guesses_alone(self, asked: Asked) -> list[int]:
        """The next tokens behind one text. The cache has read all but the last of them then."""

        def guess() -> list[int]:
            found = [self.next_token(asked.text[asked.num_read :], asked.cache)]
            while len(found) < asked.count:
                found.append(self.next_token(found[-1:], asked.cache))
            return found

        return self.time.measured(guess, num_new=asked.num_new)

    def guesses(self, wanted: Sequence[tuple[ModelDrafter, int]]) -> list[Made | Exception]:
        """What these drafters guess, at most as many tokens each; an exception where one fails.

        They share passes as far as that costs less than passes of their own.
        """
        made: list[Made | Exception] = [Made() for _ in wanted]
        asked = {index: each for index, (drafter, count) in enumerate(wanted) if (each := drafter.asks(count))}
        places = list(asked)
        readings = [Reading(len(each.text), each.num_new, each.count) for each in asked.values()]
        apart = [[place] for place in range(len(readings))]
        for group in apart if self._size is None else share_passes(self._size, readings):
            indices = [places[place] for place in group]
            for index, found in zip(indices, self._made([asked[each] for each in indices]), strict=True):
                made[index] = found
                if isinstance(found, Made):
                    wanted[index][0].has_read(asked[index], found.tokens)
        return made

    def _made(self, asked: Sequence[Asked]) -> list[Made | Exception]:
        if len(asked) > 1:
            try:
                return self._made_together(asked)
            except Exception as error:  # of which text it is will be seen
                made = [self._made_alone(each) for each in asked]
                if all(isinstance(each, Made) for each in made):
                    self._size = None
                    log.warning("the draft model guesses for one text after another from now on: %s", error)
                return made
        return [self._made_alone(each) for each in asked]

    def _made_together(self, asked: Sequence[Asked]) -> list[Made | Exception]:
        made = guess_together(self._one_pass, asked, device=self.model.device, clock=self._clock)
        self.time.took(
            max(each.seconds for each in made),
            num_guesses=max(each.count for each in asked),
            num_new=max(each.num_new for each in asked),
        )
        return [*made]

    def _made_alone(self, asked: Asked) -> Made | Exception:
        started = self._clock()
        try:
            tokens = self.guesses_alone(asked)
        except Exception as error:  # its text ends with it
            return error
        return Made(tuple(tokens), self._clock() - started)

    def _one_pass(self, ids_BS: Tensor, cache: DynamicCache, *, mask_BL: Tensor, positions_BS: Tensor) -> Tensor:
        positions = {"position_ids": positions_BS} if self._takes_positions else {}
        return self._logits(ids_BS, cache, attention_mask=mask_BL, **positions)

    def _logits(self, ids_BS: Tensor, cache: DynamicCache, **more: Tensor) -> Tensor:
        """Those of the next tokens, [B, V]."""
        out = self.model(input_ids=ids_BS, past_key_values=cache, use_cache=True, **self._last_only, **more)
        logits_BV: Tensor = out.logits[:, -1, : self.num_words]
        return logits_BV


class ModelDrafter:
    """Guesses how one text goes on, by a model that other texts use too. `source` and `guesses` do not change the text.

    It has no guesses behind a text that is too long for the model, or has a token that the model does not know, and
    none before it has read all but the last `PIECE` tokens.
    """

    def __init__(self, draft: DraftModel, tokens: Sequence[int] = ()) -> None:
        self._draft = draft
        self._tokens: list[int] = []
        self._read: list[int] = []  # what the cache has read
        self._num_right = 0  # how many of these, from the first on, are the text's
        self._cache = DynamicCache()
        self._knows_all = True
        self.append(tokens)

    def append(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        for token in tokens:
            position = len(self._tokens)
            if self._num_right == position and self._read[position : position + 1] == [token]:
                self._num_right += 1
            self._tokens.append(token)
            self._knows_all = self._knows_all and 0 <= token < self._draft.num_words

    @property
    def is_behind(self) -> bool:
        """Whether it has more to read than a guess should wait for."""
        return self._can_guess and len(self._tokens) - self._num_right > PIECE

    def read_piece(self) -> None:
        """Read `PIECE` tokens more, if it is behind."""
        if self.is_behind:
            piece = self._tokens[self._num_right : self._num_right + PIECE]
            self._draft.next_token(piece, self._cache_of(self._num_right))
            self._num_right += len(piece)
            self._read = self._tokens[: self._num_right]

    def source(self) -> Source | None:
        """Always of the same kind: how likely the guesses are right is seen from those before."""
        return Source("model", PRIOR, self._draft.time.seconds_each) if self._can_guess and not self.is_behind else None

    def guesses(self, count: int) -> list[int]:
        """What the model would write. There are fewer than `count` where its longest text ends."""
        return self.further((), count)

    def further(self, assumed: Sequence[int], count: int) -> list[int]:
        """The same behind tokens that are `assumed`. It does not read again what it has just guessed."""
        if (asked := self.asks(count, assumed)) is None:
            return []
        found = self._draft.guesses_alone(asked)
        self.has_read(asked, found)
        return found

    @property
    def company(self) -> DraftModel | None:
        """Its model, if that guesses for several texts at once."""
        return self._draft if self._draft.guesses_together else None

    def asks(self, count: int, assumed: Sequence[int] = ()) -> Asked | None:
        """What it asks its model for these guesses; None if there is no room for any. `has_read` says what came."""
        text = [*self._tokens, *assumed]
        count = count if self._room is None else min(count, self._room - len(assumed))
        if count <= 0:
            return None
        num_read = self._num_right
        while num_read < min(len(self._read), len(text)) and self._read[num_read] == text[num_read]:
            num_read += 1
        num_read = min(num_read, len(text) - 1)  # something has to be read for the next token
        return Asked(text, num_read, count, self._cache_of(num_read))

    def has_read(self, asked: Asked, found: Sequence[int]) -> None:
        """The model has found these tokens behind what it was asked, and its cache has read all but the last."""
        self._read = [*asked.text, *found[:-1]]
        self._num_right = len(self._tokens)

    def _cache_of(self, num_tokens: int) -> DynamicCache:
        """The cache, which has read the first tokens of the text, as many as these, and nothing else."""
        if num_wrong := len(self._read) - num_tokens:
            self._cache.crop(-num_wrong)
        return self._cache

    @property
    def _can_guess(self) -> bool:
        return bool(self._tokens) and self._knows_all and self._room != 0

    @property
    def _room(self) -> int | None:
        """How many tokens the model can guess until the text is too long for it; None if it never is."""
        longest = self._draft.max_length
        return None if longest is None else max(0, longest - len(self._tokens) + 1)
