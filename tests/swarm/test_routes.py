"""Which routes a client takes through servers that measure, announce and serve as usual."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shoal import MissingBlocks
from shoal.errors import UserError
from shoal.net.identity import Identity
from shoal.net.memory import Frame
from shoal.net.ping import ask, measure_round_trips
from shoal.peers import ServerInfo
from shoal.policy.routing.route import Needs
from shoal.spans import Span

from .harness import QUICK, Swarm

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.tensor([[5, 17, 42, 9, 33]])


def announced(swarm: Swarm) -> dict[str, ServerInfo]:
    """What each server says of itself at present."""
    return {record.info.peer: record.info for record in swarm.network.records}


def neighbors(swarm: Swarm) -> dict[str, set[str]]:
    """The servers to which each server announces a round trip."""
    return {peer: {name for name, _ in info.round_trips} for peer, info in announced(swarm).items()}


def far_apart(swarm: Swarm, *pairs: tuple[str, str]) -> None:
    """Delay all messages between these pairs of peers."""
    for pair in pairs:
        swarm.call(swarm.network.delay, 0.05, *pair)


def test_servers_announce_their_round_trips_to_those_that_may_be_next_to_them_in_a_route(swarm: MakeSwarm):
    swarm_ = swarm("0:2", "2:4", "1:3", announce_seconds=0.05)
    expected = {"s0": {"s1", "s2"}, "s1": {"s0", "s2"}, "s2": {"s0", "s1"}}
    swarm_.settle(lambda: neighbors(swarm_) == expected)
    swarm_.kill("s2")
    swarm_.settle(lambda: neighbors(swarm_)["s0"] == {"s1"})


def test_a_server_that_joins_is_known_to_be_near_long_before_the_next_renewal(swarm: MakeSwarm):
    swarm_ = swarm("0:2", "2:4", announce_seconds=100.0)
    swarm_.settle(lambda: neighbors(swarm_) == {"s0": set(), "s1": {"s0"}})


@pytest.mark.parametrize("near", ["s1", "s2"])
def test_a_ring_goes_over_the_shorter_link_between_two_servers(swarm: MakeSwarm, near: str):
    swarm_ = swarm("0:2")
    far_apart(swarm_, ("s0", "s2" if near == "s1" else "s1"))
    swarm_.start("2:4", announce_seconds=0.05)
    swarm_.start("2:4", announce_seconds=0.05)
    swarm_.settle(lambda: all(announced(swarm_)[peer].round_trips for peer in ("s1", "s2")))
    client = swarm_.model().blocks.swarm
    route = swarm_.runtime.run(client.route(Span(0, 4), needs=Needs()))
    assert [hop.server.peer for hop in route.hops] == ["s0", near]
    assert near in route.explain()


def test_a_client_measures_the_round_trips_of_all_servers_before_its_first_route(swarm: MakeSwarm):
    swarm_ = swarm("0:4", "0:4", "0:4")
    swarm_.call(even, swarm_)
    model = swarm_.model(config=replace(QUICK, measure_seconds=5.0))
    (client,) = (peer for peer in swarm_.network.peers if peer.startswith("client"))
    far_apart(swarm_, (client, "s0"), (client, "s2"))
    route = swarm_.runtime.run(model.blocks.swarm.route(Span(0, 4), needs=Needs()))
    assert [hop.server.peer for hop in route.hops] == ["s1"]


def test_a_client_does_not_wait_long_for_servers_that_do_not_answer(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:4", "0:4")
    swarm_.call(swarm_.network.hang, "s0")
    model = swarm_.model(config=replace(QUICK, measure_seconds=0.05))
    assert model.generate(PROMPT, max_new_tokens=3).tolist() == whole.generate(PROMPT, max_new_tokens=3).tolist()


def test_pinned_blocks_go_through_their_peer_and_no_other(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:4", "0:4", "1:4")
    model = swarm_.model(config=replace(QUICK, pinned=((Span(2, 3), "s2"),)))
    with model.inference_session(max_length=20) as session:
        answer = model.generate(PROMPT, max_new_tokens=6, session=session)
        assert [hop.server.peer for hop in session.hops for block in hop.span if block == 2] == ["s2"]
        swarm_.kill("s2")
        with pytest.raises(MissingBlocks, match="no server for blocks 2:3 answers: s2"):
            model.generate(None, max_new_tokens=2, session=session)
    assert answer.tolist() == whole.generate(PROMPT, max_new_tokens=6).tolist()


def test_blocks_that_are_pinned_to_the_wrong_peer_are_an_error_that_says_what_it_holds(swarm: MakeSwarm):
    swarm_ = swarm("0:4", "0:2")
    model = swarm_.model(config=replace(QUICK, pinned=((Span(1, 4), "s1"),)))
    with pytest.raises(MissingBlocks, match="blocks 1:4 are pinned to s1, which holds 0:2") as error:
        model.generate(PROMPT, max_new_tokens=2)
    assert "shoal status --json" in str(error.value.hint)
    absent = Identity.temporary().peer
    unserved = swarm_.model(config=replace(QUICK, pinned=((Span(0, 4), absent),)))
    with pytest.raises(MissingBlocks, match=f"pinned to {absent}, which does not serve this model"):
        unserved.generate(PROMPT, max_new_tokens=2)
    with pytest.raises(UserError, match="blocks 2:5 cannot be pinned: the model has 4"):
        swarm_.model(config=replace(QUICK, pinned=((Span(2, 5), "s0"),)))


def test_servers_are_pinned_allowed_and_blocked_by_their_names(swarm: MakeSwarm):
    swarm_ = swarm("0:4", "0:4", "0:4")
    for name, server in zip(("mia", "hugo", "lily"), swarm_.servers.values(), strict=True):
        swarm_.call(rename, swarm_, server.info.peer, name)
    for options, expected in (
        ({"pinned": ((Span(0, 4), "hugo"),)}, "s1"),
        ({"allowed_servers": frozenset({"lily"})}, "s2"),
        ({"blocked_servers": frozenset({"hugo", "lily"})}, "s0"),
    ):
        model = swarm_.model(config=replace(QUICK, **options))
        with model.inference_session(max_length=20) as session:
            model.generate(PROMPT, max_new_tokens=2, session=session)
            assert session.servers == (expected,)
    with pytest.raises(UserError, match="no server is called 'toby'"):
        swarm_.model(config=replace(QUICK, blocked_servers=frozenset({"toby"})))


def test_the_other_chooser_finds_the_same_tokens(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:3", "1:4", "0:1", "3:4").model(config=replace(QUICK, chooser="nsga2"))
    assert model.generate(PROMPT, max_new_tokens=6).tolist() == whole.generate(PROMPT, max_new_tokens=6).tolist()


def test_eight_microbatches_go_to_two_equal_servers_in_halves(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:4", "0:4")
    swarm_.call(even, swarm_)
    given = Counter[tuple[str, str]]()

    def count(frame: Frame) -> Frame:
        for kind in "forward", "backward":
            given[kind, frame.receiver] += f'"kind":"{kind}"'.encode() in frame.header
        return frame

    swarm_.network.on_frame = count
    model = swarm_.model()
    ids = torch.randint(2, 97, (16, 500), generator=torch.Generator().manual_seed(0))
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    logits = model(inputs_embeds=embeds).logits
    torch.testing.assert_close(logits, whole(ids).logits, rtol=1e-4, atol=1e-5)
    assert [given["forward", peer] for peer in ("s0", "s1")] == [4, 4]
    logits.square().mean().backward()
    assert sum(given["backward", peer] for peer in ("s0", "s1")) == 8
    assert min(given["backward", peer] for peer in ("s0", "s1")) >= 2


def even(swarm: Swarm) -> None:
    """Let all servers announce the same speed, instead of the measured ones."""
    swarm.network.edit_announcements(lambda info: replace(info, decode_speed=100.0, prefill_speed=1000.0))


def rename(swarm: Swarm, peer: str, name: str) -> None:
    """Let a server announce another name."""
    swarm.network.edit_announcements(lambda info: replace(info, name=name) if info.peer == peer else info)


def test_a_peer_that_does_not_answer_has_no_distance(swarm: MakeSwarm):
    swarm_ = swarm("0:4", "0:4")
    swarm_.kill("s1")
    asker = swarm_.call(swarm_.network.node, "asker")
    found: dict[str, Any] = swarm_.runtime.run(
        measure_round_trips(asker.transport, [server.info for server in swarm_.servers.values()])
    )
    assert found["s0"] > 0
    assert found["s1"] is None
    assert swarm_.runtime.run(ask(asker.transport, "absent")) is None
    swarm_.runtime.run(asker.transport.close())
