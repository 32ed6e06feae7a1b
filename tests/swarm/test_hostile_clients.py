"""Whatever a stranger sends, he gets one clear answer, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from shoal.policy.batching.engine_limits import Limits
from shoal.protocol import (
    MAX_BATCH,
    MAX_STEP_TOKENS,
    MAX_STEPS_AHEAD,
    Failure,
    Opened,
    PassResult,
    Pong,
    StepResult,
    Unreached,
)

from .harness import Swarm, swarm_of
from .intruder import (
    ANSWERED,
    FINGERPRINT,
    MODEL,
    Intruder,
    Raw,
    declaring,
    num_push_connections,
    num_sessions,
    num_streams,
    raw,
)

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.tensor([[5, 17, 42, 9, 33]])
HIDDEN_SIZE = 32
MAX_LENGTH = 512  # of the model
ON_SPAN: dict[str, Any] = {"model": MODEL, "fingerprint": FINGERPRINT, "start": 0, "end": 2}
HUGE = "9" * 5000
LINK = "0123456789abcdef" * 2


def hidden(batch_size: int = 1, num_tokens: int = 2, size: int = HIDDEN_SIZE) -> torch.Tensor:
    return torch.ones(batch_size, num_tokens, size)


def opening(tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Raw:
    return raw("open", tensors, **{**ON_SPAN, "batch_size": 1, "expected_length": 16, **changes})


def offering(*shape: int, **changes: Any) -> Raw:
    """A session that begins with pages of these names, so the client says."""
    return opening({"digests": torch.zeros(shape, dtype=torch.uint8)}, **changes)


def step(position: Any = 0, tensors: dict[str, torch.Tensor] | None = None, **fields: Any) -> Raw:
    return raw("step", {"hidden": hidden()} if tensors is None else tensors, position=position, **fields)


def rewind(position: Any = 0, epoch: Any = 1, **fields: Any) -> Raw:
    return raw("rewind", position=position, epoch=epoch, **fields)


def place(peer: Any = "nobody", link: Any = LINK, **fields: Any) -> dict[str, Any]:
    """The server before, or that after."""
    return {"peer": peer, "link": link, **fields}


def stepping(tensors: dict[str, torch.Tensor]) -> list[Raw]:
    """A session whose first step has these tensors beside, or instead of, two good tokens."""
    return [opening(), step(tensors={"hidden": hidden(), **tensors})]


def forward(tensors: dict[str, torch.Tensor] | None = None, **changes: Any) -> Raw:
    return raw("forward", {"hidden": hidden()} if tensors is None else tensors, **ON_SPAN | changes)


def backward(**tensors: torch.Tensor) -> Raw:
    return raw("backward", {"hidden": hidden(), **tensors}, **ON_SPAN)


def spec(name: str = "hidden", dtype: str = "float32", shape: Any = (1, 2, HIDDEN_SIZE)) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": shape}


INVALID = "not a valid message"

REFUSED: dict[str, tuple[list[Raw], str]] = {
    # no message at all
    "nothing": ([Raw(b"")], INVALID),
    "noise": ([Raw(bytes(range(256)), b"\xff" * 64)], INVALID),
    "a pickle": ([Raw(b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94.")], INVALID),
    "not UTF-8": ([Raw(b'{"kind":"\xff\xfe"}')], INVALID),
    "half a header": ([Raw(step().header[:-7], step().payload)], INVALID),
    "another JSON value": ([Raw(b"[1, 2]")], INVALID),
    "deep nesting": ([Raw(b'{"kind":' + b"[" * 30_000)], INVALID),
    "no kind": ([Raw(b'{"position": 0}')], INVALID),
    "an unknown kind": ([raw("eval")], INVALID),
    "a kind that is a list": ([raw(["step"])], INVALID),
    "a lone surrogate": ([Raw(b'{"kind":"\\ud800"}')], INVALID),
    "control characters": ([raw("\x1b[2J\x1b]0;pwned\x07")], INVALID),
    "control characters in a field's name": ([raw("ping", **{"\x1b[2J\n": 1})], INVALID),
    # fields that are not there, or of another type
    "somebody else's session": ([opening(), step(session="s0-1")], INVALID),
    "a session without a length": ([raw("open", **ON_SPAN, batch_size=1)], INVALID),
    "a length that is a float": ([opening(expected_length=16.0)], INVALID),
    "a length that is a string": ([opening(expected_length="16")], INVALID),
    "a length that is a truth": ([opening(expected_length=True)], INVALID),
    "a length that is NaN": ([opening(expected_length=float("nan"))], INVALID),
    "a length that is infinite": ([opening(expected_length=float("inf"))], INVALID),
    "a negative length": ([opening(expected_length=-1)], INVALID),
    "no length": ([opening(expected_length=0)], INVALID),
    "no sequences": ([opening(batch_size=0)], INVALID),
    "too many sequences": ([opening(batch_size=MAX_BATCH + 1)], INVALID),
    "a number of thousands of digits": ([Raw(step().header.replace(b": 0", f": {HUGE}".encode()))], INVALID),
    "a number beyond all floats": ([Raw(step().header.replace(b": 0", b": 1e999"))], INVALID),
    "a negative position": ([opening(), step(-1)], INVALID),
    "a position that is null": ([opening(), step(None)], INVALID),
    "rows of a step": ([opening(), step(), step(2, rows=[0])], INVALID),
    "rows of no sequence": ([opening(), step(), rewind(2, rows=[])], INVALID),
    "negative rows": ([opening(), step(), rewind(2, rows=[-1])], INVALID),
    "rows that are words": ([opening(), step(), rewind(2, rows=["0"])], INVALID),
    "a thousand rows too many": ([opening(), step(), rewind(2, rows=[0] * (MAX_BATCH + 1))], INVALID),
    "a negative epoch": ([opening(epoch=-1)], INVALID),
    "an epoch beyond all counting": ([opening(), rewind(epoch=1 << 53)], INVALID),
    "an epoch that is a word": ([opening(), rewind(epoch="1")], INVALID),
    "a rewind without an epoch": ([opening(), raw("rewind", position=0)], INVALID),
    "a rewind with tensors": ([opening(), raw("rewind", {"hidden": hidden()}, position=0, epoch=1)], INVALID),
    "a skip before the first token": ([opening(), step(skip=-1)], INVALID),
    "more hops left than a route has": ([opening(), step(hops_left=257)], INVALID),
    "fewer than no hops left": ([opening(), step(hops_left=-1)], INVALID),
    "the likeliest of nothing": ([opening(), step(top_k=3)], INVALID),
    # places in the ring
    "a next server without a name": ([opening(downstream=place(""))], INVALID),
    "a next server whose name has no end": ([opening(downstream=place("p" * 65))], INVALID),
    "a next server that is a number": ([opening(downstream=place(7))], INVALID),
    "a next server without a link": ([opening(after={"peer": "s1"})], INVALID),
    "a link that is short": ([opening(), raw("set_neighbors", upstream=place(link="abc"))], INVALID),
    "a link that is long": ([opening(), raw("set_neighbors", upstream=place(link=LINK + "0"))], INVALID),
    "a link of other letters": ([opening(), raw("set_neighbors", downstream=place(link="Z" * 32))], INVALID),
    "thousands of addresses": ([opening(downstream=place(addresses=["/memory/s1"] * 3000))], INVALID),
    "an address without end": ([opening(downstream=place(addresses=["/" * 301]))], INVALID),
    "an address that upsets terminals": ([opening(downstream=place(addresses=["\x1b]0;pwned\x07"]))], INVALID),
    "an address of the server before": ([opening(upstream=place(addresses=[]))], INVALID),
    "a tie of two before": ([opening(), raw("set_neighbors", upstream=[place(), place()])], INVALID),
    "a backward span": ([opening(start=2, end=1)], INVALID),
    "an empty span": ([opening(start=1, end=1)], INVALID),
    "a negative span": ([opening(start=-1)], INVALID),
    "a span beyond all models": ([opening(end=1 << 40)], INVALID),
    "a model's name without end": ([opening(model="m" * 10_000)], INVALID),
    # tensors that are not as declared
    "a payload that is too short": ([opening(), Raw(step().header, step().payload[:-1])], "256 bytes declared, 255"),
    "a payload that is too long": ([opening(), Raw(step().header, step().payload + b"\0")], "256 bytes declared, 257"),
    "a payload that nobody declared": ([Raw(b'{"kind":"ping"}', bytes(16))], "0 bytes declared, 16 sent"),
    "a tensor of 16 TiB": ([opening(), declaring(step(), spec(shape=[1 << 22, 1 << 20]))], "a payload of"),
    "a tensor of 2^90 bytes": ([opening(), declaring(step(), spec(shape=[1 << 22] * 4))], "a payload of"),
    "a tensor twice": ([opening(), declaring(step(), spec(), spec())], "a tensor is declared twice"),
    "a tensor of objects": ([opening(), declaring(step(), spec(dtype="object"))], INVALID),
    "a tensor of doubles": ([opening(), declaring(step(), spec(dtype="float64"))], INVALID),
    "an empty tensor": ([opening(), declaring(step(), spec(shape=[1, 0, HIDDEN_SIZE]))], INVALID),
    "a negative shape": ([opening(), declaring(step(), spec(shape=[-1, -2, HIDDEN_SIZE]))], INVALID),
    "a shape of five": ([opening(), declaring(step(), spec(shape=[1, 1, 1, 2, HIDDEN_SIZE]))], INVALID),
    "a shape of floats": ([opening(), declaring(step(), spec(shape=[1.0, 2, HIDDEN_SIZE]))], INVALID),
    "a tensor of weights": ([opening(), declaring(step(), spec("weights"))], INVALID),
    "a greeting with tensors": (
        [raw("open", {"hidden": hidden()}, **ON_SPAN, batch_size=1, expected_length=8)],
        INVALID,
    ),
    "a ping with tensors": ([raw("ping", {"hidden": hidden()})], INVALID),
    "a step with a gradient": (stepping({"grad": hidden()}), INVALID),
    "a step with digests": (stepping({"digests": torch.zeros(1, 1, 16, dtype=torch.uint8)}), INVALID),
    # messages out of turn
    "a step before a session": ([step()], "a message of kind 'step' makes no sense here"),
    "two sessions on one stream": ([opening(), opening()], "a message of kind 'open' makes no sense here"),
    "an answer from a client": ([raw("opened")], "a message of kind 'opened' makes no sense here"),
    "a result from a client": (
        [opening(), raw("step_result", {"hidden": hidden()})],
        "'step_result' makes no sense here",
    ),
    "a heartbeat as it was in another version": ([raw("working")], INVALID),
    "a tie before a session": ([raw("set_neighbors")], "a message of kind 'set_neighbors' makes no sense here"),
    "a rewind before a session": ([rewind()], "a message of kind 'rewind' makes no sense here"),
    "a pass in the middle of a session": ([opening(), step(), forward()], "'forward' makes no sense here"),
    "a gradient in the middle of a session": ([opening(), backward(grad=hidden())], "'backward' makes no sense here"),
    "a farewell from a client": ([opening(), raw("leaving", seconds=1.0)], "'leaving' makes no sense here"),
    "a push that failed at a client": (
        [opening(), raw("unreached", epoch=0, position=0)],
        "'unreached' makes no sense",
    ),
    "a pong that nobody asked for": ([raw("pong")], "'pong' makes no sense here"),
    "a failure of a client's": ([raw("failure", code="busy", reason="me too")], "'failure' makes no sense here"),
    # what a session begins with
    "a salt without end": ([opening(salt="s" * 257)], INVALID),
    "a salt that is a number": ([opening(salt=7)], INVALID),
    "a salt that is null": ([opening(salt=None)], INVALID),
    "digests that are numbers": ([opening({"digests": torch.zeros(1, 1, 16)})], "digests must be uint8 of shape"),
    "digests that are too short": ([offering(1, 1, 15)], "digests must be uint8 of shape"),
    "digests that are too long": ([offering(1, 1, 17)], "digests must be uint8 of shape"),
    "digests of no sequence": ([offering(1, 16)], "digests must be uint8 of shape"),
    "digests of digests": ([offering(1, 1, 1, 16)], "digests must be uint8 of shape"),
    "digests of another batch": ([offering(2, 1, 16)], "digests must be uint8 of shape"),
    "digests of a smaller batch": ([offering(1, 1, 16, batch_size=2)], "digests must be uint8 of shape"),
    "more digests than pages": ([offering(1, 2, 16)], "digests of 2 pages for a session of 16 tokens"),
    "a million digests": ([offering(1, 1 << 20, 16, expected_length=512)], "digests of 1048576 pages"),
    # a session's tokens
    "too long a session": ([opening(expected_length=MAX_LENGTH + 1)], "513 tokens; the model allows 512"),
    "a step without inputs": ([opening(), step(tensors={})], "hidden states must be floating-point numbers"),
    "words for numbers": (stepping({"hidden": hidden().long()}), "hidden states must be floating-point numbers"),
    "a flat tensor": (stepping({"hidden": hidden()[0]}), "hidden states must be floating-point numbers"),
    "a single number": (stepping({"hidden": torch.tensor(1.0)}), "hidden states must be floating-point numbers"),
    "another hidden size": (stepping({"hidden": hidden(size=16)}), "hidden size 16; this model's is 32"),
    "a hidden size of millions": (stepping({"hidden": hidden(size=1 << 20)}), "hidden size 1048576"),
    "more tokens than the model allows": (
        stepping({"hidden": hidden(num_tokens=MAX_LENGTH + 1)}),
        "513 tokens in a session; the model allows 512",
    ),
    "more tokens, in two steps": (
        [opening(), step(tensors={"hidden": hidden(num_tokens=MAX_LENGTH)}), step(MAX_LENGTH)],
        "514 tokens in a session; the model allows 512",
    ),
    "tokens beyond what was sent": ([opening(), rewind(3), step(3, epoch=1)], "position 3 of a session with 0 tokens"),
    "a hole in the tokens": (
        [opening(), step(), ANSWERED, rewind(5), step(5, epoch=1)],
        "position 5 of a session with 2 tokens",
    ),
    "a position of millions": (
        [opening(), step(), ANSWERED, rewind(1 << 22), step(1 << 22, epoch=1)],
        "position 4194304 of a session with 2",
    ),
    "a rewind to the epoch that is": ([opening(epoch=5), rewind(epoch=5)], "epoch 5 after epoch 5"),
    "a rewind to an old epoch": ([opening(), step(), rewind(epoch=9), rewind(epoch=8)], "epoch 8 after epoch 9"),
    "more steps ahead than allowed": (
        [opening(), *(step(2 * n) for n in range(1, MAX_STEPS_AHEAD + 2))],
        "more than 32 steps, or 8192 tokens, at once",
    ),
    "more tokens ahead than allowed": (
        [
            opening(batch_size=2, expected_length=512),
            *(step(n, {"hidden": hidden(2, 512)}, epoch=1) for n in range(9)),
        ],
        "more than 32 steps, or 8192 tokens, at once",
    ),
    "too many tokens in a step that has to wait": (
        [opening(), step(6, {"hidden": hidden(5, 300)})],
        "1500 tokens in one step",
    ),
    "too many tokens at once": (
        [opening(batch_size=4, expected_length=512), step(tensors={"hidden": hidden(4, 300)})],
        f"1200 tokens in one step; {MAX_STEP_TOKENS} are allowed",
    ),
    "more sequences than any session has": (
        [opening(expected_length=1), step(tensors={"hidden": hidden(MAX_BATCH + 1, 1)})],
        "1025 sequences; 1024 are allowed",
    ),
    "rows of a session that begins anew": (
        [opening(), rewind(rows=[0]), step(epoch=1)],
        "rows of a session that begins anew",
    ),
    "rows that are not there": (
        [opening(), step(), ANSWERED, rewind(2, rows=[1]), step(2, epoch=1)],
        "do not continue those of the session",
    ),
    "more rows than inputs": (
        [opening(), step(), ANSWERED, rewind(2, rows=[0, 0]), step(2, epoch=1)],
        "1 sequences that do not continue",
    ),
    "rows of rows of nobody": (
        [opening(), step(), rewind(2, rows=[0, 0]), rewind(2, epoch=2, rows=[2])],
        "rows of sequences that there are not",
    ),
    "another batch": (
        [opening(batch_size=2), step(), step(2, {"hidden": hidden(2)})],
        "2 sequences that do not continue those of the session",
    ),
    # positions and masks
    "positions that are floats": (stepping({"positions": torch.ones(1, 2)}), "positions must be int64"),
    "positions of another shape": (stepping({"positions": torch.zeros(2, 1).long()}), "positions must be int64"),
    "positions of no shape": (stepping({"positions": torch.tensor(0)}), "positions must be int64"),
    "negative positions": (stepping({"positions": torch.tensor([[-1, 0]])}), "positions must be in 0:512"),
    "positions of another planet": (
        stepping({"positions": torch.tensor([[0, torch.iinfo(torch.int64).max]])}),
        "positions must be in 0:512",
    ),
    "a mask of floats": (stepping({"mask": torch.ones(1, 2)}), "the padding mask must be uint8 zeros and ones"),
    "a mask of another shape": (stepping({"mask": torch.ones(1, 3, dtype=torch.uint8)}), "the padding mask must be"),
    "a mask of twos": (stepping({"mask": torch.full((1, 2), 2, dtype=torch.uint8)}), "the padding mask must be"),
    # single passes
    "a pass without inputs": ([forward({})], "hidden states must be floating-point numbers"),
    "a pass over too many tokens": ([forward({"hidden": hidden(1, 513)})], "513 tokens; the model allows 512"),
    "a pass over too large a batch": ([forward({"hidden": hidden(5, 512)})], "2560 tokens in one batch; 1024 are"),
    "a pass over a million sequences": ([forward({"hidden": hidden(1 << 17, 1)})], "131072 tokens in one batch"),
    "a pass with another hidden size": ([forward({"hidden": hidden(size=33)})], "hidden size 33; this model's is 32"),
    "a gradient of nothing": ([backward()], "needs a gradient of its output's shape"),
    "a gradient of another shape": ([backward(grad=hidden(1, 1))], "needs a gradient of its output's shape"),
    "a gradient of another size": ([backward(grad=hidden(size=16))], "needs a gradient of its output's shape"),
    "a gradient of integers": ([backward(grad=hidden().long())], "needs a gradient of its output's shape"),
}

MISROUTED: dict[str, tuple[list[Raw], str]] = {
    "another model": ([opening(model="gpt-5")], "this server holds blocks of"),
    "other weights": ([opening(fingerprint="0" * 64)], "this server's weights are others"),
    "a pass through another model": ([forward(model="")], "this server holds blocks of"),
    "more than the whole cache": (
        [opening(batch_size=9, expected_length=512)],
        "can never fit into this server's cache",
    ),
}

MOVED: dict[str, tuple[list[Raw], str]] = {
    "blocks beyond the server's": ([opening(end=3)], "this server holds blocks 0:2, not 0:3"),
    "blocks beyond the model's": ([opening(start=7, end=9)], "this server holds blocks 0:2, not 7:9"),
    "a pass through blocks that are elsewhere": ([forward(start=2, end=4)], "holds blocks 0:2, not 2:4"),
}

ATTACKS = [
    pytest.param(frames, code, reason, id=name)
    for code, attacks in (("rejected", REFUSED), ("misrouted", MISROUTED), ("moved", MOVED))
    for name, (frames, reason) in attacks.items()
]


@pytest.fixture(scope="module")
def town(folder: Path) -> Iterator[tuple[Swarm, Any, Intruder]]:
    """A swarm, an honest client's model, and a stranger."""
    with swarm_of(folder, "0:2", "2:4") as swarm:
        yield swarm, swarm.model(), Intruder(swarm, "s0")


def check_idle(swarm: Swarm) -> None:
    """Nobody is there: all room is free, and every page is accounted for."""
    swarm.settle(lambda: not num_push_connections(swarm))
    engine = swarm.servers["s0"].engine
    assert engine.cache_tokens_left == engine.cache_tokens
    assert num_sessions(swarm, "s0") == 0
    swarm.call(engine.check_integrity)


class Peace:
    """An honest session around an attack: after it, nothing has changed for anybody."""

    def __init__(self, swarm: Swarm, model: Any, whole: PreTrainedModel) -> None:
        self._swarm, self._model, self._whole = swarm, model, whole

    def __enter__(self) -> None:
        self._session = self._model.inference_session(max_length=32)
        self._first = self._model.generate(PROMPT, max_new_tokens=2, session=self._session)
        self._before = self._state()

    def __exit__(self, *error: object) -> None:
        if error == (None, None, None):
            self._swarm.settle(lambda: self._state() == self._before)
            rest = self._model.generate(None, max_new_tokens=2, session=self._session)
            answer = torch.cat((self._first, rest), dim=1)
            assert self._session.servers == ("s0", "s1")
            assert answer.tolist() == self._whole.generate(PROMPT, max_new_tokens=4).tolist()
        self._session.close()
        self._swarm.settle(lambda: not num_streams(self._swarm, "s0"))
        check_idle(self._swarm)

    def _state(self) -> tuple[int, int]:
        return self._swarm.servers["s0"].engine.cache_tokens_left, num_streams(self._swarm, "s0")


@pytest.mark.parametrize(("frames", "code", "reason"), ATTACKS)
def test_a_wrong_request_gets_one_clear_answer_and_touches_nobody(town, whole, frames, code, reason):
    swarm, model, intruder = town
    with Peace(swarm, model, whole):
        *before, failure = intruder.ask(*frames)
        assert isinstance(failure, Failure)
        assert failure.code == code
        assert re.search(reason, failure.reason)
        assert failure.reason.isprintable()
        assert len(failure.reason) < 400
        assert all(isinstance(answer, Opened | StepResult) for answer in before)


UNANSWERED: dict[str, tuple[list[Raw], int]] = {
    "tokens beyond what was sent": ([opening(), step(3)], 0),
    "a hole in the tokens": ([opening(), step(), step(5)], 1),
    "a step of an epoch that has not come": ([opening(), step(), step(2, epoch=7)], 1),
    "a step of an epoch that is over": ([opening(epoch=3), step(epoch=2), step(epoch=3)], 1),
    "a step that a rewind has overtaken": ([opening(), rewind(), step(), step(epoch=1)], 1),
    "a step that waited when a rewind came": ([opening(), step(2), rewind(epoch=1), step(epoch=1)], 1),
    "an older step again": ([opening(), step(), step(2), step()], 2),
    "as many steps ahead as allowed": ([opening(), *(step(2 * n) for n in range(1, MAX_STEPS_AHEAD + 1))], 0),
    "a step that waits, again and again": ([opening(), *[step(6)] * 50], 0),
}


@pytest.mark.parametrize(("frames", "num_results"), UNANSWERED.values(), ids=UNANSWERED.keys())
def test_a_step_whose_turn_it_is_not_is_held_or_ignored(town, whole, frames, num_results):
    swarm, model, intruder = town
    with Peace(swarm, model, whole):
        assert [type(answer) for answer in intruder.ask(*frames)] == [Opened, *[StepResult] * num_results]


def test_a_step_that_comes_again_is_answered_again_and_computed_once(town, whole):
    swarm, model, intruder = town
    engine = swarm.servers["s0"].engine
    with Peace(swarm, model, whole):
        stream, before = intruder.open(), engine.num_passes
        intruder.tell(stream, opening())
        heard = intruder.hear(stream)
        for _ in range(5):
            intruder.tell(stream, step())
            heard += intruder.hear(stream)
        assert [type(message) for message, _ in heard] == [Opened, *[StepResult] * 5]
        assert all(torch.equal(tensors["hidden"], heard[1][1]["hidden"]) for _, tensors in heard[1:])
        assert engine.num_passes == before + 1
        assert not intruder.finish(stream)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 3e38], ids=str)
@pytest.mark.parametrize("kind", ["step", "forward", "backward"])
def test_numbers_that_are_none_stay_with_who_sent_them(town, whole, number, kind):
    swarm, model, intruder = town
    bad = torch.full((1, 2, HIDDEN_SIZE), number)
    frames = {
        "step": [*stepping({"hidden": bad}), step(2, {"hidden": bad})],
        "forward": [forward({"hidden": bad})],
        "backward": [backward(hidden=bad, grad=bad)],
    }[kind]
    with Peace(swarm, model, whole):
        assert isinstance(intruder.ask(*frames)[-1], StepResult if kind == "step" else PassResult)


STRANGE: dict[str, list[Raw]] = {
    "a session of nothing but padding": [
        *stepping({"mask": torch.zeros(1, 2, dtype=torch.uint8)}),
        step(2, {"hidden": hidden(), "mask": torch.zeros(1, 2, dtype=torch.uint8)}),
    ],
    "a pass over nothing but padding": [forward({"hidden": hidden(), "mask": torch.zeros(1, 2, dtype=torch.uint8)})],
    "one sequence of padding among others": [
        raw(
            "backward",
            {
                "hidden": hidden(2),
                "mask": torch.tensor([[0, 0], [1, 1]], dtype=torch.uint8),
                "grad": hidden(2),
            },
            **ON_SPAN,
        )
    ],
    "the last position, over and over": stepping({"positions": torch.tensor([[511, 511]])}),
    "positions that run backwards": stepping({"positions": torch.tensor([[9, 3]])}),
    "another precision than the server's": stepping({"hidden": hidden().half()}),
    "a precision that changes": [*stepping({"hidden": hidden().bfloat16()}), step(2)],
    "a pass in another precision": [forward({"hidden": hidden().bfloat16()})],
    "a gradient in another precision": [backward(hidden=hidden().bfloat16(), grad=hidden().half())],
    "passes before a session": [forward(), ANSWERED, backward(grad=hidden()), ANSWERED, opening(), step()],
    "the same step again and again": [opening(), *[step()] * 20],
    "digests that nobody has computed": [offering(1, 1, 16), step()],
    "digests of a long session": [
        offering(3, 32, 16, batch_size=3, expected_length=512),
        step(tensors={"hidden": hidden(3)}),
    ],
    "a skip of everything": [opening(skip=99), step(skip=2)],
    "a skip beyond the step": [opening(), step(skip=1 << 22), step(2)],
    "the last step again, which nobody wanted to see": [opening(), step(skip=2), step(skip=2)],
    "hops left without a next server": [opening(), step(hops_left=256)],
    "a rewind of nothing": [opening(), rewind(), step(epoch=1)],
    "rewinds one after another": [
        opening(),
        step(),
        ANSWERED,
        *(rewind(2, epoch=n, rows=[0]) for n in range(1, 9)),
        step(2, epoch=8),
    ],
    "rows that mean nothing when all begins anew": [
        opening(),
        step(),
        ANSWERED,
        rewind(2, rows=[0]),
        rewind(epoch=2),
        step(epoch=2),
    ],
    "a next server that is none": [opening(downstream=place("?!")), step(hops_left=1), step(2)],
    "a next server that is oneself": [
        opening(downstream=place("s0"), upstream=place("s0")),
        step(hops_left=256),
        step(2),
    ],
    "ties without end": [
        opening(),
        *(raw("set_neighbors", downstream=place(f"p{n}", addresses=["/"] * 8)) for n in range(300)),
        step(),
    ],
    "a salt of any characters": [opening(salt="\x00\n\u202e\U0001f9c2"), step()],
}


@pytest.mark.parametrize("frames", STRANGE.values(), ids=STRANGE.keys())
def test_what_is_strange_but_allowed_is_computed(town, whole, frames):
    swarm, model, intruder = town
    with Peace(swarm, model, whole):
        *_, (answer, tensors) = intruder.exchange(*frames)
        assert isinstance(answer, StepResult | PassResult)
        assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


VALID = [
    opening(),
    offering(1, 1, 16, salt="s"),
    step(),
    rewind(2, rows=[0]),
    step(2, epoch=1, hops_left=2),
    step(link=LINK),
    raw("set_neighbors", upstream=place("intruder"), downstream=place("s0")),
    forward(),
    backward(grad=hidden()),
    raw("ping"),
    raw("close"),
]


@st.composite
def mutated(draw: st.DrawFn) -> Raw:
    """A valid frame with a few bytes or fields changed."""
    frame = draw(st.sampled_from(VALID))
    if draw(st.booleans()):
        fields = json.loads(frame.header)
        field = draw(st.sampled_from([*fields, "tensors", "rows", "session"]))
        fields[field] = draw(
            st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text(max_size=8)
            | st.lists(st.integers(-1, 2), max_size=3)
            | st.lists(st.fixed_dictionaries({"name": st.just("hidden"), "dtype": st.text(max_size=4)}), max_size=2)
        )
        return Raw(json.dumps(fields).encode(), frame.payload)
    header, payload = bytearray(frame.header), bytearray(frame.payload)
    for garbled in (header, payload):
        for _ in range(draw(st.integers(0, 3)) if garbled else 0):
            garbled[draw(st.integers(0, len(garbled) - 1))] = draw(st.integers(0, 255))
    return Raw(bytes(header), bytes(payload[: draw(st.sampled_from([len(payload), len(payload) // 2]))]))


noise = st.builds(Raw, st.binary(max_size=200), st.binary(max_size=64))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.lists(st.sampled_from(VALID) | mutated() | noise, min_size=1, max_size=5))
def test_whatever_is_sent_is_answered_or_refused(town, frames):
    swarm, _, intruder = town
    answers = intruder.ask(*frames)
    assert all(isinstance(answer, Opened | StepResult | PassResult | Pong | Unreached | Failure) for answer in answers)
    assert not any(isinstance(answer, Failure) for answer in answers[:-1])
    assert not any(isinstance(answer, Failure) and answer.code == "broken" for answer in answers)
    swarm.settle(lambda: not num_streams(swarm, "s0"))
    check_idle(swarm)


def test_the_swarm_outlives_all_that(town, whole):
    swarm, model, _ = town
    with Peace(swarm, model, whole):
        pass
    assert "s0" in swarm.servers


# -- those who say nothing, or do not listen ------------------------------------------------------------------------


def test_sessions_that_are_never_used_take_no_room_and_are_ended(swarm: MakeSwarm, whole):
    swarm_ = swarm("0:4", cache_tokens=64, idle_seconds=2.0)
    intruder, mute = Intruder(swarm_, "s0"), Intruder(swarm_, "s0", name="mute")
    silent = [mute.open() for _ in range(50)]
    for stream in [intruder.open() for _ in range(50)]:
        intruder.tell(stream, opening(expected_length=64))
    swarm_.settle(lambda: num_sessions(swarm_, "s0") == 50)
    assert swarm_.servers["s0"].engine.cache_tokens_left == 64
    answer = swarm_.model().generate(PROMPT, max_new_tokens=4)
    assert answer.tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()
    swarm_.settle(lambda: not num_streams(swarm_, "s0"))
    check_idle(swarm_)
    assert len(silent) == 50


def crowd_in(swarm: Swarm) -> list[Any]:
    """Four sessions that take a page each, and then fall silent."""
    intruder, engine = Intruder(swarm, "s0", name="crowd"), swarm.servers["s0"].engine
    streams = [intruder.open() for _ in range(4)]
    for num_left, stream in zip((48, 32, 16, 0), streams, strict=True):
        intruder.tell(stream, opening(), step())
        swarm.settle(lambda num_left=num_left: engine.cache_tokens_left == num_left)
    return streams


def test_those_who_wait_for_room_get_it_when_silent_sessions_are_ended(swarm: MakeSwarm):
    swarm_ = swarm("0:4", cache_tokens=64, idle_seconds=0.5)
    crowd_in(swarm_)
    answers = Intruder(swarm_, "s0").ask(opening(), step(), step(2))
    assert isinstance(answers[-1], StepResult)
    swarm_.settle(lambda: not num_streams(swarm_, "s0"))
    check_idle(swarm_)


def test_those_who_wait_for_room_in_vain_are_asked_to_come_back(swarm: MakeSwarm):
    swarm_ = swarm("0:4", cache_tokens=64, limits=Limits(queue_seconds=0.1))
    streams = crowd_in(swarm_)
    *_, busy = Intruder(swarm_, "s0").ask(opening(), step())
    assert isinstance(busy, Failure)
    assert (busy.code, busy.reason) == ("busy", "no room in the cache for 0.1 s")
    assert busy.retry_after
    assert len(streams) == num_sessions(swarm_, "s0")


def test_those_who_find_a_long_queue_are_asked_to_come_back_at_once(swarm: MakeSwarm):
    swarm_ = swarm("0:4", cache_tokens=64, limits=Limits(queue_length=2))
    crowd_in(swarm_)
    waiting = Intruder(swarm_, "s0", name="waiting")
    for stream in [waiting.open() for _ in range(2)]:
        waiting.tell(stream, opening(), step())
    swarm_.settle(lambda: swarm_.servers["s0"].engine.queue_length == 2)
    late = Intruder(swarm_, "s0")
    *_, busy = late.ask(opening(), step())
    assert isinstance(busy, Failure)
    assert (busy.code, busy.reason) == ("busy", "2 others wait for room in the cache")
    assert [type(answer) for answer in late.ask(opening())] == [Opened]
    assert isinstance(late.ask(forward())[0], PassResult)
    swarm_.kill("crowd")
    swarm_.settle(lambda: swarm_.servers["s0"].engine.queue_length == 0)
    assert isinstance(late.ask(opening(), step())[-1], StepResult)


def test_a_client_that_never_reads_its_answers_is_ended(swarm: MakeSwarm):
    swarm_ = swarm("0:4", idle_seconds=0.5)
    intruder = Intruder(swarm_, "s0")
    stream = intruder.open()
    intruder.tell(stream, opening(end=4), *[raw("ping")] * 40)
    swarm_.settle(lambda: not num_streams(swarm_, "s0"))
    check_idle(swarm_)


def test_a_server_leaves_although_somebody_never_reads_its_answers(swarm: MakeSwarm):
    swarm_ = swarm("0:4")
    intruder = Intruder(swarm_, "s0")
    stream = intruder.open()
    intruder.tell(stream, opening(end=4), *[raw("ping")] * 20)
    swarm_.settle(lambda: num_sessions(swarm_, "s0") == 1)
    swarm_.stop("s0")
    swarm_.settle(lambda: not num_streams(swarm_, "s0"))


@pytest.mark.parametrize("when", ["before its first step", "in the middle of a step", "between steps"])
def test_a_client_that_vanishes_gives_its_room_back(swarm: MakeSwarm, whole, when: str):
    swarm_ = swarm("0:4")
    model = swarm_.model()
    intruder = Intruder(swarm_, "s0")
    server = swarm_.servers["s0"].engine
    stream = intruder.open()
    frames = {
        "before its first step": [opening()],
        "in the middle of a step": [opening(expected_length=512), step(tensors={"hidden": hidden(1, 512)})],
        "between steps": [opening(), step(), step(2)],
    }[when]
    intruder.tell(stream, *frames)
    has_come = {
        "before its first step": lambda: num_sessions(swarm_, "s0") == 1,
        "in the middle of a step": lambda: server.queue_length == 1 or server.cache_tokens_left < server.cache_tokens,
        "between steps": lambda: server.cache_tokens_left < server.cache_tokens,
    }[when]
    swarm_.settle(has_come)
    swarm_.kill("intruder")
    swarm_.settle(lambda: not num_streams(swarm_, "s0"))
    check_idle(swarm_)
    assert model.generate(PROMPT, max_new_tokens=4).tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()


@contextlib.contextmanager
def busy_thread(swarm_: Swarm) -> Iterator[None]:
    """Meanwhile, the server computes nothing."""
    free = threading.Event()
    executor = swarm_.servers["s0"].engine.executor
    holding = asyncio.run_coroutine_threadsafe(executor.run(free.wait), swarm_.runtime.loop)
    try:
        yield
    finally:
        free.set()
        holding.result()


@pytest.mark.parametrize("more", [forward(), opening(), raw("rewind", epoch=1, position=0)], ids=["pass", "open", "no"])
def test_who_asks_for_more_before_a_pass_is_answered_is_refused(swarm: MakeSwarm, more: Raw):
    """Else what is sent meanwhile, 256 MiB a stream, would wait here, and nobody would count it."""
    swarm_ = swarm("0:4")
    with busy_thread(swarm_):
        pong, failure = Intruder(swarm_, "s0").ask(forward(), raw("ping"), more)
        assert isinstance(pong, Pong)
        assert pong.working
        assert isinstance(failure, Failure)
        assert failure.code == "rejected"
        assert failure.reason.endswith("before the last one is answered")
        swarm_.settle(lambda: not swarm_.servers["s0"].engine.queue_length)


def test_who_hangs_up_after_a_goodbye_is_not_computed_for(swarm: MakeSwarm):
    swarm_ = swarm("0:4")
    intruder = Intruder(swarm_, "s0")
    stream = intruder.open()
    with busy_thread(swarm_):
        intruder.tell(stream, forward(), raw("close"), raw("ping"))
        assert isinstance(intruder.hear(stream)[0][0], Pong)
        swarm_.kill("intruder")
        swarm_.settle(lambda: not num_streams(swarm_, "s0"))
        assert not swarm_.servers["s0"].engine.queue_length


def test_passes_beyond_what_memory_holds_are_asked_to_come_back(swarm: MakeSwarm):
    most = 3 * hidden(1, 512).nbytes
    swarm_ = swarm("0:4", limits=Limits(waiting_bytes=most))
    server = swarm_.servers["s0"].engine
    crowd, late = Intruder(swarm_, "s0", name="crowd"), Intruder(swarm_, "s0", name="late")
    streams = [crowd.open() for _ in range(3)]
    with busy_thread(swarm_):
        for stream in streams:
            crowd.tell(stream, forward({"hidden": hidden(1, 512)}))
        swarm_.settle(lambda: server.passes.waiting_bytes == most)
        (busy,) = late.ask(forward())
    assert isinstance(busy, Failure)
    assert (busy.code, busy.reason) == ("busy", "too many passes are waiting")
    swarm_.settle(lambda: server.passes.waiting_bytes == 0)
    (answer,) = late.ask(forward())
    assert isinstance(answer, PassResult)
