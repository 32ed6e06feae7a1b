"""The memory of the KV cache: pages of keys and values, one layout for all blocks of a server.

`shoal.server.kv.pages` knows which sequence has which page; this module does not. A page holds `PAGE_TOKENS` tokens of
one sequence in *every* block of the span. It also holds the span's outputs for these tokens: a session that begins with
the same inputs gets them without a computation.
"""

# T tokens, P pages, G sequences, S tokens of the longest of them, J heads of keys, K size of a key, D hidden size

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.model.body import Body
from shoal.prefix import PAGE_TOKENS
from shoal.server.kv.session_cache import Growth


@dataclass(frozen=True)
class KeyValueShape:
    """What one block caches for one token: the number of heads, and the sizes of a head's key and value in numbers."""

    num_heads: int
    key_size: int
    value_size: int

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of a token's keys and values in a dtype. For int8 this includes the scales."""
        scales = 2 * self.num_heads * torch.float32.itemsize if dtype == torch.int8 else 0
        return self.num_heads * (self.key_size + self.value_size) * dtype.itemsize + scales


def key_value_shapes(body: Body) -> dict[int, KeyValueShape]:
    """What each block of a body caches for a token, found by running the body on one token."""
    shapes: dict[int, KeyValueShape] = {}

    def attend(block: int, query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        shapes[block] = KeyValueShape(key.shape[1], key.shape[3], value.shape[3])
        return query.new_zeros((1, query.shape[2], query.shape[1], value.shape[3]))

    backbone = body.backbone
    hidden_TD = torch.zeros(1, backbone.config.hidden_size, dtype=backbone.dtype, device=backbone.device)
    with torch.inference_mode():
        body.forward_packed(hidden_TD, torch.zeros(1, dtype=torch.long), span=body.span, attend=attend)
    return shapes


class Pages:
    """One kind of tensor, of every token in every page: `[P, PAGE_TOKENS, ...]`."""

    def __init__(self, num_pages: int, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        # Not zeros: writing zeros would occupy all of the memory at once. Pages are cleared when they are allocated.
        self._values = torch.empty((num_pages, PAGE_TOKENS, *sizes), dtype=dtype, device=device)

    def write(self, slots_T: Tensor, values: Tensor) -> None:
        """Write tokens into their slots: slot s is token `s % PAGE_TOKENS` of page `s // PAGE_TOKENS`."""
        self._values.flatten(0, 1)[slots_T] = values

    def read(self, pages: Tensor | slice) -> Tensor:
        """The pages of these numbers. A slice of pages is a view, not a copy."""
        return self._values[pages]

    def copy(self, source: int, target: int) -> None:
        """Overwrite one page with another."""
        self._values[target] = self._values[source]

    def clear(self, pages: Sequence[int]) -> None:
        """Fill pages with zeros."""
        self._values[list(pages)] = 0


class Int8Pages(Pages):
    """Pages in int8, with one float32 scale for each head of each token: about half of bfloat16's memory."""

    def __init__(self, num_pages: int, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(num_pages, sizes, torch.int8, device)
        self._scales = Pages(num_pages, (*sizes[:-1], 1), torch.float32, device)
        self._dtype = dtype

    def write(self, slots_T: Tensor, values: Tensor) -> None:
        values = values.float()
        scales = (values.abs().amax(dim=-1, keepdim=True) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
        self._scales.write(slots_T, scales)
        super().write(slots_T, (values / scales).round_().to(torch.int8))

    def read(self, pages: Tensor | slice) -> Tensor:
        return (super().read(pages) * self._scales.read(pages)).to(self._dtype)

    def copy(self, source: int, target: int) -> None:
        super().copy(source, target)
        self._scales.copy(source, target)

    def clear(self, pages: Sequence[int]) -> None:
        super().clear(pages)
        self._scales.clear(pages)


class PagedCache:
    """Keys, values and outputs of `num_pages` pages. The system provides memory only for pages that were written."""

    def __init__(
        self, body: Body, shapes: Mapping[int, KeyValueShape], num_pages: int, *, kind: type[Pages] = Pages
    ) -> None:
        backbone = body.backbone

        def pages(kind: type[Pages], *sizes: int) -> Pages:
            return kind(num_pages, sizes, backbone.dtype, backbone.device)

        self._device = backbone.device
        self._keys = {block: pages(kind, shape.num_heads, shape.key_size) for block, shape in shapes.items()}
        self._values = {block: pages(kind, shape.num_heads, shape.value_size) for block, shape in shapes.items()}
        self._outputs = pages(Pages, backbone.config.hidden_size)

    def write(self, block: int, slots_T: Tensor, keys_TJK: Tensor, values_TJK: Tensor) -> None:
        """Write the keys and values of new tokens of a block into their slots (see `Pages.write`)."""
        self._keys[block].write(slots_T, keys_TJK)
        self._values[block].write(slots_T, values_TJK)

    def read(self, block: int, pages_GP: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `num_tokens` tokens of several sequences, each [G, J, S, K]."""

        def gather(pages: Pages) -> Tensor:
            return pages.read(pages_GP).flatten(1, 2)[:, :num_tokens].transpose(1, 2)

        return gather(self._keys[block]), gather(self._values[block])

    def read_one(self, block: int, pages: Sequence[int], num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first tokens of one sequence, [1, J, S, K]. Consecutive pages are not copied."""
        first, last = pages[0], pages[-1]
        if list(pages) != list(range(first, last + 1)):
            return self.read(block, torch.tensor([list(pages)], device=self._device), num_tokens)

        def run(kind: Pages) -> Tensor:
            return kind.read(slice(first, last + 1)).flatten(0, 1)[None, :num_tokens].transpose(1, 2)

        return run(self._keys[block]), run(self._values[block])

    def write_outputs(self, slots_T: Tensor, outputs_TD: Tensor) -> None:
        """Write the span's outputs for new tokens into their slots."""
        self._outputs.write(slots_T, outputs_TD)

    def read_outputs(self, pages: Sequence[int]) -> Tensor:
        """The span's outputs for full pages, [T, D]."""
        return self._outputs.read(torch.tensor(list(pages), device=self._device)).flatten(0, 1)

    def prepare(self, growths: Sequence[Growth]) -> None:
        """Do what sessions' new tokens require: copy the pages that are copied on write, and clear new pages.

        A sequence gives no weight to what is behind its last token. But an infinity or NaN that another session left
        there would still make its outputs NaN.
        """
        copies = [copy for growth in growths for copy in growth.copies]
        new_pages = [page for growth in growths for page in growth.new_pages]
        for pages in (*self._keys.values(), *self._values.values()):
            for source, target in copies:
                pages.copy(source, target)
            if new_pages:
                pages.clear(new_pages)
        for source, target in copies:
            self._outputs.copy(source, target)
