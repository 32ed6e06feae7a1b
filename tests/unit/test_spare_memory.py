"""A server gives freed memory back when it has grown. In virtual time."""

from __future__ import annotations

import asyncio

from shoal.cli.service.spare_memory import LOOK_SECONDS, SPARE_BYTES, give_memory_back
from shoal.concurrency import owned_task
from tests.swarm import virtual_time


class Memory:
    """The memory of a process: what is in use, and what is free and was not given back."""

    def __init__(self, used: int) -> None:
        self.used = used
        self.free = 0
        self.num_trims = 0

    def resident(self) -> int:
        return self.used + self.free

    def trim(self) -> None:
        self.free = 0
        self.num_trims += 1


def test_what_is_freed_goes_back_when_the_process_has_grown_and_only_then():
    async def scene() -> None:
        memory = Memory(used=20 * SPARE_BYTES)
        async with owned_task(give_memory_back(memory.resident, memory.trim)):
            await asyncio.sleep(2.5 * LOOK_SECONDS)
            assert memory.num_trims == 1  # what loading has left
            memory.free = SPARE_BYTES
            await asyncio.sleep(2 * LOOK_SECONDS)
            assert memory.num_trims == 1
            memory.free = SPARE_BYTES + 1
            await asyncio.sleep(LOOK_SECONDS)
            assert (memory.num_trims, memory.free) == (2, 0)

    virtual_time.run(scene())


def test_a_process_that_has_shrunk_counts_from_there():
    async def scene() -> None:
        memory = Memory(used=20 * SPARE_BYTES)
        async with owned_task(give_memory_back(memory.resident, memory.trim)):
            await asyncio.sleep(0.5 * LOOK_SECONDS)
            memory.used = 10 * SPARE_BYTES
            await asyncio.sleep(LOOK_SECONDS)
            memory.free = 2 * SPARE_BYTES
            await asyncio.sleep(LOOK_SECONDS)
            assert (memory.num_trims, memory.free) == (2, 0)

    virtual_time.run(scene())
