from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from shoal import (
    AutoDistributedModel,
    AutoDistributedModelForSequenceClassification,
    MissingBlocks,
    UnsupportedOperation,
    UserError,
)
from shoal.client.inference_session import InferenceSession
from shoal.client.options.client_options import INITIAL_PEERS
from shoal.client.runtime import Runtime
from shoal.model.remote_cache import RemoteCache
from shoal.model.weights.checkpoint import Checkpoint
from shoal.net import NetworkConfig
from shoal.net.memory import MemoryNetwork
from shoal.prefix import PAGE_TOKENS

from .harness import FLOAT32, Swarm, swarm_of
from .tiny_models import tiny_config, with_noise

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.tensor([[5, 17, 42, 9, 33]])
MORE = torch.tensor([[8, 61]])


def free_tokens(swarm: Swarm) -> list[int]:
    return [server.engine.cache_tokens_left for server in swarm.servers.values()]


def test_each_call_of_a_session_continues_the_one_before(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    with model.inference_session(max_length=64) as session:
        first = model.generate(PROMPT, max_new_tokens=4, session=session)
        second = model.generate(None, max_new_tokens=3, session=session)
        third = model.generate(MORE, max_new_tokens=4, session=session)
    spoken = torch.cat((first, second), dim=1)
    assert spoken.tolist() == whole.generate(PROMPT, max_new_tokens=7).tolist()
    expected = whole.generate(torch.cat((spoken, MORE), dim=1), max_new_tokens=4)
    assert torch.cat((spoken, third), dim=1).tolist() == expected.tolist()


def test_a_session_may_be_given_the_whole_text_so_far(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:4").model()
    with model.inference_session(max_length=64) as session:
        first = model.generate(PROMPT, max_new_tokens=4, session=session)
        everything = torch.cat((first, MORE), dim=1)
        assert model.generate(everything, max_new_tokens=4, session=session).tolist() == (
            whole.generate(everything, max_new_tokens=4).tolist()
        )


def test_a_session_goes_on_after_a_beam_search(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    with model.inference_session(max_length=64) as session:
        best = model.generate(PROMPT, max_new_tokens=5, num_beams=3, session=session)
        assert best.tolist() == whole.generate(PROMPT, max_new_tokens=5, num_beams=3).tolist()
        then = torch.cat((best, model.generate(None, max_new_tokens=3, session=session)), dim=1)
        assert then.tolist() == whole.generate(best, max_new_tokens=3).tolist()


def test_tokens_that_would_be_read_twice_are_refused(swarm: MakeSwarm):
    model = swarm("0:4").model()
    with model.inference_session(max_length=64) as session:
        said = model.generate(PROMPT, max_new_tokens=12, session=session)
        edited = said.clone()
        edited[0, -1] = (edited[0, -1] + 1) % 97
        with pytest.raises(UserError, match="repeat the session's first 16"):
            model.generate(edited, max_new_tokens=1, session=session)


TOO_LONG = "5 tokens and 5 new ones in a session of at most 8"


def as_generated(model, prompt: torch.Tensor | None, **options: Any) -> list[int]:
    """What `generate()` returns for one text."""
    return model.generate(prompt, **options)[0].tolist()


def as_streamed(model, prompt: torch.Tensor | None, **options: Any) -> list[int]:
    """The same by a stream."""
    with model.stream(prompt, **options) as stream:
        return ([] if prompt is None else prompt[0].tolist()) + [token.id for token in stream]


@pytest.mark.parametrize("generated", [as_generated, as_streamed])
@pytest.mark.parametrize(
    "options",
    [
        {"max_new_tokens": 5},
        {"max_length": 10},
        {"generation_config": GenerationConfig(max_new_tokens=5)},
        {"max_new_tokens": 5, "prompt_lookup_num_tokens": 3},
        {"max_new_tokens": 5, "draft": "auto"},
    ],
)
def test_a_text_that_has_no_place_in_its_session_is_refused_before_anything_is_computed(
    swarm: MakeSwarm, whole: PreTrainedModel, generated: Callable[..., list[int]], options: dict[str, Any]
):
    if generated is as_streamed:
        options = {name: value for name, value in options.items() if name != "prompt_lookup_num_tokens"}
    model = swarm("0:4").model()
    with model.inference_session(max_length=8) as session:
        with pytest.raises(UserError, match=TOO_LONG) as refused:
            generated(model, PROMPT, session=session, **options)
        assert "max_new_tokens=4" in (refused.value.hint or "")
        assert session.position == 0
        assert not session.servers
        expected = whole.generate(PROMPT, max_new_tokens=4)[0].tolist()
        assert generated(model, PROMPT, session=session, max_new_tokens=4) == expected
        with pytest.raises(UserError, match="9 tokens in a session of at most 8"):
            generated(model, None, session=session)


@pytest.mark.parametrize("generated", [as_generated, as_streamed])
def test_a_text_of_no_said_length_ends_with_its_session(
    swarm: MakeSwarm, whole: PreTrainedModel, generated: Callable[..., list[int]]
):
    """Whether the length is Transformers' default, or one that came with the model."""
    model = swarm("0:4").model()
    expected = whole.generate(PROMPT, max_new_tokens=20)[0].tolist()
    with model.inference_session(max_length=8) as session:
        assert generated(model, PROMPT, session=session) == expected[:9]
    with model.inference_session(max_length=40) as session:
        assert generated(model, PROMPT, session=session) == expected
    model.generation_config.max_new_tokens = 30
    with model.inference_session(max_length=10) as session:
        assert generated(model, PROMPT, session=session) == expected[:11]


def test_beams_of_no_said_length_end_with_their_session(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:4").model()
    with model.inference_session(max_length=9) as session:
        answer = model.generate(PROMPT, num_beams=3, session=session)
    assert answer.tolist() == whole.generate(PROMPT, num_beams=3, max_new_tokens=5).tolist()


class StopsAfter(BaseStreamer):
    """A user who presses Ctrl-C at some token."""

    def __init__(self, num_tokens: int) -> None:
        self.num_left = num_tokens + 1  # the prompt comes first

    def put(self, value: torch.Tensor) -> None:
        self.num_left -= 1
        if self.num_left < 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


@pytest.mark.parametrize("num_calls", [0, 1])
def test_an_interrupted_call_is_forgotten_by_the_session(swarm: MakeSwarm, whole: PreTrainedModel, num_calls: int):
    model = swarm("0:2", "2:4").model()
    with model.inference_session(max_length=64) as session:
        said = PROMPT
        for _ in range(num_calls):
            said = model.generate(said, max_new_tokens=4, session=session)
        with pytest.raises(KeyboardInterrupt):
            model.generate(said, max_new_tokens=9, streamer=StopsAfter(5), session=session)
        everything = torch.cat((said, MORE), dim=1)
        assert model.generate(everything, max_new_tokens=5, session=session).tolist() == (
            whole.generate(everything, max_new_tokens=5).tolist()
        )


def interrupted_call(model, session) -> None:
    with pytest.raises(KeyboardInterrupt):
        model.generate(MORE, max_new_tokens=9, streamer=StopsAfter(5), session=session)


def wrong_call(model, session) -> None:
    with pytest.raises(ValueError, match="no_such_option"):
        model.generate(MORE, max_new_tokens=9, no_such_option=1, session=session)


def wrong_stream(model, session) -> None:
    with pytest.raises(UserError, match="num_guesses"):
        model.stream(MORE, max_new_tokens=9, num_guesses=99, session=session)


def closed_stream(model, session) -> None:
    with model.stream(MORE, max_new_tokens=9, session=session) as stream:
        next(iter(stream))


@pytest.mark.parametrize("fail", [interrupted_call, wrong_call, wrong_stream, closed_stream])
@pytest.mark.parametrize("num_calls", [0, 1])
def test_a_session_is_after_a_failed_call_what_it_was_before(
    swarm: MakeSwarm, whole: PreTrainedModel, num_calls: int, fail
):
    """Also for what goes on with it by other means, and is not lost for the next call."""
    model = swarm("0:2", "2:4").model()
    with model.inference_session(max_length=64) as session:
        said = PROMPT[:, :0]
        if num_calls:
            said = model.generate(PROMPT, max_new_tokens=4, session=session)
        position = session.position
        fail(model, session)
        assert session.position == position
        everything = torch.cat((said, PROMPT), dim=1)
        logits = model(everything[:, position:]).logits
        expected = whole(everything).logits[:, position:]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        answer = model.generate(max_new_tokens=5, session=session)
        assert answer.tolist() == whole.generate(everything, max_new_tokens=5)[:, everything.shape[1] :].tolist()


@pytest.mark.parametrize("how", ["prompt lookup", "assistant", "beams", "samples"])
def test_a_later_call_of_a_session_may_decode_in_another_way(swarm: MakeSwarm, whole: PreTrainedModel, how: str):
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "assistant": {"assistant_model": whole},
        "beams": {"num_beams": 3},
        "samples": {"do_sample": True, "num_return_sequences": 3},
    }[how]
    model = swarm("0:2", "2:4").model()
    with model.inference_session(max_length=64) as session:
        said = model.generate(PROMPT, max_new_tokens=4, session=session)
        everything = torch.cat((said, said), dim=1)
        torch.manual_seed(1)
        answer = model.generate(everything, max_new_tokens=6, session=session, **options)
    torch.manual_seed(1)
    assert answer.tolist() == whole.generate(everything, max_new_tokens=6, **options).tolist()


def test_padded_sequences_of_a_session_become_beams(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:2", "2:4", "2:4")
    model = swarm_.model()
    prompt = torch.tensor([[0, 0, 5, 17, 42], [7, 8, 9, 10, 11]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with model.inference_session(max_length=64, batch_size=2) as session:
        said = model.generate(prompt, attention_mask=mask, max_new_tokens=4, session=session)
        swarm_.kill(session.servers[-1])
        answer = model.generate(None, max_new_tokens=4, num_beams=3, session=session)
    grown = torch.cat((mask, mask.new_ones(2, 4)), dim=1)
    expected = whole.generate(said, attention_mask=grown, max_new_tokens=4, num_beams=3)
    assert answer.tolist() == expected[:, said.shape[1] :].tolist()


@pytest.mark.parametrize("explicit", [False, True])
def test_guessed_tokens_end_where_the_text_does(swarm: MakeSwarm, whole: PreTrainedModel, explicit: bool):
    model = swarm("0:4").model()
    repetitive = PROMPT[:, :2].repeat(1, 5)
    for num_tokens in range(1, 13):
        with contextlib.ExitStack() as stack:
            session = None
            if explicit:
                session = stack.enter_context(model.inference_session(max_length=repetitive.shape[1] + num_tokens - 1))
            answer = model.generate(repetitive, max_new_tokens=num_tokens, prompt_lookup_num_tokens=8, session=session)
        assert answer.tolist() == whole.generate(repetitive, max_new_tokens=num_tokens).tolist()


def test_a_mask_of_another_length_than_the_tokens_is_refused(swarm: MakeSwarm):
    model = swarm("0:4").model()
    with model.inference_session(max_length=64) as session:
        cache = RemoteCache(session)
        model(PROMPT, past_key_values=cache)
        with pytest.raises(UserError, match="a mask of 5 tokens for 2 tokens after the session's 5"):
            model(MORE, attention_mask=torch.ones(1, 5), past_key_values=cache)


def test_a_closed_session_frees_its_cache(swarm: MakeSwarm):
    swarm_ = swarm("0:2", "2:4")
    model = swarm_.model()
    before = free_tokens(swarm_)
    with model.inference_session(max_length=100, batch_size=1) as session:
        model.generate(PROMPT, max_new_tokens=2, session=session)
        assert free_tokens(swarm_) == [room - PAGE_TOKENS for room in before]
        model.generate(None, max_new_tokens=PAGE_TOKENS, session=session)
        assert free_tokens(swarm_) == [room - 2 * PAGE_TOKENS for room in before]
    with pytest.raises(UserError, match="closed"):
        model.generate(PROMPT, max_new_tokens=2, session=session)
    model.generate(PROMPT, max_new_tokens=2)
    model(PROMPT)
    swarm_.settle(lambda: free_tokens(swarm_) == before)


def test_a_failed_call_frees_its_cache_while_its_error_is_still_referenced(swarm: MakeSwarm):
    swarm_ = swarm("0:2", "2:4")
    model = swarm_.model()
    before = free_tokens(swarm_)
    with pytest.raises(KeyboardInterrupt) as interrupt:
        model.generate(PROMPT, max_new_tokens=9, streamer=StopsAfter(5))
    swarm_.settle(lambda: free_tokens(swarm_) == before)
    assert interrupt.tb is not None


def test_a_returned_cache_stays_open(swarm: MakeSwarm):
    model = swarm("0:4").model()
    result = model.generate(PROMPT, max_new_tokens=4, return_dict_in_generate=True)
    result.past_key_values.crop(-1)
    logits = model(result.sequences[:, -2:-1], past_key_values=result.past_key_values).logits
    assert logits.argmax(dim=-1).tolist() == result.sequences[:, -1:].tolist()


class ClosesAfter(StopsAfter):
    """A user who closes the session on another thread, at some token."""

    def __init__(self, num_tokens: int, swarm: Swarm, session: InferenceSession) -> None:
        super().__init__(num_tokens)
        self._swarm = swarm
        self._session = session
        self.closing = threading.Thread(target=session.close)

    def put(self, value: torch.Tensor) -> None:
        self.num_left -= 1
        if self.num_left == 0:
            server = self._swarm.servers["s0"]
            whole_step = server.engine.step

            async def step(*args: Any, **kwargs: Any) -> torch.Tensor:
                self.closing.start()
                await asyncio.sleep(3600)
                return await whole_step(*args, **kwargs)

            server.engine.step = step


def test_closing_a_session_ends_the_step_that_runs_in_it(swarm: MakeSwarm, caplog: pytest.LogCaptureFixture):
    swarm_ = swarm("0:4")
    model = swarm_.model()
    before = free_tokens(swarm_)
    session = model.inference_session(max_length=64)
    closes = ClosesAfter(3, swarm_, session)
    with pytest.raises(UserError, match="closed"):
        model.generate(PROMPT, max_new_tokens=20, streamer=closes, session=session)
    closes.closing.join()
    swarm_.settle(lambda: free_tokens(swarm_) == before)
    assert "looking for another server" not in caplog.text
    with pytest.raises(UserError, match="closed"):
        session.step(torch.zeros(1, 1, 32))


def test_a_copy_of_the_model_shares_its_network(swarm: MakeSwarm, whole: PreTrainedModel):
    twin = copy.deepcopy(swarm("0:4").model())
    assert twin.generate(PROMPT, max_new_tokens=4).tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()


def test_a_slice_of_the_blocks_runs_by_itself(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    blocks = model.transformer.h[1:3]
    assert len(model.transformer.h) == 4
    assert len(blocks) == 2

    def reference(hidden: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hooks = [
            whole.model.layers[1].register_forward_pre_hook(lambda _, args: (hidden, *args[1:])),
            whole.model.layers[2].register_forward_hook(lambda _, __, output: seen.append(output)),
        ]
        whole.model(inputs_embeds=hidden.detach(), use_cache=False)
        for hook in hooks:
            hook.remove()
        return seen[0]

    hidden = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    twin = hidden.detach().clone().requires_grad_(True)
    output, expected = blocks(hidden), reference(twin)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(hidden.grad, twin.grad, rtol=1e-4, atol=1e-4)

    with blocks.inference_session(max_length=10, batch_size=2) as session:
        steps = [session.step(part) for part in hidden.split(2, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_a_module_may_stand_between_two_slices(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:4").model()
    h = model.transformer.h
    hidden = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(1))
    between = torch.nn.Linear(32, 32)
    h[2:](between(h[:2](hidden))).sum().backward()
    assert between.weight.grad is not None
    assert between.weight.grad.abs().sum() > 0


def test_a_backward_pass_through_a_session_is_refused(swarm: MakeSwarm):
    model = swarm("0:4").model()
    with model.inference_session(max_length=10) as session:
        output = session.step(torch.randn(1, 2, 32, requires_grad=True))
        with pytest.raises(UnsupportedOperation, match="do not flow through an inference session"):
            output.sum().backward()


def test_a_session_keeps_its_own_copy_of_what_it_was_given(swarm: MakeSwarm):
    swarm_ = swarm("0:4", "0:4")
    blocks = swarm_.model().transformer.h
    hidden = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0))
    expected = blocks(hidden)
    buffer, position = torch.empty(1, 1, 32), torch.empty(1, 1, dtype=torch.int64)
    outputs = []
    with blocks.inference_session(max_length=8) as session:
        for token in range(4):
            buffer.copy_(hidden[:, token : token + 1])
            outputs.append(session.step(buffer, position_ids=position.fill_(token)))
            if token == 2:
                swarm_.kill(session.servers[0])
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=1e-3, atol=1e-4)


def test_inputs_that_are_changed_before_the_backward_pass_are_refused(swarm: MakeSwarm):
    blocks = swarm("0:4").model().transformer.h
    with torch.inference_mode():
        blocks(torch.zeros(1, 1, 32))
    hidden = torch.randn(1, 3, 32, requires_grad=True) * 1
    output = blocks(hidden)
    hidden.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_gradients_of_gradients_are_refused(swarm: MakeSwarm):
    blocks = swarm("0:4").model().transformer.h
    hidden = torch.randn(1, 3, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(blocks(hidden).square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_empty_inputs_are_refused(swarm: MakeSwarm):
    model = swarm("0:4").model()
    with pytest.raises(UserError, match=r"inputs of shape \[1, 0, 32\]"):
        model.transformer.h(torch.zeros(1, 0, 32))
    with model.inference_session(max_length=8) as session, pytest.raises(UserError, match="inputs of shape"):
        session.step(torch.zeros(0, 1, 32))


def test_options_that_can_never_work_are_refused_when_the_model_is_opened(swarm: MakeSwarm):
    swarm_ = swarm()
    with pytest.raises(UserError, match="has 4 blocks, not 2"):
        swarm_.model(num_hidden_layers=2)
    with pytest.raises(UserError, match="float64 is not a dtype to compute in"):
        swarm_.model(dtype="float64")


@pytest.mark.parametrize("peers", ["/a /b", "/a,/b", "/a, /b ", ["/a", "/b"]])
@pytest.mark.parametrize("where", ["argument", "environment"])
def test_peers_may_be_given_in_one_string(
    folder: Path, monkeypatch: pytest.MonkeyPatch, peers: str | list[str], where: str
):
    asked: list[tuple[str, ...]] = []

    def join(config: NetworkConfig) -> None:
        asked.append(config.initial_peers)
        raise UserError("enough")

    monkeypatch.setattr("shoal.client.shared_network.join", join)
    monkeypatch.setenv(INITIAL_PEERS, peers if isinstance(peers, str) else " ".join(peers))
    with pytest.raises(UserError, match="enough"):
        AutoDistributedModel.from_pretrained(folder, initial_peers=peers if where == "argument" else None)
    assert asked == [("/a", "/b")]


def test_blocks_outlive_the_model_that_they_were_taken_from(folder: Path):
    runtime = Runtime()
    thread = runtime.thread
    node = MemoryNetwork().node("client")
    blocks = AutoDistributedModel.from_checkpoint(Checkpoint.open(folder), node, runtime, options=FLOAT32).transformer.h
    del runtime
    gc.collect()
    with pytest.raises(MissingBlocks):
        blocks(torch.zeros(1, 1, 32))
    del blocks
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()


def test_several_threads_use_one_model(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model()
    prompts = [PROMPT + shift for shift in range(6)]
    expected = [whole.generate(prompt, max_new_tokens=8).tolist() for prompt in prompts]
    answers: list[list[list[int]] | None] = [None] * len(prompts)

    def ask(index: int) -> None:
        answers[index] = model.generate(prompts[index], max_new_tokens=8).tolist()

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == expected


def test_the_headless_model_gives_the_last_hidden_state(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model(AutoDistributedModel)
    expected = whole.model(PROMPT).last_hidden_state
    torch.testing.assert_close(model(PROMPT).last_hidden_state, expected, rtol=1e-4, atol=1e-5)


def test_a_classification_head_is_new_and_can_be_trained(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:2", "2:4").model(AutoDistributedModelForSequenceClassification, num_labels=3)
    assert model(PROMPT).logits.shape == (1, 3)
    torch.testing.assert_close(
        model(PROMPT).logits, model.score(whole.model(PROMPT).last_hidden_state[:, -1]), rtol=1e-4, atol=1e-5
    )
    optimizer = torch.optim.SGD([model.score.weight], lr=0.05)
    losses = []
    for _ in range(3):
        loss = model(PROMPT, labels=torch.tensor([2])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gpt_neox", "mamba"])
def test_every_family_calls_its_blocks_transformer_h(family: str, tmp_path: Path):
    torch.manual_seed(0)
    whole = with_noise(AutoModelForCausalLM.from_config(tiny_config(family)).eval())
    whole.save_pretrained(tmp_path)
    with swarm_of(tmp_path, "0:2", "2:5") as swarm_:
        model = swarm_.model()
        h = model.transformer.h
        assert len(h) == 5
        hidden = torch.randn(1, 3, 32)
        torch.testing.assert_close(h[3:](h[:3](hidden)), h(hidden), rtol=1e-4, atol=1e-5)
        assert model.generate(PROMPT % 30, max_new_tokens=5).tolist() == (
            whole.generate(PROMPT % 30, max_new_tokens=5).tolist()
        )
