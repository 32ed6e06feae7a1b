"""An attention backend is two methods: a pass calls one of them once, and its blocks the other."""

# T new tokens

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal.errors import UnsupportedOperation
from shoal.server.kv.attention import AttentionOptions, PackedBatch
from shoal.server.kv.batch import Chunk, PackedPass
from shoal.server.kv.cache_shapes import cache_shapes
from shoal.server.kv.paged_cache import PagedCache
from shoal.server.kv.sdpa_attention import SdpaAttention, SdpaMetadata
from shoal.server.kv.session_cache import Growth
from shoal.spans import Span

from .tiny_models import NUM_BLOCKS
from .visitors import random_inputs, tiny_body


class Recorder:
    """The reference backend, and a record of the calls of it."""

    def __init__(self, cache: PagedCache) -> None:
        self._backend = SdpaAttention(cache)
        self.batches: list[PackedBatch] = []
        self.blocks: list[int] = []
        self.windows: list[int | None] = []

    def metadata(self, batch: PackedBatch) -> SdpaMetadata:
        self.batches.append(batch)
        return self._backend.metadata(batch)

    def attend(
        self, metadata: SdpaMetadata, block: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
    ) -> Tensor:
        self.blocks.append(block)
        self.windows.append(options.sliding_window)
        return self._backend.attend(metadata, block, query, key, value, options)


def chunk(hidden_BTD: Tensor, span: Span, pages: tuple[int, ...]) -> Chunk:
    return Chunk(
        span=span,
        hidden_BTD=hidden_BTD,
        positions_BT=None,
        mask_BS=None,
        num_computed_tokens=0,
        pages=(pages,),
        growth=Growth((), pages),
    )


def test_metadata_is_made_once_for_each_segment_of_the_blocks_and_every_block_attends_with_it():
    body = tiny_body("llama")
    cache = PagedCache(body, cache_shapes(body), 4)
    backend = Recorder(cache)
    chunks = [
        chunk(random_inputs(1, body, 1, 3), body.span, (2,)),
        chunk(random_inputs(2, body, 1, 5), Span(0, 2), (1,)),
    ]
    outputs = PackedPass(body, cache, backend)(chunks)
    assert backend.blocks == list(range(NUM_BLOCKS))
    assert [[(each.start, each.end) for each in batch.sequences] for batch in backend.batches] == [
        [(0, 3), (3, 8)],
        [(0, 3)],
    ]
    assert backend.batches[0].slot_mapping_T.tolist() == [32, 33, 34, 16, 17, 18, 19, 20]
    for each, output in zip(chunks, outputs, strict=True):
        assert isinstance(output, Tensor)
        torch.testing.assert_close(output, body(each.hidden_BTD, span=each.span))


def test_a_backend_is_told_the_window_of_each_layer():
    body = tiny_body("gemma3_text")
    cache = PagedCache(body, cache_shapes(body), 1)
    backend = Recorder(cache)
    PackedPass(body, cache, backend)([chunk(random_inputs(1, body, 1, 3), body.span, (0,))])
    types = body.backbone.config.layer_types[:NUM_BLOCKS]
    assert [window is not None for window in backend.windows] == [each == "sliding_attention" for each in types]


def test_what_a_layer_says_of_its_attention_is_understood_or_refused():
    options = AttentionOptions.from_layer(
        {"scaling": 0.5, "dropout": 0.0, "sliding_window": None, "position_bias": None}
    )
    assert options == AttentionOptions(scaling=0.5)
    with pytest.raises(UnsupportedOperation, match="packed attention does not support position_bias"):
        AttentionOptions.from_layer({"position_bias": torch.zeros(1)})
