"""How fast a server is: measured on the blocks that it holds, the way it computes them, in a few seconds at most.

What was measured is kept on disk: it changes with the weights, the machine and the versions, not with every start.
"""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass

import torch

from shoal.model.body import Body
from shoal.model.memo import remembered
from shoal.model.prefix import PAGE_TOKENS
from shoal.server.batch import Chunk, Pass
from shoal.server.pages import pages_for
from shoal.server.session import Growth

PAST_TOKENS = 64
PREFILL_TOKENS = 128
REPEATS = 5


@dataclass(frozen=True)
class Speeds:
    """Tokens per second through a whole span: one at a time, and many at once."""

    decode: float
    prefill: float


def speeds_of(body: Body, compute: Pass, *, weights: str, num_pages: int) -> Speeds:
    """How fast the blocks are here; `weights` names them, and how they are quantized."""
    device = body.backbone.device
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    fact = (
        f"speed of {weights} blocks {body.span} in {body.backbone.dtype} on {device.type} {machine} with "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    decode, prefill = remembered(fact, lambda: _measure(body, compute, num_pages=num_pages))
    return Speeds(decode, prefill)


def _measure(body: Body, compute: Pass, *, num_pages: int) -> tuple[float, float]:
    def seconds(num_cached: int, num_tokens: int) -> float:
        chunk = _chunk(body, num_cached, num_tokens, num_pages)
        start = time.perf_counter()
        (output,) = compute([chunk])
        if isinstance(output, Exception):
            raise output
        output.cpu()  # which waits for it
        return time.perf_counter() - start

    num_cached = min(PAST_TOKENS, num_pages * PAGE_TOKENS - 1)
    num_tokens = min(PREFILL_TOKENS, num_pages * PAGE_TOKENS)
    for _ in range(2):  # the first passes pay for what happens only once
        seconds(num_cached, 1)
    decode = statistics.median(seconds(num_cached, 1) for _ in range(REPEATS))
    prefill = statistics.median(seconds(0, num_tokens) for _ in range(REPEATS))
    return 1 / decode, num_tokens / prefill


def _chunk(body: Body, num_cached: int, num_tokens: int, num_pages: int) -> Chunk:
    """Tokens of a session whose past is nothing but zeros: they take as long as any others."""
    backbone = body.backbone
    pages = tuple(range(min(num_pages, pages_for(num_cached + num_tokens))))
    cache = None
    if not body.family.packable:
        cache = body.new_cache()
        if num_cached:
            past = torch.zeros(1, num_cached, backbone.config.hidden_size, dtype=backbone.dtype, device=backbone.device)
            body(past, cache=cache)
    return Chunk(
        span=body.span,
        hidden_BTD=torch.zeros(1, num_tokens, backbone.config.hidden_size, dtype=backbone.dtype),
        positions_BT=None,
        mask_BS=None,
        num_cached=num_cached,
        pages=(pages,),
        growth=Growth((), pages),
        cache=cache,
    )
