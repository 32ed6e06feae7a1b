"""A server may answer anything: the client gets the outputs of the whole model, from another server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shoal import MissingBlocks, RequestRejected
from shoal.net.transport import Stream, StreamBroken
from shoal.net.wire import codec
from shoal.peers import short
from shoal.protocol import AnyMessage, Backward, Close, Forward, Open, Ping, Rewind, SetNeighbors, Step
from shoal.spans import Span

from .harness import QUICK, Swarm
from .intruder import Raw, declaring, raw

MakeSwarm = Callable[..., Swarm]
Answer = Callable[[AnyMessage, codec.Tensors], list[Raw]]

PROMPT = torch.tensor([[5, 17, 42, 9, 33]])
IMPATIENT = replace(QUICK, longest_answer_seconds=0.5)


def announce(swarm: Swarm, converse: Callable[[Stream], Any], **announced: Any) -> Any:
    """A peer named "rogue", which announces false facts about itself; returns its node."""
    honest = next(iter(swarm.servers.values()))
    near = tuple((short(name), 1e-6) for name in swarm.servers)
    lies = {"peer": "rogue", "span": Span(0, 4), "decode_speed": 1e9, "cache_tokens_left": 4096, "round_trips": near}
    lies |= announced
    info = replace(honest.info, **lies)

    async def start() -> Any:
        node = swarm.network.node("rogue")
        await node.transport.listen(converse)
        await node.directory.announce(honest.model, info, lifetime=300)
        return node

    return swarm.runtime.run(start())


class Rogue:
    """A server that announces false facts, opens sessions, and answers as it is told.

    Its answers to a ping are those of a server that waits for the step after the last one; or `pong`, again and again.
    """

    def __init__(self, swarm: Swarm, answer: Answer, *, pong: Answer | None = None, **announced: Any) -> None:
        self.asked: list[str] = []
        self.num_pings = 0
        self._answer = answer
        self._pong = pong or self._honest_pong
        self._next = (0, 0)
        announce(swarm, self._converse, **announced)

    async def _converse(self, stream: Stream) -> None:
        while True:
            message, tensors = await codec.receive(stream)
            match message:
                case Close():
                    return
                case Ping():
                    self.num_pings += 1
                    frames = self._pong(message, tensors)
                case SetNeighbors():
                    frames = []
                case Rewind():
                    self._next = message.epoch, message.position
                    frames = []
                case _:
                    self.asked.append(message.kind)
                    frames = self._answer(message, tensors)
                    if frames and isinstance(message, Step):
                        self._next = message.epoch, message.position + 1
            for frame in frames:
                await stream.send(frame.header, [frame.payload])

    def _honest_pong(self, *_: Any) -> list[Raw]:
        epoch, position = self._next
        return [raw("pong", epoch=epoch, position=position)]


class Impostor:
    """A server that lets an honest one compute, and changes what that says; and what is to be pushed, it makes up."""

    def __init__(
        self,
        swarm: Swarm,
        *,
        says: Callable[[dict[str, Any], bytes], list[Raw]] = lambda fields, payload: [framed(fields, payload)],
        pushes: Callable[[dict[str, Any], torch.Tensor], list[Raw]] | None = None,
        **announced: Any,
    ) -> None:
        self.num_steps = 0
        self._says = says
        self._pushes = pushes
        self._after: dict[str, Any] | None = None
        self._transport = announce(swarm, self._converse, **announced).transport

    async def _converse(self, stream: Stream) -> None:
        honest = await self._transport.open("s0")

        async def back() -> None:
            with contextlib.suppress(StreamBroken):
                while True:
                    header, payload = await honest.receive()
                    for frame in self._says(json.loads(header), bytes(payload)):
                        await stream.send(frame.header, [frame.payload])
            await stream.close()

        answering = asyncio.create_task(back())
        try:
            while True:
                header, payload = await stream.receive()
                fields = json.loads(header)
                self._after = fields.get("downstream", self._after)
                if fields["kind"] == "step":
                    self.num_steps += 1
                    _, tensors = codec.decode(header, payload)
                    if fields["hops_left"] and self._pushes is not None and self._after is not None:
                        await self._push(fields, tensors["hidden"])
                    fields["hops_left"] = 0
                if fields["kind"] != "set_neighbors":
                    await honest.send(framed({**fields, "upstream": None, "downstream": None}).header, [payload])
        finally:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
            await honest.close()

    async def _push(self, fields: dict[str, Any], hidden: torch.Tensor) -> None:
        assert self._after is not None
        assert self._pushes is not None
        known = {name: fields[name] for name in ("epoch", "position")} | {"link": self._after["link"]}
        stream = await self._transport.open(self._after["peer"])
        with contextlib.suppress(StreamBroken):
            for frame in self._pushes(known, hidden):
                await stream.send(frame.header, [frame.payload])


def framed(fields: dict[str, Any], payload: bytes = b"") -> Raw:
    present = {name: value for name, value in fields.items() if value is not None}
    return Raw(json.dumps(present).encode(), payload)


def politely(answer: Answer) -> Answer:
    """Sessions are opened; the rest is answered as given."""
    return lambda message, tensors: [raw("opened")] if isinstance(message, Open) else answer(message, tensors)


def always(*frames: Raw) -> Answer:
    return politely(lambda message, tensors: [addressed(frame, message) for frame in frames])


def addressed(frame: Raw, message: AnyMessage, **changes: int) -> Raw:
    """The same frame; a result as one to this message."""
    if not frame.header.startswith(b'{"kind": "step_result"') or not isinstance(message, Step):
        return frame
    to = {"epoch": message.epoch, "position": message.position}
    to = {name: value + changes.get(name, 0) for name, value in to.items()}
    return Raw(json.dumps(json.loads(frame.header) | to).encode(), frame.payload)


def echo(change: Callable[[torch.Tensor], torch.Tensor]) -> Answer:
    """The inputs come back as outputs, changed."""
    return politely(
        lambda message, tensors: [addressed(raw("step_result", {"hidden": change(tensors["hidden"])}), message)]
    )


def elsewhere(**changes: int) -> Answer:
    """The results are as they should be, but of other steps."""
    return politely(
        lambda message, tensors: [addressed(raw("step_result", {"hidden": tensors["hidden"]}), message, **changes)]
    )


def spoilt(number: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(hidden: torch.Tensor) -> torch.Tensor:
        hidden[0, -1, 7] = number
        return hidden

    return change


def failure(code: Any, reason: Any = "because", **fields: Any) -> Raw:
    return raw("failure", code=code, reason=reason, **fields)


TENSOR = {"hidden": torch.ones(1, 5, 32)}

UNHEARD = "is lost: (no answer within|does not do what it was asked)"  # whichever is noticed first

ANSWERS: dict[str, tuple[Answer, str]] = {
    "noise": (always(Raw(bytes(range(256)), b"\xff" * 100)), "is lost: not a valid message"),
    "a pickle": (always(Raw(b"\x80\x04K\x01.")), "is lost: not a valid message"),
    "an answer that stops short": (
        always(Raw(raw("step_result", TENSOR).header, b"\0" * 16)),
        "640 bytes declared, 16 sent",
    ),
    "a payload of 32 MiB": (always(Raw(raw("step_result", TENSOR).header, bytes(32 << 20))), "33554432 sent"),
    "a tensor of 2^90 bytes": (
        always(declaring(raw("step_result", TENSOR), {"name": "hidden", "dtype": "float32", "shape": [1 << 22] * 4})),
        "is lost: a payload of",
    ),
    "no tensor": (always(raw("step_result")), "answered something else than was asked"),
    "another tensor": (always(raw("step_result", {"ids": TENSOR["hidden"]})), "answered something else than was asked"),
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
    "a greeting": (always(raw("opened")), "answered with 'opened', which was not asked for"),
    "a question": (always(raw("ping")), "answered with 'ping', which was not asked for"),
    "a goodbye": (always(raw("close")), "answered with 'close', which was not asked for"),
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
    "a rewind of nothing": (always(failure("rewind")), "cannot go on with what it was just sent"),
    "a rewind from the start": (lambda *_: [failure("rewind")], "cannot go on with what it was just sent"),
    "a heartbeat as it was in another version": (always(raw("working")), "is lost: not a valid message"),
    "the end": (always(failure("leaving")), "gave up: because"),
    "silence": (always(), UNHEARD),
    "results of another epoch": (elsewhere(epoch=1), UNHEARD),
    "results of another position": (elsewhere(position=3), UNHEARD),
    "results of everything else": (
        politely(lambda message, tensors: [raw("step_result", TENSOR, epoch=7, position=n) for n in range(500)]),
        UNHEARD,
    ),
    "a result of a negative epoch": (
        politely(lambda *_: [raw("step_result", TENSOR, epoch=-1, position=0)]),
        "is lost: not a valid message",
    ),
    "a pong without a ping": (always(raw("pong")), "answered with 'pong', which was not asked for"),
    "a pong with a word": (always(raw("pong", working="yes")), "is lost: not a valid message"),
    "a session that is opened twice": (always(raw("opened")), "answered with 'opened', which was not asked for"),
    "more tokens known than were offered": (
        lambda *_: [raw("opened", {"hidden": torch.ones(1, 16, 32)}, num_tokens=16)],
        "is lost: it knows something else than was asked",
    ),
    "tokens known, and no outputs": (lambda *_: [raw("opened", num_tokens=16)], "it knows something else"),
    "outputs of nothing": (lambda *_: [raw("opened", {"hidden": torch.ones(1, 1, 32)})], "it knows something else"),
    "a push that failed, of no step": (
        always(*[raw("unreached", epoch=3, position=n) for n in range(100)]),
        UNHEARD,
    ),
    "a push that failed, of the step": (always(raw("unreached", epoch=0, position=0)), UNHEARD),
    "neighbors": (always(raw("set_neighbors")), "answered with 'set_neighbors', which was not asked for"),
    "a step back": (always(raw("rewind", epoch=9, position=0)), "answered with 'rewind', which was not asked for"),
    "a step": (always(raw("step", TENSOR, position=0)), "is lost: a message of kind 'step' makes no sense here"),
    "leaving since before": (always(raw("leaving", seconds=-1)), "is lost: not a valid message"),
    "leaving in NaN seconds": (always(raw("leaving", seconds=float("nan"))), "is lost: not a valid message"),
    "leaving in a thousand years": (always(raw("leaving", seconds=3e10)), "is lost: not a valid message"),
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


PONGS: dict[str, Callable[[int], Raw]] = {
    "and computes for others": lambda number: raw("pong", working=True, num_passes=number),
    "and computes nothing": lambda number: raw("pong", working=True, num_passes=3),
    "in another epoch": lambda number: raw("pong", working=True, num_passes=number, epoch=99, position=99),
    "and has done it, so it says": lambda number: raw("pong", epoch=99, position=99),
}


@pytest.mark.parametrize("pong", PONGS.values(), ids=PONGS.keys())
@pytest.mark.parametrize("kind", ["a session", "a pass"])
def test_a_server_that_works_for_ever_is_left(
    honest: Swarm, whole: PreTrainedModel, kind: str, pong: Callable[[int], Raw]
):
    rogue = Rogue(honest, always(), pong=lambda *_: [pong(rogue.num_pings)])
    model = honest.model(config=IMPATIENT)
    if kind == "a session":
        assert model.generate(PROMPT, max_new_tokens=4).tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()
    else:
        torch.testing.assert_close(model(PROMPT).logits, whole(PROMPT).logits, rtol=1e-4, atol=1e-4)
    assert rogue.asked == (["open", "step"] if kind == "a session" else ["forward"])
    assert rogue.num_pings


UNPONGS: dict[str, tuple[Answer, str]] = {
    "nothing": (lambda *_: [], "rogue is lost: said nothing for"),
    "twice": (lambda *_: [raw("pong", working=True)] * 2, "rogue answered with 'pong', which was not asked for"),
    "a ping": (lambda *_: [raw("ping")], "rogue answered with 'ping', which was not asked for"),
    "that it lacks the step": (lambda *_: [raw("pong")], "rogue is lost: does not do what it was asked"),
    "in negative numbers": (lambda *_: [raw("pong", num_passes=-1)], "rogue is lost: not a valid message"),
}


@pytest.mark.parametrize(("pong", "reason"), UNPONGS.values(), ids=UNPONGS.keys())
def test_a_server_that_is_asked_whether_it_is_there_has_to_say_so(
    honest: Swarm, whole: PreTrainedModel, caplog, pong: Answer, reason: str
):
    rogue = Rogue(honest, always(), pong=pong)
    model = honest.model(config=replace(QUICK, silence_seconds=0.3))
    assert model.generate(PROMPT, max_new_tokens=4).tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()
    assert rogue.num_pings
    assert [record.getMessage() for record in caplog.records if re.match(reason, record.getMessage())]


def twice(fields: dict[str, Any], payload: bytes) -> list[Raw]:
    return [framed(fields, payload)] * (2 if fields["kind"] == "step_result" else 1)


def crowded(*others: dict[str, Any]) -> Callable[[dict[str, Any], bytes], list[Raw]]:
    """These messages stand before and after every result."""

    def says(fields: dict[str, Any], payload: bytes) -> list[Raw]:
        frames = [framed(other) for other in others] if fields["kind"] == "step_result" else []
        return [*frames, framed(fields, payload), *frames]

    return says


NOISES: dict[str, Callable[[dict[str, Any], bytes], list[Raw]]] = {
    "every result twice": twice,
    "results of other epochs": crowded(*({"kind": "step_result", "epoch": n, "position": 0} for n in range(50, 90))),
    "results of other positions": crowded(
        *({"kind": "step_result", "epoch": 0, "position": n} for n in range(300, 340))
    ),
    "pushes that failed": crowded(*({"kind": "unreached", "epoch": n, "position": n} for n in range(40))),
    "a farewell at once": crowded({"kind": "leaving", "seconds": 0}),
    "farewells": crowded(*({"kind": "leaving", "seconds": n} for n in (86400, 0.5, 0, 7))),
}


@pytest.mark.parametrize("says", NOISES.values(), ids=NOISES.keys())
def test_messages_that_were_not_asked_for_change_no_token(honest: Swarm, whole: PreTrainedModel, says):
    rogue = Impostor(honest, says=says)
    model = honest.model()
    assert model.generate(PROMPT, max_new_tokens=6).tolist() == whole.generate(PROMPT, max_new_tokens=6).tolist()
    assert rogue.num_steps


def test_results_that_come_between_two_steps_are_not_kept(honest: Swarm, whole: PreTrainedModel):
    """A flood of them while the user thinks: the client forgets each as it comes."""
    flood = [{"kind": "step_result", "epoch": 0, "position": n} for n in range(2000)]
    rogue = Impostor(honest, says=crowded(*flood))
    model = honest.model()
    with model.inference_session(max_length=40) as session:
        first = model.generate(PROMPT, max_new_tokens=1, session=session)
        assert rogue.num_steps
        (stage,) = session.state.stages
        assert not stage.num_unsettled
        rest = model.generate(None, max_new_tokens=3, session=session)
    assert torch.cat((first, rest), dim=1).tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()


PUSHED: dict[str, Callable[[dict[str, Any], torch.Tensor], list[Raw]]] = {
    "nothing": lambda known, hidden: [],
    "noise": lambda known, hidden: [raw("step", {"hidden": hidden}, **known | {"position": 99}), Raw(b"noise")],
    "no tensor": lambda known, hidden: [raw("step", **known)],
    "NaN": lambda known, hidden: [raw("step", {"hidden": hidden * float("nan")}, **known)],
    "infinity": lambda known, hidden: [raw("step", {"hidden": hidden / 0}, **known)],
    "another hidden size": lambda known, hidden: [raw("step", {"hidden": hidden[..., :16]}, **known)],
    "more tokens": lambda known, hidden: [raw("step", {"hidden": hidden.repeat(1, 2, 1)}, **known)],
    "more tokens than fit": lambda known, hidden: [raw("step", {"hidden": hidden.repeat(1, 70, 1)}, **known)],
    "a larger batch": lambda known, hidden: [raw("step", {"hidden": hidden.repeat(2, 1, 1)}, **known)],
    "integers": lambda known, hidden: [raw("step", {"hidden": hidden.long()}, **known)],
    "half precision": lambda known, hidden: [raw("step", {"hidden": hidden.half()}, **known)],
    "positions of another planet": lambda known, hidden: [
        raw("step", {"hidden": hidden, "positions": torch.full(hidden.shape[:2], 1 << 40)}, **known)
    ],
    "a question to a head": lambda known, hidden: [raw("step", {"hidden": hidden}, logits=1, **known)],
    "steps of epochs to come": lambda known, hidden: [
        raw("step", {"hidden": hidden}, **known | {"epoch": known["epoch"] + n}) for n in range(1, 100)
    ],
    "steps to come": lambda known, hidden: [
        raw("step", {"hidden": hidden}, **known | {"position": known["position"] + n}) for n in range(1, 100)
    ],
    "over another link": lambda known, hidden: [raw("step", {"hidden": hidden}, **known | {"link": "0" * 32})],
}


@pytest.mark.parametrize("pushes", PUSHED.values(), ids=PUSHED.keys())
def test_a_server_that_is_pushed_nonsense_is_not_blamed(
    swarm: MakeSwarm, whole: PreTrainedModel, caplog: pytest.LogCaptureFixture, pushes
):
    swarm_ = swarm("0:2", "2:4")
    rogue = Impostor(swarm_, pushes=pushes, span=Span(0, 2))
    model = swarm_.model()
    caplog.set_level(logging.INFO, logger="shoal.client")
    with model.inference_session(max_length=40) as session:
        answer = model.generate(PROMPT, max_new_tokens=6, session=session)
        assert session.servers == ("rogue", "s1")
    assert answer.tolist() == whole.generate(PROMPT, max_new_tokens=6).tolist()
    assert rogue.num_steps
    told = [record.getMessage() for record in caplog.records]
    assert "rogue cannot push to s1" in told
    assert not [line for line in told if re.match("s1 ", line)]


def test_a_server_that_is_wrong_by_itself_is_blamed_although_it_was_pushed_to(
    swarm: MakeSwarm, whole: PreTrainedModel, caplog: pytest.LogCaptureFixture
):
    swarm_ = swarm("0:2", "2:4")
    Rogue(swarm_, echo(spoilt(float("nan"))), span=Span(2, 4))
    model = swarm_.model()
    assert model.generate(PROMPT, max_new_tokens=4).tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()
    lost = [record.getMessage() for record in caplog.records if "looking for another" in record.getMessage()]
    assert [line.split(";")[0] for line in lost] == ["rogue answered with numbers that are not finite"]


def test_a_server_that_never_goes_on_is_left(honest: Swarm, whole: PreTrainedModel):
    """The first piece of a long prompt is answered, the second never fits: again from the start would never end."""

    def answer(message: AnyMessage, tensors: codec.Tensors) -> list[Raw]:
        assert isinstance(message, Step)
        if message.position:
            return [failure("rewind")]
        return [addressed(raw("step_result", {"hidden": tensors["hidden"]}), message)]

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
        with pytest.raises(MissingBlocks, match="rogue cannot go on with what it was just sent"):
            model.generate(None, max_new_tokens=3, session=session)
        honest.start("0:4")
        rest = model.generate(None, max_new_tokens=3, session=session)
    assert torch.cat((first, rest), dim=1).tolist() == whole.generate(PROMPT, max_new_tokens=6).tolist()
    assert len(rogue.asked) < 20


def test_passes_and_gradients_come_from_another_server(honest: Swarm, whole: PreTrainedModel):
    def answer(message: AnyMessage, tensors: codec.Tensors) -> list[Raw]:
        if isinstance(message, Forward):
            return [raw("pass_result", {"hidden": tensors["hidden"] / 0})]
        assert isinstance(message, Backward)
        return [raw("pass_result", {"hidden": tensors["hidden"]})]

    rogue = Rogue(honest, answer)
    model = honest.model()
    expected = whole.get_input_embeddings()(PROMPT).detach().requires_grad_(True)
    whole(inputs_embeds=expected).logits.square().sum().backward()
    embeds = model.get_input_embeddings()(PROMPT).detach().requires_grad_(True)
    model(inputs_embeds=embeds).logits.square().sum().backward()
    torch.testing.assert_close(embeds.grad, expected.grad, rtol=1e-4, atol=1e-4)
    assert rogue.asked == ["forward"]


def test_inputs_that_are_not_finite_are_no_servers_fault(honest: Swarm):
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


def test_a_rejection_names_the_server(honest: Swarm):
    Rogue(honest, always(failure("rejected", "I do not like your words")))
    with pytest.raises(RequestRejected, match=r"^rogue rejects this: I do not like your words$") as rejection:
        honest.model().generate(PROMPT, max_new_tokens=4)
    assert rejection.value.peer == "rogue"
