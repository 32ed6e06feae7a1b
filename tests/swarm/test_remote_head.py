"""A server may hold the output head too: whoever asks it for logits gets the tokens of the whole model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from shoal import AutoDistributedModel, UserError
from shoal.model.remote_cache import RemoteCache
from shoal.policy.routing.switching import LOOK_TOKENS
from shoal.protocol import Failure, StepResult

from ..call_after import CallAfter
from .harness import QUICK, Swarm, swarm_of
from .intruder import FINGERPRINT, MODEL, Intruder, Raw, raw
from .test_generation import HOW, MASK, PADDED, PROMPT
from .test_hostile_servers import Rogue, always
from .tiny_models import tiny_config, tiny_model

MakeSwarm = Callable[..., Swarm]

REMOTE = replace(QUICK, remote_head=True)


def without_head(model: Any) -> Any:
    """The client's own projection spoilt: only a server can know the tokens."""
    projection = model.get_output_embeddings()

    def refuse(*_: Any) -> None:
        raise AssertionError("the client computes the head itself")

    projection.register_forward_pre_hook(refuse)
    return model


def swarm_with_head(swarm: MakeSwarm, *spans: str) -> Swarm:
    """Servers of which the last holds the head."""
    made = swarm(*spans[:-1])
    made.start(spans[-1], serve_head=True)
    return made


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("batch", ["one", "left-padded"])
def test_the_tokens_are_those_of_the_whole_model(swarm: MakeSwarm, whole: PreTrainedModel, how: str, batch: str):
    inputs = {"input_ids": PROMPT} if batch == "one" else {"input_ids": PADDED, "attention_mask": MASK}
    if how == "prompt lookup":  # takes one sequence only
        inputs = {"input_ids": PROMPT.repeat(1, 2)}
    model = without_head(swarm_with_head(swarm, "0:2", "2:4").model(config=REMOTE))
    torch.manual_seed(1)
    expected = whole.generate(**inputs, max_new_tokens=12, **HOW[how])
    torch.manual_seed(1)
    assert model.generate(**inputs, max_new_tokens=12, **HOW[how]).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "family", ["gemma2", "granite", "gpt2", "opt", "cohere", "mamba", "bloom", "minicpm3", "falcon_h1", "qwen3_moe"]
)
@pytest.mark.parametrize("top_k", [None, 20])
def test_scaled_capped_and_tied_heads_give_the_logits_of_the_whole_model(
    tmp_path: Path, family: str, top_k: int | None
):
    tiny_model(tiny_config(family)).save_pretrained(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = whole.generate(PADDED, attention_mask=MASK, **options)
    with swarm_of(tmp_path, "0:3") as made:
        made.start("3:5", serve_head=True)
        model = without_head(made.model(config=replace(REMOTE, head_top_k=top_k)))
        actual = model.generate(PADDED, attention_mask=MASK, **options)
        if (cache := actual.past_key_values) is not None:
            cache.session.close()
    assert actual.sequences.tolist() == expected.sequences.tolist()
    ours, theirs = torch.stack(actual.logits), torch.stack(expected.logits)
    if top_k is not None:
        assert (ours > float("-inf")).sum(dim=-1).unique().tolist() == [top_k]
        theirs = theirs.where(ours > float("-inf"), float("-inf"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * expected.logits[0].abs().max().item())


def test_a_session_over_several_calls_goes_on_from_where_it_was(swarm: MakeSwarm, whole: PreTrainedModel):
    model = without_head(swarm_with_head(swarm, "0:4").model(config=REMOTE))
    with model.inference_session(max_length=40) as session:
        first = model.generate(PROMPT, max_new_tokens=4, session=session)
        rest = model.generate(None, max_new_tokens=8, session=session)
    assert torch.cat((first, rest), dim=1).tolist() == whole.generate(PROMPT, max_new_tokens=12).tolist()


def long_prompt(num_tokens: int) -> torch.Tensor:
    return torch.randint(2, 97, (4, num_tokens), generator=torch.Generator().manual_seed(0))


def test_a_prompt_of_several_messages_is_answered_with_the_logits_of_its_end(swarm: MakeSwarm, whole: PreTrainedModel):
    prompt = long_prompt(400)  # 1,600 tokens
    model = without_head(swarm_with_head(swarm, "0:2", "2:4").model(config=REMOTE))
    assert model.generate(prompt, max_new_tokens=4).tolist() == whole.generate(prompt, max_new_tokens=4).tolist()


@torch.no_grad()
def test_logits_that_are_spread_over_several_messages_come_together(swarm: MakeSwarm, whole: PreTrainedModel):
    prompt = long_prompt(400)
    model = without_head(swarm_with_head(swarm, "0:4").model(config=REMOTE))
    cache = model_cache(model)
    logits = model(prompt, past_key_values=cache, logits_to_keep=300).logits
    torch.testing.assert_close(logits, whole(prompt).logits[:, -300:], rtol=1e-4, atol=1e-4)


def model_cache(model: Any) -> Any:
    return RemoteCache(model.blocks.new_session(batch_size=4, max_length=512))


def test_what_a_server_has_computed_before_is_not_sent_and_its_last_token_has_logits(
    swarm: MakeSwarm, whole: PreTrainedModel
):
    made = swarm_with_head(swarm, "0:2", "2:4")
    prompt = long_prompt(32)[:1]  # two pages, full to the last token
    expected = whole.generate(prompt, max_new_tokens=5).tolist()
    for _ in range(2):
        assert without_head(made.model(config=REMOTE)).generate(prompt, max_new_tokens=5).tolist() == expected
    longer = torch.cat((prompt, long_prompt(9)[1:2]), dim=1)
    model = without_head(made.model(config=REMOTE))
    assert model.generate(longer, max_new_tokens=5).tolist() == whole.generate(longer, max_new_tokens=5).tolist()


@pytest.mark.parametrize("order", [("0:4", "2:4"), ("2:4", "0:4")])
def test_the_route_ends_at_a_head_however_fast_the_others_are(
    swarm: MakeSwarm, whole: PreTrainedModel, order: tuple[str, str]
):
    made = swarm(order[0])
    made.start("0:2")
    made.start(order[1], serve_head=True)
    model = without_head(made.model(config=REMOTE))
    with model.inference_session(max_length=20) as session:
        answer = model.generate(PROMPT, max_new_tokens=6, session=session)
        assert session.servers[-1] == "s2"
    assert answer.tolist() == whole.generate(PROMPT, max_new_tokens=6).tolist()


# -- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}])
def test_another_head_takes_the_place_of_one_that_is_killed(
    swarm: MakeSwarm, whole: PreTrainedModel, how: dict[str, Any]
):
    made = swarm_with_head(swarm, "0:2", "2:4")
    model = without_head(made.model(config=REMOTE))
    made.start("2:4")
    made.start("2:3")
    made.start("3:4", serve_head=True)
    prompt = PROMPT.repeat(1, 2)
    torch.manual_seed(3)
    expected = whole.generate(prompt, max_new_tokens=10, **how)
    kill = CallAfter(4, lambda: made.kill("s1"))
    streams = {} if "num_beams" in how else {"streamer": kill}
    if not streams:
        made.call(made.network.drop_after, "s1", 5)
    torch.manual_seed(3)
    assert model.generate(prompt, max_new_tokens=10, **how, **streams).tolist() == expected.tolist()


def test_where_no_head_is_left_the_client_computes_it(
    swarm: MakeSwarm, whole: PreTrainedModel, caplog: pytest.LogCaptureFixture
):
    made = swarm_with_head(swarm, "0:2", "2:4")
    made.start("2:4")
    model = made.model(config=REMOTE)
    with caplog.at_level(logging.WARNING):
        answer = model.generate(PROMPT, max_new_tokens=10, streamer=CallAfter(4, lambda: made.kill("s1")))
        again = model.generate(PROMPT, max_new_tokens=10)
    assert answer.tolist() == again.tolist() == whole.generate(PROMPT, max_new_tokens=10).tolist()
    assert caplog.text.count("no server offers the output head: this client computes it") == 1


def test_the_log_says_nothing_of_heads_while_one_is_offered(
    swarm: MakeSwarm, whole: PreTrainedModel, caplog: pytest.LogCaptureFixture
):
    made = swarm_with_head(swarm, "0:2", "2:4")
    made.start("2:4")
    model = without_head(made.model(config=REMOTE))
    made.say_slow("s1")  # all the same it is not left for a server without a head
    length = 3 * LOOK_TOKENS  # faster routes are looked for twice, past each of the servers
    with caplog.at_level(logging.INFO):
        answer = model.generate(PROMPT, max_new_tokens=length)
    assert answer.tolist() == whole.generate(PROMPT, max_new_tokens=length).tolist()
    assert "output head" not in caplog.text


def test_a_swarm_without_heads_serves_those_who_would_like_one(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model(config=REMOTE)
    assert model.generate(PROMPT, max_new_tokens=6).tolist() == whole.generate(PROMPT, max_new_tokens=6).tolist()


def test_a_server_that_comes_back_without_its_head_is_used_without(swarm: MakeSwarm, whole: PreTrainedModel):
    made = swarm_with_head(swarm, "0:2", "2:4")
    model = made.model(config=REMOTE)
    with model.inference_session(max_length=20) as session:
        first = model.generate(PROMPT, max_new_tokens=3, session=session)
        made.restart("s1", "2:4")
        rest = model.generate(None, max_new_tokens=3, session=session)
    assert torch.cat((first, rest), dim=1).tolist() == whole.generate(PROMPT, max_new_tokens=6).tolist()


# -- the likeliest tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [1, 5, 1000])
def test_greedy_tokens_are_exact_with_the_likeliest_alone(swarm: MakeSwarm, whole: PreTrainedModel, top_k: int):
    model = without_head(swarm_with_head(swarm, "0:4").model(config=replace(REMOTE, head_top_k=top_k)))
    answer = model.generate(PADDED, attention_mask=MASK, max_new_tokens=12)
    assert answer.tolist() == whole.generate(PADDED, attention_mask=MASK, max_new_tokens=12).tolist()


def test_sampling_from_as_many_tokens_as_are_sent_is_exact(swarm: MakeSwarm, whole: PreTrainedModel):
    model = without_head(swarm_with_head(swarm, "0:4").model(config=replace(REMOTE, head_top_k=10)))
    how = {"do_sample": True, "top_k": 10, "top_p": 0.9, "temperature": 1.3, "max_new_tokens": 12}
    torch.manual_seed(5)
    expected = whole.generate(PROMPT, **how)
    torch.manual_seed(5)
    assert model.generate(PROMPT, **how).tolist() == expected.tolist()


# -- what is asked for, and what is not -------------------------------------------------------------------------------


def test_training_and_calls_without_a_session_use_the_clients_own_head(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm_with_head(swarm, "0:4").model(config=REMOTE)
    ours, theirs = model(PROMPT, labels=PROMPT), whole(PROMPT, labels=PROMPT)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-5)
    ours.loss.backward()
    assert model.get_output_embeddings().weight.grad is not None


def test_a_head_that_the_client_has_changed_is_its_own(swarm: MakeSwarm):
    model = swarm_with_head(swarm, "0:4").model(config=REMOTE)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = 0.0
        model.get_output_embeddings().weight[6:] *= -1.0
    ids = model.generate(PROMPT, max_new_tokens=6)
    with torch.no_grad():
        assert ids[0, PROMPT.shape[1]] == model(PROMPT, use_cache=False).logits[0, -1].argmax()


def test_logits_that_would_be_too_many_are_computed_by_the_client(
    swarm: MakeSwarm, whole: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("shoal.client.head.logits.MAX_LOGITS_BYTES", 97 * 4 * 2)
    model = swarm_with_head(swarm, "0:4").model(config=REMOTE)
    with torch.no_grad():
        logits = model(PADDED, past_key_values=model_cache(model), attention_mask=MASK).logits
    expected = whole(PADDED, attention_mask=MASK).logits
    torch.testing.assert_close(logits[MASK.bool()], expected[MASK.bool()], rtol=1e-4, atol=1e-5)


def test_a_head_is_served_after_the_last_block_only(swarm: MakeSwarm):
    with pytest.raises(UserError, match="the output head follows the last block, which is not among 0:2"):
        swarm("0:2", serve_head=True)


def test_models_without_a_head_and_numbers_below_one_are_refused(swarm: MakeSwarm):
    made = swarm("0:4")
    with pytest.raises(UserError, match="no output head that a server could compute"):
        made.model(AutoDistributedModel, config=REMOTE)
    with pytest.raises(UserError, match="head_top_k is for a head that a server computes"):
        made.model(config=replace(QUICK, head_top_k=5))
    with pytest.raises(UserError, match="head_top_k=0: it must be at least 1"):
        made.model(config=replace(REMOTE, head_top_k=0))


# -- strangers --------------------------------------------------------------------------------------------------------

OPENING = raw("open", model=MODEL, fingerprint=FINGERPRINT, start=0, end=4, batch_size=2, expected_length=16)


def asking(**fields: Any) -> Raw:
    return raw("step", {"hidden": torch.ones(2, 3, 32)}, position=0, **fields)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"logits": -1}, "not a valid message"),
        ({"logits": 1025}, "not a valid message"),
        ({"logits": "1"}, "not a valid message"),
        ({"logits": True}, "not a valid message"),
        ({"logits": 1, "top_k": 0}, "not a valid message"),
        ({"logits": 1, "top_k": 1 << 40}, "not a valid message"),
        ({"top_k": 3}, "the likeliest tokens without logits"),
        ({"logits": 4}, "logits of 4 tokens in a step of 3"),
        ({"logits": 1, "top_k": 98}, "the 98 likeliest of 97 tokens"),
    ],
)
def test_a_wrong_question_to_the_head_is_rejected(swarm: MakeSwarm, fields: dict[str, Any], reason: str):
    made = swarm_with_head(swarm, "0:4")
    *_, answer = Intruder(made, "s0").ask(OPENING, asking(**fields))
    assert isinstance(answer, Failure)
    assert answer.code == "rejected"
    assert reason in answer.reason
    made.servers["s0"].engine.check_integrity()


def test_more_logits_than_a_question_is_worth_are_rejected(swarm: MakeSwarm, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shoal.server.engine.validator.MAX_LOGITS_BYTES", 128 * 97 * 2)
    whole_batch = raw("step", {"hidden": torch.ones(128, 1, 32, dtype=torch.bfloat16)}, position=0, logits=1)
    made = swarm_with_head(swarm, "0:4")
    _, answered = Intruder(made, "s0").ask(OPENING, whole_batch)
    assert isinstance(answered, StepResult)
    monkeypatch.setattr("shoal.server.engine.validator.MAX_LOGITS_BYTES", 128 * 97 * 2 - 1)
    *_, answer = Intruder(made, "s0", name="another").ask(OPENING, whole_batch)
    assert isinstance(answer, Failure)
    assert (answer.code, answer.reason) == ("rejected", "more than 0 MiB of logits")


@pytest.mark.parametrize("end", [3, 4])
def test_logits_that_this_server_cannot_know_are_to_be_had_elsewhere(swarm: MakeSwarm, end: int):
    made = swarm("0:4") if end == 4 else swarm_with_head(swarm, "0:4")
    opening = raw("open", model=MODEL, fingerprint=FINGERPRINT, start=0, end=end, batch_size=2, expected_length=16)
    *_, answer = Intruder(made, "s0").ask(opening, asking(logits=1))
    assert isinstance(answer, Failure)
    assert answer.code == "misrouted"


def test_logits_come_in_the_dtype_of_the_question_and_raw(swarm: MakeSwarm):
    made = swarm_with_head(swarm, "0:4")
    question = raw("step", {"hidden": torch.ones(2, 3, 32, dtype=torch.float16)}, position=0, logits=2, top_k=4)
    (_, _), (result, tensors) = Intruder(made, "s0").exchange(OPENING, question)
    assert {spec.name: (spec.dtype, spec.shape, spec.encoding) for spec in result.tensors} == {
        "logits": ("float16", (2, 2, 4), "raw"),
        "ids": ("int64", (2, 2, 4), "raw"),
    }
    assert (tensors["logits"].diff(dim=-1) <= 0).all()


def test_where_nothing_is_wanted_nothing_is_sent(swarm: MakeSwarm):
    made = swarm_with_head(swarm, "0:4")
    (_, _), (result, tensors) = Intruder(made, "s0").exchange(OPENING, asking(logits=0))
    assert isinstance(result, StepResult)
    assert not tensors


LOGITS = torch.zeros(1, 1, 97)
BEST, IDS = torch.zeros(1, 1, 5), torch.arange(5)[None, None]


def with_nan(logits: torch.Tensor) -> torch.Tensor:
    return logits.index_fill(2, torch.tensor([3]), float("nan"))


ANSWERS: dict[str, tuple[int | None, dict[str, torch.Tensor]]] = {
    "hidden states": (None, {"hidden": torch.zeros(1, 5, 32)}),
    "nothing": (None, {}),
    "logits of all tokens": (None, {"logits": LOGITS.repeat(1, 5, 1)}),
    "another vocabulary": (None, {"logits": LOGITS[..., :-1]}),
    "another dtype": (None, {"logits": LOGITS.half()}),
    "NaN": (None, {"logits": with_nan(LOGITS)}),
    "the likeliest, which nobody asked for": (None, {"logits": LOGITS, "ids": torch.arange(97)[None, None]}),
    "all, where some were asked for": (5, {"logits": LOGITS}),
    "some without their names": (5, {"logits": BEST}),
    "fewer than asked for": (5, {"logits": BEST[..., 1:], "ids": IDS[..., 1:]}),
    "a token beyond the vocabulary": (5, {"logits": BEST, "ids": IDS + 93}),
    "a token below it": (5, {"logits": BEST, "ids": IDS - 1}),
    "a token twice": (5, {"logits": BEST, "ids": IDS % 4}),
    "names that are no numbers": (5, {"logits": BEST, "ids": IDS.float()}),
}


@pytest.mark.parametrize(("top_k", "tensors"), ANSWERS.values(), ids=ANSWERS.keys())
def test_a_head_that_answers_anything_else_is_left(
    swarm: MakeSwarm, whole: PreTrainedModel, top_k: int | None, tensors: dict[str, torch.Tensor]
):
    made = swarm_with_head(swarm, "0:4")
    rogue = Rogue(made, always(raw("step_result", tensors)), head=True)
    model = without_head(made.model(config=replace(REMOTE, head_top_k=top_k)))
    answer = model.generate(PROMPT, max_new_tokens=4)
    assert rogue.asked == ["open", "step"]
    assert answer.tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()


def test_a_server_that_only_says_that_it_has_a_head_is_left(swarm: MakeSwarm, whole: PreTrainedModel):
    made = swarm_with_head(swarm, "0:4")
    rogue = Rogue(made, always(raw("failure", code="misrouted", reason="no head")), head=True)
    model = without_head(made.model(config=REMOTE))
    assert model.generate(PROMPT, max_new_tokens=4).tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()
    assert rogue.asked == ["open", "step"]
