"""Tensors that travel in fewer bytes: who asks for it gets it, nobody else does, and no token depends on who serves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from shoal import UnsupportedOperation, UserError
from shoal.cli.options import Wire
from shoal.client.options.client_options import WIRES, ClientOptions, parse_wire
from shoal.model import families
from shoal.net.memory import Frame
from shoal.net.wire import codec
from shoal.protocol import AnyMessage, Backward, Open, Opened, Step
from shoal.tensors import Encoding

from .harness import QUICK, Swarm
from .intruder import raw
from .local_blocks import Transfer
from .test_hostile_servers import Rogue, politely

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.tensor([[5, 17, 42, 9, 33]])
LONG_PROMPT = torch.arange(40)[None] * 7 % 90 + 2


def asking_for(wire: Encoding) -> ClientOptions:
    return replace(QUICK, wire=wire)


@dataclass
class Tap:
    """Everything that is sent in a swarm, read along."""

    frames: list[tuple[Frame, AnyMessage, codec.Tensors]] = field(default_factory=list)

    def __call__(self, frame: Frame) -> Frame:
        self.frames.append((frame, *codec.decode(frame.header, bytearray(frame.payload))))
        return frame

    def encodings(self, *, peer: str = "") -> set[str]:
        """How floating-point numbers travel, to and from a peer or everybody."""
        return {
            spec.encoding
            for frame, message, _ in self.frames
            if peer in ("", frame.sender, frame.receiver)
            for spec in message.tensors
            if spec.dtype == "float32"
        }

    def packed(self) -> set[tuple[str, str]]:
        """From which peers to which something was sent packed."""
        return {
            (frame.sender, frame.receiver)
            for frame, message, _ in self.frames
            for spec in message.tensors
            if spec.packed is not None
        }

    def payload_bytes(self) -> int:
        return sum(len(frame.payload) for frame, _, _ in self.frames)

    def inputs_of(self, server: str) -> torch.Tensor:
        """What a server was sent, step after step."""
        steps = [
            tensors["hidden"]
            for frame, message, tensors in self.frames
            if frame.receiver == server and isinstance(message, Step)
        ]
        return torch.cat(steps, dim=1)


def tapped(swarm: Swarm) -> Tap:
    swarm.network.on_frame = tap = Tap()
    return tap


def slow_lines(swarm: Swarm, *peers: str) -> None:
    """From now on, all of these peers believe that their lines to each other are so slow that packing always gains."""
    for one, other in permutations(peers, 2):
        swarm.call(lambda one=one, other=other: swarm.network.line(one, other).told(1000))


def without_encodings(swarm: Swarm, name: str) -> None:
    """From now on, a server announces that it knows none, however often it announces something."""
    server, network = swarm.servers[name], swarm.network
    network.on_announce = lambda info: replace(info, encodings=()) if info.peer == name else info
    swarm.call(lambda: network.publish(name, server.model, server.info, swarm.runtime.loop.time() + 300))


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
@pytest.mark.parametrize("successor", ["knows the encoding", "does not know it"])
def test_no_token_changes_when_a_server_dies(swarm: MakeSwarm, wire: Encoding, successor: str):
    undisturbed = swarm("0:2", "2:4").model(config=asking_for(wire)).generate(PROMPT, max_new_tokens=16)
    swarm_ = swarm("0:2", "2:4")
    model = swarm_.model(config=asking_for(wire))
    tap = tapped(swarm_)
    with model.inference_session(max_length=40) as session:
        first = model.generate(PROMPT, max_new_tokens=8, session=session)
        swarm_.start("2:4")
        if successor == "does not know it":
            without_encodings(swarm_, "s2")
        swarm_.kill("s1")
        rest = model.generate(None, max_new_tokens=8, session=session)
        assert session.servers == ("s0", "s2")
    assert torch.cat((first, rest), dim=1).tolist() == undisturbed.tolist()
    before, after = tap.inputs_of("s1"), tap.inputs_of("s2")
    assert torch.equal(after[:, : before.shape[1]], before)
    assert tap.encodings(peer="s2") == ({wire} if successor == "knows the encoding" else {"raw"})


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_no_token_depends_on_who_knows_the_encoding(swarm: MakeSwarm, wire: Encoding):
    swarm_ = swarm("0:2", "2:4")
    everybody = swarm_.model(config=asking_for(wire)).generate(PROMPT, max_new_tokens=16)
    without_encodings(swarm_, "s0")
    tap = tapped(swarm_)
    only_one = swarm_.model(config=asking_for(wire)).generate(PROMPT, max_new_tokens=16)
    assert only_one.tolist() == everybody.tolist()
    assert tap.encodings(peer="s0") == {"raw"}
    assert tap.encodings(peer="s1") == {wire}


def test_nothing_is_lost_unless_the_user_asks_for_it(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:4")
    tap = tapped(swarm_)
    model = swarm_.model()
    assert model.generate(PROMPT, max_new_tokens=8).tolist() == whole.generate(PROMPT, max_new_tokens=8).tolist()
    model(PROMPT, labels=PROMPT).loss.backward()
    assert tap.encodings() == {"raw"}
    assert WIRES["auto"] == ClientOptions().wire == "raw"


def test_slow_lines_carry_fewer_bytes_and_the_same_bits(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:2", "2:4")
    packing, raw = swarm_.model(peer="packing"), swarm_.model(peer="raw", config=replace(QUICK, packs=False))
    slow_lines(swarm_, "packing", "s0", "s1")
    results = []
    for model in (packing, raw):
        tap = tapped(swarm_)
        generated = model.generate(LONG_PROMPT, max_new_tokens=8).tolist()
        embeds = whole.get_input_embeddings()(LONG_PROMPT).detach().requires_grad_(True)
        logits = model(inputs_embeds=embeds).logits
        logits.square().sum().backward()
        results.append((generated, logits.detach(), embeds.grad, tap))
    (tokens, logits, grad, few), (raw_tokens, raw_logits, raw_grad, many) = results
    assert tokens == raw_tokens == whole.generate(LONG_PROMPT, max_new_tokens=8).tolist()
    assert torch.equal(logits, raw_logits)
    assert torch.equal(grad, raw_grad)
    assert few.packed() >= {*permutations(("packing", "s0"), 2), *permutations(("packing", "s1"), 2), ("s0", "s1")}
    assert few.encodings() == {"raw"}
    assert few.payload_bytes() < many.payload_bytes()
    assert many.packed() == set()


def test_a_server_that_unpacks_nothing_gets_nothing_packed(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:2", "2:4")
    without_encodings(swarm_, "s1")
    model = swarm_.model(peer="client")
    slow_lines(swarm_, "client", "s0", "s1")
    tap = tapped(swarm_)
    generated = model.generate(LONG_PROMPT, max_new_tokens=4)
    assert generated.tolist() == whole.generate(LONG_PROMPT, max_new_tokens=4).tolist()
    assert ("client", "s0") in tap.packed()
    assert tap.packed().isdisjoint({("client", "s1"), ("s0", "s1")})


def test_int8_is_half_of_bfloat16_on_the_wire(swarm: MakeSwarm):
    swarm_ = swarm("0:2", "2:4")
    tokens = torch.arange(400).view(2, 200) % 90 + 2
    sent: dict[str, int] = {}
    wires: tuple[Encoding, ...] = ("raw", "bfloat16", "int8")
    for wire in wires:
        model = swarm_.model(config=asking_for(wire))
        tap = tapped(swarm_)
        model(tokens)
        sent[wire] = tap.payload_bytes()
    assert sent["raw"] == 2 * 2 * tokens.numel() * 32 * 4  # two hops, there and back
    assert sent["bfloat16"] == sent["raw"] / 2
    assert sent["int8"] == sent["bfloat16"] * (32 + 2) / 64  # half a block, with a peak of two bytes


@pytest.mark.parametrize("wire", ["bfloat16", "int8"])
def test_logits_and_gradients_are_those_of_a_model_that_rounds_between_its_hops(
    swarm: MakeSwarm, folder: Path, wire: Encoding
):
    rounding = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    layers = rounding.model.layers
    for hop in (0, 2, 3):
        layers[hop].register_forward_pre_hook(lambda _, inputs: (Transfer.apply(inputs[0], wire), *inputs[1:]))
    layers[3].register_forward_hook(lambda _, inputs, output: Transfer.apply(output, wire))
    swarm_ = swarm("0:2", "2:3", "3:4")
    tap = tapped(swarm_)
    results = []
    for model in (rounding, swarm_.model(config=asking_for(wire))):
        embeds = rounding.get_input_embeddings()(PROMPT).detach().requires_grad_(True)
        logits = model(inputs_embeds=embeds).logits
        logits.square().sum().backward()
        results.append((logits.detach(), embeds.grad))
    for actual, expected in zip(results[1], results[0], strict=True):
        assert (actual - expected).norm() < 1e-3 * expected.norm()
    assert tap.encodings() == {wire}
    assert any(isinstance(message, Backward) for _, message, _ in tap.frames)


def test_what_a_server_has_computed_before_travels_in_the_encoding_too(swarm: MakeSwarm):
    swarm_ = swarm("0:2", "2:4")
    model = swarm_.model(config=asking_for("int8"))
    first = model.generate(LONG_PROMPT, max_new_tokens=8)
    tap = tapped(swarm_)
    assert model.generate(LONG_PROMPT, max_new_tokens=8).tolist() == first.tolist()
    known = [message for _, message, _ in tap.frames if isinstance(message, Opened) and message.num_tokens]
    assert known
    assert {message.encoding_of("hidden") for message in known} == {"int8"}


def test_a_server_that_loses_what_nobody_asked_it_to_lose_is_left(swarm: MakeSwarm, whole: PreTrainedModel, caplog):
    swarm_ = swarm("0:4")

    def answer(message: AnyMessage, tensors: codec.Tensors) -> list[Any]:
        frame = raw("step_result", {"hidden": tensors["hidden"]})
        header, buffers = codec.encode(codec.parse(frame.header), {"hidden": tensors["hidden"]}, "int8")
        return [replace(frame, header=header, payload=b"".join(buffers))]

    rogue = Rogue(swarm_, politely(answer))
    generated = swarm_.model().generate(PROMPT, max_new_tokens=4)
    assert generated.tolist() == whole.generate(PROMPT, max_new_tokens=4).tolist()
    assert "answered in int8, which was not asked for" in caplog.text
    assert rogue.asked == ["open", "step"]


def test_a_server_that_answers_raw_instead_is_as_good(swarm: MakeSwarm):
    swarm_ = swarm("0:4")
    model = swarm_.model(config=asking_for("int8"))
    expected = model.generate(PROMPT, max_new_tokens=4)

    def as_raw(frame: Frame) -> Frame:
        message, tensors = codec.decode(frame.header, bytearray(frame.payload))
        if frame.sender != "s0" or isinstance(message, Open):
            return frame
        header, buffers = codec.encode(message, tensors)
        return replace(frame, header=header, payload=b"".join(buffers))

    swarm_.network.on_frame = as_raw
    assert model.generate(PROMPT, max_new_tokens=4).tolist() == expected.tolist()


def test_a_family_that_cannot_bear_an_encoding_refuses_it(swarm: MakeSwarm, monkeypatch):
    monkeypatch.setitem(families.TOO_SENSITIVE, "int8", frozenset({"llama"}))
    swarm_ = swarm("0:4")
    with pytest.raises(UnsupportedOperation, match="'llama' is not certified for hidden states that travel in int8"):
        swarm_.model(config=asking_for("int8"))
    swarm_.model(config=asking_for("bfloat16"))


def test_what_loses_nothing_is_never_refused(swarm: MakeSwarm, monkeypatch):
    monkeypatch.setitem(families.TOO_SENSITIVE, "bfloat16", frozenset({"llama"}))
    swarm("0:4").model(config=asking_for("bfloat16"), dtype="bfloat16")


def test_only_raw_is_never_packed():
    assert {wire for wire in WIRES if not ClientOptions.from_keywords(wire=wire).packs} == {"raw"}


def test_the_command_line_has_the_same_words():
    assert {*Wire} == {*WIRES}


def test_an_unknown_way_to_travel_is_a_mistake():
    with pytest.raises(UserError, match="'int4' is not a way to send tensors"):
        parse_wire("int4")
