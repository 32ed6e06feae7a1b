"""How fast a server is: measured on the blocks that it holds, in well under a second."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from shoal.model.body import Body

PREFILL_TOKENS = 64
REPEATS = 3


@dataclass(frozen=True)
class Speeds:
    """Tokens per second through a whole span: one at a time, and many at once."""

    decode: float
    prefill: float


@torch.inference_mode()
def measure(body: Body, *, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Speeds:
    """Run the span as a session would. The first pass is not counted: it pays for what happens only once."""

    def seconds(num_tokens: int, past_tokens: int) -> float:
        cache = body.new_cache()
        if past_tokens:
            body(torch.zeros(1, past_tokens, hidden_size, dtype=dtype, device=device), cache=cache)
        hidden = torch.zeros(1, num_tokens, hidden_size, dtype=dtype, device=device)
        start = time.perf_counter()
        body(hidden, cache=cache)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    seconds(1, 1)
    decode = statistics.median(seconds(1, 1) for _ in range(REPEATS))
    prefill = statistics.median(seconds(PREFILL_TOKENS, 0) for _ in range(REPEATS))
    return Speeds(1 / decode, PREFILL_TOKENS / prefill)
