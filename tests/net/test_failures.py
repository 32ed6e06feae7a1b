"""Real processes that die, hang, are cut off or leave in the middle of a sentence: its tokens are always the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, TextStreamer

from shoal import AutoDistributedModelForCausalLM
from shoal.bundled import STORIES
from shoal.testing import ShapedServer, ShapedSwarm, shaped_swarm

PROMPT = torch.tensor([[3, 14, 15, 92, 65, 35, 89, 79]])
LONG_PROMPT = torch.arange(300)[None] % 200 + 3
OPTIONS = ("--dtype", "float32", "--cache-tokens", "4096")
NUM_TOKENS = 16


class After(TextStreamer):
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


ACTS: dict[str, tuple[Callable[[ShapedServer], object], Callable[[ShapedServer], object]]] = {
    "killed": (ShapedServer.kill, ShapedServer.restart),
    "restarted with amnesia": (lambda server: server.restart(wait=False), lambda server: None),
    "told to stop": (lambda server: server.stop(wait=False), ShapedServer.restart),
    "hung": (ShapedServer.hang, ShapedServer.resume),
    "cut off": (ShapedServer.cut, ShapedServer.heal),
    "in a black hole": (ShapedServer.black_hole, ShapedServer.heal),
}


@pytest.mark.parametrize("place", [0, 1], ids=["the first", "the last"])
@pytest.mark.parametrize("when", ["decoding", "idle"])
@pytest.mark.parametrize("how", ACTS)
def test_a_sentence_goes_on_when_a_server_is(swarm: ShapedSwarm, whole, how: str, when: str, place: int):
    act, mend = ACTS[how]
    expected = whole.generate(PROMPT, max_new_tokens=2 * NUM_TOKENS, do_sample=False).tolist()
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=swarm.addresses, dtype="float32")
    try:
        with model.inference_session(max_length=64) as session:
            victims: list[ShapedServer] = []

            def strike() -> None:
                victims.append(in_use(swarm, session, place))
                act(victims[0])

            streamer = After(NUM_TOKENS // 2, strike) if when == "decoding" else None
            first = model.generate(
                PROMPT, max_new_tokens=NUM_TOKENS, do_sample=False, streamer=streamer, session=session
            )
            if when == "idle":
                strike()
            rest = model.generate(None, max_new_tokens=NUM_TOKENS, do_sample=False, session=session)
        assert torch.cat((first, rest), dim=1).tolist() == expected
    finally:
        model.close()
        mend(victims[0])
        swarm.wait_until_ready()


def test_a_long_prompt_survives_the_death_of_two_servers_at_once(swarm: ShapedSwarm, whole):
    expected = whole.generate(LONG_PROMPT, max_new_tokens=8, do_sample=False).tolist()
    model = AutoDistributedModelForCausalLM.from_pretrained(STORIES, initial_peers=swarm.addresses, dtype="float32")
    try:
        with model.inference_session(max_length=320) as session:
            first = model.generate(LONG_PROMPT, max_new_tokens=4, do_sample=False, session=session)
            victims = [in_use(swarm, session, place) for place in (0, 1)]
            for victim in victims:
                victim.kill()
            rest = model.generate(None, max_new_tokens=4, do_sample=False, session=session)
        assert torch.cat((first, rest), dim=1).tolist() == expected
    finally:
        model.close()
        for victim in victims:
            victim.restart()
