"""Whatever is pushed to a server, by whoever, its client gets what it asked for, and others notice nothing."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shoal.net.memory import QUEUE_FRAMES
from shoal.net.signing.token_digests import tensor_digest
from shoal.net.transport import Stream
from shoal.protocol import MAX_STEPS_AHEAD, Failure, NotCached, PassResult, Pong, StepResult, Unreached
from shoal.server.rpc.pushing import pass_pushes, push_connection
from shoal.server.rpc.session_stream import MAX_PENDING_RESULTS
from shoal.server.rpc.step_queue import MAX_QUEUED_TOKENS, StepQueue

from .harness import Swarm, swarm_of
from .intruder import FINGERPRINT, MODEL, Intruder, Raw, num_push_connections, num_sessions, num_streams, raw

MakeSwarm = Callable[..., Swarm]

LINK, OTHER_LINK = "0123456789abcdef" * 2, "f" * 32
HIDDEN = 0.1 * torch.arange(64).view(1, 2, 32)


def opening(span: str = "0:2", **changes: Any) -> Raw:
    start, end = (int(block) for block in span.split(":"))
    fields = {
        "model": MODEL,
        "fingerprint": FINGERPRINT,
        "start": start,
        "end": end,
        "batch_size": 1,
        "expected_length": 512,
    }
    return raw("open", **fields | changes)


def step(position: int = 0, hidden: torch.Tensor | None = HIDDEN, **fields: Any) -> Raw:
    return raw("step", None if hidden is None else {"hidden": hidden}, position=position, **fields)


def pushed(position: int = 0, hidden: torch.Tensor | None = HIDDEN, *, link: str = LINK, **fields: Any) -> Raw:
    return step(position, hidden, link=link, **fields)


def place(peer: str, link: str = LINK) -> dict[str, Any]:
    return {"peer": peer, "link": link}


@pytest.fixture(scope="module")
def town(folder: Path) -> Iterator[Swarm]:
    with swarm_of(folder, "0:2", "2:4") as swarm:
        yield swarm


@pytest.fixture
def guest(town: Swarm) -> Iterator[Intruder]:
    """A client of the first server; when it has gone, nothing is left of it on any."""
    name = f"guest{town.call(lambda: len(town.network.peers))}"
    yield Intruder(town, "s0", name=name)
    check_idle(town)


def stranger(swarm: Swarm, name: str = "stranger") -> Intruder:
    number = swarm.call(lambda: len(swarm.network.peers))
    return Intruder(swarm, "s0", name=f"{name}{number}")


def check_idle(swarm: Swarm) -> None:
    for name, server in swarm.servers.items():
        swarm.settle(lambda name=name: not num_streams(swarm, name) and not num_sessions(swarm, name))
        assert server.engine.cache_tokens_left == server.engine.cache_tokens
        swarm.call(server.engine.check_integrity)
    swarm.settle(lambda: not num_push_connections(swarm))


def held(swarm: Swarm) -> list[int]:
    """How many tokens wait in each session of the whole swarm, step by step."""

    def look() -> list[int]:
        orders = [each for each in gc.get_objects() if type(each) is StepQueue]
        return [arrived.size for order in orders for arrived in order.waiting]

    return swarm.call(look)


def answered(guest: Intruder, stream: Stream, *frames: Raw) -> tuple[Any, dict[str, torch.Tensor]]:
    """Send these, and return the next message that comes."""
    guest.tell(stream, *frames)
    ((message, tensors),) = guest.hear(stream)
    return message, dict(tensors)


# -- from those who push --------------------------------------------------------------------------------------------

LARGE = torch.ones(1, 512, 32)

IGNORED: dict[str, list[Raw]] = {
    "over a link that nobody expects": [pushed(link=OTHER_LINK, hidden=-HIDDEN)],
    "without a link after the first": [pushed(9), step(hidden=-HIDDEN)],
    "of an epoch that is over": [pushed(hidden=-HIDDEN, epoch=1)],
    "of an epoch that never comes": [pushed(hidden=-HIDDEN, epoch=99)],
    "of a position that never comes": [pushed(300, hidden=-HIDDEN, epoch=2)],
    "without tensors": [pushed(hidden=None, epoch=2)],
    "of another hidden size": [pushed(hidden=torch.ones(1, 2, 16), epoch=2)],
    "of words": [pushed(hidden=torch.ones(1, 2, 32).long(), epoch=2)],
    "of more tokens than a step has": [pushed(hidden=torch.ones(5, 300, 32), epoch=2)],
    "of more tokens than the session has": [pushed(hidden=torch.ones(1, 513, 32), epoch=2)],
    "with the wrong positions": [
        raw("step", {"hidden": HIDDEN, "positions": torch.full((1, 2), 1 << 40)}, position=0, epoch=2, link=LINK)
    ],
    "for a head that is not here": [pushed(epoch=2, hidden=-HIDDEN, logits=1)],
    "in floods": [pushed(n, LARGE, epoch=2) for n in range(1, 200)],
    "in floods of future epochs": [pushed(0, HIDDEN, epoch=n) for n in range(3, 300)],
    "and then says something else": [pushed(9, epoch=2), raw("ping")],
}


@pytest.mark.parametrize("frames", IGNORED.values(), ids=IGNORED.keys())
def test_what_is_pushed_wrongly_neither_ends_a_session_nor_gets_into_it(town, guest, frames):
    pusher = stranger(town, "upstream")
    reference = guest.open()
    _, expected = answered(guest, reference, opening(), step()), guest.hear(reference)[0][1]
    stream = guest.open()
    answered(guest, stream, opening(epoch=2, upstream=place(pusher.name)))
    assert not pusher.ask(*frames)
    assert len(held(town)) <= MAX_STEPS_AHEAD
    assert sum(held(town)) <= MAX_QUEUED_TOKENS
    result, tensors = answered(guest, stream, step(epoch=2))
    assert isinstance(result, StepResult)
    assert torch.equal(tensors["hidden"], expected["hidden"])
    assert not guest.finish(stream)
    assert not guest.finish(reference)


@pytest.mark.parametrize("frames", [[Raw(b"noise")], [pushed(9), Raw(b"\x80\x04K\x01.")], [pushed(-1)]])
def test_a_push_that_is_no_message_ends_only_its_own_stream(town, guest, frames):
    pusher = stranger(town)
    stream = guest.open()
    answered(guest, stream, opening(upstream=place(pusher.name)))
    (failure,) = pusher.ask(*frames)
    assert isinstance(failure, Failure)
    assert failure.code == "rejected"
    assert isinstance(answered(guest, stream, step())[0], StepResult)
    assert not guest.finish(stream)


def test_only_the_peer_that_the_client_named_may_push(town, guest):
    pusher, thief = stranger(town), stranger(town, "thief")
    stream = guest.open()
    answered(guest, stream, opening(upstream=place(pusher.name)))
    assert not thief.ask(pushed(hidden=-HIDDEN))
    assert not pusher.ask(pushed())
    ((_, tensors),) = guest.hear(stream)
    _, expected = answered(guest, stream, raw("rewind", epoch=1, position=0), step(epoch=1))
    assert torch.equal(tensors["hidden"], expected["hidden"])
    assert not guest.finish(stream)


def test_a_push_that_overtakes_the_rewind_of_its_epoch_waits_for_it(town, guest):
    pusher = stranger(town)
    stream = guest.open()
    answered(guest, stream, opening(upstream=place(pusher.name)), step())
    guest.hear(stream)
    assert not pusher.ask(pushed(1, epoch=1))
    assert held(town) == [2]
    result, tensors = answered(guest, stream, raw("rewind", epoch=1, position=1))
    assert (result.epoch, result.position) == (1, 1)
    assert tensors["hidden"].shape == (1, 2, 32)
    assert not guest.finish(stream)


def test_what_a_server_has_pushed_means_nothing_once_another_has_its_place(town, guest):
    """Garbage for the steps to come, also for those of the next epoch."""
    pusher = stranger(town)
    stream = guest.open()
    answered(guest, stream, opening(upstream=place(pusher.name)))
    assert not pusher.ask(pushed(2, -HIDDEN), pushed(0, -HIDDEN, epoch=1), pushed(2, -HIDDEN, epoch=1))
    assert len(held(town)) == 3
    first = answered(guest, stream, raw("set_neighbors"), raw("rewind", epoch=1, position=0), step(epoch=1))
    second = answered(guest, stream, step(2, epoch=1))
    assert [message.position for message, _ in (first, second)] == [0, 2]
    assert not held(town)
    whole = guest.open()
    expected = answered(guest, whole, opening(), step(0, torch.cat((HIDDEN, HIDDEN), dim=1))), guest.hear(whole)[0]
    outputs = torch.cat((first[1]["hidden"], second[1]["hidden"]), dim=1)
    torch.testing.assert_close(outputs, expected[1][1]["hidden"], rtol=1e-4, atol=1e-4)
    assert not guest.finish(stream)
    assert not guest.finish(whole)


def test_what_the_client_sends_itself_counts_more_than_what_is_pushed(town, guest):
    """Steps that are pushed fill all the room there is, and stand where the client's own belong."""
    pusher = stranger(town)
    stream = guest.open()
    answered(guest, stream, opening(upstream=place(pusher.name)))
    assert not pusher.ask(*(pushed(2 * n, -HIDDEN) for n in range(1, 40)))
    assert len(held(town)) == MAX_STEPS_AHEAD
    guest.tell(stream, *(step(2 * n) for n in range(MAX_STEPS_AHEAD - 1, -1, -1)))
    heard = guest.hear(stream, MAX_STEPS_AHEAD)
    assert [message.position for message, _ in heard] == [2 * n for n in range(MAX_STEPS_AHEAD)]
    reference = guest.open()
    long = (
        answered(guest, reference, opening(), step(0, HIDDEN.repeat(1, MAX_STEPS_AHEAD, 1))),
        guest.hear(reference)[0],
    )
    outputs = torch.cat([tensors["hidden"] for _, tensors in heard], dim=1)
    torch.testing.assert_close(outputs, long[1][1]["hidden"], rtol=1e-4, atol=1e-4)
    guest.finish(stream)
    assert not guest.finish(reference)


def test_pushes_go_on_after_a_client_has_said_goodbye_for_nobody(town, guest):
    pusher = stranger(town)
    stream = guest.open()
    answered(guest, stream, opening(upstream=place(pusher.name)))
    assert not guest.finish(stream)
    assert not pusher.ask(*(pushed(2 * n) for n in range(50)))
    assert not held(town)


def test_a_session_that_is_opened_again_over_its_old_link_keeps_it(town, guest):
    pusher = stranger(town)
    old, new = guest.open(), guest.open()
    for stream in (old, new):
        answered(guest, stream, opening(upstream=place(pusher.name)))
    assert not guest.finish(old)
    assert not pusher.ask(pushed())
    assert isinstance(guest.hear(new)[0][0], StepResult)
    assert not guest.finish(new)


def test_a_stream_that_only_pushes_once_is_ended(swarm: MakeSwarm):
    swarm_ = swarm("0:4", idle_seconds=0.2)
    silent = stranger(swarm_)
    for _ in range(20):
        silent.tell(silent.open(), pushed())
    swarm_.settle(lambda: not num_streams(swarm_, "s0"))


# -- from clients who tie rings -------------------------------------------------------------------------------------


def test_a_ring_that_is_tied_to_a_loop_does_not_turn(town, guest):
    """From the first server to the second, from there to the first, and so on, for 256 hops."""
    weaver = Intruder(town, "s1", name=f"{guest.name}-again")
    passes = [server.engine.num_passes for server in town.servers.values()]
    first, second = guest.open(), weaver.open()
    answered(guest, first, opening("0:2", upstream=place("s1", OTHER_LINK), downstream=place("s1", LINK)))
    answered(weaver, second, opening("2:4", upstream=place("s0", LINK), downstream=place("s0", OTHER_LINK)))
    for position in (0, 2, 4):
        guest.tell(first, step(position, hops_left=256))
        assert guest.hear(first)[0][0].position == position
        assert weaver.hear(second)[0][0].position == position
    assert not [message for message in guest.finish(first) if isinstance(message, StepResult)]
    assert not [message for message in weaver.finish(second) if isinstance(message, StepResult)]
    assert [server.engine.num_passes for server in town.servers.values()] == [number + 3 for number in passes]


def test_a_server_that_pushes_to_itself_comes_to_an_end(town, guest):
    stream = guest.open()
    answered(guest, stream, opening(upstream=place("s0"), downstream=place("s0")))
    assert isinstance(answered(guest, stream, step(hops_left=256))[0], StepResult)
    assert not [message for message in guest.finish(stream) if isinstance(message, StepResult)]


@pytest.mark.parametrize("downstream", [None, place("nobody"), place("?!")], ids=["no server", "nobody", "no name"])
def test_a_client_hears_what_could_not_be_pushed(town, guest, downstream, monkeypatch):
    monkeypatch.setattr(push_connection, "OPEN_SECONDS", 0.05)
    stream = guest.open()
    answered(guest, stream, opening(**{} if downstream is None else {"downstream": downstream}), step(hops_left=3))
    heard = [message for message, _ in guest.hear(stream, 2)]
    assert {type(message) for message in heard} == {StepResult, Unreached}
    assert {(message.epoch, message.position) for message in heard} == {(0, 0)}
    assert not guest.finish(stream)


def test_a_next_server_that_never_reads_holds_up_only_its_own_session(town, guest):
    """So much of its outputs is kept for it, and then nothing more is computed, until the client ties another ring."""
    deaf = town.call(town.network.node, f"deaf{guest.name}")

    async def ignore(stream: Stream) -> None:
        await asyncio.Event().wait()

    town.runtime.run(deaf.transport.listen(ignore))
    stream = guest.open()
    answered(guest, stream, opening(downstream=place(deaf.transport.peer)))
    engine, taken = town.servers["s0"].engine, QUEUE_FRAMES + MAX_PENDING_RESULTS
    for number in range(taken):
        assert isinstance(answered(guest, stream, step(2 * number, hops_left=1))[0], StepResult)
    num_passes = engine.num_passes
    guest.tell(stream, step(2 * taken, hops_left=1))
    for _ in range(30):
        pong, _ = answered(guest, stream, raw("ping"))
        assert (type(pong), pong.working, pong.position) == (Pong, True, 2 * taken)
    assert engine.num_passes == num_passes
    guest.tell(stream, raw("set_neighbors"))
    assert {type(message) for message, _ in guest.hear(stream, 2)} == {StepResult, Unreached}
    assert not guest.finish(stream)
    town.kill(deaf.transport.peer)


def test_steps_again_and_again_to_a_client_that_does_not_read_are_not_piled_up(town, guest):
    stream = guest.open()
    answered(guest, stream, opening(), step())
    guest.hear(stream)
    guest.tell(stream, *[step(hops_left=1)] * 500)
    heard = guest.finish(stream)
    assert 0 < len(heard) < 500
    assert {type(message) for message in heard} == {StepResult, Unreached}


# -- passes ---------------------------------------------------------------------------------------------------------


def a_pass(hidden: torch.Tensor | None = HIDDEN, **fields: Any) -> Raw:
    about = {"model": MODEL, "fingerprint": FINGERPRINT, "start": 0, "end": 2}
    return raw("forward", None if hidden is None else {"hidden": hidden}, **about | fields)


def inputs(hidden: torch.Tensor | None = HIDDEN, *, link: str = LINK, name: str = "hidden") -> Raw:
    return raw("pass_inputs", None if hidden is None else {name: hidden}, link=link)


def test_the_inputs_of_a_pass_are_those_that_the_peer_pushed_that_the_client_named(town, guest):
    pusher, thief = stranger(town), stranger(town, "thief")
    stream = guest.open()
    _, expected = answered(guest, stream, a_pass())
    assert not thief.ask(inputs(-HIDDEN))
    pong, _ = answered(guest, stream, a_pass(None, upstream=place(pusher.name)), raw("ping"))
    assert (type(pong), pong.working) == (Pong, False)
    assert not thief.ask(inputs(-HIDDEN), inputs(-HIDDEN, link=OTHER_LINK))
    assert not pusher.ask(inputs(-HIDDEN, link=OTHER_LINK), inputs(-HIDDEN, name="grad"), inputs())
    ((result, tensors),) = guest.hear(stream)
    assert torch.equal(tensors["hidden"], expected["hidden"])
    assert result.inputs == tensor_digest(HIDDEN)
    assert not guest.finish(stream)


@pytest.mark.parametrize(
    "hidden", [torch.ones(1, 2, 16), torch.ones(2, 32), torch.ones(1, 2, 32).long(), torch.ones(3, 400, 32)]
)
def test_inputs_that_are_wrong_are_asked_for_again(town, guest, hidden):
    """By the client, over the same stream: they are not its fault."""
    pusher = stranger(town)
    stream = guest.open()
    answered(guest, stream, a_pass(None, upstream=place(pusher.name)), raw("ping"))
    assert not pusher.ask(inputs(hidden))
    ((message, _),) = guest.hear(stream)
    assert message == NotCached(inputs=True)
    assert isinstance(answered(guest, stream, a_pass())[0], PassResult)
    assert not guest.finish(stream)


def test_a_pass_with_inputs_that_are_sent_and_pushed_is_refused(town, guest):
    (failure,) = guest.ask(a_pass(upstream=place("s1")))
    assert failure.code == "rejected"
    assert "inputs that are sent and pushed" in failure.reason


def test_a_pass_that_could_not_be_computed_is_refused_before_its_inputs_come(town, guest):
    (failure,) = guest.ask(a_pass(None, start=2, end=4, upstream=place("s1")))
    assert failure.code == "moved"


def test_a_client_that_leaves_while_its_pass_waits_leaves_nothing(town, guest):
    pusher = stranger(town)
    stream = guest.open()
    answered(guest, stream, a_pass(None, upstream=place(pusher.name), downstream=place("s1")), raw("ping"))
    guest.tell(stream, raw("close"))  # what it has asked for is still awaited, until it hangs up
    town.runtime.run(stream.close())
    town.settle(lambda: not num_streams(town, "s0"))
    assert not pusher.ask(inputs())


def test_a_pass_whose_inputs_never_come_is_ended(swarm: MakeSwarm):
    swarm_ = swarm("0:4", idle_seconds=0.2)
    silent = stranger(swarm_)
    for _ in range(20):
        silent.tell(silent.open(), a_pass(None, upstream=place("nobody")))
    swarm_.settle(lambda: not num_streams(swarm_, "s0"))


@pytest.mark.parametrize("peer", ["s1", "nobody"])
def test_a_client_hears_the_same_wherever_it_lets_a_pass_be_pushed(town, guest, peer, monkeypatch):
    """Outputs for a server that does not wait for them, or that is not there."""
    monkeypatch.setattr(pass_pushes, "PUSH_FIRST_SECONDS", 0.05)
    stream = guest.open()
    _, expected = answered(guest, stream, a_pass())
    result, tensors = answered(guest, stream, a_pass(downstream=place(peer)))
    assert result.inputs is None
    assert torch.equal(tensors["hidden"], expected["hidden"])
    assert not guest.finish(stream)


def test_outputs_of_passes_for_a_server_that_never_reads_are_not_piled_up(town, guest, monkeypatch):
    monkeypatch.setattr(pass_pushes, "PUSH_FIRST_SECONDS", 0.05)
    deaf = town.call(town.network.node, f"deaf{guest.name}")

    async def ignore(stream: Stream) -> None:
        await asyncio.Event().wait()

    town.runtime.run(deaf.transport.listen(ignore))
    stream = guest.open()
    for _ in range(QUEUE_FRAMES + 1):  # what is on the line, and one that waits
        assert isinstance(answered(guest, stream, a_pass(downstream=place(deaf.transport.peer)))[0], PassResult)
    guest.tell(stream, a_pass(downstream=place(deaf.transport.peer)))
    for _ in range(30):
        assert isinstance(answered(guest, stream, raw("ping"))[0], Pong)
    town.runtime.run(stream.close())
    town.kill(deaf.transport.peer)


def test_a_server_that_pushes_a_pass_to_itself_computes_it_once(town, guest):
    engine, stream = town.servers["s0"].engine, guest.open()
    before = engine.num_passes
    assert isinstance(answered(guest, stream, a_pass())[0], PassResult)
    alone = engine.num_passes
    assert isinstance(answered(guest, stream, a_pass(upstream=place("s0"), hidden=None), raw("ping"))[0], Pong)
    other = guest.open()
    assert isinstance(answered(guest, other, a_pass(downstream=place("s0")))[0], PassResult)
    assert isinstance(guest.hear(stream)[0][0], PassResult)
    assert engine.num_passes - alone == 2 * (alone - before)
    assert not guest.finish(stream)
    assert not guest.finish(other)
