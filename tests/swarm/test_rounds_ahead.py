"""Several steps of one session on their way around a ring at once, in virtual time."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from shoal.client.decoding.session import Session
from shoal.concurrency import now

from .long_rings import MAX_LENGTH, Times, ring_and_client, some_text
from .schedules.work import Reading
from .virtual_time import run

pytestmark = pytest.mark.usefixtures("no_log_lines")

NUM_SERVERS = 4
TIMES = Times(trip=0.05, link=None)
"""Servers far apart that compute in no time."""
AROUND = (NUM_SERVERS + 1) * TIMES.trip
STEPS = [some_text(1 + index % 3, seed=index) for index in range(24)]


@contextlib.asynccontextmanager
async def far_reading() -> AsyncIterator[Reading]:
    """A session across the ring that has read a prompt."""
    async with ring_and_client(NUM_SERVERS, TIMES) as client:
        session = Session(client.swarm, client.span, batch_size=1, max_length=MAX_LENGTH)
        text = Reading(client, session, 1)
        await text.read(some_text(9, seed=99))
        yield text
        await session.close()


def test_four_steps_under_way_take_as_long_as_one():
    async def scene() -> tuple[float, float]:
        async with far_reading() as text:
            began = now()
            for step in STEPS[:4]:
                await text.read(step)
            alone, began = now() - began, now()
            for index, step in enumerate(STEPS):
                await text.read(step, ahead=STEPS[index + 1 : index + 4])
            return alone / 4, (now() - began) / len(STEPS)

    alone, ahead = run(scene())
    assert alone == pytest.approx(AROUND, rel=0.05)
    assert ahead == pytest.approx(AROUND / 4, rel=0.05)


def test_steps_that_were_sent_in_vain_cost_the_next_one_no_trip():
    async def scene() -> list[float]:
        seconds = []
        async with far_reading() as text:
            for index in range(0, 20, 4):
                began = now()
                await text.read(STEPS[index], ahead=STEPS[index + 1 : index + 4])
                text.crop(text.num_tokens - 1)
                seconds.append(now() - began)
        return seconds

    assert run(scene()) == pytest.approx([AROUND] * 5, rel=0.05)
