"""Which blocks a server can load quickly, because what they are made from is on its disk."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from shoal.model.linear.quantization import Quantization, stored_quantization
from shoal.model.loading import QuantizedBlockCache
from shoal.peers import MAX_SPANS_ON_DISK
from shoal.server.measuring.means import Means
from shoal.spans import Span


def quick_blocks(means: Means) -> list[int]:
    """The blocks whose files are here. If the server quantizes them itself, those that it has quantized before."""
    checkpoint = means.checkpoint
    if not quantizes(means):
        return checkpoint.blocks_on_disk()
    cache = QuantizedBlockCache(checkpoint, means.dtype, means.quantization)
    return [block for block in range(checkpoint.num_blocks) if cache.has(block)]


def quantizes(means: Means) -> bool:
    """Whether the server quantizes the blocks of its checkpoint itself."""
    return means.quantization is not Quantization.NONE and stored_quantization(means.checkpoint.config) is None


def missing_blocks(means: Means, span: Span) -> list[int]:
    """The blocks of a span for which something has to be downloaded before they are loaded."""
    here = {*quick_blocks(means), *means.checkpoint.blocks_on_disk()}
    return [block for block in span if block not in here]


def spans_of(blocks: Iterable[int]) -> tuple[Span, ...]:
    """The spans that these blocks form, in order; only the longest if they are more than `MAX_SPANS_ON_DISK`."""
    numbered = enumerate(sorted(set(blocks)))
    runs = [[block for _, block in run] for _, run in itertools.groupby(numbered, key=lambda pair: pair[1] - pair[0])]
    spans = [Span(run[0], run[-1] + 1) for run in runs]
    longest = sorted(spans, key=lambda span: (-len(span), span))[:MAX_SPANS_ON_DISK]
    return tuple(sorted(longest))
