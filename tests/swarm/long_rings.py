"""Rings of up to eight servers with the network and the speeds of real ones, in virtual time.

    python -m tests.swarm.long_rings        the table of docs/performance.md

Hidden states of the tiny model are small, so links have fewer bytes per second: a token takes as long on them as one of
4 KiB does at 100 Mbit/s.
"""

# B sequences, T new tokens, D hidden size

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeVar

import torch

from shoal.client.decoding.session import Session
from shoal.concurrency import now
from shoal.peers import Capacity, ModelInfo
from shoal.policy.routing.prompt_pieces import RingCost, StageCost
from shoal.server.engine.engine import Engine
from shoal.server.kv.batch import Chunk, Pass
from shoal.spans import Span

from .schedules.bed import PATIENT, Bed, Client, Member, VirtualExecutor
from .schedules.oracle import Oracle
from .schedules.work import Reading
from .virtual_time import run

T = TypeVar("T")

NUM_BLOCKS = 8
MAX_LENGTH = 2048
LONG_PROMPT = 1024
MODEL = ModelInfo(key="e" * 16, name="eight blocks", family="llama", num_blocks=NUM_BLOCKS)
TOKENS_PER_SECOND = 100e6 / 8 / 4096
"""Of one link of 100 Mbit/s, if a token has 4 KiB."""


@functools.cache
def eight_blocks() -> Oracle:
    # With a larger spread, rounding grows from block to block; with a smaller size, headers would count on the links.
    return Oracle(MODEL, MAX_LENGTH, spread=0.03, hidden_size=512)


TOKEN_BYTES = torch.float32.itemsize * eight_blocks().hidden_size


@dataclass(frozen=True)
class Times:
    """The seconds of a pass in one block, without tokens and for each token, and of a trip. A server's link carries
    `link` tokens a second in each direction; None is any number."""

    block: float = 0.0
    token: float = 0.0
    trip: float = 0.05
    link: float | None = TOKENS_PER_SECOND


SLOW = Times(block=0.0089, token=0.00031)
"""An eighth of the reference model on two cores (docs/performance.md)."""
FAST = Times(block=0.00089, token=0.000031)


def best_seconds(num_servers: int, times: Times, num_tokens: int) -> float:
    """When the best equal pieces of a prompt are back, of any parts of tokens, all of them under way at once."""
    length = NUM_BLOCKS // num_servers
    sent = 0.0 if times.link is None else 1 / times.link
    stage = StageCost(length * times.block, length * times.token, sent)
    ring = RingCost((stage,) * num_servers, (num_servers + 1) * times.trip)
    return min(
        ring.first_seconds(num_tokens / number) + (number - 1) * ring.busy_seconds(num_tokens / number)
        for number in range(1, num_tokens + 1)
    )


class TimedExecutor(VirtualExecutor):
    """Passes take time by their tokens and blocks."""

    def __init__(self, times: Times) -> None:
        super().__init__()
        self._times = times
        self._seconds = 0.0

    def timed(self, compute: Pass) -> Pass:
        def counted(chunks: Sequence[Chunk]) -> list[torch.Tensor | Exception]:
            num_tokens = sum(chunk.hidden_BTD.shape[:2].numel() for chunk in chunks)
            self._seconds = len(chunks[0].span) * (self._times.block + self._times.token * num_tokens)
            return compute(chunks)

        return counted

    async def run(self, function: Callable[[], T]) -> T:
        result = function()
        seconds, self._seconds = self._seconds, 0.0
        await asyncio.sleep(seconds)
        return result


class LongRing(Bed):
    """Servers with as many of the eight blocks each, which announce how fast they and their links are."""

    def __init__(self, num_servers: int, times: Times) -> None:
        length = NUM_BLOCKS // num_servers
        spans = [f"{start}:{start + length}" for start in range(0, NUM_BLOCKS, length)]
        super().__init__(spans, cache_pages=1024, drain_seconds=0.0, whole=eight_blocks())
        self.rounds_differently = False  # over so many tokens and blocks it becomes too large
        self.times = times
        self.network.delay(times.trip)

    def _executor(self) -> VirtualExecutor:
        return TimedExecutor(self.times)

    def _member(self, name: str, span: Span, speed: float, engine: Engine, executor: VirtualExecutor) -> Member:
        times, length = self.times, len(span)
        speed = min(1e6, 1 / max(1e-9, length * (times.block + times.token)))
        prefill = min(1e6, 1 / max(1e-9, length * times.token))
        if times.link is not None:
            rate = times.link * TOKEN_BYTES
            self.network.limit(name, up=rate, down=rate)
        capacity = Capacity(NUM_BLOCKS, ((length, speed * length),), times.link, 1.0, 1.0)
        node = self.network.node(name)
        return Member(name, span, speed, node, engine, executor, prefill_speed=prefill, capacity=capacity)


def some_text(num_tokens: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, eight_blocks().vocabulary, (1, num_tokens), generator=generator)


@contextlib.asynccontextmanager
async def ring_and_client(num_servers: int, times: Times) -> AsyncIterator[Client]:
    """A ring of `num_servers` servers, and a client whose own link has no limit."""
    async with LongRing(num_servers, times) as ring:
        client = ring.client("client0", PATIENT)
        await asyncio.sleep(100.0)  # the servers have measured how far they are from each other
        yield client
        await client.close()


async def first_token_seconds(client: Client, ids_BT: torch.Tensor) -> float:
    """How long a new session takes to read a prompt. Its outputs are compared with the model in one piece."""
    session = Session(client.swarm, client.span, batch_size=ids_BT.shape[0], max_length=MAX_LENGTH)
    began = now()
    await Reading(client, session, ids_BT.shape[0]).read(ids_BT)
    seconds = now() - began
    await session.close()
    return seconds


def main() -> None:
    logging.disable(logging.CRITICAL)
    print("| machines | trip | servers | first token, s | best pieces, s | ratio |\n|---|---|---|---|---|---|")
    for (name, times), trip, num_servers in product({"slow": SLOW, "fast": FAST}.items(), (0.002, 0.05), (2, 4, 8)):
        ours = replace(times, trip=trip)

        async def scene(num_servers: int = num_servers, ours: Times = ours) -> float:
            async with ring_and_client(num_servers, ours) as client:
                return await first_token_seconds(client, some_text(LONG_PROMPT))

        seconds, best = run(scene()), best_seconds(num_servers, ours, LONG_PROMPT)
        print(f"| {name} | {trip * 1e3:.0f} ms | {num_servers} | {seconds:.3f} | {best:.3f} | {seconds / best:.2f} |")


if __name__ == "__main__":
    main()
