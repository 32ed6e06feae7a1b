"""Guesses of a checkpoint's own layers that predict further tokens, one text's.

    text       a b c d e              the model's last hidden states of a b c d are known
    layer 1      b c d e  ▶ f?        reads each state with the token behind it, and guesses the one behind that
    layer 2        c d e f?  ▶ g?     reads the states of layer 1 with the tokens one further on, a guess among them
    layer 2              g?  ▶ h?     the last layer reads its own state for what no layer was made for

What was read with tokens of the text stays. What was read with guesses is taken back at once, so that nothing has to be
corrected when they turn out wrong.
"""

# N tokens, D hidden size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.client.generation.drafting.drafter import Source
from shoal.client.generation.drafting.mtp_layers import MtpLayers

PRIOR = 0.7
"""The part of its guesses that is expected to be right before any was judged."""
PIECE = 32
"""How many tokens are read at once: outputs of servers wait for that at the most, and so does a guess."""


@dataclass
class _Depth:
    """What one layer has read. `place` is the position of the first of the states that it has not read."""

    place: int
    unread_ND: Tensor | None = None
    last_1D: Tensor | None = None  # its own state of the last token that it has read

    @property
    def num_unread(self) -> int:
        return 0 if self.unread_ND is None else len(self.unread_ND)

    def add(self, states_ND: Tensor) -> None:
        self.unread_ND = states_ND if self.unread_ND is None else torch.cat((self.unread_ND, states_ND))

    def take(self, count: int) -> Tensor:
        """The next states, which count as read from now on."""
        assert self.unread_ND is not None
        taken_ND, self.unread_ND = self.unread_ND[:count], self.unread_ND[count:]
        self.place += count
        return taken_ND


class MtpDrafter:
    """Guesses how one text goes on, by layers that other texts use too. `guesses` does not change the text.

    It needs the model's hidden states, and has no guesses before it was given some. Where it was given none of the
    text's beginning, as in a session that goes on, it reads from there on.
    """

    def __init__(self, layers: MtpLayers) -> None:
        self._layers = layers
        self._tokens: list[int] = []
        self._begin(0)

    def _begin(self, place: int) -> None:
        self._cache = self._layers.new_cache()
        self._depths = [_Depth(place) for _ in range(self._layers.num_layers)]
        self._end = place  # the position behind the last state

    def append(self, tokens: Sequence[int]) -> None:
        """The text goes on with these tokens."""
        self._tokens.extend(tokens)

    def append_states(self, states_ND: Tensor) -> None:
        """The model's last hidden states of the tokens before the last one, as many as these."""
        place = len(self._tokens) - 1 - len(states_ND)
        if place != self._end:
            self._begin(place)
        self._depths[0].add(states_ND)
        self._end += len(states_ND)

    @property
    def is_behind(self) -> bool:
        """Whether it has more to read than a guess should wait for."""
        return self._depths[0].num_unread > PIECE

    def read_piece(self) -> None:
        """Read a little more, if it is behind."""
        if self.is_behind:
            self._read()

    def source(self) -> Source | None:
        """What its guesses are worth."""
        if self.is_behind or self._end == 0 or self._end != len(self._tokens) - 1:
            return None
        return Source("further tokens", PRIOR, self._layers.time.seconds_each)

    def guesses(self, count: int) -> list[int]:
        """The next tokens, each the likeliest by its layer."""
        if count <= 0 or self.source() is None:
            return []
        return self._layers.time.measured(lambda: self._guesses(count), num_new=self._depths[0].num_unread)

    def _guesses(self, count: int) -> list[int]:
        self._read()
        first = self._depths[0]
        assert first.last_1D is not None
        last_1D = first.last_1D
        found = [self._layers.likeliest(last_1D)]
        guessed_ND = last_1D[:0]  # states that the layer before has of guesses
        num_read = [0] * len(self._depths)
        while len(found) < count:
            depth = min(len(found), len(self._depths) - 1)
            if len(found) < len(self._depths):
                unread_ND = self._depths[depth].unread_ND
                guessed_ND = guessed_ND if unread_ND is None else torch.cat((unread_ND, guessed_ND))
            else:
                guessed_ND = last_1D
            position = len(self._tokens) + len(found) - len(guessed_ND)
            guessed_ND = self._layers.run(depth, found[-len(guessed_ND) :], guessed_ND, position, self._cache)
            num_read[depth] += len(guessed_ND)
            last_1D = guessed_ND[-1:]
            found.append(self._layers.likeliest(last_1D))
        for layer, num_guessed in zip(self._cache.layers, num_read, strict=True):
            if num_guessed:
                layer.crop(-num_guessed)
        return found

    def _read(self) -> None:
        """Let each layer read the states whose next token is of the text, the first one at most `PIECE`."""
        for depth, layer in enumerate(self._depths):
            position = layer.place + 1 + depth
            count = min(layer.num_unread, len(self._tokens) - position)
            if depth == 0:
                count = min(count, PIECE)
            if count <= 0:
                return
            tokens = self._tokens[position : position + count]
            states_ND = self._layers.run(depth, tokens, layer.take(count), position, self._cache)
            layer.last_1D = states_ND[-1:]
            if depth + 1 < len(self._depths):
                self._depths[depth + 1].add(states_ND)
