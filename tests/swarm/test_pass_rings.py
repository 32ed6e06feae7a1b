"""Passes without a cache go around the ring, and the client carries them where a server cannot. In virtual time."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import functools
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.client.options.client_options import ClientOptions
from shoal.client.training import pass_rings
from shoal.client.training.gradients import Gradients
from shoal.client.training.pass_plan import MicrobatchPiece, PassPlan
from shoal.client.training.remote_passes import RemotePasses
from shoal.concurrency import now
from shoal.net.memory import Frame
from shoal.net.wire import codec
from shoal.protocol import PassInputs

from .schedules.bed import Bed, Client, Member
from .schedules.oracle import oracle, positions_of
from .schedules.tuning import DROPOUT, IDS, MASK, SEED, version
from .virtual_time import run

SPANS = ("0:1", "1:2", "2:3", "3:4")
TRIP_SECONDS = 0.05
OUTPUT_GRAD = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
PASS_KINDS = ("forward", "backward", "pass_inputs", "pass_result")

Change = Callable[[Frame], Frame | None]


@dataclass
class Passes:
    """A client that trains, and what of its passes goes over the network."""

    bed: Bed
    client: Client
    passes: RemotePasses
    sent: list[tuple[str, str, str]] = field(default_factory=list)
    """The kind, the sender and the receiver of each frame that carries tensors of a pass."""
    change: Change = lambda frame: frame

    def on_frame(self, frame: Frame) -> Frame | None:
        kind = json.loads(frame.header)["kind"]
        if kind in PASS_KINDS and frame.payload:
            self.sent.append((kind, frame.sender, frame.receiver))
        return self.change(frame) if kind in PASS_KINDS else frame

    @property
    def plan(self) -> PassPlan:
        tuning = version(0, dropout=DROPOUT)
        return PassPlan(self.client.span, tuning, inputs_wanted=True, wanted_from=0, seed=SEED)

    async def forward(self) -> tuple[Tensor, list[list[MicrobatchPiece]]]:
        """The outputs of a batch, and what the backward pass needs."""
        inputs = oracle().embed(IDS), positions_of(MASK), MASK.to(torch.uint8)
        return await self.passes.forward(self.plan, *inputs)

    async def gradients(self) -> tuple[Tensor, Gradients]:
        """The outputs of a batch, and its gradients."""
        outputs, pieces = await self.forward()
        return outputs, await self.passes.backward(self.plan, pieces, OUTPUT_GRAD)

    def break_all_pairs(self) -> None:
        for one, other in pairwise(self.bed.members):
            self.client.swarm.measurements.broken_pairs.add_for_good(one.name, other.name)
            self.client.swarm.measurements.broken_pairs.add_for_good(other.name, one.name)

    @property
    def is_broken(self) -> frozenset[tuple[str, str]]:
        return self.client.swarm.measurements.broken_pairs.now()


Act = Callable[[Passes], Awaitable[None]]


def play(act: Act, *spans: str, trip_seconds: float = 0.005) -> None:
    """Let a client train on servers of these spans; `trip_seconds` is the way between any two peers."""
    expected()  # on a loop of its own
    run(scene(act, spans or SPANS, trip_seconds))


async def scene(act: Act, spans: Sequence[str], trip_seconds: float) -> None:
    async with Bed(spans, cache_pages=16, drain_seconds=0.0) as bed:
        bed.network.delay(trip_seconds)
        client = bed.client("client", ClientOptions(patience_seconds=60.0, audits="off"))
        async with RemotePasses(client.swarm) as passes:
            training = Passes(bed, client, passes)
            bed.network.on_frame = training.on_frame
            await act(training)
        await asyncio.sleep(1.0)
        client.check_streams()
        await client.close()


def equal(one: tuple[Tensor, Gradients], other: tuple[Tensor, Gradients]) -> bool:
    """Whether outputs and gradients are the same numbers, bit for bit."""
    (outputs, found), (others, expected) = one, other
    assert found.inputs_BTD is not None
    assert expected.inputs_BTD is not None
    return (
        torch.equal(outputs, others)
        and torch.equal(found.inputs_BTD, expected.inputs_BTD)
        and found.factors.keys() == expected.factors.keys()
        and all(torch.equal(found.factors[block].values, each.values) for block, each in expected.factors.items())
    )


@functools.cache
def expected() -> tuple[Tensor, Gradients]:
    """What servers compute that are asked one after another by the client."""
    found: list[tuple[Tensor, Gradients]] = []

    async def act(training: Passes) -> None:
        training.break_all_pairs()
        found.append(await training.gradients())
        assert all("client" in (sender, receiver) for _, sender, receiver in training.sent)

    run(scene(act, SPANS, 0.005))
    return found[0]


def test_a_pass_goes_from_server_to_server_and_every_server_answers_the_client():
    async def act(training: Passes) -> None:
        found = await training.gradients()
        assert equal(found, expected())
        counts = Counter(training.sent)
        answers = {("pass_result", server, "client"): 2 for server in ("s0", "s1", "s2", "s3")}
        there = [("pass_inputs", one, other) for one, other in pairwise(("s0", "s1", "s2", "s3"))]
        back = [("pass_inputs", other, one) for one, other in pairwise(("s0", "s1", "s2", "s3"))]
        for key, count in {**answers, **dict.fromkeys((*there, *back), 1)}.items():
            assert counts[key] == count, key
        assert counts["backward", "client", "s3"] == 1
        assert not counts["backward", "client", "s0"]  # the server has kept its inputs

    play(act)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_pass_over_four_servers_makes_five_trips(direction: str):
    """At 100 ms a round trip. One after another they would take 400 ms."""

    async def act(training: Passes) -> None:
        for member in training.bed.members:
            member.executor.slowness = 0.01
        await training.gradients()  # connections are opened, and adapters are sent
        plan, inputs = training.plan, oracle().embed(IDS)
        began = now()
        _, pieces = await training.passes.forward(plan, inputs, positions_of(MASK), MASK.to(torch.uint8))
        if direction == "backward":
            began = now()
            await training.passes.backward(plan, pieces, OUTPUT_GRAD)
        assert 5 * TRIP_SECONDS <= now() - began <= 1.1 * 5 * TRIP_SECONDS

    play(act, trip_seconds=TRIP_SECONDS)


def killing(bed: Bed, member: Member, *, at: int) -> Change:
    """What kills a server when this many frames have gone over the network."""
    num_left = at

    def kill(frame: Frame) -> Frame:
        nonlocal num_left
        num_left -= 1
        if not num_left and member.alive:
            bed.kill(member)
        return frame

    return kill


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_server_that_dies_at_any_moment_is_replaced_and_the_numbers_are_the_same(data: st.DataObject):
    num_frames, victim = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 3))

    async def act(training: Passes) -> None:
        training.change = killing(training.bed, training.bed.members[victim], at=num_frames)
        assert equal(await training.gradients(), expected())
        training.change = lambda frame: frame
        assert equal(await training.gradients(), expected())

    play(act, *SPANS, *SPANS)


@pytest.mark.parametrize("pair", [("s0", "s1"), ("s2", "s1")])
def test_what_is_not_pushed_is_carried_by_the_client_and_the_pair_is_remembered(pair: tuple[str, str]):
    async def act(training: Passes) -> None:
        def lose(frame: Frame) -> Frame | None:
            is_lost = (frame.sender, frame.receiver) == pair and b'"pass_inputs"' in frame.header
            return None if is_lost else frame

        training.change = lose
        assert equal(await training.gradients(), expected())
        assert training.is_broken == {pair}
        training.sent.clear()
        began = now()
        assert equal(await training.gradients(), expected())
        assert now() - began < 1.0
        assert not [each for each in training.sent if each[1:] == pair]
        assert ("pass_inputs", "s1", "s2") in training.sent or ("pass_inputs", "s1", "s0") in training.sent

    play(act)


def lying(frame: Frame, *, sender: str) -> Frame:
    """The push of a server, with other numbers than it has answered."""
    if frame.sender != sender or not frame.payload:
        return frame
    message, tensors = codec.decode(frame.header, bytearray(frame.payload))
    if not isinstance(message, PassInputs):
        return frame
    header, buffers = codec.encode(message, {name: -tensor for name, tensor in tensors.items()})
    return replace(frame, header=header, payload=b"".join(bytes(memoryview(each).cast("B")) for each in buffers))


def test_a_server_that_pushes_something_else_than_it_answers_changes_nothing():
    async def act(training: Passes) -> None:
        training.change = lambda frame: lying(frame, sender="s1")
        assert equal(await training.gradients(), expected())
        assert training.is_broken == {("s1", "s2"), ("s1", "s0")}
        await asyncio.sleep(3600)
        assert training.is_broken == {("s1", "s2"), ("s1", "s0")}
        assert equal(await training.gradients(), expected())
        assert not training.client.swarm.servers.is_avoided("s1")
        assert not training.client.swarm.servers.is_avoided("s2")

    play(act)


def misshapen(frame: Frame, *, shape: Sequence[int]) -> Frame:
    message, _ = codec.decode(frame.header, bytearray(frame.payload))
    if not isinstance(message, PassInputs):
        return frame
    (name,) = (spec.name for spec in message.tensors)
    header, buffers = codec.encode(message, {name: torch.ones(*shape)})
    return replace(frame, header=header, payload=b"".join(bytes(memoryview(each).cast("B")) for each in buffers))


@pytest.mark.parametrize("shape", [(2, 5, 31), (2, 5), (1, 5, 32), (2, 4, 32), (64, 512, 32)])
def test_inputs_that_cannot_be_used_are_no_fault_of_the_client_nor_of_the_server(shape: tuple[int, ...]):
    async def act(training: Passes) -> None:
        training.change = lambda frame: misshapen(frame, shape=shape) if frame.sender == "s1" else frame
        assert equal(await training.gradients(), expected())
        assert ("s1", "s2") in training.is_broken
        assert not training.client.swarm.servers.is_avoided("s2")

    play(act)


def test_a_push_that_overtakes_the_request_is_held_until_the_request_comes():
    """The client is far from the second server, which is near the first one."""

    async def act(training: Passes) -> None:
        training.bed.network.delay(0.4, "client", "s1")
        for member in training.bed.members:
            member.executor.slowness = 0.01
        assert equal(await training.gradients(), expected())
        assert not training.is_broken

    play(act)


def test_a_sequence_longer_than_a_step_goes_around_the_ring_too_unless_it_is_too_large_to_push(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(pass_rings, "MAX_STEP_TOKENS", 100)
    hidden = torch.randn(1, 300, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(hidden.shape[:2], dtype=torch.uint8)

    async def act(training: Passes) -> None:
        async def gradients() -> tuple[Tensor, Gradients]:
            training.sent.clear()
            outputs, pieces = await training.passes.forward(training.plan, hidden, positions_of(mask), mask)
            return outputs, await training.passes.backward(training.plan, pieces, hidden.flip(1))

        pushed = await gradients()
        counts = Counter(training.sent)
        for one, other in pairwise(("s0", "s1", "s2", "s3")):
            assert counts["pass_inputs", one, other] == counts["pass_inputs", other, one] == 1
        monkeypatch.setattr(pass_rings, "MAX_PUSHED_BYTES", hidden.nbytes - 1)
        assert equal(await gradients(), pushed)
        assert all("client" in (sender, receiver) for _, sender, receiver in training.sent)

    play(act)
