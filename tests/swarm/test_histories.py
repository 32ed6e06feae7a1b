"""A client may keep its inputs in a file, or rounded: a server that dies is replaced all the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shoal import UnsupportedOperation, UserError
from shoal.cli.options import History
from shoal.client.history.history import BLOCK_TOKENS
from shoal.client.history.history_store import HistoryStore
from shoal.client.options.client_options import HISTORIES, parse_history
from shoal.model import families
from shoal.net.wire.encodings import as_received
from shoal.tensors import Encoding

from ..call_after import CallAfter
from .harness import QUICK, Swarm
from .test_wire import tapped

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.arange(150)[None] * 7 % 90 + 2
PADDED = torch.cat((torch.zeros(2, 3, dtype=torch.long), PROMPT.view(2, 75)), dim=1)
MASK = PADDED.ne(0).long()
TOKEN_BYTES = 32 * 4


def store_of(model: Any) -> HistoryStore:
    store: HistoryStore = model.blocks.swarm.store
    return store


@pytest.mark.parametrize("memory_bytes", [0, 100 * TOKEN_BYTES])
@pytest.mark.parametrize("padded", [False, True])
def test_no_token_changes_when_a_lost_server_is_rebuilt_from_a_file(
    swarm: MakeSwarm, whole: PreTrainedModel, memory_bytes: int, padded: bool
):
    swarm_ = swarm("0:4")
    model = swarm_.model(config=replace(QUICK, history_memory=memory_bytes))
    inputs = {"inputs": PADDED, "attention_mask": MASK} if padded else {"inputs": PROMPT}
    expected = whole.generate(**inputs, max_new_tokens=90)
    with model.inference_session(max_length=400) as session:
        first = model.generate(**inputs, max_new_tokens=80, session=session)
        assert store_of(model).file_bytes
        assert store_of(model).memory_bytes <= memory_bytes
        for span in ("0:1", "1:3", "3:4"):
            swarm_.start(span)
        swarm_.kill("s0")
        rest = model.generate(None, max_new_tokens=10, session=session)
        assert session.servers == ("s1", "s2", "s3")
        assert store_of(model).memory_bytes <= memory_bytes
    assert torch.cat((first, rest), dim=1).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}], ids=lambda how: next(iter(how))
)
def test_beams_crops_and_samples_are_replayed_from_a_file(
    swarm: MakeSwarm, whole: PreTrainedModel, how: dict[str, Any]
):
    torch.manual_seed(3)
    expected = whole.generate(PROMPT, max_new_tokens=100, **how)
    swarm_ = swarm("0:2", "2:4", "0:4")
    model = swarm_.model(config=replace(QUICK, history_memory=0))
    for name in swarm_.servers:
        swarm_.call(swarm_.network.drop_after, name, 30)
    tap = tapped(swarm_)
    torch.manual_seed(3)
    assert model.generate(PROMPT, max_new_tokens=100, **how).tolist() == expected.tolist()
    assert sum(message.kind == "open" for _, message, _ in tap.frames) > 2


@pytest.mark.parametrize("history", ["bfloat16", "int8"])
def test_a_rounded_history_changes_nothing_until_a_server_is_lost_and_only_what_was_settled_then(
    swarm: MakeSwarm, whole: PreTrainedModel, history: Encoding
):
    swarm_ = swarm("0:2", "2:4")
    model = swarm_.model(config=replace(QUICK, history=history))
    tap = tapped(swarm_)
    with model.inference_session(max_length=400) as session:
        first = model.generate(PROMPT, max_new_tokens=80, session=session)
        assert first.tolist() == whole.generate(PROMPT, max_new_tokens=80).tolist()
        swarm_.start("2:4")
        swarm_.kill("s1")
        rest = model.generate(None, max_new_tokens=10, session=session)
        assert session.servers == ("s0", "s2")
    assert rest.shape == (1, 10)
    before, after = tap.inputs_of("s1"), tap.inputs_of("s2")
    num_settled = before.shape[1] // BLOCK_TOKENS * BLOCK_TOKENS
    assert torch.equal(after[:, :num_settled], as_received(before[:, :num_settled], history))
    assert torch.equal(after[:, num_settled : before.shape[1]], before[:, num_settled:])


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_inputs_that_travelled_in_fewer_bytes_are_kept_in_as_few_and_no_token_changes(swarm: MakeSwarm, wire: Encoding):
    config = replace(QUICK, wire=wire, history_memory=0)
    undisturbed = swarm("0:2", "2:4").model(config=config).generate(PROMPT, max_new_tokens=90)
    swarm_ = swarm("0:2", "2:4")
    model = swarm_.model(config=config)
    with model.inference_session(max_length=400) as session:
        first = model.generate(PROMPT, max_new_tokens=80, session=session)
        num_settled = session.num_tokens // BLOCK_TOKENS * BLOCK_TOKENS
        hop_bytes = {"bfloat16": 2 * 32, "int8": 32 + 2}[wire]
        assert store_of(model).file_bytes == 2 * num_settled * hop_bytes
        swarm_.start("2:4")
        swarm_.kill("s1")
        rest = model.generate(None, max_new_tokens=10, session=session)
    assert torch.cat((first, rest), dim=1).tolist() == undisturbed.tolist()


def test_sessions_that_have_ended_leave_nothing_in_memory_and_nothing_in_the_file(swarm: MakeSwarm):
    swarm_ = swarm("0:2", "2:4")
    model = swarm_.model(config=replace(QUICK, history_memory=200 * TOKEN_BYTES))
    model.generate(PROMPT, max_new_tokens=4)
    with model.inference_session(max_length=200) as session:
        model.generate(PROMPT, max_new_tokens=4, session=session)
        assert store_of(model).memory_bytes
    del session

    def forgotten() -> bool:
        gc.collect()
        return store_of(model).memory_bytes == store_of(model).file_bytes == 0

    swarm_.settle(forgotten)


def test_a_failure_in_mid_prompt_is_recovered_from_a_file(swarm: MakeSwarm, whole: PreTrainedModel):
    """The failed hop's history is not settled yet, those before it are."""
    swarm_ = swarm("0:2", "2:4", "2:4")
    model = swarm_.model(config=replace(QUICK, history_memory=0))
    for name in ("s1", "s2"):
        swarm_.call(swarm_.network.drop_after, name, 1)
    streamer = CallAfter(60, lambda: swarm_.call(swarm_.network.drop_after, "s0", 1))
    expected = whole.generate(PROMPT, max_new_tokens=80)
    assert model.generate(PROMPT, max_new_tokens=80, streamer=streamer).tolist() == expected.tolist()


def test_a_family_whose_tokens_an_encoding_changes_keeps_no_history_in_it(swarm: MakeSwarm, monkeypatch):
    monkeypatch.setitem(families.TOO_SENSITIVE, "int8", frozenset({"llama"}))
    swarm_ = swarm("0:4")
    with pytest.raises(UnsupportedOperation, match="'llama' is not certified for hidden states that are kept in int8"):
        swarm_.model(config=replace(QUICK, history="int8"))
    swarm_.model(config=replace(QUICK, history="bfloat16"))


def test_the_command_line_offers_the_same_encodings():
    assert {*History} == {*HISTORIES}


def test_an_unknown_encoding_of_a_history_is_refused():
    with pytest.raises(UserError, match="'zip' is not a way to keep a history"):
        parse_history("zip")
