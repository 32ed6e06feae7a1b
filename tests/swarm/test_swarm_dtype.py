"""Servers that join and clients compute in the swarm's dtype, unless their options name another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .harness import QUICK, Swarm

PROMPT = torch.tensor([[1, 5, 9, 33, 7]])


@pytest.fixture(scope="module")
def stored_in_bfloat16(whole: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bfloat16")
    copy.deepcopy(whole).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture
def float32_swarm(swarm: Callable[..., Swarm], stored_in_bfloat16: Path) -> Swarm:
    """A swarm of one server whose options name float32, and that holds the first half of the model."""
    started = swarm()
    started.start("0:2", folder=stored_in_bfloat16)
    return started


def test_a_server_and_a_client_that_join_a_float32_swarm_compute_in_float32(float32_swarm, stored_in_bfloat16):
    joined = float32_swarm.start("2:4", folder=stored_in_bfloat16, dtype="auto")
    assert joined.info.dtype == "float32"
    model = float32_swarm.model(folder=stored_in_bfloat16, dtype="auto")
    assert model.dtype is torch.float32
    whole = AutoModelForCausalLM.from_pretrained(stored_in_bfloat16, dtype=torch.float32)
    expected = whole.generate(PROMPT, do_sample=False, max_new_tokens=12)
    assert model.generate(PROMPT, do_sample=False, max_new_tokens=12).tolist() == expected.tolist()
    torch.testing.assert_close(model(PROMPT).logits, whole(PROMPT).logits)


def test_the_first_server_and_a_client_without_servers_take_the_models_own_dtype(swarm, stored_in_bfloat16):
    empty = swarm()
    assert empty.model(folder=stored_in_bfloat16, dtype="auto").dtype is torch.bfloat16
    assert empty.start("0:4", folder=stored_in_bfloat16, dtype="auto").info.dtype == "bfloat16"


def test_a_server_that_comes_back_alone_takes_the_models_own_dtype_and_not_its_former_one(
    float32_swarm, stored_in_bfloat16
):
    assert float32_swarm.restart("s0", "0:2", folder=stored_in_bfloat16, dtype="auto").info.dtype == "bfloat16"


def test_servers_of_other_weights_do_not_decide_the_dtype(swarm, stored_in_bfloat16):
    of_others = swarm("0:4")
    joined = of_others.start("0:4", folder=stored_in_bfloat16, dtype="auto")
    assert joined.model.key == of_others.servers["s0"].model.key
    assert joined.info.dtype == "bfloat16"
    assert of_others.model(folder=stored_in_bfloat16, dtype="auto").dtype is torch.bfloat16


def test_a_client_computes_in_the_dtype_of_the_servers_that_it_may_use(float32_swarm, stored_in_bfloat16):
    float32_swarm.start("0:4", folder=stored_in_bfloat16, dtype="float16")
    config = replace(QUICK, blocked_servers=frozenset({float32_swarm.servers["s1"].info.peer}))
    assert float32_swarm.model(folder=stored_in_bfloat16, dtype="auto").dtype is torch.float16
    assert float32_swarm.model(folder=stored_in_bfloat16, dtype="auto", config=config).dtype is torch.float32


def test_a_server_and_a_client_compute_in_the_dtype_that_their_options_name(float32_swarm, stored_in_bfloat16, caplog):
    named = float32_swarm.start("2:4", folder=stored_in_bfloat16, dtype="bfloat16")
    assert named.info.dtype == "bfloat16"
    assert "the swarm computes in float32, but this server in bfloat16, as its options say" in caplog.text
    assert float32_swarm.model(folder=stored_in_bfloat16, dtype="bfloat16").dtype is torch.bfloat16


def test_a_mixture_of_dtypes_is_logged_once_by_servers_and_by_clients(float32_swarm, stored_in_bfloat16, caplog):
    model = float32_swarm.model(folder=stored_in_bfloat16, dtype="auto")
    assert "compute differently" not in caplog.text
    float32_swarm.start("2:4", folder=stored_in_bfloat16, dtype="bfloat16")
    first, other = (server.info.peer[-6:] for server in float32_swarm.servers.values())

    def said(logger: str) -> list[str]:
        return [record.message for record in caplog.records if record.name == logger and "differ" in record.message]

    expected = f"servers of this model compute differently: bfloat16: {other}; float32: {first}"
    float32_swarm.settle(lambda: bool(said("shoal.server.neighbors")))
    assert said("shoal.server.neighbors") == [expected]
    for _ in range(2):
        model(PROMPT)
    assert said("shoal.client.swarm.known.directory_cache") == [expected]
