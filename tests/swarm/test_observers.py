"""Observers are told what happens to a client's sessions, and in a server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from shoal.events import (
    AdapterStored,
    BlocksChanged,
    Event,
    PassComputed,
    RouteChosen,
    ServerLost,
    SessionClosed,
    SessionOpened,
    StageReplaced,
)
from shoal.spans import Span

from .harness import QUICK, Swarm

PROMPT = torch.arange(3, 11)[None]


def test_an_observer_sees_a_session_from_its_first_route_to_its_end(swarm: Callable[..., Swarm]):
    told: list[Event] = []
    net = swarm("0:2", "2:4", "2:4")
    model = net.model(config=replace(QUICK, observers=(told.append,)))
    with model.inference_session(max_length=32) as session:
        model.generate(PROMPT, max_new_tokens=2, session=session)
        lost = session.servers[1]
        net.kill(lost)
        model.generate(None, max_new_tokens=2, session=session)
    model.close()  # the observer is told of the rest
    first, opened, *others, closed = told
    assert isinstance(first, RouteChosen)
    assert first.span == Span(0, 4)
    assert [span for _, span in first.servers] == [Span(0, 2), Span(2, 4)]
    assert isinstance(opened, SessionOpened)
    assert (opened.span, opened.batch_size) == (Span(0, 4), 1)
    assert lost in [each.peer for each in others if isinstance(each, ServerLost)]
    (replaced,) = [each for each in others if isinstance(each, StageReplaced)]
    assert (replaced.peer, set(replaced.replacements)) == (lost, {"s1", "s2"} - {lost})
    assert isinstance(closed, SessionClosed)
    assert (closed.session, closed.model) == (opened.session, opened.model)


def test_observers_that_raise_or_hang_change_nothing(swarm: Callable[..., Swarm], whole: PreTrainedModel):
    go_on = threading.Event()

    def fail(event: Event) -> None:
        raise ValueError("a bug of the observer's")

    def hang(event: Event) -> None:
        go_on.wait(20)

    model = swarm("0:2", "2:4").model(config=replace(QUICK, observers=(fail, hang)))
    found = model.generate(PROMPT, max_new_tokens=5, do_sample=False).tolist()
    assert found == whole.generate(PROMPT, max_new_tokens=5, do_sample=False).tolist()
    go_on.set()


def test_an_observer_of_a_server_sees_its_blocks_passes_and_adapters(swarm: Callable[..., Swarm]):
    told: list[Event] = []
    net = swarm("0:4", observers=(told.append,))
    model = get_peft_model(net.model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.generate(PROMPT, max_new_tokens=3, do_sample=False)
    net.stop("s0")  # the observer is told of the rest
    first, *others, last = told
    assert isinstance(first, BlocksChanged)
    assert isinstance(last, BlocksChanged)
    assert (first.before, first.now, last.before, last.now) == (None, Span(0, 4), Span(0, 4), None)
    passes = [each for each in others if isinstance(each, PassComputed)]
    assert sum(each.num_tokens for each in passes) == PROMPT.shape[1] + 2  # the last token is not computed
    assert {(each.span, each.num_requests) for each in passes} == {(Span(0, 4), 1)}
    stored = [each for each in others if isinstance(each, AdapterStored)]
    assert len({each.name for each in stored}) == 4
    assert len(passes) + len(stored) == len(others)
