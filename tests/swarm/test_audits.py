"""Servers that compute something else than they should are found, replaced and kept away from; honest ones are not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from shoal.client.options.client_options import ClientOptions
from shoal.events import Event, ServerAudited, TextDoubtful
from shoal.policy.audits.likeness import EXACT
from shoal.policy.routing.switching import Looks

from .harness import QUICK, Swarm
from .lies import Liars, Lie, noise, shifted
from .test_speculation import MakeDrafter, far_sighted, foreseeing, mostly

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.tensor([[5, 17, 42, 9, 33, 61, 8, 70, 12, 3]])


@pytest.fixture(autouse=True)
def stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions stay on their servers, however slow these are while the machine is busy."""
    monkeypatch.setattr(Looks, "is_due", lambda *_, **__: False)


@pytest.fixture
def audited(tmp_path: Path) -> ClientOptions:
    return replace(QUICK, audits="high", evidence_folder=tmp_path)


class Seen:
    """The audits that a client has made, and the texts that it has called doubtful."""

    def __init__(self) -> None:
        self.audits: list[ServerAudited] = []
        self.doubts: list[TextDoubtful] = []

    def __call__(self, event: Event) -> None:
        match event:
            case ServerAudited():
                self.audits.append(event)
            case TextDoubtful():
                self.doubts.append(event)

    @property
    def findings(self) -> dict[str, set[str]]:
        return {each.peer: {other.finding for other in self.audits if other.peer == each.peer} for each in self.audits}


def test_honest_servers_pass_audits_and_the_tokens_are_those_of_one_machine(
    swarm: MakeSwarm, audited: ClientOptions, whole: PreTrainedModel
):
    swarm_ = swarm("0:2", "2:4", "0:2", "2:4")
    seen = Seen()
    model = swarm_.model(config=replace(audited, observers=(seen,)))
    with model.inference_session(max_length=120) as session:
        text = model.generate(PROMPT, max_new_tokens=60, session=session)
        swarm_.settle(lambda: len(seen.audits) >= 2)
        assert set(seen.findings) == set(session.servers)
    assert torch.equal(text, oracle(whole, PROMPT, 60))
    assert set.union(*seen.findings.values()) == {"clean"}
    assert max(audit.distance for audit in seen.audits) < EXACT.typical / 10
    assert not seen.doubts


@pytest.mark.parametrize(("drafter", "num_guesses"), [(foreseeing, 4), (far_sighted, 1)])
def test_servers_that_compute_guesses_are_audited_as_others_are(
    swarm: MakeSwarm, audited: ClientOptions, whole: PreTrainedModel, drafter: MakeDrafter, num_guesses: int
):
    swarm_ = swarm("0:2", "2:4", "0:2", "2:4")
    seen = Seen()
    model = swarm_.model(config=replace(audited, observers=(seen,)))
    wanted = oracle(whole, PROMPT, 60)[0, PROMPT.shape[1] :].tolist()
    with model.inference_session(max_length=120) as session:
        draft = drafter(PROMPT, wanted, mostly)
        stream = model.stream(PROMPT, max_new_tokens=60, draft=draft, num_guesses=num_guesses, session=session)
        assert [token.id for token in stream] == wanted
        swarm_.settle(lambda: len(seen.audits) >= 2)
        assert set(seen.findings) == set(session.servers)
    assert set.union(*seen.findings.values()) == {"clean"}
    assert not seen.doubts


def test_a_liar_is_found_while_it_computes_guesses(swarm: MakeSwarm, audited: ClientOptions):
    swarm_ = swarm("0:2", "2:4")
    seen = Seen()
    model = swarm_.model(config=replace(audited, observers=(seen,)))
    Liars(swarm_.network).add("s0", shifted)
    with model.inference_session(max_length=200) as session:
        model.generate(PROMPT, max_new_tokens=1, session=session)
        for span in ("0:2", "2:4", "0:2", "2:4"):
            swarm_.start(span)
        list(model.stream(None, max_new_tokens=80, num_guesses=4, session=session))
        assert "s0" not in session.servers
    assert {peer for peer, found in seen.findings.items() if "lied" in found} == {"s0"}


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("lie", [noise(0.05), shifted, torch.zeros_like])
def test_a_liar_is_found_and_replaced_and_what_it_may_have_spoiled_is_named(
    swarm: MakeSwarm, audited: ClientOptions, whole: PreTrainedModel, which: int, lie: Lie
):
    swarm_ = swarm("0:2", "2:4")
    seen = Seen()
    model = swarm_.model(config=replace(audited, observers=(seen,)))
    Liars(swarm_.network).add(f"s{which}", lie)
    with model.inference_session(max_length=200) as session:
        first = model.generate(PROMPT, max_new_tokens=1, session=session)
        for span in ("0:2", "2:4", "0:2", "2:4"):
            swarm_.start(span)
        text = torch.cat([first, model.generate(None, max_new_tokens=80, session=session)], dim=1)
        assert f"s{which}" not in session.servers
    assert {peer for peer, found in seen.findings.items() if "lied" in found} == {f"s{which}"}
    doubt = seen.doubts[-1]  # if it pushes something else than it answers, the next server may be to blame at first
    assert doubt.reason == f"s{which} was found lying"
    assert doubt.start < doubt.end <= PROMPT.shape[1] + 64
    known = text[:, : doubt.end + 1]  # the token after the last doubtful output was chosen from that
    assert torch.equal(text, oracle(whole, known, text.shape[1] - known.shape[1]))


def oracle(whole: PreTrainedModel, prompt: torch.Tensor, num_tokens: int) -> torch.Tensor:
    mask = torch.ones_like(prompt)
    result = whole.generate(prompt, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
    assert isinstance(result, torch.Tensor)
    return result


def test_a_server_that_pushes_something_else_than_it_answers_is_not_believed_to_push(
    swarm: MakeSwarm, audited: ClientOptions, whole: PreTrainedModel
):
    swarm_ = swarm("0:2", "2:4")
    seen = Seen()
    model = swarm_.model(config=replace(audited, observers=(seen,)))
    liars = Liars(swarm_.network)
    liars.add("s0", shifted, answers=False)
    liars.sign_nothing("s1", "s2", "s3")  # receipts would find it first
    with model.inference_session(max_length=200) as session:
        first = model.generate(PROMPT, max_new_tokens=1, session=session)
        for span in ("2:4", "2:4"):
            swarm_.start(span)
        text = torch.cat([first, model.generate(None, max_new_tokens=160, session=session)], dim=1)
        assert session.servers[0] == "s0"
        audited_text = text[:, : session.num_audited + 1]  # the last may be new to its pushes
    assert "misled" in seen.findings["s1"]
    assert "lied" not in set.union(*seen.findings.values())  # which of both it was cannot be told
    assert len(seen.doubts) <= 3  # one for each server that it pushed to: after that, the client carries everything
    known = text[:, : seen.doubts[-1].end + 1]
    if (num_right := audited_text.shape[1] - known.shape[1]) > 0:
        assert torch.equal(audited_text, oracle(whole, known, num_right))


def test_a_witness_that_lies_is_found_instead(swarm: MakeSwarm, audited: ClientOptions, whole: PreTrainedModel):
    swarm_ = swarm("0:4")
    seen = Seen()
    model = swarm_.model(config=replace(audited, observers=(seen,)))
    with model.inference_session(max_length=200) as session:
        first = model.generate(PROMPT, max_new_tokens=1, session=session)
        for _ in range(2):
            swarm_.start("0:4")
        Liars(swarm_.network).add("s1", shifted)
        text = torch.cat([first, model.generate(None, max_new_tokens=160, session=session)], dim=1)
        assert session.servers == ("s0",)
    assert torch.equal(text, oracle(whole, PROMPT, 161))
    assert seen.findings["s0"] >= {"witness_lied"}
    assert seen.findings["s0"] <= {"clean", "witness_lied"}
    assert not seen.doubts


def test_if_two_servers_differ_and_there_is_no_third_no_one_is_blamed_and_the_text_is_doubtful(
    swarm: MakeSwarm, audited: ClientOptions
):
    swarm_ = swarm("0:4")
    seen = Seen()
    model = swarm_.model(config=replace(audited, observers=(seen,)))
    Liars(swarm_.network).add("s0", shifted)
    with model.inference_session(max_length=200) as session:
        model.generate(PROMPT, max_new_tokens=1, session=session)
        swarm_.start("0:4")
        model.generate(None, max_new_tokens=80, session=session)
        assert session.servers == ("s0",)
        assert session.doubtful
    assert seen.findings["s0"] == {"unsettled"}
    assert seen.doubts[0].reason == "s0 and s1 differ, and no other server decides"


def test_a_liar_stays_shut_out_for_the_next_client_of_the_same_user(
    swarm: MakeSwarm, audited: ClientOptions, tmp_path: Path
):
    swarm_ = swarm("0:4")
    config = audited
    Liars(swarm_.network).add("s0", shifted)
    first = swarm_.model(config=config)
    with first.inference_session(max_length=200) as session:
        first.generate(PROMPT, max_new_tokens=1, session=session)
        swarm_.start("0:4")
        swarm_.start("0:4")
        first.generate(None, max_new_tokens=80, session=session)
    (file,) = tmp_path.iterdir()
    assert file.name == "s0.json"
    second = swarm_.model(config=config)
    with second.inference_session(max_length=40) as session:
        second.generate(PROMPT, max_new_tokens=4, session=session)
        assert session.servers != ("s0",)
    file.unlink()  # forgiven
    third = swarm_.model(config=replace(audited, blocked_servers=frozenset({"s1", "s2"})))
    with third.inference_session(max_length=40) as session:
        third.generate(PROMPT, max_new_tokens=4, session=session)
        assert session.servers == ("s0",)


def test_audits_that_are_off_ask_no_one_else(swarm: MakeSwarm, audited: ClientOptions):
    swarm_ = swarm("0:4", "0:4")
    seen = Seen()
    model = swarm_.model(config=replace(audited, audits="off", observers=(seen,)))
    with model.inference_session(max_length=200) as session:
        model.generate(PROMPT, max_new_tokens=80, session=session)
        (used,) = session.servers
    assert not seen.audits
    assert [name for name, server in swarm_.servers.items() if server.engine.num_passes] == [used]


@pytest.mark.parametrize("top_k", [None, 8])
def test_the_output_head_of_a_server_is_audited_too(
    swarm: MakeSwarm, audited: ClientOptions, whole: PreTrainedModel, top_k: int | None
):
    swarm_ = swarm("0:2")
    swarm_.start("2:4", serve_head=True)
    seen = Seen()
    model = swarm_.model(config=replace(audited, remote_head=True, head_top_k=top_k, observers=(seen,)))
    with model.inference_session(max_length=200) as session:
        first = model.generate(PROMPT, max_new_tokens=1, session=session)
        for _ in range(2):
            swarm_.start("2:4", serve_head=True)
        honest = torch.cat([first, model.generate(None, max_new_tokens=60, session=session)], dim=1)
        assert torch.equal(honest, oracle(whole, PROMPT, 61))
        assert seen.findings["s1"] == {"clean"}
        Liars(swarm_.network).add("s1", lambda logits: logits.flip(-1), tensor="logits")
        model.generate(None, max_new_tokens=60, session=session)
        assert "s1" not in session.servers
    assert "lied" in seen.findings["s1"]
    assert [doubt.reason for doubt in seen.doubts] == ["s1 was found lying"]
