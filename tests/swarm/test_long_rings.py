"""What the first token of a prompt waits for, in rings of two to eight servers. In virtual time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
import torch

from shoal.client.decoding.session import Session
from shoal.net.memory import Frame
from shoal.policy.audits.receipt_verdict import ReceiptVerdict

from .long_rings import (
    FAST,
    LONG_PROMPT,
    MAX_LENGTH,
    SLOW,
    TOKEN_BYTES,
    Times,
    best_seconds,
    first_token_seconds,
    ring_and_client,
    some_text,
)
from .schedules.bed import PATIENT, Client
from .schedules.work import Reading
from .virtual_time import run

OPENING_TRIPS = 2
"""A session is opened on all servers at once, and then the prompt leaves: its outputs come n + 1 trips later."""
WITHIN = 1.15

pytestmark = pytest.mark.usefixtures("no_log_lines")

Act = Callable[[Client], Awaitable[None]]


def in_ring(num_servers: int, times: Times, act: Act) -> None:
    async def scene() -> None:
        async with ring_and_client(num_servers, times) as client:
            await act(client)

    run(scene())


@pytest.mark.parametrize("num_servers", [2, 8])
def test_a_first_token_takes_two_trips_more_than_the_prompt_around_the_ring(num_servers: int):
    """Of a short prompt and of one with pages that could have been cached, of a client that has used nothing yet."""
    times = Times(link=None)

    async def act(client: Client) -> None:
        for num_tokens in (40, 5, 70):
            seconds = await first_token_seconds(client, some_text(num_tokens, seed=num_tokens))
            assert seconds <= (num_servers + 1 + OPENING_TRIPS) * times.trip + 1e-4

    in_ring(num_servers, times, act)


@pytest.mark.parametrize(("num_servers", "times"), [(2, SLOW), (4, FAST), (8, SLOW), (8, FAST)])
def test_a_long_prompt_keeps_all_servers_of_a_ring_busy(num_servers: int, times: Times):
    async def act(client: Client) -> None:
        seconds = await first_token_seconds(client, some_text(LONG_PROMPT)) - OPENING_TRIPS * times.trip
        assert seconds <= WITHIN * best_seconds(num_servers, times, LONG_PROMPT)

    in_ring(num_servers, times, act)


async def num_cached(client: Client, ids_BT: torch.Tensor, *, salt: str | None = None) -> int | None:
    """How much of a text the servers had in their caches, of a session that is read to its end."""
    session = Session(client.swarm, client.span, batch_size=1, max_length=MAX_LENGTH, salt=salt)
    await Reading(client, session, 1).read(ids_BT)
    await session.close()
    return session.num_cached


def test_what_a_client_has_sent_before_is_found_in_the_caches():
    """Also if a text had no page yet when its session was opened."""

    async def act(client: Client) -> None:
        text, other = some_text(40), some_text(40, seed=1)
        session = Session(client.swarm, client.span, batch_size=1, max_length=MAX_LENGTH)
        reading = Reading(client, session, 1)
        await reading.read(text[:, :5])
        await reading.read(text[:, 5:])
        await session.close()
        assert await num_cached(client, text) == 32
        assert await num_cached(client, other) == 0
        assert await num_cached(client, other) == 32

    in_ring(2, Times(), act)


def test_what_another_client_of_the_same_salt_has_sent_is_found_too():
    async def act(client: Client) -> None:
        text = some_text(40)
        other = client.bed.client("client1", replace(PATIENT, salt="ours"))
        assert await num_cached(client, text, salt="ours") == 0
        assert await num_cached(other, text) == 32
        await other.close()

    in_ring(2, Times(), act)


def test_what_servers_sign_of_a_long_prompt_is_compared_although_its_outputs_come_late():
    """The outputs of one server are long on their way to the client: what the next one signs of them comes before."""
    times = replace(FAST, trip=0.002)

    async def act(client: Client) -> None:
        client.bed.network.delay(0.5, "s3", "client0")
        sent = list[int]()

        def note(frame: Frame) -> Frame:
            header = json.loads(frame.header)
            if header["kind"] == "receipt" and header["end"] <= LONG_PROMPT:
                sent.append(header["end"])
            return frame

        client.bed.network.on_frame = note
        session = Session(client.swarm, client.span, batch_size=1, max_length=MAX_LENGTH)
        reading = Reading(client, session, 1)
        token = await reading.read(some_text(LONG_PROMPT))
        await asyncio.sleep(2.0)  # all is there
        await reading.read(token)
        compared = client.swarm.audits.receipts
        assert set(compared) == {ReceiptVerdict.AGREES}
        assert compared[ReceiptVerdict.AGREES] >= len(sent) > 100
        await session.close()

    in_ring(8, times, act)


@pytest.mark.parametrize("num_servers", [2, 8])
def test_the_first_token_of_a_known_text_does_not_wait_for_one_server_after_the_other(num_servers: int):
    """All servers are asked at once for what they have cached of it, and of a text that goes on from it."""
    times = Times(link=None)

    async def act(client: Client) -> None:
        text = some_text(100)
        await first_token_seconds(client, text[:, :70])
        for num_tokens in (70, 100):
            seconds = await first_token_seconds(client, text[:, :num_tokens])
            assert seconds <= (num_servers + 1 + OPENING_TRIPS) * times.trip + 1e-4
            assert await num_cached(client, text[:, :num_tokens]) == num_tokens // 16 * 16

    in_ring(num_servers, times, act)


def test_what_a_server_has_cached_of_other_inputs_is_not_believed():
    """The servers before it have forgotten the text: what follows from it is not known before they compute it."""

    async def act(client: Client) -> None:
        text = some_text(100)
        await num_cached(client, text)
        next(each for each in client.bed.members if each.name == "s1").engine.forget()
        assert await num_cached(client, text) == 0
        assert await num_cached(client, text) == 96

    in_ring(4, Times(), act)


def test_a_prompt_that_is_interrupted_while_it_is_sent_blames_no_server():
    """Half of a message is on the stream to the first server. The next step opens another one."""

    async def act(client: Client) -> None:
        text = some_text(LONG_PROMPT)
        client.bed.network.limit(client.name, up=200 * TOKEN_BYTES, down=None)
        session = Session(client.swarm, client.span, batch_size=1, max_length=MAX_LENGTH)
        reading = Reading(client, session, 1)
        await reading.read(text[:, :20])
        interrupted = asyncio.create_task(session.step(client.whole.embed(text), 20, None, None))
        await asyncio.sleep(1.0)
        interrupted.cancel()
        with pytest.raises(asyncio.CancelledError):
            await interrupted
        await reading.read(text[:, 20:60])
        assert not any(client.swarm.servers.is_avoided(each.name) for each in client.bed.members)
        assert [hop.server.peer for hop in session.hops] == [each.name for each in client.bed.members]
        await session.close()

    in_ring(2, Times(link=None), act)
