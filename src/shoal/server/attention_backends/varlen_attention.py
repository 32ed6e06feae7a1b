"""FlashAttention through PyTorch's `varlen_attn`: one kernel for all sequences of a pass, of whatever lengths.

The FlashAttention 2 that comes with PyTorch reads no pages as small as ours, so keys and values are gathered for it.
FlashAttention 3 and 4 read them where they are, through tables of pages; they are packages of their own.
"""

# N sequences, T new tokens, S all tokens of all sequences, P pages of the longest sequence
# H heads of queries, J heads of keys, K size of a key, V of a value

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from shoal.errors import UnsupportedOperation
from shoal.prefix import PAGE_TOKENS
from shoal.server.kv.attention import AttentionOptions, Feature, PackedBatch
from shoal.server.kv.paged_cache import PagedCache

HALF_DTYPES = (torch.float16, torch.bfloat16)
"""The dtypes in which FlashAttention computes."""


@dataclass(frozen=True)
class VarlenMetadata:
    """A pass: the slots of its new tokens, where each sequence begins among queries and keys, and the longest ones.

    `index` is where the keys are: the slots [S] of all tokens, or the pages [N, P] of all sequences.
    """

    slot_mapping_T: Tensor
    query_starts: Tensor
    key_starts: Tensor
    lengths_N: Tensor
    most_queries: int
    most_keys: int
    index: Tensor


class VarlenAttention:
    """The `PartialBackend` for GPUs that have FlashAttention. With `reads_pages`, keys are not gathered.

    It calls `kernel`, PyTorch's `varlen_attn`. Raises `UnsupportedOperation` if that cannot work on this cache.
    """

    features = frozenset({Feature.WINDOWS})

    def __init__(self, cache: PagedCache, kernel: Callable[..., Any], *, reads_pages: bool = False) -> None:
        if cache.dtype not in HALF_DTYPES:
            raise UnsupportedOperation(f"FlashAttention does not compute in {str(cache.dtype).removeprefix('torch.')}")
        for block, shape in cache.shapes.tokens.items():
            if shape.key_size != shape.value_size:
                raise UnsupportedOperation("keys and values of different sizes")
            cache.raw_pages(block)  # the reference attends to new tokens before they are rounded to int8
        self._cache = cache
        self._kernel = kernel
        self._reads_pages = reads_pages
        # Older versions of PyTorch share heads of keys without being asked to.
        self._asks_for_groups = "enable_gqa" in inspect.signature(kernel).parameters

    def metadata(self, batch: PackedBatch) -> VarlenMetadata:
        """The sequences have to follow each other in the pass without gaps, as `PackedPass` puts them."""
        sequences, device = batch.sequences, batch.slot_mapping_T.device
        num_queries = [each.end - each.start for each in sequences]
        lengths = [each.num_tokens for each in sequences]
        query_starts = _starts(num_queries)
        assert query_starts[:-1] == [each.start for each in sequences]
        pages = [each.pages[: -(-each.num_tokens // PAGE_TOKENS)] for each in sequences]
        index = _page_table(pages) if self._reads_pages else _slots(pages, lengths)
        return VarlenMetadata(
            slot_mapping_T=batch.slot_mapping_T,
            query_starts=torch.tensor(query_starts, dtype=torch.int32, device=device),
            key_starts=torch.tensor(_starts(lengths), dtype=torch.int32, device=device),
            lengths_N=torch.tensor(lengths, dtype=torch.int32, device=device),
            most_queries=max(num_queries),
            most_keys=max(lengths),
            index=index.to(device),
        )

    def attend(
        self, metadata: VarlenMetadata, block: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        self._cache.write(block, metadata.slot_mapping_T, key[0].transpose(0, 1), value[0].transpose(0, 1))
        more: dict[str, Any] = {"enable_gqa": query.shape[1] > key.shape[1]} if self._asks_for_groups else {}
        key_starts: Tensor | None = metadata.key_starts
        if self._reads_pages:
            keys, values = self._cache.raw_pages(block)
            key_starts = None
            more |= {"seqused_k": metadata.lengths_N, "block_table": metadata.index}
        else:
            keys, values = self._cache.gather(block, metadata.index)
        output_THV: Tensor = self._kernel(
            query[0].transpose(0, 1).contiguous(),
            keys,
            values,
            metadata.query_starts,
            key_starts,
            metadata.most_queries,
            metadata.most_keys,
            scale=query.shape[-1] ** -0.5 if options.scaling is None else options.scaling,
            # As many tokens before a token as it sees, itself not counted. -1 is all of them.
            window_size=(-1 if options.sliding_window is None else options.sliding_window - 1, 0),
            **more,
        )
        return output_THV[None]


def gathering(cache: PagedCache) -> VarlenAttention:
    """FlashAttention over gathered keys and values. Raises what PyTorch raises if it has no `varlen_attn`."""
    return VarlenAttention(cache, _kernel())


def reading_pages(cache: PagedCache, *, implementation: str, package: str) -> VarlenAttention:
    """FlashAttention that reads pages, by one of PyTorch's implementations ("FA3") that needs a package.

    Raises what PyTorch raises if it has no such implementation, and `UnsupportedOperation` without the package. Once
    it is activated, the process uses the implementation for all that PyTorch computes with FlashAttention.
    """
    try:
        importlib.import_module(package)
    except ImportError:
        raise UnsupportedOperation(f"the package {package} is not installed") from None
    attention = VarlenAttention(cache, _kernel(), reads_pages=True)
    importlib.import_module("torch.nn.attention").activate_flash_attention_impl(implementation)
    return attention


def default_implementation() -> None:
    """Let PyTorch compute with the FlashAttention that comes with it again."""
    attention = importlib.import_module("torch.nn.attention")
    if attention.current_flash_attention_impl() is not None:
        attention.restore_flash_attention_impl()


def _kernel() -> Callable[..., Any]:
    # PyTorch loads a part of its compiler with this module, so it is not imported where it is not used.
    kernel: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    return kernel


def _starts(lengths: Sequence[int]) -> list[int]:
    """Where each of the parts begins if they stand in a row, and the end of the last."""
    return [0, *accumulate(lengths)]


def _slots(pages: Sequence[Sequence[int]], lengths: Sequence[int]) -> Tensor:
    """The slots of all tokens of all sequences, [S]."""
    within = torch.arange(PAGE_TOKENS)
    rows = [
        (torch.tensor(own)[:, None] * PAGE_TOKENS + within).flatten()[:length]
        for own, length in zip(pages, lengths, strict=True)
    ]
    return torch.cat(rows)


def _page_table(pages: Sequence[Sequence[int]]) -> Tensor:
    """The pages of all sequences, [N, P]. Shorter sequences are filled up with a page that the kernel does not read."""
    longest = max(len(own) for own in pages)
    return torch.tensor([[*own, *[own[0]] * (longest - len(own))] for own in pages], dtype=torch.int32)
