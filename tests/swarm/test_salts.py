"""Which cached beginnings a session may use: its own client's by default, or those of all clients that share theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from shoal import UserError
from shoal.gateway.guard.admission import Admission

from .harness import QUICK, Swarm, swarm_of
from .tiny_models import tiny_config

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.arange(3, 43)[None]
NUM_CACHED = 32
"""The full pages of the prompt."""


def num_cached(model: Any, **options: Any) -> int:
    """How many tokens of the prompt all servers had in their caches."""
    with model.stream(PROMPT, max_new_tokens=2, **options) as stream:
        assert len(list(stream)) == 2
        return stream.num_cached


def test_a_client_shares_its_own_beginnings_and_learns_nothing_of_others(swarm: MakeSwarm):
    net = swarm("0:2", "2:4")
    one, other = net.model(), net.model()
    assert [num_cached(one), num_cached(one), num_cached(other), num_cached(other)] == [0, NUM_CACHED, 0, NUM_CACHED]


def test_clients_share_beginnings_if_both_say_so(swarm: MakeSwarm):
    net = swarm("0:2", "2:4")
    sharing = [net.model(config=replace(QUICK, salt="")) for _ in range(2)]
    assert [num_cached(each) for each in (*sharing, net.model())] == [0, NUM_CACHED, 0]


def test_a_drawn_salt_can_not_be_guessed_nor_read_in_a_log(swarm: MakeSwarm):
    net = swarm("0:4")
    salts = {net.model().blocks.swarm.salt for _ in range(3)}
    assert len(salts) == 3
    assert all(len(each) == 32 for each in salts)
    assert "hush" not in repr(replace(QUICK, salt="hush"))


def test_streams_of_a_model_share_beginnings_by_their_own_salts(swarm: MakeSwarm):
    model = swarm("0:2", "2:4").model()
    cached = [num_cached(model, salt=salt) for salt in ("a", "b", "a", "b")]
    assert cached == [0, 0, NUM_CACHED, NUM_CACHED]
    assert num_cached(model) == 0


@pytest.mark.parametrize("family", ["llama", "mamba", "jamba"])
def test_a_stream_with_a_salt_has_the_same_tokens(family: str, tmp_path: Path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(tiny_config(family)).save_pretrained(tmp_path)
    with swarm_of(tmp_path, "0:2", "2:5") as net:
        model = net.model()
        without, with_salt = (
            [token.id for token in model.stream(PROMPT[:, :9], max_new_tokens=6, **options)]
            for options in ({}, {"salt": "a"})
        )
        assert with_salt == without


def test_a_stream_in_a_session_has_the_salt_of_the_session(swarm: MakeSwarm):
    model = swarm("0:4").model()
    with model.inference_session(max_length=64) as session, pytest.raises(UserError, match="a session has a salt"):
        model.stream(PROMPT, session=session, salt="a")


def test_each_key_of_a_gateway_has_a_salt_of_its_own():
    accounts = Admission(("one", "two"))
    first, again, second = (accounts.account(f"Bearer {key}").salt for key in ("one", "one", "two"))
    assert first == again != second
    assert len(first) == 32
    assert Admission().account(None).salt != Admission().account(None).salt
    sharing = Admission(("one", "two"), salt="")
    assert {sharing.account(f"Bearer {key}").salt for key in ("one", "two")} == {""}
