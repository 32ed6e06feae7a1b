"""Servers sign what they received, answered and pushed: who says one thing and does another is found by that alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from shoal.client.options.client_options import ClientOptions
from shoal.client.swarm.audit_book import AuditBook
from shoal.events import Event, ServerLost, TextDoubtful
from shoal.net.memory import Frame, MemoryNetwork
from shoal.net.signing.receipt_signatures import is_signed
from shoal.policy.audits.receipt_verdict import ReceiptVerdict
from shoal.policy.routing.switching import Looks
from shoal.protocol import Open, Receipt, dump, parse

from .harness import QUICK, Swarm
from .lies import Liars, Signs, shifted
from .test_speculation import MakeDrafter, always, far_sighted, foreseeing, mostly, never

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.tensor([[5, 17, 42, 9, 33, 61, 8, 70, 12, 3]])


@pytest.fixture(autouse=True)
def receipts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No server is audited, and sessions stay on their servers, however slow these are while the machine is busy."""
    monkeypatch.setattr(AuditBook, "choose", lambda *_: None)
    monkeypatch.setattr(Looks, "is_due", lambda *_, **__: False)


@pytest.fixture
def options(tmp_path: Path) -> ClientOptions:
    return replace(QUICK, audits="low", evidence_folder=tmp_path)


class Seen:
    """What a client is told of servers."""

    def __init__(self) -> None:
        self.lost: dict[str, str] = {}
        self.doubts: list[TextDoubtful] = []

    def __call__(self, event: Event) -> None:
        match event:
            case ServerLost():
                self.lost[event.peer] = event.reason
            case TextDoubtful():
                self.doubts.append(event)


def oracle(whole: PreTrainedModel, prompt: torch.Tensor, num_tokens: int) -> torch.Tensor:
    mask = torch.ones_like(prompt)
    result = whole.generate(prompt, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
    assert isinstance(result, torch.Tensor)
    return result


def receipts_of(model: Any) -> dict[ReceiptVerdict, int]:
    return dict(model.blocks.swarm.audits.receipts)


@dataclass
class Wire:
    """The receipts that servers send, and what becomes of them."""

    network: MemoryNetwork
    change: Callable[[Receipt], Receipt | None] = lambda receipt: receipt

    def __post_init__(self) -> None:
        self.receipts: list[tuple[str, Receipt]] = []
        self.sessions: list[str | None] = []
        self.network.on_frame = self._on_frame

    def _on_frame(self, frame: Frame) -> Frame | None:
        if frame.payload:
            return frame
        match message := parse(frame.header):
            case Open():
                self.sessions.append(message.receipts)
            case Receipt():
                self.receipts.append((frame.sender, message))
                changed = self.change(message)
                return None if changed is None else replace(frame, header=dump(changed))
        return frame


@pytest.mark.parametrize("wire", ["raw", "int8"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_honest_servers_sign_all_tokens_but_the_last_few(
    swarm: MakeSwarm, options: ClientOptions, wire: Any, batch_size: int
):
    swarm_ = swarm("0:2", "2:4")
    seen, wires = Seen(), Wire(swarm_.network)
    model = swarm_.model(config=replace(options, wire=wire, observers=(seen,)))
    prompt = PROMPT.repeat(batch_size, 1)
    with model.inference_session(max_length=120, batch_size=batch_size) as session:
        model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=60, session=session)
    for peer in ("s0", "s1"):
        ranges = [(each.first, each.end) for sender, each in wires.receipts if sender == peer]
        assert ranges == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert set(receipts_of(model)) == {ReceiptVerdict.AGREES}
    assert receipts_of(model)[ReceiptVerdict.AGREES] >= 7  # the last come when there may be no step after them
    assert not seen.lost
    assert not seen.doubts


def test_who_pushes_the_inputs_of_the_next_server_signs_the_same_as_that_one(swarm: MakeSwarm, options: ClientOptions):
    swarm_ = swarm("0:2", "2:4")
    wires = Wire(swarm_.network)
    model = swarm_.model(config=options)
    with model.inference_session(max_length=60) as session:
        model.generate(PROMPT, max_new_tokens=20, session=session)
    first, second = (
        next(receipt for sender, receipt in wires.receipts if sender == peer and receipt.first == 0)
        for peer in ("s0", "s1")
    )
    assert first.pushed == first.answered == second.inputs
    assert second.pushed is None


def test_of_logits_no_digest_is_signed(swarm: MakeSwarm, options: ClientOptions):
    swarm_ = swarm("0:2")
    swarm_.start("2:4", serve_head=True)
    wires = Wire(swarm_.network)
    model = swarm_.model(config=replace(options, remote_head=True))
    with model.inference_session(max_length=80) as session:
        model.generate(PROMPT, max_new_tokens=40, session=session)
    assert {receipt.answered for sender, receipt in wires.receipts if sender == "s1"} == {None}
    assert set(receipts_of(model)) == {ReceiptVerdict.AGREES}


@pytest.mark.parametrize(("answers", "pushes"), [(True, False), (False, True)])
def test_a_server_that_signs_what_it_sent_and_pushes_something_else_than_it_answers_is_shut_out(
    swarm: MakeSwarm, options: ClientOptions, whole: PreTrainedModel, tmp_path: Path, answers: bool, pushes: bool
):
    swarm_ = swarm("0:2", "2:4")
    seen = Seen()
    model = swarm_.model(config=replace(options, observers=(seen,)))
    Liars(swarm_.network).add("s0", shifted, answers=answers, pushes=pushes, signs="what it sent")
    with model.inference_session(max_length=200) as session:
        first = model.generate(PROMPT, max_new_tokens=1, session=session)
        swarm_.start("0:2")
        text = torch.cat([first, model.generate(None, max_new_tokens=40, session=session)], dim=1)
        assert session.servers == ("s2", "s1")
    assert model.blocks.swarm.audits.liars == {"s0"}
    assert not seen.lost.keys() - {"s0"}
    doubt = seen.doubts[-1]  # if the receipt of the next server came first, either may be to blame until then
    assert doubt.reason == "s0 was found lying"
    assert doubt.end <= 16 + 4  # the receipt for 16 tokens comes while the next are computed
    known = text[:, : doubt.end + 1]
    assert torch.equal(text, oracle(whole, known, text.shape[1] - known.shape[1]))
    evidence = json.loads(json.loads((tmp_path / "s0.json").read_text())["receipt"])
    assert evidence["pushed"] != evidence["got"]
    receipt = Receipt(**{name: evidence[name] for name in Receipt.model_fields if name in evidence})
    transport = model.blocks.swarm.node.transport
    assert is_signed(transport, receipt, session=evidence["session"], server="s0")
    assert not is_signed(transport, receipt, session=evidence["session"], server="s1")


@pytest.mark.parametrize("signs", ["nothing", "what it computed"])
def test_if_two_neighbors_sign_different_things_the_client_carries_the_outputs_and_no_one_is_shut_out(
    swarm: MakeSwarm, options: ClientOptions, whole: PreTrainedModel, signs: Signs
):
    swarm_ = swarm("0:2", "2:4")
    seen = Seen()
    model = swarm_.model(config=replace(options, observers=(seen,)))
    Liars(swarm_.network).add("s0", shifted, answers=False, signs=signs)
    with model.inference_session(max_length=200) as session:
        text = model.generate(PROMPT, max_new_tokens=60, session=session)
        assert session.servers == ("s0", "s1")
    assert not model.blocks.swarm.audits.liars
    assert not seen.lost
    assert swarm_.call(model.blocks.swarm.measurements.broken_pairs.now) == {("s0", "s1")}
    (doubt,) = seen.doubts
    assert (doubt.start, doubt.reason) == (0, "s0 or s1 signs something else than it has sent or got")
    assert doubt.end <= 16 + 2
    known = text[:, : doubt.end + 1]
    assert torch.equal(text, oracle(whole, known, text.shape[1] - known.shape[1]))


def forged(receipt: Receipt) -> Receipt:
    last = "1" if receipt.signature.endswith("0") else "0"
    return receipt.model_copy(update={"signature": receipt.signature[:-1] + last})


def other_inputs(receipt: Receipt) -> Receipt:
    return receipt.model_copy(update={"inputs": "0" * 64})


@pytest.mark.parametrize("change", [forged, other_inputs])
def test_a_server_whose_receipt_is_wrong_is_lost_and_what_it_answered_meanwhile_is_doubtful(
    swarm: MakeSwarm, options: ClientOptions, whole: PreTrainedModel, change: Callable[[Receipt], Receipt]
):
    swarm_ = swarm("0:4")
    seen = Seen()
    model = swarm_.model(config=replace(options, observers=(seen,)))
    with model.inference_session(max_length=200) as session:
        first = model.generate(PROMPT, max_new_tokens=1, session=session)
        swarm_.start("0:4")
        Wire(swarm_.network, lambda receipt: change(receipt) if session.servers == ("s0",) else receipt)
        text = torch.cat([first, model.generate(None, max_new_tokens=30, session=session)], dim=1)
        assert session.servers == ("s1",)
    assert "with a receipt that is wrong" in seen.lost["s0"]
    assert not model.blocks.swarm.audits.liars
    assert seen.doubts[0].start == 0
    assert torch.equal(text, oracle(whole, PROMPT, 31))


def test_a_receipt_of_another_session_is_refused(swarm: MakeSwarm, options: ClientOptions):
    swarm_ = swarm("0:4")
    wires = Wire(swarm_.network)
    seen = Seen()
    model = swarm_.model(config=replace(options, observers=(seen,)))
    with model.inference_session(max_length=60) as session:
        model.generate(PROMPT, max_new_tokens=20, session=session)
    (_, old), *_ = wires.receipts
    with model.inference_session(max_length=60) as session:
        model.generate(PROMPT, max_new_tokens=1, session=session)
        swarm_.start("0:4")
        wires.change = lambda receipt: old if session.servers == ("s0",) else receipt
        model.generate(None, max_new_tokens=20, session=session)
        assert session.servers == ("s1",)
    _, same = (receipt for sender, receipt in wires.receipts if sender == "s0" and not receipt.first)
    assert (same.inputs, same.answered) == (old.inputs, old.answered)
    assert "is wrong: its signature is not that of the server" in seen.lost["s0"]


def test_a_server_that_signs_nothing_is_used_and_audited_as_before(
    swarm: MakeSwarm, options: ClientOptions, whole: PreTrainedModel
):
    swarm_ = swarm("0:2", "2:4")
    seen = Seen()
    Wire(swarm_.network, lambda receipt: None)
    model = swarm_.model(config=replace(options, observers=(seen,)))
    with model.inference_session(max_length=120) as session:
        text = model.generate(PROMPT, max_new_tokens=80, session=session)
        assert session.servers == ("s0", "s1")
        assert [each.signs for each in session.state.stages] == [False, False]
    assert torch.equal(text, oracle(whole, PROMPT, 80))
    assert not seen.lost
    assert not receipts_of(model)


def test_without_audits_no_receipts_are_asked_for(swarm: MakeSwarm, options: ClientOptions):
    swarm_ = swarm("0:4")
    wires = Wire(swarm_.network)
    model = swarm_.model(config=replace(options, audits="off"))
    with model.inference_session(max_length=60) as session:
        model.generate(PROMPT, max_new_tokens=20, session=session)
    assert wires.sessions == [None]
    assert not wires.receipts


@pytest.mark.parametrize(
    ("drafter", "is_right", "num_guesses"),
    [(foreseeing, never, 4), (foreseeing, mostly, 4), (far_sighted, mostly, 1), (far_sighted, always, 4)],
)
def test_honest_servers_that_compute_guesses_sign_what_is_kept_of_them(
    swarm: MakeSwarm,
    whole: PreTrainedModel,
    options: ClientOptions,
    drafter: MakeDrafter,
    is_right: Callable[[int], bool],
    num_guesses: int,
):
    seen = Seen()
    model = swarm("0:2", "2:4").model(config=replace(options, observers=(seen,)))
    wanted = oracle(whole, PROMPT, 64)[0, PROMPT.shape[1] :].tolist()
    draft = drafter(PROMPT, wanted, is_right)
    stream = model.stream(PROMPT, max_new_tokens=64, draft=draft, num_guesses=num_guesses)
    assert [token.id for token in stream] == wanted
    assert set(receipts_of(model)) == {ReceiptVerdict.AGREES}
    assert not seen.lost
    assert not seen.doubts
