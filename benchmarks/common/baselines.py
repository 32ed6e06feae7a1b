"""The two baselines for failing servers in the PETALS paper (arXiv 2312.08361, section 4.1)."""

from __future__ import annotations

import bisect
import contextlib
import statistics
import time
from collections.abc import Awaitable, Callable, Set
from typing import Any

import torch

from benchmarks.common.clients import Generation, TookTooLong, generate
from shoal import ShoalError

NUM_LENGTHS = 8
"""How many lengths between the shortest and the longest are measured; others are interpolated."""
REPEATS = 3


def without_retries(model: Any) -> None:
    """Turn off the retry loop of a client, so that every failure reaches its caller."""

    async def once(span: object, act: Callable[[Set[Any]], Awaitable[Any]]) -> Any:
        return await act(frozenset())

    model.blocks.swarm.with_failover = once


def restarting(model: Any, prompt: torch.Tensor, num_tokens: int, *, cap: float) -> float | None:
    """Seconds until a generation ends without a failure, including all failed attempts. None after `cap` seconds."""
    began = time.perf_counter()
    while time.perf_counter() < began + cap:
        with contextlib.suppress(ShoalError):
            try:
                generate(model, prompt, num_tokens, deadline=began + cap)
            except TookTooLong:
                return None
            return time.perf_counter() - began
    return None


def expected_restarting(undisturbed: Generation, num_tokens: int) -> Callable[[float], float]:
    """The expected seconds for `num_tokens` tokens in a row, as a function of the probability that a step fails."""
    step = statistics.median(seconds for _, seconds in undisturbed.gaps())

    def expected(failing: float) -> float:
        return step * (num_tokens if not failing else ((1 - failing) ** -num_tokens - 1) / failing)

    return expected


def without_caches(model: Any, prompt: torch.Tensor, num_tokens: int, *, cap: float) -> float | None:
    """Seconds for a generation that computes all tokens again for each new one. None after `cap` seconds."""
    began, ids = time.perf_counter(), prompt
    while ids.shape[1] < prompt.shape[1] + num_tokens:
        if time.perf_counter() > began + cap:
            return None
        with contextlib.suppress(ShoalError):
            ids = torch.cat((ids, _next(model, ids)), dim=1)
    return time.perf_counter() - began


def expected_without_caches(model: Any, prompt: torch.Tensor, num_tokens: int) -> Callable[[float], float]:
    """Like `expected_restarting`, for generation without caches. Measures passes of a few lengths."""
    first, last = prompt.shape[1], prompt.shape[1] + num_tokens - 1
    lengths = sorted({first + (last - first) * index // NUM_LENGTHS for index in range(NUM_LENGTHS + 1)})
    seconds = [_pass_seconds(model, prompt, length) for length in lengths]
    total = sum(_between(lengths, seconds, length) for length in range(first, last + 1))
    return lambda failing: total / (1 - failing)


def _pass_seconds(model: Any, prompt: torch.Tensor, length: int) -> float:
    ids = prompt.repeat(1, -(-length // prompt.shape[1]))[:, :length]
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        _next(model, ids)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _between(lengths: list[int], seconds: list[float], length: int) -> float:
    """Linear interpolation between the measured lengths."""
    index = max(1, bisect.bisect_left(lengths, length))
    if len(lengths) == 1:
        return seconds[0]
    left, right = lengths[index - 1], lengths[index]
    return seconds[index - 1] + (seconds[index] - seconds[index - 1]) * (length - left) / (right - left)


@torch.no_grad()
def _next(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids, use_cache=False, logits_to_keep=1).logits
    token: torch.Tensor = logits[:, -1].argmax(dim=-1, keepdim=True)
    return token
