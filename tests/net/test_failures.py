"""Real servers that die, hang, are cut off or leave during a generation: its tokens are always the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES
from shoal.policy.audits.receipt_verdict import ReceiptVerdict
from shoal.testing import ShapedServer, ShapedSwarm, shaped_swarm

from ..call_after import CallAfter

PROMPT = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])
LONG_PROMPT = torch.arange(300)[None] % 200 + 3
OPTIONS = ("--dtype", "float32", "--cache-tokens", "4096")
NUM_TOKENS = 8
"""The tokens of each call of `generate`."""


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShapedSwarm]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        with shaped_swarm(STORIES, ["0:6", "6:12", "0:6", "6:12"], options=OPTIONS, preloaded=True) as swarm:
            yield swarm


@pytest.fixture(scope="module")
def whole() -> object:
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype="float32")


def in_use(swarm: ShapedSwarm, session: object, place: int) -> ShapedServer:
    """The server at this place of a session's route."""
    peer = session.servers[place]
    (server,) = [server for server in swarm.servers if server.peer == peer]
    return server


def restart(server: ShapedServer) -> None:
    """Start it again without waiting: the test waits for all servers before the next one fails."""
    server.restart(wait=False)


Act = Callable[[ShapedServer], object]
ACTS: dict[str, tuple[Act, Act]] = {
    "killed": (ShapedServer.kill, restart),
    "told to stop": (lambda server: server.stop(wait=False), restart),
    "hung": (ShapedServer.hang, ShapedServer.resume),
    "cut off": (ShapedServer.cut, ShapedServer.heal),
    "in a black hole": (ShapedServer.black_hole, ShapedServer.heal),
}


def test_real_servers_sign_with_their_identities(swarm: ShapedSwarm, whole):
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=swarm.addresses, dtype="float32")
    with contextlib.closing(model), model.inference_session(max_length=64) as session:
        text = model.generate(PROMPT, max_new_tokens=5 * NUM_TOKENS, session=session)
        receipts = dict(model.blocks.swarm.audits.receipts)
        assert [stage.signs for stage in session.state.stages] == [True, True]
    assert text.tolist() == whole.generate(PROMPT, max_new_tokens=5 * NUM_TOKENS, do_sample=False).tolist()
    assert set(receipts) == {ReceiptVerdict.AGREES}
    assert receipts[ReceiptVerdict.AGREES] >= 4  # of two servers, for 16 tokens each


@pytest.mark.parametrize("how", ACTS)
def test_a_generation_continues_when_servers_are(swarm: ShapedSwarm, whole, how: str):
    """The first and the last of two servers fail, during a call of `generate` and between two.

    In the second half the replacements fail; the first servers are back by then, without anything of the session.
    """
    act, repair = ACTS[how]
    expected = whole.generate(PROMPT, max_new_tokens=4 * NUM_TOKENS, do_sample=False).tolist()
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=swarm.addresses, dtype="float32")
    with (
        contextlib.closing(model),
        contextlib.ExitStack() as repairs,
        model.inference_session(max_length=64) as session,
    ):
        parts: list[torch.Tensor] = []

        def fail(place: int) -> None:
            victim = in_use(swarm, session, place)
            repairs.callback(repair, victim)
            act(victim)

        def continue_generation(streamer: CallAfter | None = None) -> None:
            prompt = None if parts else PROMPT
            parts.append(
                model.generate(prompt, max_new_tokens=NUM_TOKENS, do_sample=False, streamer=streamer, session=session)
            )

        for while_decoding, while_idle in ((0, 1), (1, 0)):
            swarm.wait_until_ready()
            continue_generation(CallAfter(NUM_TOKENS // 2, partial(fail, while_decoding)))
            fail(while_idle)
            continue_generation()
            repairs.close()
        assert torch.cat(parts, dim=1).tolist() == expected


def test_a_long_prompt_survives_the_death_of_two_servers_at_once(swarm: ShapedSwarm, whole):
    swarm.wait_until_ready()
    expected = whole.generate(LONG_PROMPT, max_new_tokens=8, do_sample=False).tolist()
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=swarm.addresses, dtype="float32")
    with (
        contextlib.closing(model),
        contextlib.ExitStack() as repairs,
        model.inference_session(max_length=320) as session,
    ):
        first = model.generate(LONG_PROMPT, max_new_tokens=4, do_sample=False, session=session)
        for victim in [in_use(swarm, session, place) for place in (0, 1)]:
            repairs.callback(restart, victim)
            victim.kill()
        rest = model.generate(None, max_new_tokens=4, do_sample=False, session=session)
        assert torch.cat((first, rest), dim=1).tolist() == expected
