"""Whatever a server answers, the client gets what the whole model says, from somebody else."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shoal import MissingBlocks, RequestRejected
from shoal.net import codec
from shoal.net.transport import Stream
from shoal.protocol import Backward, Close, Forward, Message, Open, Step
from shoal.spans import Span

from .harness import QUICK, Swarm
from .intruder import Raw, declaring, raw

MakeSwarm = Callable[..., Swarm]
Answer = Callable[[Message, codec.Tensors], list[Raw]]

PROMPT = torch.tensor([[5, 17, 42, 9, 33]])
IMPATIENT = replace(QUICK, longest_answer_seconds=0.5)


class Rogue:
    """A server that announces whatever it likes, opens sessions, and answers as it likes."""

    def __init__(self, swarm: Swarm, answer: Answer, **announced: Any) -> None:
        self.asked: list[str] = []
        self._answer = answer
        honest = next(iter(swarm.servers.values()))
        lies = {"peer": "rogue", "span": Span(0, 4), "decode_speed": 1e9, "cache_tokens_left": 4096, **announced}
        info = replace(honest.info, **lies)

        async def start() -> None:
            node = swarm.network.node("rogue")
            await node.transport.listen(self._converse)
            await node.directory.announce(honest.model, info, lifetime=300)

        swarm.runtime.run(start())

    async def _converse(self, stream: Stream) -> None:
        while True:
            message, tensors = await codec.receive(stream)
            if isinstance(message, Close):
                return
            self.asked.append(message.kind)
            for frame in self._answer(message, tensors):
                await stream.send(frame.header, [frame.payload])


def politely(answer: Answer) -> Answer:
    """Sessions are opened; the rest is answered as given."""
    return lambda message, tensors: [raw("opened")] if isinstance(message, Open) else answer(message, tensors)


def always(*frames: Raw) -> Answer:
    return politely(lambda message, tensors: list(frames))


def echo(change: Callable[[torch.Tensor], torch.Tensor]) -> Answer:
    """The inputs come back as outputs, changed."""
    return politely(lambda message, tensors: [raw("result", {"hidden": change(tensors["hidden"])})])


def spoilt(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(hidden: torch.Tensor) -> torch.Tensor:
        hidden[0, -1, 7] = number
        return hidden

    return change


def failure(code: Any, reason: Any = "because", **fields: Any) -> Raw:
    return raw("failure", code=code, reason=reason, **fields)


TENSOR = {"hidden": torch.ones(1, 5, 32)}

ANSWERS: dict[str, tuple[Answer, str]] = {
    "noise": (always(Raw(bytes(range(256)), b"\xff" * 100)), "is lost: not a valid message"),
    "a pickle": (always(Raw(b"\x80\x04K\x01.")), "is lost: not a valid message"),
    "an answer that stops short": (
        always(Raw(raw("result", TENSOR).header, b"\0" * 16)),
        "640 bytes declared, 16 sent",
    ),
    "a payload of 32 MiB": (always(Raw(raw("result", TENSOR).header, bytes(32 << 20))), "33554432 sent"),
    "a tensor of 2^90 bytes": (
        always(declaring(raw("result", TENSOR), {"name": "hidden", "dtype": "float32", "shape": [1 << 22] * 4})),
        "is lost: a payload of",
    ),
    "no tensor": (always(raw("result")), "answered something else than was asked"),
    "another tensor": (always(raw("result", {"grad": TENSOR["hidden"]})), "answered something else than was asked"),
    "fewer tokens": (
        echo(lambda hidden: hidden[:, 1:].clone() if hidden.shape[1] > 1 else hidden[..., 1:]),
        "else than",
    ),
    "another hidden size": (echo(lambda hidden: hidden[..., :16]), "answered something else than was asked"),
    "a batch of two": (echo(lambda hidden: hidden.repeat(2, 1, 1)), "answered something else than was asked"),
    "integers": (echo(torch.Tensor.long), "answered something else than was asked"),
    "half precision": (echo(torch.Tensor.half), "answered something else than was asked"),
    "NaN": (echo(spoilt(float("nan"))), "answered with numbers that are not finite"),
    "infinity": (echo(spoilt(float("-inf"))), "answered with numbers that are not finite"),
    "a greeting": (always(raw("opened")), "answered with 'opened', which nobody asked for"),
    "a question": (always(raw("ping")), "answered with 'ping', which nobody asked for"),
    "a goodbye": (always(raw("close")), "answered with 'close', which nobody asked for"),
    "an unknown failure": (always(failure("evil")), "is lost: not a valid message"),
    "a failure without reason": (always(failure("broken", None)), "is lost: not a valid message"),
    "a reason without end": (always(failure("broken", "x" * 10_000)), "is lost: not a valid message"),
    "a reason that upsets terminals": (always(failure("broken", "\x1b]0;pwned\x07")), "is lost: not a valid message"),
    "busy for NaN seconds": (always(failure("busy", retry_after=float("nan"))), "is lost: not a valid message"),
    "busy for ever": (always(failure("busy", retry_after=1e300)), "is lost: not a valid message"),
    "busy since before": (always(failure("busy", retry_after=-1.0)), "is lost: not a valid message"),
    "busy for no time": (always(failure("busy", retry_after=1e-300)), "is busy: because"),
    "busy from the start": (lambda *_: [failure("busy", retry_after=0)], "is busy: because"),
    "somewhere else": (always(failure("misrouted")), "cannot do this: because"),
    "a rewind of nothing": (always(failure("rewind")), "gave up: because"),
    "a rewind from the start": (lambda *_: [failure("rewind")], "gave up: because"),
    "a heartbeat, then the end": (always(raw("working"), failure("leaving")), "gave up: because"),
    "silence": (always(), "is lost: "),
}


@pytest.fixture
def honest(swarm: MakeSwarm) -> Swarm:
    return swarm("0:4")


@pytest.mark.parametrize(("answer", "reason"), ANSWERS.values(), ids=ANSWERS.keys())
def test_a_server_that_answers_anything_else_is_left(honest: Swarm, whole, caplog, answer: Answer, reason: str):
    rogue = Rogue(honest, answer)
    model = honest.model(config=IMPATIENT)
    caplog.set_level(logging.INFO, logger="shoal.client")
    generated = model.generate(PROMPT, max_new_tokens=4)
    assert rogue.asked
    assert generated.tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()
    told = [record.getMessage() for record in caplog.records if re.match("rogue ", record.getMessage())]
    assert re.search(reason, told[0])
    assert all(line.isprintable() and len(line) < 500 for line in told)


@pytest.mark.parametrize("kind", ["a session", "a pass"])
def test_a_server_that_works_for_ever_is_left(honest: Swarm, whole: PreTrainedModel, kind: str):
    rogue = Rogue(honest, lambda *_: [raw("working")] * 1_000_000)
    model = honest.model(config=IMPATIENT)
    if kind == "a session":
        assert model.generate(PROMPT, max_new_tokens=4).tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()
    else:
        torch.testing.assert_close(model(PROMPT).logits, whole(PROMPT).logits, rtol=1e-4, atol=1e-4)
    assert rogue.asked == ["open" if kind == "a session" else "forward"]


def test_a_server_that_never_goes_on_is_left(honest: Swarm, whole: PreTrainedModel):
    """The first piece of a long prompt is answered, the second never fits: again from the start would never end."""

    def answer(message: Message, tensors: codec.Tensors) -> list[Raw]:
        assert isinstance(message, Step)
        return [failure("rewind")] if message.position else [raw("result", {"hidden": tensors["hidden"]})]

    rogue = Rogue(honest, politely(answer))
    model = honest.model()
    prompt = torch.arange(3 * 400).view(3, 400) % 90 + 2
    answered = model.generate(prompt, max_new_tokens=2)
    assert answered.tolist() == whole.generate(prompt, max_new_tokens=2).tolist()
    assert rogue.asked == ["open", "step", "step"]


def test_a_server_that_only_ever_rewinds_is_left(honest: Swarm, whole: PreTrainedModel):
    model = honest.model()
    with model.inference_session(max_length=40) as session:
        first = model.generate(PROMPT, max_new_tokens=3, session=session)
        rogue = Rogue(honest, always(failure("rewind")))
        honest.kill("s0")
        with pytest.raises(MissingBlocks, match="rogue gave up: because"):
            model.generate(None, max_new_tokens=3, session=session)
        honest.start("0:4")
        rest = model.generate(None, max_new_tokens=3, session=session)
    assert torch.cat((first, rest), dim=1).tolist() == whole.generate(PROMPT, max_new_tokens=6).tolist()
    assert len(rogue.asked) < 20


def test_passes_and_gradients_come_from_somebody_else(honest: Swarm, whole: PreTrainedModel):
    def answer(message: Message, tensors: codec.Tensors) -> list[Raw]:
        if isinstance(message, Forward):
            return [raw("result", {"hidden": tensors["hidden"] / 0})]
        assert isinstance(message, Backward)
        return [raw("result", {"hidden": tensors["hidden"]})]

    rogue = Rogue(honest, answer)
    model = honest.model()
    expected = whole.get_input_embeddings()(PROMPT).detach().requires_grad_(True)
    whole(inputs_embeds=expected).logits.square().sum().backward()
    embeds = model.get_input_embeddings()(PROMPT).detach().requires_grad_(True)
    model(inputs_embeds=embeds).logits.square().sum().backward()
    torch.testing.assert_close(embeds.grad, expected.grad, rtol=1e-4, atol=1e-4)
    assert rogue.asked == ["forward"]


def test_inputs_that_are_not_finite_are_nobodys_fault(honest: Swarm):
    model = honest.model()
    embeds = model.get_input_embeddings()(PROMPT).detach()
    embeds[0, 1, 3] = float("nan")
    assert model(inputs_embeds=embeds).logits.isnan().any()


@pytest.mark.parametrize(
    "announced",
    [
        {"addresses": ("/ip4/0.0.0.0/tcp/0", "garbage", "")},
        {"prefill_speed": 1e9, "cache_tokens_left": 1 << 53},
        {"decode_speed": 0.0, "prefill_speed": 0.0, "cache_tokens_left": 0},
        {"dtype": "none", "quantization": "?", "version": "", "name": "?" * 128},
    ],
    ids=["addresses", "speed without end", "no speed", "words"],
)
def test_a_record_that_lies_costs_one_try_at_most(honest: Swarm, whole: PreTrainedModel, announced: dict[str, Any]):
    rogue = Rogue(honest, lambda *_: [failure("misrouted")], **announced)
    model = honest.model()
    for _ in range(2):
        assert model.generate(PROMPT, max_new_tokens=4).tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()
    assert len(rogue.asked) <= 1


def test_a_span_that_the_server_does_not_hold_is_looked_for_elsewhere(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:2", "2:4")
    liar = replace(swarm_.servers["s0"].info, span=Span(0, 4), decode_speed=1e9)

    def lie() -> None:
        swarm_.network.publish("s0", swarm_.servers["s0"].model, liar, swarm_.runtime.loop.time() + 300)

    swarm_.start("0:2")
    swarm_.call(lie)
    model = swarm_.model()
    assert model.generate(PROMPT, max_new_tokens=4).tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()


def test_a_rejection_names_who_rejects(honest: Swarm):
    Rogue(honest, always(failure("rejected", "I do not like your words")))
    with pytest.raises(RequestRejected, match=r"^rogue rejects this: I do not like your words$") as rejection:
        honest.model().generate(PROMPT, max_new_tokens=4)
    assert rejection.value.peer == "rogue"
