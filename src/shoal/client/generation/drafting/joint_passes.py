"""Passes of one model that guess for several texts. They are a batch, as in Transformers' own generation.

    pass 1     text 1    a b c d e f [g h]          what was read before, and what is read now
               text 2    · · · · a b [c d]          all read as much as the text with the most new tokens: c once more
    pass 2     text 1    a b c d e f  g h [i]       each reads what was guessed for it
               text 2    · · · · a b  c d [e]       and leaves when it has as many guesses as it wants

Each text keeps a cache of its own. It is copied into a batch that is padded on the left, and when all guesses are made,
what was read of the text is added to its own. So if a pass fails, nothing has changed.

A batch is what models of Transformers take, whatever their masks and positions: windows, chunks, ALiBi. All texts in
one row with a mask would need these to be known, and attention would grow with the texts times all of their tokens.
"""

# B texts, S tokens that a pass reads of each, L tokens of the longest text, H heads, D size of a head, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache

from shoal.client.generation.drafting.drafter import Made


@dataclass(frozen=True)
class Asked:
    """A text for which `count` guesses are wanted. The `cache` has read its first `num_read` tokens, and no others."""

    text: Sequence[int]
    num_read: int
    count: int
    cache: DynamicCache

    @property
    def num_new(self) -> int:
        """How many tokens the first pass has to read."""
        return len(self.text) - self.num_read


class Pass(Protocol):
    """One pass of a model over a batch, left-padded where the mask is 0. Returns the logits [B, V] behind each text."""

    def __call__(self, ids_BS: Tensor, cache: DynamicCache, *, mask_BL: Tensor, positions_BS: Tensor) -> Tensor: ...


@torch.no_grad()
def guess_together(
    one_pass: Pass, asked: Sequence[Asked], *, device: torch.device | str, clock: Callable[[], float]
) -> list[Made]:
    """The likeliest tokens behind each text, in as many passes as the text wants guesses that wants the most.

    Each is charged the time until its last guess is made, and that in which the texts' own caches are brought up to
    date. The caches have read all but the last guess then.
    """
    started = clock()
    longest, num_new = max(len(each.text) for each in asked), max(each.num_new for each in asked)
    cache = _joined(asked, longest - num_new)
    ids_BS = torch.tensor([_padded(each.text[-num_new:], num_new) for each in asked], device=device)
    mask_BL = torch.tensor([_padded([1] * len(each.text), longest) for each in asked], device=device)
    positions_BS = (mask_BL.cumsum(dim=-1) - 1).clamp(min=0)[:, -num_new:]

    tokens: list[list[int]] = [[] for _ in asked]
    states: list[list[_States]] = [[] for _ in asked]
    seconds = [0.0 for _ in asked]
    rows = list(range(len(asked)))  # whose they are
    while True:
        likeliest_B = one_pass(ids_BS, cache, mask_BL=mask_BL, positions_BS=positions_BS).argmax(dim=-1)
        for index, token in zip(rows, likeliest_B.tolist(), strict=True):
            tokens[index].append(token)
        going_on = [row for row, index in enumerate(rows) if len(tokens[index]) < asked[index].count]
        if len(going_on) < len(rows):
            for row in set(range(len(rows))).difference(going_on):
                its = asked[rows[row]]
                states[rows[row]] = _newest(cache, row, its.num_new + its.count - 1)
                seconds[rows[row]] = clock() - started
            if not going_on:
                break
            rows = [rows[row] for row in going_on]
            cache.batch_select_indices(torch.tensor(going_on, device=device))
            likeliest_B, mask_BL, positions_BS = (each[going_on] for each in (likeliest_B, mask_BL, positions_BS))
        ids_BS, positions_BS = likeliest_B[:, None], positions_BS[:, -1:] + 1
        mask_BL = torch.cat((mask_BL, torch.ones_like(ids_BS)), dim=1)

    guessed = clock()
    for each, its_states in zip(asked, states, strict=True):
        for layer, keys_1HSD, values_1HSD in its_states:
            each.cache.update(keys_1HSD, values_1HSD, layer)
    at_last = clock() - guessed
    return [Made(tuple(its), until + at_last) for its, until in zip(tokens, seconds, strict=True)]


_States = tuple[int, Tensor, Tensor]  # a layer, and keys and values that it has read


def _padded(values: Sequence[int], length: int) -> list[int]:
    return [0] * (length - len(values)) + list(values)


def _joined(asked: Sequence[Asked], length: int) -> DynamicCache:
    """A cache with a row for each text: all but as many last tokens as make the longest text as long as this."""
    joint = DynamicCache()
    if length == 0:
        return joint
    longest = max(asked, key=lambda each: len(each.text))
    num_kept = [max(0, length - (len(longest.text) - len(each.text))) for each in asked]
    for index, like in enumerate(longest.cache.layers):
        if not like.is_initialized:  # a layer that uses what another one has read
            continue
        joined = []
        for name in ("keys", "values"):
            size = getattr(like, name).shape
            states_BHSD = getattr(like, name).new_zeros((len(asked), size[1], length, size[3]))
            for row, (each, kept) in enumerate(zip(asked, num_kept, strict=True)):
                if kept:
                    states_BHSD[row, :, length - kept :] = getattr(each.cache.layers[index], name)[0, :, :kept]
            joined.append(states_BHSD)
        joint.update(*(each[:, :, :0] for each in joined), index)
        joint.layers[index].keys, joint.layers[index].values = joined  # `update` would copy them once more
    return joint


def _newest(cache: DynamicCache, row: int, count: int) -> list[_States]:
    """What the layers have read of the last tokens of one text, as many as these."""
    return [
        (index, layer.keys[row : row + 1, :, -count:].clone(), layer.values[row : row + 1, :, -count:].clone())
        for index, layer in enumerate(cache.layers)
        if layer.is_initialized
    ]
