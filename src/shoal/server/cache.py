"""The memory of the KV cache: pages of keys and values, one layout for all blocks of a server.

Which page belongs to whom is not known here: see `shoal.server.pages`. A page holds `PAGE_TOKENS` tokens of one
sequence in *every* block of the span, and the span's outputs for them, which whoever begins with the same inputs gets
without a computation.
"""

# T tokens, P pages, G sequences, S tokens of the longest, J heads of keys, K their size, D hidden size

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.model.body import Body
from shoal.model.prefix import PAGE_TOKENS
from shoal.server.session import Growth


@dataclass(frozen=True)
class KeyValueShape:
    """What one token of one block takes: heads, and the sizes of a key and of a value."""

    num_heads: int
    key_size: int
    value_size: int

    @property
    def num_elements(self) -> int:
        return self.num_heads * (self.key_size + self.value_size)


def key_value_shapes(body: Body) -> dict[int, KeyValueShape]:
    """What each block of a body caches for a token: found out by passing one through."""
    shapes: dict[int, KeyValueShape] = {}

    def look(block: int, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        shapes[block] = KeyValueShape(key.shape[1], key.shape[3], value.shape[3])
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3]))

    backbone = body.backbone
    hidden_TD = torch.zeros(1, backbone.config.hidden_size, dtype=backbone.dtype, device=backbone.device)
    with torch.inference_mode():
        body.forward_packed(hidden_TD, torch.zeros(1, dtype=torch.long), span=body.span, attend=look)
    return shapes


class PagedCache:
    """Keys, values and outputs of `num_pages` pages. Memory that was never written is not taken from the system."""

    def __init__(self, body: Body, shapes: dict[int, KeyValueShape], num_pages: int) -> None:
        backbone = body.backbone
        self.num_pages = num_pages

        def pages(*sizes: int) -> Tensor:
            return torch.zeros((num_pages, PAGE_TOKENS, *sizes), dtype=backbone.dtype, device=backbone.device)

        self._keys = {block: pages(shape.num_heads, shape.key_size) for block, shape in shapes.items()}
        self._values = {block: pages(shape.num_heads, shape.value_size) for block, shape in shapes.items()}
        self._outputs = pages(backbone.config.hidden_size)

    def write(self, block: int, slots_T: Tensor, keys_TJK: Tensor, values_TJK: Tensor) -> None:
        """Put new tokens where they belong: slot s is token `s % PAGE_TOKENS` of page `s // PAGE_TOKENS`."""
        self._keys[block].flatten(0, 1)[slots_T] = keys_TJK
        self._values[block].flatten(0, 1)[slots_T] = values_TJK

    def read(self, block: int, pages_GP: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """The first tokens of several sequences, [G, J, S, K]."""

        def gather(pool: Tensor) -> Tensor:
            return pool[pages_GP].flatten(1, 2)[:, :num_tokens].transpose(1, 2)

        return gather(self._keys[block]), gather(self._values[block])

    def read_one(self, block: int, pages: Sequence[int], num_tokens: int) -> tuple[Tensor, Tensor]:
        """The first tokens of one sequence, [1, J, S, K]; where its pages lie in a row, nothing is copied."""
        if pages[-1] - pages[0] == len(pages) - 1 and list(pages) == list(range(pages[0], pages[-1] + 1)):
            run = slice(pages[0], pages[-1] + 1)
            return tuple(  # type: ignore[return-value]
                pool[run].flatten(0, 1)[None, :num_tokens].transpose(1, 2)
                for pool in (self._keys[block], self._values[block])
            )
        return self.read(block, torch.tensor([list(pages)], device=self._outputs.device), num_tokens)

    def keep_outputs(self, slots_T: Tensor, outputs_TD: Tensor) -> None:
        self._outputs.flatten(0, 1)[slots_T] = outputs_TD

    def outputs(self, pages: Sequence[int]) -> Tensor:
        """The span's outputs for full pages, [T, D]."""
        return self._outputs[list(pages)].flatten(0, 1)

    def prepare(self, growths: Sequence[Growth]) -> None:
        """Make pages ready to be written: what was shared is copied, and what others left in new pages is cleared.

        Nobody attends to what is behind his last token, but a number there that is not finite would spoil his sums.
        """
        copies = [copy for growth in growths for copy in growth.copies]
        taken = [page for growth in growths for page in growth.taken]
        for pool in (*self._keys.values(), *self._values.values()):
            for source, target in copies:
                pool[target] = pool[source]
            if taken:
                pool[taken] = 0
        for source, target in copies:
            self._outputs[target] = self._outputs[source]
