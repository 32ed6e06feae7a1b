"""How many texts and requests a gateway computes at once, and which wait."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from shoal.gateway.error_objects import Refused
from shoal.gateway.guard.admission import Admission, Admitted

from . import virtual_time


class Texts:
    """Texts that are computed until they are told to end."""

    def __init__(self) -> None:
        self.running: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}

    async def compute(self, request: Admitted, name: str) -> None:
        ends = self._ends[name] = asyncio.Event()
        async with request.text():
            self.running.append(name)
            await ends.wait()
            self.running.remove(name)

    async def end(self, name: str) -> None:
        self._ends[name].set()
        await asyncio.sleep(1)


def test_the_texts_of_a_request_take_their_turns_within_the_limit():
    async def scene() -> None:
        admission, texts = Admission(max_running=2), Texts()
        async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
            account = admission.account(None)
            large = await stack.enter_async_context(admission.admitted(account))
            for number in range(4):
                group.create_task(texts.compute(large, f"large {number}"))
            await asyncio.sleep(1)
            small = await stack.enter_async_context(admission.admitted(account))
            group.create_task(texts.compute(small, "small"))
            await asyncio.sleep(1)
            assert texts.running == ["large 0", "large 1"]
            assert (admission.num_running, admission.num_waiting) == (1, 1)
            await texts.end("large 1")
            await texts.end("large 0")
            assert texts.running == ["large 2", "large 3"]
            await texts.end("large 3")
            assert texts.running == ["large 2", "small"]
            assert (admission.num_running, admission.num_waiting) == (2, 0)
            await texts.end("small")
            await texts.end("large 2")
        assert (admission.num_running, admission.num_waiting) == (0, 0)

    virtual_time.run(scene())


def test_requests_are_refused_while_too_many_wait():
    async def scene() -> None:
        admission, texts = Admission(max_running=1, max_waiting=1), Texts()
        account = admission.account(None)
        async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
            first = await stack.enter_async_context(admission.admitted(account))
            for number in range(5):  # one request, however many texts it has
                group.create_task(texts.compute(first, f"first {number}"))
            await asyncio.sleep(1)
            second = await stack.enter_async_context(admission.admitted(account))
            waiting = group.create_task(texts.compute(second, "second"))
            with pytest.raises(Refused, match="too many requests wait"):
                await stack.enter_async_context(admission.admitted(account))
            for number in range(5):
                await texts.end(f"first {number}")
            assert texts.running == ["second"]
            await stack.enter_async_context(admission.admitted(account))
            await texts.end("second")
            await waiting

    virtual_time.run(scene())
