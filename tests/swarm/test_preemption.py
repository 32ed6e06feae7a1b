"""Servers with too little room for all sessions: these preempt each other, begin again, and lose nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from shoal.errors import UserError
from shoal.policy.batching.pass_rules import RULES
from shoal.server.kv.session_cache import SessionCache

from .harness import QUICK, Swarm

MakeSwarm = Callable[..., Swarm]

NUM_CLIENTS, NUM_TOKENS = 5, 40
PATIENT = replace(QUICK, patience_seconds=60.0, silence_seconds=10.0)


@pytest.mark.parametrize("scheduling", RULES)
@pytest.mark.parametrize("spans", [["0:4"], ["0:4", "0:4"], ["0:2", "2:4"]], ids=" and ".join)
def test_generations_that_preempt_each_other_end_with_the_right_tokens(
    swarm: MakeSwarm, whole: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, spans: list[str], scheduling: str
):
    preempted: list[int] = []
    usual = SessionCache.preempt

    def preempt(session: SessionCache) -> None:
        preempted.append(session.num_tokens)
        usual(session)

    monkeypatch.setattr(SessionCache, "preempt", preempt)
    swarm_ = swarm(*spans, cache_tokens=96, scheduling=scheduling)
    models = [swarm_.model(config=PATIENT) for _ in range(NUM_CLIENTS)]
    prompts = [torch.randint(2, 97, (1, 14), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    together = threading.Barrier(NUM_CLIENTS)
    answers: dict[int, list[list[int]]] = {}

    def ask(index: int) -> None:
        together.wait()
        answers[index] = models[index].generate(prompts[index], max_new_tokens=NUM_TOKENS).tolist()

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(NUM_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [whole.generate(prompt, max_new_tokens=NUM_TOKENS).tolist() for prompt in prompts]
    assert [answers.get(index) for index in range(NUM_CLIENTS)] == expected
    assert preempted
    for server in swarm_.servers.values():
        swarm_.settle(lambda server=server: server.engine.cache_tokens_left == server.engine.cache_tokens)
        swarm_.call(server.engine.check_integrity)


def test_a_server_with_an_unknown_scheduling_does_not_start(swarm: MakeSwarm):
    with pytest.raises(UserError, match="no scheduling 'best'"):
        swarm("0:4", scheduling="best")
