"""Gradients of factors are added up on servers, and their sums travel once. In virtual time."""

# B sequences, T tokens, D hidden size

from __future__ import annotations

import asyncio
import functools
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shoal.client.options.client_options import ClientOptions
from shoal.client.training.gradients import FactorSums, Gradients
from shoal.client.training.pass_plan import MicrobatchPiece, PassPlan
from shoal.client.training.remote_passes import RemotePasses
from shoal.client.training.server_passes import SUM_SECONDS
from shoal.concurrency import now
from shoal.events import Event, Observers, PassesDoubtful, ServerAudited
from shoal.model.peft.factors import ActiveAdapters
from shoal.net.memory import Frame
from shoal.net.wire import codec
from shoal.policy.lateness import LATE_FACTOR, LATE_SECONDS, OPENING_LATE_SECONDS
from shoal.policy.routing.spread import microbatch_rows
from shoal.protocol import Failure, PassInputs, PassResult, SumResult
from shoal.server.training.gradient_sums import TakenSum

from .schedules.bed import Bed, Client, Member
from .schedules.oracle import oracle
from .schedules.tuning import DROPOUT, SEED, version
from .test_pass_rings import Change, killing
from .virtual_time import run

IDS = torch.randint(3, oracle().vocabulary, (24, 64), generator=torch.Generator().manual_seed(0))
OUTPUT_GRAD = torch.randn(*IDS.shape, oracle().hidden_size, generator=torch.Generator().manual_seed(1))
NUM_FACTORS = sum(len(each.values) for each in version(0).blocks.values())
UNAUDITED = ClientOptions(patience_seconds=60.0, audits="off")


@dataclass
class Training:
    """A client that trains, and which gradients of factors came to it."""

    bed: Bed
    client: Client
    passes: RemotePasses
    num_bytes: Counter[str] = field(default_factory=Counter)
    """Of gradients of factors, by the kind of message that they came in."""
    change: Change = lambda frame: frame

    @property
    def num_rows(self) -> int:
        """The sequences of a microbatch."""
        return rows_for(len(self.bed.members) - len(self.client.swarm.audits.liars))

    @property
    def num_microbatches(self) -> int:
        return len(IDS) // self.num_rows

    @property
    def expected(self) -> Gradients:
        """What microbatches find that are sent one by one, added up by the client."""
        return expected(self.num_rows)

    def on_frame(self, frame: Frame) -> Frame | None:
        header = json.loads(frame.header)
        for tensor in header.get("tensors", ()):
            if tensor["name"] == "factor_grads":
                self.num_bytes[header["kind"]] += 4 * torch.Size(tensor["shape"]).numel()
        return self.change(frame)

    def on_message(self, kind: str, act: Callable[[str], None], *, sender: str = "client", number: int = 0) -> None:
        """Act when the message `number` of this kind leaves its sender. The action is told to whom."""
        left = number

        def change(frame: Frame) -> Frame:
            nonlocal left
            if frame.sender == sender and json.loads(frame.header)["kind"] == kind:
                left -= 1
                if left == -1:
                    act(frame.receiver)
            return frame

        self.change = change

    def member(self, name: str) -> Member:
        return next(each for each in self.bed.members if each.name == name)

    async def forward(self, plan: PassPlan | None = None) -> list[list[MicrobatchPiece]]:
        _, pieces = await self.passes.forward(plan or whole_plan(self.client), oracle().embed(IDS), None, None)
        assert len(pieces) == self.num_microbatches
        return pieces

    async def backward(self, pieces: list[list[MicrobatchPiece]], plan: PassPlan | None = None) -> Gradients:
        return await self.passes.backward(plan or whole_plan(self.client), pieces, OUTPUT_GRAD)

    async def gradients(self) -> Gradients:
        return await self.backward(await self.forward())

    def check_nothing_is_kept(self) -> None:
        for member in self.bed.living:
            assert not len(member.engine.passes.sums)
            assert not len(member.engine.passes.activations)
            assert not member.engine.passes.activations.budget.used_bytes


def whole_plan(client: Client, *, seed: int = SEED, inputs: bool = True) -> PassPlan:
    tuning = version(0, dropout=DROPOUT)
    return PassPlan(client.span, tuning, inputs_wanted=inputs, wanted_from=0, seed=seed)


Act = Callable[[Training], Awaitable[None]]


def rows_for(num_servers: int) -> int:
    """The sequences of a microbatch."""
    return microbatch_rows(*IDS.shape, num_servers=num_servers)


def play(act: Act, *spans: str, drain_seconds: float = 0.0, config: ClientOptions = UNAUDITED, seed: int = 0) -> None:
    """Let a client train on servers of these spans."""
    for num_servers in range(max(1, len(spans) - 1), len(spans) + 1):  # one may be shut out
        expected(rows_for(num_servers))  # on a loop of its own
    random.seed(seed)
    run(scene(act, spans, drain_seconds, config))


async def scene(act: Act, spans: Sequence[str], drain_seconds: float, config: ClientOptions = UNAUDITED) -> None:
    async with Bed(spans, cache_pages=16, drain_seconds=drain_seconds) as bed:
        client = bed.client("client", config)
        async with RemotePasses(client.swarm) as passes:
            training = Training(bed, client, passes)
            bed.network.on_frame = training.on_frame
            await act(training)
        await asyncio.sleep(1.0)
        client.check_streams()
        training.check_nothing_is_kept()
        await client.close()


@functools.cache
def expected(num_rows: int) -> Gradients:
    """What microbatches of so many sequences find that are sent one by one, added up here."""
    sums, inputs = FactorSums(), list[Tensor]()

    async def act(training: Training) -> None:
        for number, start in enumerate(range(0, len(IDS), num_rows)):
            rows, plan = slice(start, start + num_rows), whole_plan(training.client, seed=SEED + (start << 16))
            (piece,) = plan.microbatches(oracle().embed(IDS[rows]), None, None, rows=num_rows)
            found = await training.passes.backward(plan, [[piece]], OUTPUT_GRAD[rows])
            assert found.inputs_BTD is not None
            sums.add(number, found.factors)
            inputs.append(found.inputs_BTD)
        assert set(training.num_bytes) == {"pass_result"}

    run(scene(act, ["0:4"], 0.0))
    return Gradients(torch.cat(inputs), sums.rounded())


def equal(found: Gradients, other: Gradients) -> bool:
    """Whether gradients are the same numbers, bit for bit."""
    assert found.inputs_BTD is not None
    assert other.inputs_BTD is not None
    return torch.equal(found.inputs_BTD, other.inputs_BTD) and factors_equal(found, other)


def factors_equal(found: Gradients, other: Gradients) -> bool:
    return (
        found.factors.keys() == other.factors.keys()
        and all(each.values.dtype == torch.float32 for each in found.factors.values())
        and all(torch.equal(found.factors[block].values, each.values) for block, each in other.factors.items())
    )


@pytest.mark.parametrize("spans", [["0:4"], ["0:2", "2:4"], ["0:1", "1:2", "2:3", "3:4"]])
def test_sums_come_once_from_each_server(spans: list[str]):
    async def act(training: Training) -> None:
        for number in range(1, 3):
            assert equal(await training.gradients(), training.expected)
            assert training.num_bytes == {"sum_result": number * 4 * NUM_FACTORS}
            training.check_nothing_is_kept()

    play(act, *spans)


def test_servers_that_share_the_microbatches_give_their_sums_in_halves_and_the_total_is_the_same():
    async def act(training: Training) -> None:
        assert equal(await training.gradients(), training.expected)
        assert set(training.num_bytes) == {"sum_result"}
        assert 2 * 4 * NUM_FACTORS < training.num_bytes["sum_result"] <= 4 * 4 * NUM_FACTORS

    play(act, "0:2", "0:2", "2:4", "2:4")


def test_frozen_blocks_have_no_sums():
    async def act(training: Training) -> None:
        plan = replace(whole_plan(training.client, inputs=False), frozen=frozenset({0, 1}), wanted_from=3)
        found = await training.backward(await training.forward(plan), plan)
        assert factors_equal(found, Gradients(None, {3: training.expected.factors[3]}))
        assert training.num_bytes == {"sum_result": 4 * len(plan.tuning.blocks[3].values)}

    play(act, "0:2", "2:4")


def test_without_adapters_there_are_no_sums():
    async def act(training: Training) -> None:
        plan = replace(whole_plan(training.client), tuning=ActiveAdapters())
        found = await training.backward(await training.forward(plan), plan)
        assert not found.factors
        assert not training.num_bytes

    play(act, "0:4")


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_server_that_dies_at_any_moment_is_replaced_and_the_numbers_are_the_same(data: st.DataObject):
    num_frames, victim = data.draw(st.integers(1, 120)), data.draw(st.integers(0, 3))

    async def act(training: Training) -> None:
        pieces = await training.forward()
        training.change = killing(training.bed, training.bed.members[victim], at=num_frames)
        assert equal(await training.backward(pieces), training.expected)
        training.change = lambda frame: frame
        assert equal(await training.gradients(), training.expected)

    play(act, "0:2", "0:2", "2:4", "2:4")


def test_a_server_that_dies_before_its_sum_is_taken_is_replaced_for_all_of_its_passes():
    async def act(training: Training) -> None:
        pieces = await training.forward()
        training.on_message("take_sum", lambda server: training.bed.kill(training.member(server)))
        assert equal(await training.backward(pieces), training.expected)
        assert training.num_bytes["pass_result"] > 0

    play(act, "0:2", "2:4", "0:2", "2:4")


def test_a_sum_that_is_gone_is_computed_again_by_the_same_server_which_is_not_blamed():
    async def act(training: Training) -> None:
        pieces = await training.forward()

        def forget(server: str) -> None:
            training.member(server).engine.passes.sums.release("client")

        training.on_message("take_sum", forget)
        assert equal(await training.backward(pieces), training.expected)
        assert training.num_bytes == {"pass_result": training.num_microbatches * 4 * NUM_FACTORS}
        assert not training.client.swarm.servers.is_avoided("s0")

    play(act, "0:4")


def test_a_server_that_leaves_stays_until_its_sum_is_taken():
    async def act(training: Training) -> None:
        before, last = training.bed.members
        pieces = await training.forward()
        before.executor.slowness = 50.0  # the other server is done long before it

        def dismiss(_: str) -> None:
            assert len(last.engine.passes.sums)
            training.bed.dismiss(last)

        training.on_message("pass_result", dismiss, sender=last.name, number=training.num_microbatches - 1)
        assert equal(await training.backward(pieces), training.expected)
        assert set(training.num_bytes) == {"sum_result"}
        await asyncio.sleep(1.0)
        assert training.bed.living == [before]  # it has not waited for the end of its time

    play(act, "0:2", "2:4", drain_seconds=60.0)


def test_where_is_no_room_for_a_sum_every_answer_has_its_own():
    async def act(training: Training) -> None:
        for member in training.bed.members:
            member.engine.passes.sums.client_bytes = 8
        assert equal(await training.gradients(), training.expected)
        assert training.num_bytes == {"pass_result": training.num_microbatches * 4 * NUM_FACTORS}

    play(act, "0:2", "2:4")


def test_a_sum_has_no_gradients_of_answers_that_are_not_used():
    """A server is pushed something else than the client believes: what it has added of that is not what is wanted."""

    async def act(training: Training) -> None:
        pieces, changed = await training.forward(), list[str]()

        def lying(frame: Frame) -> Frame:
            if frame.sender != "s1" or not frame.payload or len(changed) == 2:
                return frame
            message, tensors = codec.decode(frame.header, bytearray(frame.payload))
            if not isinstance(message, PassInputs):
                return frame
            changed.append(frame.receiver)
            header, buffers = codec.encode(message, {name: -tensor for name, tensor in tensors.items()})
            payload = b"".join(bytes(memoryview(each).cast("B")) for each in buffers)
            return replace(frame, header=header, payload=payload)

        training.change = lying
        assert equal(await training.backward(pieces), training.expected)
        assert changed == ["s0", "s0"]

    play(act, "0:2", "2:4")


def test_a_sum_of_more_passes_than_the_client_has_counted_is_not_used():
    async def act(training: Training) -> None:
        pieces = await training.forward()

        def change(frame: Frame) -> Frame:
            if json.loads(frame.header)["kind"] != "sum_result":
                return frame
            message, tensors = codec.decode(frame.header, bytearray(frame.payload))
            assert isinstance(message, SumResult)
            header, _ = codec.encode(message.model_copy(update={"num_passes": message.num_passes + 1}), tensors)
            return replace(frame, header=header)

        training.change = change
        assert equal(await training.backward(pieces), training.expected)
        assert training.num_bytes["pass_result"] == training.num_microbatches * 4 * NUM_FACTORS

    play(act, "0:4")


@pytest.mark.parametrize("num_in_time", [0, 1, 3])
@pytest.mark.parametrize("gives_in", [True, False])
def test_a_sum_of_a_server_that_others_have_overtaken_counts_no_pass_twice(num_in_time: int, gives_in: bool):
    """It computes late what others have computed meanwhile, adds that to its sum, or never answers again."""

    async def act(training: Training) -> None:
        pieces = await training.forward()
        by_peer = Counter(piece.peer for each in pieces for piece in each)
        victim = training.member(by_peer.most_common(1)[0][0])

        def stall(_: str) -> None:
            victim.executor.slowness = 2000.0
            if not gives_in:
                victim.executor.thawed.clear()

        if num_in_time:
            training.on_message("pass_result", stall, sender=victim.name, number=num_in_time - 1)
        else:
            stall(victim.name)
        assert equal(await training.backward(pieces), training.expected)
        victim.executor.recover()

    play(act, "0:4", "0:4")


def keep_sums(training: Training, victim: Member) -> None:
    """From now on the server never reads that it is asked for a sum. It goes on to say that it works."""

    def change(frame: Frame) -> Frame | None:
        kind = json.loads(frame.header)["kind"]
        if frame.receiver == victim.name and kind == "take_sum":
            return None
        if frame.sender == victim.name and kind == "pong":
            pong, _ = codec.decode(frame.header, bytearray())
            return replace(frame, header=codec.encode(pong.model_copy(update={"working": True}), {})[0])
        return frame

    training.change = change


@pytest.mark.parametrize("spans", [("0:4", "0:4"), ("0:2", "0:2", "2:4", "2:4"), ("0:4", "0:1", "1:3", "3:4")])
def test_a_sum_that_a_silent_server_keeps_is_computed_by_others(spans: Sequence[str]):
    async def act(training: Training) -> None:
        pieces = await training.forward()
        keep_sums(training, training.bed.members[0])
        began = now()
        assert equal(await training.backward(pieces), training.expected)
        assert LATE_FACTOR * SUM_SECONDS <= now() - began <= LATE_FACTOR * SUM_SECONDS + 2.0
        assert training.num_bytes["pass_result"] > 0
        assert not training.client.swarm.servers.is_avoided("s0")  # once is an accident

    play(act, *spans)


def test_a_sum_of_a_server_that_was_overtaken_in_its_batch_is_late_sooner():
    async def act(training: Training) -> None:
        pieces = await training.forward()
        victim, began = training.bed.members[0], now()
        keep_sums(training, victim)
        keep, num_answered = training.change, 0

        def change(frame: Frame) -> Frame | None:
            nonlocal num_answered
            if frame.sender == victim.name and json.loads(frame.header)["kind"] == "pass_result":
                num_answered += 1
                if num_answered == 2:
                    victim.executor.thawed.clear()
            return keep(frame)

        training.change = change
        assert equal(await training.backward(pieces), training.expected)
        assert LATE_SECONDS + OPENING_LATE_SECONDS <= now() - began <= LATE_SECONDS + OPENING_LATE_SECONDS + 2.0
        assert num_answered == 2
        victim.executor.recover()

    play(act, "0:4", "0:4")


@pytest.mark.parametrize("others", [(), ("0:4",)], ids=["no others", "others"])
def test_a_sum_that_is_late_and_comes_first_counts_and_its_server_stays(others: Sequence[str]):
    async def act(training: Training) -> None:
        pieces = await training.forward()
        late, *rest = training.bed.members
        take = late.engine.passes.sums.take

        async def take_late(peer: str, name: str, *, keeps_rest: bool) -> TakenSum | None:
            for member in rest:
                member.executor.slowness = 1e4
            await asyncio.sleep(LATE_FACTOR * SUM_SECONDS + 3.0)
            return await take(peer, name, keeps_rest=keeps_rest)

        late.engine.passes.sums.take = take_late  # type: ignore[method-assign]
        assert equal(await training.backward(pieces), training.expected)
        assert set(training.num_bytes) == {"sum_result"}
        assert not training.client.swarm.servers.is_avoided(late.name)
        for member in rest:
            member.executor.recover()

    play(act, "0:4", *others)


def test_sums_that_are_never_taken_are_dropped_with_the_last_stream_which_is_not_open_for_long():
    async def act(training: Training) -> None:
        for waits in (True, False):
            pieces = await training.forward()
            stopped = asyncio.Event()
            training.on_message("take_sum", lambda server, stopped=stopped: stopped.set())  # type: ignore[misc]
            calling = asyncio.create_task(training.backward(pieces))
            training.bed.network.delay(1.0)  # the request to take it travels when the call ends
            await stopped.wait()
            calling.cancel()
            await asyncio.gather(calling, return_exceptions=True)
            training.bed.network.delay(0.005)
            if waits:
                (member,) = training.bed.members
                assert len(member.engine.passes.sums) <= 1
                await asyncio.sleep(80.0)
                training.check_nothing_is_kept()

    play(act, "0:4")


Wrong = Callable[[Any, Tensor], tuple[Any, Tensor | None]]

WRONG: dict[str, Wrong] = {
    "nothing": lambda result, values: (result, None),
    "too few": lambda result, values: (result, values[1:]),
    "integers": lambda result, values: (result, values.long()),
    "in a shorter dtype": lambda result, values: (result, values.bfloat16()),
    "another kind": lambda result, values: (PassResult(), values),
    "it is rejected": lambda result, values: (Failure(code="rejected", reason="no"), None),
}


def changed_sum(frame: Frame, wrong: Wrong, *, kinds: Set[str] = frozenset({"sum_result"})) -> Frame:
    """What the first server answers in place of gradients of factors."""
    if frame.sender != "s0" or json.loads(frame.header)["kind"] not in kinds:
        return frame
    message, tensors = codec.decode(frame.header, bytearray(frame.payload))
    if "factor_grads" not in tensors:
        return frame
    changed, values = wrong(message.model_copy(update={"tensors": ()}), tensors.pop("factor_grads"))
    header, buffers = codec.encode(changed, {**tensors, **({} if values is None else {"factor_grads": values})})
    return replace(frame, header=header, payload=b"".join(bytes(memoryview(each).cast("B")) for each in buffers))


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_sum_that_is_none_is_not_used_and_the_server_is_avoided(wrong: Wrong):
    async def act(training: Training) -> None:
        pieces = await training.forward()

        training.change = lambda frame: changed_sum(frame, wrong)
        assert equal(await training.backward(pieces), training.expected)
        assert training.client.swarm.servers.is_avoided("s0")

    play(act, "0:4", "0:4")


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kinds", [{"sum_result"}, {"sum_result", "pass_result"}], ids=["sums", "answers too"])
def test_a_liar_is_found_by_its_sums_and_an_audited_sum_is_right(tmp_path: Path, seed: int, kinds: Set[str]):
    """The gradients of inputs that it pushes and answers are right. As a witness, it may lie in its answers."""
    audited, doubts = list[ServerAudited](), list[PassesDoubtful]()

    def told(event: Event) -> None:
        match event:
            case ServerAudited():
                audited.append(event)
            case PassesDoubtful():
                doubts.append(event)

    async def act(training: Training) -> None:
        def lie(frame: Frame) -> Frame:
            return changed_sum(frame, lambda result, values: (result, -values), kinds=kinds)

        num_wrong, training.change = 0, lie
        training.client.swarm.events = Observers(direct=[told])
        book = training.client.swarm.audits
        for _ in range(60):
            right = training.expected
            is_right = close(await training.gradients(), right)
            assert is_right == book.is_liar("s0")
            if is_right:
                break
            num_wrong += 1
        assert book.liars == {"s0"}
        assert sum(doubt.num_passes for doubt in doubts) >= num_wrong
        assert {each.finding for each in audited} & {"lied", "witness_lied"}
        assert close(await training.gradients(), training.expected)

    config = ClientOptions(patience_seconds=60.0, audits="high", evidence_folder=tmp_path)
    play(act, "0:4", "0:4", "0:4", config=config, seed=seed)


def test_honest_sums_are_audited_and_clean(tmp_path: Path):
    audited = list[ServerAudited]()

    async def act(training: Training) -> None:
        training.client.swarm.events = Observers(
            direct=[lambda event: audited.append(event) if isinstance(event, ServerAudited) else None]
        )
        for _ in range(12):
            assert equal(await training.gradients(), training.expected)
        assert {each.finding for each in audited} == {"clean"}
        num_tokens = IDS.shape[1] * rows_for(3)
        assert any(each.num_tokens > num_tokens for each in audited)  # of several microbatches together

    config = ClientOptions(patience_seconds=60.0, audits="high", evidence_folder=tmp_path)
    play(act, "0:4", "0:4", "0:4", config=config)


def close(found: Gradients, other: Gradients) -> bool:
    return all(
        bool((found.factors[block].values - each.values).norm() <= 1e-4 * each.values.norm())
        for block, each in other.factors.items()
    )
