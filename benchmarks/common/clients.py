"""Clients of a benchmark: they generate, alone or at the same time, and note when each token arrived."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from shoal.peers import ServerInfo


@dataclass(frozen=True)
class Generation:
    """The start of a generation, the arrival of each token (both in seconds of `perf_counter`), and the tokens."""

    began: float
    times: Sequence[float]
    tokens: Sequence[int]

    @property
    def seconds_to_first(self) -> float:
        return self.times[0] - self.began

    def gaps(self) -> list[tuple[float, float]]:
        """For each token after the first: its arrival, and the seconds since the token before."""
        return [(later, later - earlier) for earlier, later in itertools.pairwise(self.times)]


class TookTooLong(Exception):
    """A generation was stopped at its deadline."""


class _Clock:
    """A streamer that notes the time of each token. The first call has the prompt."""

    def __init__(self, deadline: float, came: Callable[[int], None] | None) -> None:
        self.times: list[float] = []
        self._deadline = deadline
        self._came = came
        self._prompt_came = False

    def put(self, value: Any) -> None:
        if self._prompt_came:
            self.times.append(time.perf_counter())
            if self.times[-1] > self._deadline:
                raise TookTooLong
            if self._came is not None:
                self._came(len(self.times))
        self._prompt_came = True

    def end(self) -> None:
        pass


def generate(
    model: Any,
    prompt: torch.Tensor,
    num_tokens: int,
    *,
    deadline: float = math.inf,
    came: Callable[[int], None] | None = None,
    **options: Any,
) -> Generation:
    """Greedy decoding of one prompt [1, T]. After each token, `came` is called with the number of tokens so far.

    Raises `TookTooLong` at the first token after the `deadline`, a time of `perf_counter`.
    """
    clock = _Clock(deadline, came)
    began = time.perf_counter()
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        streamer=clock,
        **options,
    )
    return Generation(began, clock.times, output[0, prompt.shape[1] :].tolist())


def generate_together(model: Any, prompts: Sequence[torch.Tensor], num_tokens: int) -> list[Generation]:
    """Generate from all prompts at the same time, each in a thread of its own."""
    return at_the_same_time([partial(generate, model, prompt, num_tokens) for prompt in prompts])


def at_the_same_time(clients: Sequence[Callable[[], Generation]]) -> list[Generation]:
    """Run all clients, each in a thread of its own."""
    with ThreadPoolExecutor(len(clients)) as threads:
        return [each.result() for each in [threads.submit(client) for client in clients]]


def decoding_speed(generations: Sequence[Generation]) -> float:
    """Tokens per second of all generations together, while all of them decode."""
    arrivals = [generation.times for generation in generations]
    start, end = max(each[0] for each in arrivals), min(each[-1] for each in arrivals)
    return sum(start < time <= end for each in arrivals for time in each) / (end - start)


def announced(model: Any) -> Sequence[ServerInfo]:
    """What all servers of a distributed model announce now, straight from the directory."""
    blocks = model.transformer.h
    found: Sequence[ServerInfo] = blocks.runtime.run(blocks.swarm.node.directory.servers(blocks.swarm.model))
    return found


def local_batch_speed(model: Any, prompts: torch.Tensor, num_tokens: int) -> float:
    """Tokens per second after the first, of plain Transformers that decodes the prompts [B, T] as one batch."""
    seconds = []
    for new in (1, num_tokens + 1):
        began = time.perf_counter()
        model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
        )
        seconds.append(time.perf_counter() - began)
    return len(prompts) * num_tokens / (seconds[1] - seconds[0])


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
