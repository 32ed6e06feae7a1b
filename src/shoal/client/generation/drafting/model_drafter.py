"""Guesses of a small model on this machine. All texts share its weights, and each has a cache of its own.

    text      a b c d e f         the cache has read  a b c d x y
                                  the text begins so  a b c d            x y are taken back
    guesses               g h i   it reads e f, and says g; it reads g, and says h; it reads h, and says i

Each guess is the token that the model finds likeliest. It costs one step of the model, and the first one reads what is
new, which is seldom more than a few tokens. A prompt is read in pieces before that, while the servers compute.
"""

# S tokens that the model has not read, V tokens of the vocabulary

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from shoal.client.generation.drafting.drafter import Source
from shoal.client.generation.drafting.guess_time import GuessTime

PRIOR = 0.5
"""The part of its guesses that is expected to be right before any was judged."""
PIECE = 32
"""How many tokens are read at once: outputs of servers wait for that at the most, and so does a guess."""


class DraftModel:
    """A causal language model of Transformers that guesses, and how long a guess takes it.

    `num_words` is the size of the other model's vocabulary. It guesses no token that only one of both has.
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
        self.time = GuessTime(lambda: self.next_token([0], DynamicCache()), clock)

    @torch.no_grad()
    def next_token(self, tokens: Sequence[int], cache: DynamicCache) -> int:
        """The likeliest token behind these, and behind those that the cache has read."""
        ids_1S = torch.tensor([tokens], device=self.model.device)
        out = self.model(input_ids=ids_1S, past_key_values=cache, use_cache=True, **self._last_only)
        return int(out.logits[0, -1, : self.num_words].argmax())

    def guesses(self, tokens: Sequence[int], count: int, cache: DynamicCache) -> list[int]:
        """The next `count` tokens behind these, and behind those that the cache has read. It reads all but the last."""

        def guess() -> list[int]:
            found = [self.next_token(tokens, cache)]
            while len(found) < count:
                found.append(self.next_token(found[-1:], cache))
            return found

        return self.time.measured(guess, num_new=len(tokens))


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
        text = [*self._tokens, *assumed]
        count = count if self._room is None else min(count, self._room - len(assumed))
        if count <= 0:
            return []
        num_read = self._num_right
        while num_read < min(len(self._read), len(text)) and self._read[num_read] == text[num_read]:
            num_read += 1
        num_read = min(num_read, len(text) - 1)  # something has to be read for the next token
        found = self._draft.guesses(text[num_read:], count, self._cache_of(num_read))
        self._read = [*text, *found[:-1]]
        self._num_right = len(self._tokens)
        return found

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
