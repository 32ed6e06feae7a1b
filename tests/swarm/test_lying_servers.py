"""A server lies, in any way and from any moment on, while another fails: the session says what is doubtful."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.client.decoding.session import Session
from shoal.client.options.client_options import ClientOptions
from shoal.policy.audits.audit_budget import FIRST_AUDIT_TOKENS, MOST_FAILED, AuditLevel
from shoal.spans import Span

from .lies import Liars, Lie, noise, shifted
from .schedules.bed import PASS_SECONDS, Bed, Member
from .schedules.oracle import oracle
from .schedules.work import prompt
from .virtual_time import run

NUM_EXAMPLES = int(os.environ.get("SHOAL_LYING_SCHEDULES", "0"))
"""The number of new random schedules to play, instead of the fixed ones."""
CUTS = (("0:2", "2:4"), ("0:4",), ("0:1", "1:3", "3:4"))
NUM_HONEST = 2
"""The honest holders of each block; the third lies."""
MOST_TOKENS = 64
"""A server that lies from the beginning is found within this many tokens."""


def weaker(hidden_BTD: torch.Tensor) -> torch.Tensor:
    return hidden_BTD * 0.95


LIES: dict[str, Lie] = {"noise": noise(0.05), "shifted": shifted, "zeros": torch.zeros_like, "weaker": weaker}


@dataclass(frozen=True)
class Story:
    cuts: tuple[str, ...]
    liar: int
    """The hop for which there is a third server, the fastest, that lies."""
    lie: str
    answers: bool
    pushes: bool
    after: int
    killed: int | None
    """The hop of which a third, honest server is killed in the middle."""
    num_prompt: int
    audits: AuditLevel
    seed: int


@st.composite
def stories(draw: st.DrawFn) -> Story:
    cuts = draw(st.sampled_from(CUTS))
    answers, pushes = draw(st.sampled_from([(True, True), (True, False), (False, True)]))
    return Story(
        cuts,
        liar=draw(st.integers(0, len(cuts) - 1)),
        lie=draw(st.sampled_from(list(LIES))),
        answers=answers,
        pushes=pushes,
        after=draw(st.sampled_from([0, 0, 5, 40])),
        killed=draw(st.none() | st.integers(0, len(cuts) - 1)),
        num_prompt=draw(st.sampled_from([5, 20, 90])),
        audits=draw(st.sampled_from(["low", "high"])),
        seed=draw(st.integers(0, 2**16)),
    )


pytestmark = pytest.mark.usefixtures("no_log_lines")


@settings(
    max_examples=NUM_EXAMPLES or 15,
    derandomize=not NUM_EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)
@given(stories())
def test_every_token_is_that_of_one_machine_or_said_to_be_doubtful_and_no_honest_server_is_blamed(story: Story):
    random.seed(story.seed)
    with tempfile.TemporaryDirectory() as folder:
        run(_play(story, Path(folder)))


async def _play(story: Story, evidence_folder: Path) -> None:
    async with Bed(story.cuts * NUM_HONEST, cache_pages=160, drain_seconds=0.0) as bed:
        liars = Liars(bed.network)
        name = bed.start(Span.parse(story.cuts[story.liar]), speed=4 / PASS_SECONDS).name
        victim = None if story.killed is None else bed.start(Span.parse(story.cuts[story.killed]))
        await asyncio.sleep(0)
        liars.add(name, LIES[story.lie], answers=story.answers, pushes=story.pushes, after=story.after)
        client = bed.client(
            "client", ClientOptions(patience_seconds=60.0, audits=story.audits, evidence_folder=evidence_folder)
        )
        session = Session(client.swarm, client.span, batch_size=1, max_length=256)
        try:
            await _talk(bed, session, story, name, victim)
            assert client.swarm.audits.liars <= {name}
        finally:
            await session.close()
            await client.close()


@torch.no_grad()
async def _talk(bed: Bed, session: Session, story: Story, liar: str, victim: Member | None) -> None:
    ids = prompt(1, story.num_prompt, seed=story.seed)
    new, num_with_liar = ids, 0
    for number in range(100):
        if victim is not None and number == 20:
            bed.kill(victim)
        outputs = await session.step(oracle().embed(new), ids.shape[1] - new.shape[1], None, None)
        assert isinstance(outputs, torch.Tensor)
        num_with_liar += any(hop.server.peer == liar for hop in session.hops)
        new = oracle().head(outputs[:, -1:]).argmax(dim=-1)
        ids = torch.cat([ids, new], dim=1)
        await asyncio.sleep(0.01)
    expected = oracle().logits(ids, torch.ones_like(ids)).argmax(dim=-1)[0]
    for position in range(story.num_prompt - 1, ids.shape[1] - 1):
        if ids[0, position + 1] != expected[position]:
            said = any(each.start <= position < each.end for each in session.doubtful)
            assert said or position >= session.num_audited, position
    assert num_with_liar
    if story.answers and not story.after:  # if only its pushes are wrong, the next server may be to blame as well
        assert num_with_liar <= MOST_TOKENS


@pytest.mark.parametrize("seed", range(4))
def test_a_liar_is_found_as_soon_although_witnesses_fail_one_after_another(tmp_path: Path, seed: int):
    """They are dead, which the client finds out when it asks them."""
    random.seed(seed)

    async def scene() -> None:
        async with Bed(("0:4",) * (NUM_HONEST + 6), cache_pages=160, drain_seconds=0.0) as bed:
            liars = Liars(bed.network)
            name = bed.start(Span(0, 4), speed=4 / PASS_SECONDS).name
            await asyncio.sleep(0)
            liars.add(name, shifted)
            client = bed.client("client", ClientOptions(patience_seconds=60.0, evidence_folder=tmp_path))
            session = Session(client.swarm, client.span, batch_size=1, max_length=256)
            hidden_BTD = oracle().embed(prompt(1, 9))
            await session.step(hidden_BTD[:, :8], 0, None, None)
            for member in bed.members[NUM_HONEST : NUM_HONEST + 6]:
                bed.kill(member)
            num_tokens = 0
            while not client.swarm.audits.is_liar(name):
                await session.step(hidden_BTD[:, 8:], 8 + num_tokens, None, None)
                num_tokens += 1
                await asyncio.sleep(0.01)
                assert num_tokens <= FIRST_AUDIT_TOKENS + MOST_FAILED
            await session.close()
            await client.close()

    run(scene())
