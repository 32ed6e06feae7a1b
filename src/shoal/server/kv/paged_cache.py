"""The memory of the KV cache: pages of keys and values, one layout for all blocks of a server.

`shoal.server.kv.pages` knows which sequence has which page; this module does not. A page holds `PAGE_TOKENS` tokens of
one sequence in *every* block of the span. It also holds the span's outputs for these tokens: a session that begins with
the same inputs gets them without a computation.
"""

# T tokens, P pages, G sequences, S tokens of the longest of them, J heads of keys, K size of a key, D hidden size

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal.errors import UnsupportedOperation
from shoal.model.body import Body
from shoal.prefix import PAGE_TOKENS
from shoal.server.kv.cache_shapes import CacheShapes, KeyValueShape
from shoal.server.kv.session_cache import Growth
from shoal.server.kv.states import States, num_slots


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
        if isinstance(pages, slice):
            return self._values[pages]
        # Indexing with a tensor would give the same, and take three times as long on a CPU.
        return self._values.index_select(0, pages.flatten()).view(*pages.shape, *self._values.shape[1:])

    def select(self, index: Tensor) -> Tensor:
        """Copies of vectors: number i is that of head `i % J` of slot `i // J`, if a token has J heads."""
        return self._values.flatten(0, -2).index_select(0, index)

    def gather(self, slots_S: Tensor) -> Tensor:
        """Copies of the tokens in these slots."""
        return self._values.flatten(0, 1).index_select(0, slots_S)

    @property
    def raw(self) -> Tensor | None:
        """All pages [P, PAGE_TOKENS, ...] as they are, for kernels that read them; `None` if they are encoded."""
        return self._values

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

    def select(self, index: Tensor) -> Tensor:
        return (super().select(index) * self._scales.select(index)).to(self._dtype)

    def gather(self, slots_S: Tensor) -> Tensor:
        return (super().gather(slots_S) * self._scales.gather(slots_S)).to(self._dtype)

    @property
    def raw(self) -> Tensor | None:
        return None

    def copy(self, source: int, target: int) -> None:
        super().copy(source, target)
        self._scales.copy(source, target)

    def clear(self, pages: Sequence[int]) -> None:
        super().clear(pages)
        self._scales.clear(pages)


class PagedCache:
    """Keys, values and outputs of `num_pages` pages, and the states of sequences, in slots.

    The system provides memory only for what was written. `state_pages` is how many pages a slot counts as. What is
    computed is in `dtype`, by default the body's.
    """

    def __init__(
        self,
        body: Body,
        shapes: CacheShapes,
        num_pages: int,
        *,
        kind: type[Pages] = Pages,
        dtype: torch.dtype | None = None,
    ) -> None:
        backbone = body.backbone
        dtype, device = dtype or backbone.dtype, backbone.device
        self.kind, self.dtype = kind, dtype

        def pages(size_of: Callable[[KeyValueShape], int]) -> dict[int, Pages]:
            return {
                block: kind(num_pages, (shape.num_heads, size_of(shape)), dtype, device)
                for block, shape in shapes.tokens.items()
            }

        self.shapes = shapes
        self.device = device
        self._keys = pages(lambda shape: shape.key_size)
        self._values = pages(lambda shape: shape.value_size)
        self._index = {
            block: Pages(num_pages, shape.indexer.sizes, shape.indexer.dtype, device)
            for block, shape in shapes.tokens.items()
            if shape.indexer is not None
        }
        self._outputs = Pages(num_pages, (backbone.config.hidden_size,), dtype, device)
        cached_dtype = torch.int8 if kind is Int8Pages else dtype
        self.state_pages = state_pages(shapes, cached_dtype, backbone)
        self.states = States(shapes.states, num_slots(num_pages, self.state_pages), device)

    def write(self, block: int, slots_T: Tensor, keys_TJK: Tensor, values_TJK: Tensor) -> None:
        """Write the keys and values of new tokens of a block into their slots (see `Pages.write`)."""
        self._keys[block].write(slots_T, keys_TJK)
        self._values[block].write(slots_T, values_TJK)

    def write_index(self, block: int, slots_T: Tensor, keys_TK: Tensor) -> None:
        """Write the keys of new tokens for a block's indexer into their slots."""
        self._index[block].write(slots_T, keys_TK)

    def read(self, block: int, pages: Tensor | slice, num_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `num_tokens` tokens of several sequences with these pages, each [G, J, S, K].

        Pages [G, P] are copied. A slice has the pages of one sequence, which are read where they are.
        """

        def gather(kind: Pages) -> Tensor:
            found = kind.read(pages)
            found = found[None] if isinstance(pages, slice) else found
            return found.flatten(1, 2)[:, :num_tokens].transpose(1, 2)

        return gather(self._keys[block]), gather(self._values[block])

    def pages_of(self, sequences: Sequence[Sequence[int]]) -> Tensor | slice:
        """The pages of sequences with as many pages each, for `read`: a slice if they are one sequence's in a row."""
        first, *others = sequences
        if not others and all(page == first[0] + index for index, page in enumerate(first)):
            return slice(first[0], first[0] + len(first))
        return torch.tensor([list(each) for each in sequences], device=self.device)

    def select(self, block: int, index_GJS: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [G, J, S, K]. The index says which vector stands where (see `Pages.select`)."""
        index = index_GJS.flatten()
        keys, values = self._keys[block].select(index), self._values[block].select(index)
        return keys.view(*index_GJS.shape, -1), values.view(*index_GJS.shape, -1)

    def select_index(self, block: int, slots_GS: Tensor) -> Tensor:
        """The keys of a block's indexer of the tokens in these slots, [G, S, K]."""
        return self._index[block].select(slots_GS.flatten()).view(*slots_GS.shape, -1)

    def gather(self, block: int, slots_S: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [S, J, K] and values [S, J, V] of the tokens in these slots."""
        return self._keys[block].gather(slots_S), self._values[block].gather(slots_S)

    def raw_pages(self, block: int) -> tuple[Tensor, Tensor]:
        """All keys and all values of a block, [P, PAGE_TOKENS, J, K]. Raises `UnsupportedOperation` for int8 pages."""
        keys, values = self._keys[block].raw, self._values[block].raw
        if keys is None or values is None:
            raise UnsupportedOperation("kernels cannot read int8 pages")
        return keys, values

    def write_outputs(self, slots_T: Tensor, outputs_TD: Tensor) -> None:
        """Write the span's outputs for new tokens into their slots."""
        self._outputs.write(slots_T, outputs_TD)

    def read_outputs(self, pages: Sequence[int]) -> Tensor:
        """The span's outputs for full pages, [T, D]."""
        return self._outputs.read(torch.tensor(list(pages), device=self.device)).flatten(0, 1)

    def prepare(self, growths: Sequence[Growth]) -> None:
        """Do what sessions' new tokens require: copy what is copied on write, and clear new pages and slots.

        A sequence gives no weight to what is behind its last token. But an infinity or NaN that another session left
        there would still make its outputs NaN.
        """
        copies = [copy for growth in growths for copy in growth.copies]
        new_pages = [page for growth in growths for page in growth.new_pages]
        for pages in (*self._keys.values(), *self._values.values(), *self._index.values()):
            for source, target in copies:
                pages.copy(source, target)
            if new_pages:
                pages.clear(new_pages)
        for source, target in copies:
            self._outputs.copy(source, target)
        for growth in growths:
            for source, target in growth.slot_copies:
                self.states.copy(source, target)
            if growth.new_slots:
                self.states.clear(growth.new_slots)


def output_bytes(backbone: PreTrainedModel) -> int:
    """The bytes of the outputs that the cache holds for a token."""
    return int(backbone.config.hidden_size * backbone.dtype.itemsize)


def state_pages(shapes: CacheShapes, dtype: torch.dtype, backbone: PreTrainedModel) -> int:
    """How many pages the states of a sequence count as, with keys and values in this dtype: 0 without states.

    As many as take no less memory.
    """
    page_bytes = PAGE_TOKENS * (shapes.token_bytes(dtype) + output_bytes(backbone))
    return -(-shapes.state_bytes // page_bytes)
