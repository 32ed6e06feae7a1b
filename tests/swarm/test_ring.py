"""Servers push steps to each other, and the client carries them where servers cannot."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from transformers import PreTrainedModel

from shoal.net.memory import Frame
from shoal.policy.routing.prompt_pieces import FIXED_TOKENS, RingCost, StageCost, piece_length

from .harness import QUICK, Swarm
from .test_failures import PROMPT

MakeSwarm = Callable[..., Swarm]


class Traffic:
    """Counts the frames of a kind from one peer to another."""

    def __init__(self, swarm: Swarm) -> None:
        self.steps: Counter[tuple[str, str]] = Counter()
        swarm.network.on_frame = self.count

    def count(self, frame: Frame) -> Frame:
        if json.loads(frame.header)["kind"] == "step":
            self.steps[frame.sender, frame.receiver] += 1
        return frame


def test_a_step_goes_straight_from_server_to_server(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:1", "1:3", "3:4")
    traffic = Traffic(swarm_)
    answer = swarm_.model().generate(PROMPT, max_new_tokens=6)
    assert answer.tolist() == whole.generate(PROMPT, max_new_tokens=6).tolist()
    assert traffic.steps == {("client3", "s0"): 6, ("s0", "s1"): 6, ("s1", "s2"): 6}


@pytest.mark.parametrize("how", ["cut", "a black hole"])
def test_the_client_carries_between_two_servers_that_cannot_reach_each_other(
    swarm: MakeSwarm, whole: PreTrainedModel, how: str
):
    swarm_ = swarm("0:1", "1:3", "3:4")
    traffic = Traffic(swarm_)
    lost = 0

    def lose(frame: Frame) -> Frame | None:
        nonlocal lost
        if {frame.sender, frame.receiver} == {"s0", "s1"}:
            lost += json.loads(frame.header)["kind"] == "step"  # they ping each other too, now and then
            return None
        return traffic.count(frame)

    if how == "cut":
        swarm_.call(swarm_.network.cut, "s0", "s1")
    else:
        swarm_.network.on_frame = lose
    model = swarm_.model()
    with model.inference_session(max_length=40) as session:
        answer = model.generate(PROMPT, max_new_tokens=6, session=session)
        assert session.servers == ("s0", "s1", "s2")
    assert answer.tolist() == whole.generate(PROMPT, max_new_tokens=6).tolist()
    assert traffic.steps == {("client3", "s0"): 6, ("client3", "s1"): 6, ("s1", "s2"): 6}
    assert lost == (how != "cut")


def test_a_link_between_servers_that_breaks_in_the_middle_costs_nothing(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:2", "2:4")
    model = swarm_.model()
    with model.inference_session(max_length=40) as session:
        first = model.generate(PROMPT, max_new_tokens=3, session=session)
        swarm_.call(swarm_.network.cut, "s0", "s1")
        rest = model.generate(None, max_new_tokens=5, session=session)
    assert torch.cat((first, rest), dim=1).tolist() == whole.generate(PROMPT, max_new_tokens=8).tolist()


def test_a_long_prompt_goes_in_pieces_and_several_are_in_flight(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:1", "1:2", "2:3", "3:4")
    # What servers announce depends on the machine. Without it, the number of servers decides how long the pieces are.
    swarm_.call(swarm_.network.edit_announcements, lambda info: replace(info, prefill_speed=None))
    traffic = Traffic(swarm_)
    prompt = torch.arange(480)[None] % 90 + 2
    answer = swarm_.model().generate(prompt, max_new_tokens=3)
    assert answer.tolist() == whole.generate(prompt, max_new_tokens=3).tolist()
    num_pieces = 480 / piece_length(RingCost((StageCost(FIXED_TOKENS, 1.0),) * 4), 480)
    assert num_pieces > 4
    ring = ("client4", "s0", "s1", "s2", "s3")
    assert traffic.steps == dict.fromkeys(pairwise(ring), num_pieces + 2)


def test_a_standby_takes_over_without_a_replay(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:2", "2:4", "0:2", "2:4")
    model = swarm_.model(config=replace(QUICK, standby=True))
    prompt = PROMPT.repeat(1, 10)
    with model.inference_session(max_length=120) as session:
        first = model.generate(prompt, max_new_tokens=20, session=session)

        def are_warm() -> bool:
            standbys = session.state.standbys
            return len(standbys) == 2 and all(each.is_open and each.progress.num_computed >= 48 for each in standbys)

        swarm_.settle(are_warm)
        traffic = Traffic(swarm_)
        sizes: list[int] = []
        count = swarm_.network.on_frame

        def watch(frame: Frame) -> Frame:
            header = json.loads(frame.header)
            if header["kind"] == "step" and frame.sender.startswith("client"):
                sizes.append(header["tensors"][0]["shape"][1])
            return count(frame)

        swarm_.network.on_frame = watch
        for victim in session.servers:
            swarm_.kill(victim)
        rest = model.generate(None, max_new_tokens=5, session=session)
    assert torch.cat((first, rest), dim=1).tolist() == whole.generate(prompt, max_new_tokens=25).tolist()
    assert max(sizes) <= 24
    assert traffic.steps


@pytest.mark.parametrize("when", ["idle", "generating"])
def test_a_server_that_drains_is_left_before_it_goes(swarm: MakeSwarm, whole: PreTrainedModel, when: str):
    swarm_ = swarm("0:2", "2:4", drain_seconds=20.0)
    model = swarm_.model()
    swarm_.start("0:2")
    with model.inference_session(max_length=60) as session:
        first = model.generate(PROMPT, max_new_tokens=4, session=session)
        victim = session.servers[0]
        stopping = swarm_.stopping(victim)
        if when == "idle":
            stopping.result(20)
            assert victim not in session.servers
        rest = model.generate(None, max_new_tokens=30, session=session)
        stopping.result(20)
        assert victim not in session.servers
    assert torch.cat((first, rest), dim=1).tolist() == whole.generate(PROMPT, max_new_tokens=34).tolist()


def test_a_server_that_dies_between_two_steps_is_replaced_before_the_next(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:2", "2:4", "0:2")
    model = swarm_.model()
    with model.inference_session(max_length=60) as session:
        first = model.generate(PROMPT, max_new_tokens=4, session=session)
        victim = session.servers[0]
        swarm_.kill(victim)
        swarm_.settle(lambda: victim not in session.servers and session.state.is_open)
        rest = model.generate(None, max_new_tokens=4, session=session)
    assert torch.cat((first, rest), dim=1).tolist() == whole.generate(PROMPT, max_new_tokens=8).tolist()


def test_a_server_that_becomes_slow_is_left_for_one_that_is_not(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:2", "2:4", "0:2")
    model = swarm_.model()
    with model.inference_session(max_length=200) as session:
        first = model.generate(PROMPT, max_new_tokens=20, session=session)
        victim = session.servers[0]
        swarm_.say_slow(victim)
        rest = model.generate(None, max_new_tokens=50, session=session)
        swarm_.settle(lambda: victim not in session.servers)
        last = model.generate(None, max_new_tokens=4, session=session)
    assert torch.cat((first, rest, last), dim=1).tolist() == whole.generate(PROMPT, max_new_tokens=74).tolist()
