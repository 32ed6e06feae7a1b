from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from shoal import MissingBlocks, RequestRejected
from shoal.net.memory import Frame
from shoal.policy.batching.engine_limits import Limits

from ..call_after import CallAfter
from .harness import QUICK, Swarm

MakeSwarm = Callable[..., Swarm]

PROMPT = torch.tensor([[5, 17, 42, 9, 33]])
PADDED = torch.tensor([[0, 0, 5, 17, 42], [7, 8, 9, 10, 11]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])


def lose(swarm: Swarm, how: str, name: str) -> Callable[[], None]:
    def act() -> None:
        if how == "killed":
            swarm.kill(name)
        elif how == "hung":
            swarm.call(swarm.network.hang, name)
        elif how == "cut off":
            swarm.call(swarm.network.cut, name, "client2")
        elif how == "leaving":
            swarm.stop(name)

    return act


@pytest.mark.parametrize("how", ["killed", "hung", "leaving"])
@pytest.mark.parametrize("which", ["the first server", "the last server"])
def test_generation_survives_a_server_that_is_lost(swarm: MakeSwarm, whole: PreTrainedModel, how: str, which: str):
    swarm_ = swarm("0:2", "2:4")
    model = swarm_.model()
    swarm_.start("0:2")
    swarm_.start("2:4")
    with model.inference_session(max_length=40) as session:
        first = model.generate(PROMPT, max_new_tokens=4, session=session)
        victim = session.servers[0 if which == "the first server" else -1]
        lose(swarm_, how, victim)()
        rest = model.generate(None, max_new_tokens=8, session=session)
        assert victim not in session.servers
    assert torch.cat((first, rest), dim=1).tolist() == whole.generate(PROMPT, max_new_tokens=12).tolist()


def test_several_servers_with_other_cuts_take_the_place_of_one(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:4")
    model = swarm_.model()
    streamer = CallAfter(5, lambda: [swarm_.start(span) for span in ("0:1", "1:3", "3:4")] and swarm_.kill("s0"))
    answer = model.generate(PADDED, attention_mask=MASK, max_new_tokens=10, streamer=None)
    expected = whole.generate(PADDED, attention_mask=MASK, max_new_tokens=10)
    assert answer.tolist() == expected.tolist()
    assert model.generate(PROMPT, max_new_tokens=10, streamer=streamer).tolist() == (
        whole.generate(PROMPT, max_new_tokens=10).tolist()
    )


@pytest.mark.parametrize(
    "how", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True}], ids=lambda how: next(iter(how))
)
def test_beams_crops_and_samples_survive_a_stream_that_breaks_anywhere(
    swarm: MakeSwarm, whole: PreTrainedModel, how: dict[str, object]
):
    torch.manual_seed(3)
    prompt = PROMPT.repeat(1, 2)
    expected = whole.generate(prompt, max_new_tokens=8, **how)
    swarm_ = swarm("0:2", "2:4", "0:4")
    model = swarm_.model()
    for frames in (1, 2, 3, 5, 8):
        for name in swarm_.servers:
            swarm_.call(swarm_.network.drop_after, name, frames)
        torch.manual_seed(3)
        assert model.generate(prompt, max_new_tokens=8, **how).tolist() == expected.tolist()


def test_gradients_survive_servers_that_are_lost_in_forward_and_in_backward(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:4", "0:1", "1:2", "2:4")
    model = swarm_.model()
    ids = PADDED
    expected = whole.get_input_embeddings()(ids).detach().requires_grad_(True)
    whole(inputs_embeds=expected, attention_mask=MASK).logits.square().sum().backward()
    for frames in (1, 2, 3):
        for name in ("s0", "s3"):
            swarm_.call(swarm_.network.drop_after, name, frames)
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        logits = model(inputs_embeds=embeds, attention_mask=MASK).logits
        if frames == 3:
            swarm_.kill("s0")
        logits.square().sum().backward()
        torch.testing.assert_close(embeds.grad, expected.grad, rtol=1e-4, atol=1e-4)


def test_the_error_names_blocks_without_a_server_at_once(swarm: MakeSwarm):
    model = swarm("0:1", "3:4").model()
    with pytest.raises(MissingBlocks, match="no server holds blocks 1:3") as error:
        model.generate(PROMPT, max_new_tokens=2)
    assert error.value.blocks == (1, 2)
    assert "--blocks 1:3" in str(error.value.hint)


def test_a_server_that_stays_lost_is_named_when_patience_ends(swarm: MakeSwarm):
    swarm_ = swarm("0:4")
    model = swarm_.model()
    with model.inference_session(max_length=20) as session:
        model.generate(PROMPT, max_new_tokens=2, session=session)
        swarm_.kill("s0")
        with pytest.raises(MissingBlocks, match="no server for blocks 0:4 answers: s0"):
            model.generate(None, max_new_tokens=2, session=session)


def test_a_full_server_is_not_a_dead_one(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:4", cache_tokens=64, limits=Limits(queue_seconds=0.1))
    model = swarm_.model()
    with contextlib.closing(model.inference_session(max_length=60)) as session:  # not the active one
        said = model.generate(PROMPT, max_new_tokens=50, session=session)
        with pytest.raises(MissingBlocks, match=r"s0 is busy: no room in the cache for 0\.1 s"):
            model.generate(PROMPT, max_length=31)
        roomy = swarm_.start("0:4", cache_tokens=64)
        assert model.generate(PROMPT, max_length=31).tolist() == whole.generate(PROMPT, max_length=31).tolist()
        rest = model.generate(None, max_new_tokens=4, session=session)
        assert roomy.info.peer == "s1"
        assert session.servers == ("s0",)
    assert torch.cat((said, rest), dim=1).tolist() == whole.generate(PROMPT, max_new_tokens=54).tolist()


def test_weights_that_differ_never_meet_in_one_route(swarm: MakeSwarm, whole: PreTrainedModel, other_folder):
    swarm_ = swarm("0:2")
    stranger = swarm_.start("2:4", folder=other_folder)
    model = swarm_.model()
    assert stranger.model.key == swarm_.servers["s0"].model.key
    with pytest.raises(MissingBlocks, match="blocks 2:4 are served only with other weights"):
        model.generate(PROMPT, max_new_tokens=2)
    swarm_.start("2:4")
    assert model.generate(PROMPT, max_new_tokens=6).tolist() == whole.generate(PROMPT, max_new_tokens=6).tolist()


def test_a_request_that_is_wrong_everywhere_is_not_tried_elsewhere(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:4", "0:4")
    model = swarm_.model()
    with pytest.raises(RequestRejected, match="600 tokens; the model allows 512"):
        model(torch.ones(1, 600, dtype=torch.long))
    assert model.generate(PROMPT, max_new_tokens=3).tolist() == whole.generate(PROMPT, max_new_tokens=3).tolist()


def test_a_server_that_answers_nonsense_is_replaced(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:4")
    model = swarm_.model()
    swarm_.start("0:4")
    replies = 0

    def garble(frame: Frame) -> Frame:
        nonlocal replies
        if frame.sender == "s0" and b'"step_result"' in frame.header:
            replies += 1
            if replies > 2:
                return Frame(
                    frame.sender, frame.receiver, frame.header.replace(b"[1,1,32]", b"[1,1,16]"), frame.payload
                )
        return frame

    swarm_.network.on_frame = garble
    assert model.generate(PROMPT, max_new_tokens=8).tolist() == whole.generate(PROMPT, max_new_tokens=8).tolist()
    assert model.generate(PROMPT, max_new_tokens=8).tolist() == whole.generate(PROMPT, max_new_tokens=8).tolist()


def test_a_server_too_small_for_one_request_is_asked_for_the_next(swarm: MakeSwarm, whole: PreTrainedModel):
    model = swarm("0:4", cache_tokens=64).model()
    with pytest.raises(MissingBlocks, match="can never fit into this server's cache of 64 tokens"):
        model.generate(PROMPT, max_length=100)
    assert model.generate(PROMPT, max_length=12).tolist() == whole.generate(PROMPT, max_length=12).tolist()


def test_servers_that_start_again_with_other_blocks_are_found_again(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:2", "2:4")
    model = swarm_.model(config=replace(QUICK, refresh_seconds=100.0))
    expected = whole.generate(PROMPT, max_new_tokens=4).tolist()
    assert model.generate(PROMPT, max_new_tokens=4).tolist() == expected
    for name, span in (("s0", "2:4"), ("s1", "0:2")):
        swarm_.restart(name, span)
    assert model.generate(PROMPT, max_new_tokens=4).tolist() == expected


def test_a_directory_that_falls_silent_does_not_end_what_is_under_way(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:2", "2:4", "2:4")
    model = swarm_.model()
    with model.inference_session(max_length=40) as session:
        first = model.generate(PROMPT, max_new_tokens=4, session=session)
        swarm_.network.directory_answers = False
        swarm_.kill(session.servers[-1])
        rest = model.generate(None, max_new_tokens=4, session=session)
        swarm_.network.directory_answers = True
    assert torch.cat((first, rest), dim=1).tolist() == whole.generate(PROMPT, max_new_tokens=8).tolist()


def test_many_microbatches_under_way_are_one_failure_of_their_server(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:4")
    model = swarm_.model(config=replace(QUICK, patience_seconds=20.0))
    ids = torch.randint(2, 97, (40, 400), generator=torch.Generator().manual_seed(0))
    seen = 0

    def cut_in_the_middle(frame: Frame) -> Frame:
        nonlocal seen
        seen += b'"forward"' in frame.header
        if seen == 8:
            seen += 1
            swarm_.network.cut("s0", "client1")
            swarm_.network.heal()
        return frame

    swarm_.network.on_frame = cut_in_the_middle
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_server_that_could_not_announce_itself_does_at_the_next_renewal(swarm: MakeSwarm, whole: PreTrainedModel):
    swarm_ = swarm("0:2")
    server = swarm_.start("2:4", announce_seconds=0.01)
    swarm_.network.directory_answers = False
    swarm_.settle(lambda: expired(swarm_, server.info.peer))
    swarm_.network.directory_answers = True
    swarm_.settle(lambda: not expired(swarm_, server.info.peer))
    assert swarm_.model().generate(PROMPT, max_new_tokens=4).tolist() == (
        whole.generate(PROMPT, max_new_tokens=4).tolist()
    )


def expired(swarm: Swarm, peer: str) -> bool:
    """Whether a server's record has ended without having been renewed."""
    records = [record for record in swarm.network.records if record.info.peer == peer]
    return all(record.expires <= swarm.runtime.loop.time() for record in records)
