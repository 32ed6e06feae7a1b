"""Real processes that die, hang, are cut off or leave in the middle of a sentence: its tokens are always the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, TextStreamer

from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES
from shoal.testing import ShapedServer, ShapedSwarm, shaped_swarm

PROMPT = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])
LONG_PROMPT = torch.arange(300)[None] % 200 + 3
OPTIONS = ("--dtype", "float32", "--cache-tokens", "4096")
NUM_TOKENS = 8
"""Of each part of a sentence."""


class Downstream(TextStreamer):
    """Does something when so many tokens are there; the prompt counts as one."""

    def __init__(self, num_tokens: int, act: Callable[[], None]) -> None:
        self._left = num_tokens
        self._act = act

    def put(self, value: torch.Tensor) -> None:
        self._left -= 1
        if self._left == 0:
            self._act()

    def end(self) -> None:
        pass


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShapedSwarm]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_CACHE", str(tmp_path_factory.mktemp("cache")))
        with shaped_swarm(STORIES, ["0:6", "6:12", "0:6", "6:12"], options=OPTIONS) as swarm:
            yield swarm


@pytest.fixture(scope="module")
def whole() -> object:
    return AutoModelForCausalLM.from_pretrained(STORIES, dtype="float32")


def in_use(swarm: ShapedSwarm, session: object, place: int) -> ShapedServer:
    """The server that a session is on, at this place of its route."""
    peer = session.servers[place]
    (server,) = [server for server in swarm.servers if server.peer == peer]
    return server


def restart(server: ShapedServer) -> None:
    """Start it again, while others may start too: all are waited for before the next is lost."""
    server.restart(wait=False)


Act = Callable[[ShapedServer], object]
ACTS: dict[str, tuple[Act, Act]] = {
    "killed": (ShapedServer.kill, restart),
    "told to stop": (lambda server: server.stop(wait=False), restart),
    "hung": (ShapedServer.hang, ShapedServer.resume),
    "cut off": (ShapedServer.cut, ShapedServer.heal),
    "in a black hole": (ShapedServer.black_hole, ShapedServer.heal),
}


@pytest.mark.parametrize("how", ACTS)
def test_a_sentence_goes_on_when_servers_are(swarm: ShapedSwarm, whole, how: str):
    """The first and the last of two, while it is decoded and while it is not.

    In its second half those are lost that had taken the places of others, which are back, with nothing left of it.
    """
    act, mend = ACTS[how]
    expected = whole.generate(PROMPT, max_new_tokens=4 * NUM_TOKENS, do_sample=False).tolist()
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=swarm.addresses, dtype="float32")
    with (
        contextlib.closing(model),
        contextlib.ExitStack() as mends,
        model.inference_session(max_length=64) as session,
    ):
        said: list[torch.Tensor] = []

        def strike(place: int) -> None:
            victim = in_use(swarm, session, place)
            mends.callback(mend, victim)
            act(victim)

        def go_on(streamer: Downstream | None = None) -> None:
            prompt = None if said else PROMPT
            said.append(
                model.generate(prompt, max_new_tokens=NUM_TOKENS, do_sample=False, streamer=streamer, session=session)
            )

        for while_decoding, while_idle in ((0, 1), (1, 0)):
            swarm.wait_until_ready()
            go_on(Downstream(NUM_TOKENS // 2, partial(strike, while_decoding)))
            strike(while_idle)
            go_on()
            mends.close()
        assert torch.cat(said, dim=1).tolist() == expected


def test_a_long_prompt_survives_the_death_of_two_servers_at_once(swarm: ShapedSwarm, whole):
    swarm.wait_until_ready()
    expected = whole.generate(LONG_PROMPT, max_new_tokens=8, do_sample=False).tolist()
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=swarm.addresses, dtype="float32")
    with (
        contextlib.closing(model),
        contextlib.ExitStack() as mends,
        model.inference_session(max_length=320) as session,
    ):
        first = model.generate(LONG_PROMPT, max_new_tokens=4, do_sample=False, session=session)
        for victim in [in_use(swarm, session, place) for place in (0, 1)]:
            mends.callback(restart, victim)
            victim.kill()
        rest = model.generate(None, max_new_tokens=4, do_sample=False, session=session)
        assert torch.cat((first, rest), dim=1).tolist() == expected
